"PPO by the book: each check of the notebook again, and a bug for each that it must catch."
import copy, dataclasses, inspect, math, textwrap
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gp_spectral import ppo, sft
from gp_spectral.env import Feedback, GeneralPoints
from gp_spectral.ppo import ActorCritic, PPOConfig, VLLMSampler, collate, compute_gae, ppo_loss, rollout, score, train_ppo, whiten
from gp_spectral.sft import Episode, Turn, load_model, play
from made import Parity

ID = GeneralPoints()


def small(kind, seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)) if kind == "llama" else \
        GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None))
    for p in model.parameters(): p.data += 0.15 * torch.randn_like(p)        # flat distributions would hide errors
    return model.eval()


class Words:
    "As much of a tokenizer as `generate` and `collate` need."
    eos_token_id, pad_token_id = 23, 0


# --- the checks: each raises AssertionError when something is wrong

def check_sampler_against_scorer(kind="llama", temperature=0.6, n=6000):
    "How often our sampler takes each pair of tokens, against the probabilities of the scorer: chi-square over 6,000 draws."
    model, prompt = small(kind), [5, 9, 11]
    drawn = sft.generate(model, Words, [prompt] * n, 2, temperature, [(7, i) for i in range(n)])
    counts = pd.Series([tuple(ids) for ids, _ in drawn if len(ids) == 2]).value_counts()
    episodes = [Episode(None, prompt + list(pair), [Turn(3, 5, "", Feedback(0, "", False), False)]) for pair in counts.index]
    logp = score(ActorCritic(model), collate(episodes, 0), temperature)[0][:, 3:5].sum(1).exp() * n
    often = logp >= 5
    chi = ((torch.tensor(counts.values)[often] - logp[often]) ** 2 / logp[often]).sum() / often.sum()
    assert often.sum() > 15 and 0.5 < chi < 1.6, float(chi)

def check_scorer_against_transformers(kind):
    "The same tokens scored alone and without padding, by a plain forward pass."
    model = small(kind)
    rows = [torch.arange(3, 3 + n).remainder(22).tolist() for n in (5, 12)]
    logp, _ = score(ActorCritic(model), collate([Episode(None, r, [Turn(2, len(r), "", Feedback(0, "", False), False)]) for r in rows], 0), 0.7)
    for i, r in enumerate(rows):
        with torch.no_grad(): plain = (model(input_ids=torch.tensor([r])).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, torch.tensor(r)[1:, None]).squeeze(-1)
        assert (logp[i, 1:len(r)] - plain).abs().max() < 1e-4

def check_padding(kind, **settings):
    "Neither loss nor gradient may feel what stands in the padding."
    config = PPOConfig(entropy_coef=0.01, value_clip=0.2, kl="loss", **settings)
    torch.manual_seed(3)
    net = ActorCritic(small(kind)); nn.init.normal_(net.value_head.weight)
    two = [Episode(None, torch.randint(2, 20, (n,)).tolist(), [Turn(3, n // 2, "", Feedback(-1, "", False), True), Turn(n // 2 + 2, n, "", Feedback(5, "", True), True)]) for n in (12, 17)]
    b = collate(two, 0)
    old, values = score(net, b)
    for p in net.parameters(): p.data += 0.02 * torch.randn_like(p)
    advantages, returns = compute_gae(b.rewards, values, b.mask, turns=b.turns, level=config.level)
    found = []
    for wide in (0, 9):
        pad = lambda x, v: nn.functional.pad(x, (0, wide), value=v)
        net.zero_grad()
        logp, now, entropy = net(pad(b.ids, 13), pad(b.attention, 0))
        loss, _ = ppo.ppo_loss(logp, pad(old, 7), pad(advantages, 7), now, pad(returns, 7), pad(b.turns, -1), config, entropy, pad(old, 5), old_values=pad(values, 3))
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])))
    (l1, g1), (l2, g2) = found
    assert abs(l1 - l2) < 1e-5 and (g1 - g2).norm() / g1.norm() < 1e-4

def check_gae():
    "Eq. 16 as a sum without recursion, over the actions of each episode alone."
    torch.manual_seed(0)
    r, v, m = torch.randn(5, 12), torch.randn(5, 12), torch.rand(5, 12) > 0.4
    adv, ret = ppo.compute_gae(r, v, m, 0.9, 0.8)
    for i in range(5):
        rs, vs = r[i][m[i]].tolist(), v[i][m[i]].tolist()
        delta = [a + 0.9 * c - b for a, b, c in zip(rs, vs, [*vs[1:], 0.0])]
        brute = [sum(0.72 ** (l - t) * delta[l] for l in range(t, len(rs))) for t in range(len(rs))]
        np.testing.assert_allclose(adv[i][m[i]], brute, atol=1e-5); np.testing.assert_allclose(ret[i][m[i]], np.add(brute, vs), atol=1e-5)

def check_whitening():
    x, mask = torch.tensor([[1.0, 2, 3, 99]]), torch.tensor([[True, True, True, False]])
    w = ppo.whiten(x, mask)
    assert abs(w[mask].mean()) < 1e-6 and abs(w[mask].std() - 1) < 1e-6 and w[0, 3] == 0

def check_first_step(tmp_path):
    "Before the first update the policy is the one that played: ratio 1, KL 0, nothing clipped, whatever the temperature."
    train_ppo("tiny", tmp_path, ID, PPOConfig(iterations=1, samples=16, minibatch=16, microbatch=5, epochs=1, temperature=0.7, attempts=2), progress=False)
    log = pd.read_parquet(tmp_path / "log.parquet")
    assert abs(log.approx_kl[0]) < 1e-8 and log.clip_fraction[0] == 0

def check_pieces(tmp_path):
    "One optimizer step over a round of answers of different lengths, in one piece and in pieces."
    made = []
    for micro in (24, 7):
        train_ppo("tiny", tmp_path / str(micro), ID, PPOConfig(iterations=1, samples=24, attempts=2, minibatch=24, microbatch=micro, epochs=1, entropy_coef=0.01, lr=1e-5, max_grad_norm=1e9), progress=False)
        made.append(pd.read_parquet(tmp_path / str(micro) / "log.parquet").grad_norm[0])
    assert abs(made[0] / made[1] - 1) < 1e-4

def check_it_learns(tmp_path):
    train_ppo("tiny", tmp_path, Parity(), PPOConfig(iterations=10, samples=96, minibatch=48, epochs=4, lr=1e-3, reward_scale=1.0), progress=False)
    success = pd.read_parquet(tmp_path / "log.parquet").success
    assert success.iloc[-1] > 0.85 > 0.55 > success.iloc[0]

CHECKS = {"sampler": lambda t: check_sampler_against_scorer(), "scorer llama": lambda t: check_scorer_against_transformers("llama"), "scorer gpt2": lambda t: check_scorer_against_transformers("gpt2"),
          "padding": lambda t: check_padding("llama"), "padding gpt2": lambda t: check_padding("gpt2"), "padding turn": lambda t: check_padding("llama", level="turn"), "gae": lambda t: check_gae(),
          "whitening": lambda t: check_whitening(), "first step": check_first_step, "pieces": check_pieces, "learns": check_it_learns}

@pytest.mark.parametrize("name", CHECKS)
def test_check(name, tmp_path): CHECKS[name](tmp_path)


# --- the bugs: what is changed in the source, and which check must fail

def plant(monkeypatch, owner, name, old, new):
    "Puts a copy of a function with a bug in it into its place."
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(old) >= 1, f"{old!r} is not in {name}: the bug has to be planted elsewhere"
    made, module = {}, inspect.getmodule(getattr(owner, name))
    exec(compile(source.replace(old, new), f"<{name} with a bug>", "exec"), module.__dict__ | {"__name__": module.__name__}, made)
    made[name].__globals__ is module.__dict__ or made[name].__globals__.update(module.__dict__)
    monkeypatch.setattr(owner, name, made[name])

BUGS = {
    "log-probabilities of the token before": (ActorCritic, "forward", "logits.gather(-1, ids[:, 1:, None])", "logits.gather(-1, ids[:, :-1, None])", "sampler"),
    "the scorer forgets the temperature": (ActorCritic, "forward", ".float() / temperature", ".float()", "sampler"),
    "the sampler forgets the temperature": (sft._Draw, "__call__", "(scores.float() / self.temperature)", "scores.float()", "sampler"),
    "the sampler leaves out the unlikely": (sft._Draw, "__call__", "scores.float()", "scores.float().where(scores >= scores.topk(5)[0][:, -1:], -torch.inf)", "sampler"),
    "positions off by one, which rotary models forgive": (ActorCritic, "forward", "attention.cumsum(-1) - 1", "attention.cumsum(-1)", "scorer gpt2"),
    "values of padding in the loss": (ppo, "ppo_loss", "torch.where(acts, error, 0.0).sum()", "error.sum()", "padding"),
    "surrogate of padding in the loss": (ppo, "ppo_loss", "torch.where(acts, surrogate, 0.0).sum()", "surrogate.sum()", "padding"),
    "entropy of padding in the loss": (ppo, "ppo_loss", "(entropy * mask).sum() / tokens", "entropy.sum() / tokens", "padding"),
    "a mean over all positions": (ppo, "ppo_loss", "n_actions or acts.sum()", "acts.numel()", "padding"),
    "feedback is discounted like an action": (ppo, "compute_gae", "torch.where(act, new, carry)", "torch.where(act, new, gamma * lam * carry)", "gae"),
    "a value after the end": (ppo, "compute_gae", "torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])", "torch.zeros_like(values[:, 0]), torch.ones_like(values[:, 0])", "gae"),
    "lambda forgotten": (ppo, "compute_gae", "gamma * lam * carry", "gamma * carry", "gae"),
    "whitened over padding": (ppo, "whiten", "x[mask if over is None else over]", "x.flatten()", "whitening"),
    "scored at another temperature": (ppo, "_score_together", "config.temperature", "1.0", "first step"),
    "a mean of means over pieces": (ppo, "_update", "n, cut(old_values)", "None, cut(old_values)", "pieces"),
    "the wrong sign": (ppo, "ppo_loss", "-torch.where(acts, surrogate, 0.0)", "torch.where(acts, surrogate, 0.0)", "learns"),
}

@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_caught(name, monkeypatch, tmp_path):
    owner, function, old, new, check = BUGS[name]
    plant(monkeypatch, owner, function, old, new)
    with pytest.raises((AssertionError, FloatingPointError)): CHECKS[check](tmp_path)

def test_rotary_positions_forgive(monkeypatch, tmp_path):
    "Why there is a GPT-2 beside the Llama: the same bug, and the Llama's check does not see it."
    plant(monkeypatch, *BUGS["positions off by one, which rotary models forgive"][:4])
    CHECKS["scorer llama"](tmp_path)


# --- the published recipe

def published_returns(rewards, values, solved, gamma, lam, next_value=0.0):
    "The published storage's loop: one row of turns, `masks` 0 after a solved hand, no proper time limits."
    returns, gae, values = [0.0] * len(rewards), 0.0, [*values, next_value]
    for k in reversed(range(len(rewards))):
        mask = 1.0 - solved[k]
        delta = rewards[k] + gamma * values[k + 1] * mask - values[k]
        gae = delta + gamma * lam * mask * gae
        returns[k] = gae + values[k]
    return returns

def test_published_advantages():
    turns = torch.tensor([[-1, 0, 0, -1, 1, 1, -1, 2, 2], [-1, 0, 0, 0, -1, -1, -1, -1, -1], [-1, 0, -1, 1, 1, -1, -1, -1, -1]])
    torch.manual_seed(0)
    rewards, values = torch.zeros(3, 9), torch.randn(3, 9)
    for i, t, r in ((0, 2, -1.0), (0, 5, -2.0), (0, 8, -1.0), (1, 3, 5.0), (2, 1, -3.0), (2, 4, 5.0)): rewards[i, t] = r
    starts = ppo._turn_starts(turns)
    adv, ret = compute_gae(rewards, values, turns >= 0, 0.9, 0.95, turns, "turn", torch.tensor([False, True, True]))
    want = published_returns([-1, -2, -1, 5, -3, 5], values[starts].tolist(), [0, 0, 0, 1, 0, 1], 0.9, 0.95)
    np.testing.assert_allclose(ret[starts], want, atol=1e-5)
    ours = compute_gae(rewards, values, turns >= 0, 0.9, 0.95, turns, "turn")[1]
    assert (ours[0] - ret[0]).abs().max() > 0.01 and torch.allclose(ours[1:], ret[1:], atol=1e-5)      # only the hand that ran out of attempts differs

def test_published_sixth_attempt():
    model, tokenizer = load_model("tiny")
    problems = ID.problems("train", 20)
    plain = rollout(model, tokenizer, ID, problems, PPOConfig(level="turn", attempts=2, temperature=0.2))
    theirs = rollout(model, tokenizer, ID, problems, PPOConfig(level="turn", attempts=2, temperature=0.2, published=True, reward_scale=1.0))
    for a, b in zip(plain.episodes, theirs.episodes):
        assert len(b.turns) == (len(a.turns) if a.solved else 3)
        if not a.solved: assert b.turns[-1].feedback.reward == -1 and not b.solved and b.ids[:len(a.ids)] == a.ids

def test_published_rounding():
    "Sums of log-probabilities that differ by less than bfloat16 can tell give a ratio of exactly 1; the first token of a turn does not count."
    turns = torch.tensor([[-1, 0, 0, 0]])
    logp, old = torch.tensor([[0.0, -9.0, -2.0, -3.0]]), torch.tensor([[0.0, -1.0, -2.001, -3.001]])
    args = dict(advantages=torch.ones(1, 4), values=torch.zeros(1, 4), returns=torch.zeros(1, 4), turns=turns)
    assert ppo_loss(logp, old, config=PPOConfig(level="turn", published=True), **args)[1]["approx_kl"] == 0
    assert ppo_loss(logp, old, config=PPOConfig(level="turn"), **args)[1]["approx_kl"] > 1


# --- options

def test_kl_in_the_loss_is_the_exact_kl_on_average():
    torch.manual_seed(0)
    p, q = torch.randn(8).log_softmax(-1), torch.randn(8).log_softmax(-1)
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True)
    estimate = ((q[tokens] - p[tokens]).exp() - 1 - (q[tokens] - p[tokens])).mean()
    turns, zero = torch.zeros(1, 200_000, dtype=torch.long), torch.zeros(1, 200_000)
    stats = ppo_loss(p[tokens][None], p[tokens][None], zero, zero, zero, turns, PPOConfig(kl="loss"), ref_logp=q[tokens][None])[1]
    exact = (p.exp() * (p - q)).sum()
    assert abs(stats["kl_ref"] / 200_000 / exact - 1) < 0.02 and abs(estimate / exact - 1) < 0.02

@pytest.mark.parametrize("options", [dict(kl="loss"), dict(kl="reward"), dict(kl="loss", lora=2), dict(kl="reward", lora=2, level="turn"), dict(value_head="model"), dict(value_head="model", lora=2), dict(value_head="mlp"),
                                     dict(value_clip=0.1, entropy_coef=0.01, target_kl=0.1), dict(gradient_checkpointing=True), dict(gradient_checkpointing=True, lora=2), dict(dtype="bfloat16"),
                                     dict(level="turn", published=True, attempts=2)], ids=str)
def test_options_run(options, tmp_path):
    config = PPOConfig(**(dict(iterations=2, samples=8, minibatch=8, microbatch=4, epochs=1, lr=1e-4) | options))
    train_ppo("tiny", tmp_path, ID, config, progress=False)
    log, before = pd.read_parquet(tmp_path / "log.parquet"), load_model("tiny")[0].state_dict()
    assert log.drop(columns="explained_variance").select_dtypes("number").notna().all().all() and len(log) == 2
    after = load_model(tmp_path / "checkpoint")[0].state_dict()
    assert set(after) == set(before) and any(not torch.equal(after[k].float(), before[k].float()) for k in after)
    if options.get("lora"):
        change = after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
        assert 0 < torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    if "kl" in options: assert abs(log.kl_ref[0]) < 1e-7 < log.kl_ref[1]

def test_gradient_checkpointing_changes_nothing(tmp_path):
    for name in (False, True): train_ppo("tiny", tmp_path / str(name), ID, PPOConfig(iterations=1, samples=12, minibatch=12, epochs=1, lr=1e-4, gradient_checkpointing=name), progress=False)
    a, b = (pd.read_parquet(tmp_path / n / "log.parquet").grad_norm[0] for n in ("False", "True"))
    assert abs(a / b - 1) < 1e-5

def test_sampling_does_not_depend_on_company():
    model = load_model("tiny")
    problems = ID.problems("train", 30)
    a, b = ([e.ids for e in play(*model, ID, problems, 2, 1.0, batch_size=n, seed=(3, 1))] for n in (30, 4))
    assert a == b and a != [e.ids for e in play(*model, ID, problems, 2, 1.0, seed=(3, 2))]

def test_trackers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train_ppo("tiny", tmp_path, ID, PPOConfig(iterations=2, samples=8, minibatch=8, epochs=1), {"ID": ID}, 1, 4, progress=False, trackers=["tensorboard"])
    files = list(tmp_path.rglob("events.out*"))
    tags = set()
    for f in files: e = EventAccumulator(str(f.parent)); e.Reload(); tags |= set(e.Tags()["scalars"])
    assert {"reward", "approx_kl", "clip_fraction", "entropy", "explained_variance", "length", "tokens_per_second", "lr", "ID/success"} <= tags

class FakeVLLM:
    "A server that samples with our own model, and tells log-probabilities that are off by `bias`."
    def __init__(self, model, tokenizer, bias=0.0): self.model, self.tokenizer, self.bias, self.weights, self.calls = model, tokenizer, bias, {}, 0
    def init_communicator(self, device): pass
    def reset_prefix_cache(self): pass
    def update_named_param(self, name, weight): self.weights[name] = weight.clone()
    def generate(self, prompts, temperature, top_p, top_k, max_tokens, logprobs, generation_kwargs):
        assert (top_p, top_k, logprobs) == (1.0, 0, 0)
        self.model.load_state_dict(self.weights); self.calls += 1
        found = sft.generate(self.model, self.tokenizer, prompts, max_tokens, temperature, [(generation_kwargs["seed"], i) for i in range(len(prompts))])
        b = collate([Episode(None, p + ids, [Turn(len(p), len(p + ids), "", Feedback(0, "", False), True)]) for p, (ids, _) in zip(prompts, found)], 0)
        logp = score(ActorCritic(self.model), b, temperature)[0] + self.bias
        return dict(completion_ids=[ids for ids, _ in found], logprobs=[[[x] for x in row[m].tolist()] for row, m in zip(logp, b.mask)])

@pytest.mark.parametrize("bias, weight", [(0.0, 1.0), (-0.1, math.exp(0.1)), (-2.0, 2.0)])
def test_tokens_of_another_engine_are_weighted(tmp_path, bias, weight):
    server = FakeVLLM(*load_model("tiny", dtype="float32"), bias)
    train_ppo("tiny", tmp_path, ID, PPOConfig(iterations=2, samples=8, minibatch=8, epochs=1, lr=1e-4, temperature=0.8), progress=False, sampler=VLLMSampler(client=server))
    log = pd.read_parquet(tmp_path / "log.parquet")
    np.testing.assert_allclose(log.importance, weight, rtol=1e-3)                # cut at importance_cap, and the weights on the server are the policy's in both rounds
    assert server.calls >= 2
