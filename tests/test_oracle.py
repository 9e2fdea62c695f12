"""PPO end to end against a reference that is written out: plain loops over episodes, turns and tokens, plain passes of
`transformers` without padding, Adam by hand. It shares no code with the package. What a round is given (prompts,
answers, verdicts) is made up here, so that the reference knows it without asking the package, and what comes out of
`Learner.roll_out`, `experience` and `update` is compared number by number, down to the weights."""

import copy
import math
import random

import numpy as np
import pytest
import torch

from gp_spectral import play as playing, ppo
from gp_spectral.env import Feedback
from gp_spectral.ppo import Learner, PPOConfig
from test_ppo import plant
from test_said import model_of, tokenizer_of

ROUND, BEFORE = 2, 7  # which round it is, and how many optimizer steps came before it
BASE = dict(iterations=5, samples=7, minibatch=4, microbatch=3, epochs=2, attempts=3, max_new_tokens=9, seed=3)
BASE |= dict(temperature=0.7, clip=0.02, lr=0.1, value_lr=0.2, adam_eps=1.0, max_grad_norm=0.8, value_coef=0.3)
BASE |= dict(reward_scale=0.4)


class Script:
    "A task and a sampler at once: answers of one to seven tokens, some cut off, some right, each with its own reward."

    max_new_tokens = 50

    def __init__(self, config, tokenizer, told):
        self.config, self.tokenizer, self.told, self.lot = config, tokenizer, told, random.Random(5)
        self.attempts = config.attempts + config.published
        self.rewards, self.right = {}, {}  # by the text of an answer
        self.answers = {}  # (problem, attempt): (ids, whether it ended, log-probabilities that were told)

    def problems(self, split, n, seed=0):
        assert (split, n, seed) == ("train", self.config.samples, f"{self.config.seed}:{ROUND}")
        return list(range(n))

    def prompt(self, problem):
        return "?" * (1 + 3 * problem % 5)

    def retry(self, feedback):
        return "no" + "!" * round(feedback.reward % 4)

    def verify(self, problem, text):
        return Feedback(self.rewards[text], "", self.right[text])

    def _answer(self, problem, attempt):
        text = None
        while text in (None, *self.rewards):
            ids = [97 - 33 + self.lot.randrange(20) for _ in range(self.lot.randint(1, 6))]
            text = self.tokenizer.decode(ids)
        ended = self.lot.random() < 0.7
        last = problem % 4  # the attempt that is right; those of 3 never are
        self.rewards[text], self.right[text] = self.lot.choice([-3.0, -2.0, -1.0, 1.0, 5.0]), attempt == last
        ids = ids + [self.tokenizer.eos_token_id] * ended
        blind = lambda x: math.nan if self.lot.random() < 0.2 else x
        return ids, ended, [blind(self.lot.uniform(-7, -4)) for _ in ids] if problem % 3 else [math.nan] * len(ids)

    def __call__(self, model, tokenizer, prompts, max_new_tokens, temperature, seeds):
        assert (max_new_tokens, temperature) == (self.config.max_new_tokens, self.config.temperature)
        found = []
        for seed in seeds:
            assert seed[:2] == (self.config.seed, ROUND)
            self.answers.setdefault(seed[2:], self._answer(*seed[2:]))
            found.append(self.answers[seed[2:]][: 3 if self.told else 2])
        return found


# --- the reference


def conversation(task, problem, tokenizer):
    "(ids, [(first, end, reward, told log-probabilities)], solved) of an episode, from what was scripted."
    turn = lambda role, text: f"<|im_start|>{role}\n{text}<|im_end|>\n"
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    ids, turns, solved = encode(turn("user", task.prompt(problem)) + "<|im_start|>assistant\n"), [], False
    for attempt in range(task.attempts):
        new, ended, told = task.answers[problem, attempt]
        text = tokenizer.decode(new[:-1] if ended else new)
        reward, solved = task.rewards[text], task.right[text]
        if task.config.published and attempt == task.config.attempts:
            reward, solved = -1.0, False
        turns.append((len(ids), len(ids) + len(new), reward, told))
        ids = ids + new
        if task.right[text] or attempt + 1 == task.attempts:
            break
        again = turn("user", task.retry(Feedback(task.rewards[text], "", False))) + "<|im_start|>assistant\n"
        ids += encode(("" if ended else "<|im_end|>") + "\n" + again)
    return ids, turns, solved


def read(net, ids, temperature):
    "Of each token (but the first): its log-probability, the value before it, the entropy there; the first has None."
    out = net.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    hidden = out.hidden_states[-1][0] if net.critic is None else net.critic(torch.tensor([ids])).last_hidden_state[0]
    rows = [None]
    for t in range(1, len(ids)):
        p = torch.log_softmax(out.logits[0, t - 1] / temperature, -1)
        x, layers = hidden[t - 1], [m for m in net.value_head if isinstance(m, torch.nn.Linear)]
        for layer in layers:
            x = layer.weight @ x + layer.bias
            x = x if layer is layers[-1] else x * (x > 0)
        rows.append((p[ids[t]], x[0], -(p.exp() * p).sum()))
    return rows


def actions_of(turns, level):
    "[(tokens, where the value is)] of an episode, in order."
    if level == "turn":
        return [(list(range(first, end)), first) for first, end, *_ in turns]
    return [([t], t) for first, end, *_ in turns for t in range(first, end)]


def reference_experience(net, base, talks, config):
    "Per episode: old, values, ref and weights by token; advantages and returns by where an action's value is."
    found, rows = [], []
    for ids, turns, solved in talks:
        with torch.no_grad():
            told = read(net, ids, config.temperature)
            ref = read(base, ids, config.temperature)
        old, values = {}, {}
        refs, weights, rewards = {}, {}, {}
        for first, end, reward, sampled in turns:
            for k, t in enumerate(range(first, end)):
                old[t], values[t], refs[t] = told[t][0].item(), told[t][1].item(), ref[t][0].item()
                w = math.exp(old[t] - sampled[k]) if not math.isnan(sampled[k]) else 1.0
                weights[t] = min(w, config.importance_cap)
                rewards[t] = reward * config.reward_scale if t == end - 1 else 0.0
                if config.kl == "reward":
                    rewards[t] -= config.kl_coef * (old[t] - refs[t])
        actions = actions_of(turns, config.level)
        e = dict(old=old, values=values, ref=refs, weights=weights, actions=actions, advantages={}, returns={})
        found.append(e)
        for k, (tokens, at) in enumerate(actions):
            ends = k + 1 == len(actions) and (solved or not config.published)
            rows.append((e, at, sum(rewards[t] for t in tokens), values[at], ends))
    for i, (e, at, _, value, _) in enumerate(rows):
        total = 0.0
        for j in range(i, len(rows)):
            _, _, reward, own, ends = rows[j]
            following = 0.0 if ends or j + 1 == len(rows) else rows[j + 1][3]
            total += (config.gamma * config.lam) ** (j - i) * (reward + config.gamma * following - own)
            if ends:
                break
        e["advantages"][at], e["returns"][at] = total, total + value
    if config.whiten:
        every = [a for e in found for a in e["advantages"].values()]
        mean = sum(every) / len(every)
        spread = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - 1))
        for e in found:
            e["advantages"] = {at: (a - mean) / spread for at, a in e["advantages"].items()}
    return found


def rounded(x, config):
    "The published code's bfloat16."
    return x.bfloat16().float() if config.published else x


def reference_loss(net, talks, found, rows, config):
    "(loss, sums) of the episodes of a minibatch."
    n = n_tokens = 0
    sums = dict(policy_loss=0.0, value_loss=0.0, approx_kl=0.0, clip_fraction=0.0, entropy=0.0, kl_ref=0.0)
    for i in rows:
        (ids, turns, _), e = talks[i], found[i]
        now = read(net, ids, config.temperature)
        firsts = {first for first, *_ in turns} if config.published else set()
        n_tokens += sum(end - first for first, end, *_ in turns)
        for tokens, at in e["actions"]:
            n += 1
            change, weight = 0.0, 1.0
            for t in tokens:
                if t not in firsts:
                    change = change + rounded(now[t][0], config) - rounded(torch.tensor(e["old"][t]), config)
                    weight *= e["weights"][t]
            weight = min(weight, config.importance_cap)
            ratio, a = torch.as_tensor(change).exp(), e["advantages"][at]
            inside = ratio if 1 - config.clip < ratio < 1 + config.clip else torch.tensor(1 + config.clip)
            inside = torch.tensor(1 - config.clip) if ratio < 1 - config.clip else inside
            sums["policy_loss"] -= (ratio * a if ratio * a < inside * a else inside * a) * weight
            value, before, target = now[at][1], e["values"][at], e["returns"][at]
            error = (value - target) ** 2
            if config.value_clip:
                moved = before + max(-config.value_clip, min(config.value_clip, (value - before).item()))
                near = value if abs(value - before) < config.value_clip else torch.tensor(moved)
                error = max(error, (near - target) ** 2, key=lambda x: x.item())
            sums["value_loss"] += 0.5 * error
            sums["approx_kl"] += (ratio - 1 - change).item()
            sums["clip_fraction"] += float(abs(ratio.item() - 1) > config.clip)
        for first, end, *_ in turns:
            for t in range(first, end):
                if t not in firsts:
                    sums["entropy"] += now[t][2]
                    if config.kl != "off":
                        step = e["ref"][t] - rounded(now[t][0], config)
                        sums["kl_ref"] += step.exp() - 1 - step
    loss = (sums["policy_loss"] + config.value_coef * sums["value_loss"]) / n
    loss = loss - config.entropy_coef * sums["entropy"] / n_tokens
    loss = loss + (config.kl_coef * sums["kl_ref"] / n_tokens if config.kl == "loss" else 0.0)
    return loss, {k: torch.as_tensor(v).item() for k, v in sums.items()}, n, n_tokens


def reference_update(net, talks, found, config):
    "The statistics of a round; `net` is changed."
    policy = {id(p) for p in net.model.parameters()}
    moments, totals, actions, tokens, norms, step = {}, {}, 0, 0, [], 0
    whole = config.iterations * config.epochs * -(-config.samples // config.minibatch)
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, ROUND, epoch)).permutation(len(talks)).tolist()
        for k in range(0, len(order), config.minibatch):
            loss, sums, n, n_tokens = reference_loss(net, talks, found, order[k : k + config.minibatch], config)
            named = [p for p in net.parameters()]
            grads = torch.autograd.grad(loss, named, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(named, grads)]
            norms.append(math.sqrt(sum((g**2).sum().item() for g in grads)))
            shrink, step = min(1.0, config.max_grad_norm / (norms[-1] + 1e-6)), step + 1
            for p, g in zip(named, grads):
                rate = config.lr if id(p) in policy else config.value_lr
                if config.lr_end >= 0:
                    turned = math.cos(math.pi * (BEFORE + step - 1) / whole)
                    rate = config.lr_end + (rate - config.lr_end) * 0.5 * (1 + turned)
                m, v = moments.get(id(p), (0.0, 0.0))
                m, v = 0.9 * m + 0.1 * shrink * g, 0.95 * v + 0.05 * (shrink * g) ** 2
                moments[id(p)] = m, v
                p.data -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + config.adam_eps)
            actions, tokens = actions + n, tokens + n_tokens
            totals = {name: totals.get(name, 0.0) + x for name, x in sums.items()}
            if config.target_kl and sums["approx_kl"] / n > config.target_kl:
                return finished(totals, actions, tokens, norms)
    return finished(totals, actions, tokens, norms)


def finished(totals, actions, tokens, norms):
    means = {k: v / (tokens if k in ("entropy", "kl_ref") else actions) for k, v in totals.items()}
    return means | dict(grad_norm=sum(norms) / len(norms), optimizer_steps=len(norms))


# --- the comparison


def same(ours, theirs, what, places=2e-4):
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    off = (ours - theirs).abs().max().item() if ours.numel() else 0.0
    assert ours.shape == theirs.shape and off <= places * (1 + theirs.abs().max().item()), (what, off)


def compare_experience(e, talks, found, config, told):
    "Token by token, and nothing where nobody acted."
    width = max(len(ids) for ids, *_ in talks)
    assert e.batch.ids.shape == (len(talks), width) and e.round == ROUND
    for i, ((ids, turns, _), r) in enumerate(zip(talks, found)):
        assert e.batch.ids[i, : len(ids)].tolist() == ids and e.batch.attention[i].sum() == len(ids), "ids"
        chosen = [t for first, end, *_ in turns for t in range(first, end)]
        assert e.batch.mask[i].nonzero().flatten().tolist() == chosen, "mask"
        assert e.acts[i].nonzero().flatten().tolist() == [at for _, at in r["actions"]], "acts"
        same(e.logp[i, chosen], [r["old"][t] for t in chosen], "logp")
        same(e.values[i, chosen], [r["values"][t] for t in chosen], "values")
        at = [at for _, at in r["actions"]]
        same(e.advantages[i, at], [r["advantages"][t] for t in at], "advantages", 1e-3)
        same(e.returns[i, at], [r["returns"][t] for t in at], "returns")
        if config.kl != "off":
            same(e.ref_logp[i, chosen], [r["ref"][t] for t in chosen], "reference")
        if told:
            same(e.weights[i, chosen], [r["weights"][t] for t in chosen], "weights")
    assert (e.ref_logp is None) == (config.kl == "off") and (e.weights is None) == (not told)


def check(settings, told=False, seed=0):
    "One round of PPO and its reference."
    config, tokenizer = PPOConfig(**BASE | settings), tokenizer_of("qwen")
    tokenizer.pad_token = tokenizer.eos_token
    learner = Learner((model_of("llama", seed=seed), tokenizer), config, ppo._accelerator(config))
    base = copy.deepcopy(learner.bare)
    torch.manual_seed(seed + 1)
    for p in learner.bare.parameters():  # the policy has left the reference, and values are no zeros
        p.data += 0.05 * torch.randn_like(p)
    net, start = copy.deepcopy(learner.bare), copy.deepcopy(learner.bare.state_dict())
    task = Script(config, tokenizer, told)
    batch, _ = learner.roll_out(task, ROUND, task)
    talks = [conversation(task, i, tokenizer) for i in range(config.samples)]
    assert len({len(turns) for _, turns, _ in talks}) > 2 and len({len(ids) for ids, *_ in talks}) > 4
    if not told:
        talks = [(ids, [(a, b, r, [math.nan] * (b - a)) for a, b, r, _ in turns], s) for ids, turns, s in talks]
    e = learner.experience(batch, ROUND)
    found = reference_experience(net, base, talks, config)
    compare_experience(e, talks, found, config, told)
    row, wanted = learner.update(e, BEFORE), reference_update(net, talks, found, config)
    for name, x in wanted.items():
        same(row[name], x, name, 2e-3)
    after, moved = dict(net.named_parameters()), 0
    for name, p in learner.bare.named_parameters():
        step = (after[name].data - start[name]).norm()
        assert (p.data - after[name].data).norm() <= 5e-3 * step + 1e-6, name
        moved += step > 1e-4
    assert moved > 10
    return wanted


CASES = {
    "tokens": (dict(), False),
    "tokens, kl in the loss": (
        dict(kl="loss", entropy_coef=0.1, kl_coef=0.3, gamma=0.9, lam=0.8, whiten=False, value_clip=0.05),
        False,
    ),
    "tokens, kl in the reward": (dict(kl="reward", kl_coef=0.3, value_head="mlp", lr_end=0.01), False),
    "tokens of another engine": (dict(importance_cap=1.5, whiten=False, lam=1.0, entropy_coef=0.05), True),
    "a critic, and a stop": (dict(value_head="model", target_kl=1e-4, epochs=3, microbatch=96), False),
    "turns": (dict(level="turn", gamma=0.8, clip=0.05), True),
    "turns, kl in the loss": (
        dict(level="turn", kl="loss", kl_coef=0.3, entropy_coef=0.1, value_clip=0.05, whiten=False, clip=0.05),
        False,
    ),
    "turns, kl in the reward": (dict(level="turn", kl="reward", kl_coef=0.3, lam=0.5, importance_cap=1.5), True),
    "as published": (dict(level="turn", published=True, gamma=0.9, attempts=2, clip=0.05), False),
}


@pytest.mark.parametrize("name", CASES)
def test_ppo_is_its_reference(name):
    check(*CASES[name])


def test_what_the_cases_reach():
    "Clips on both sides, steps that are cut, a round that stops early: else the reference would pass by them."
    steps = {name: check(*CASES[name]) for name in ("tokens", "a critic, and a stop")}
    assert 0.2 < steps["tokens"]["clip_fraction"] < 1 and steps["tokens"]["grad_norm"] > BASE["max_grad_norm"]
    assert steps["a critic, and a stop"]["optimizer_steps"] < 6 and steps["tokens"]["optimizer_steps"] == 4


# --- bugs of the wiring: (owner, function, old, new, case)

BUGS = {
    "rewards on the first token of an attempt": (ppo, "collate", "[i, t.end - 1] =", "[i, t.start] =", "tokens"),
    "rewards on the last token but one": (ppo, "collate", "t.end - 1", "max(t.start, t.end - 2)", "tokens"),
    "all rewards on the last token": (
        ppo,
        "collate",
        "rewards[i, t.end - 1] =",
        "rewards[i, len(e.ids) - 1] =",
        "tokens",
    ),
    "rewards are not scaled": (ppo, "rollout", "config.reward_scale", "1.0", "tokens"),
    "only the last attempt is rewarded": (
        ppo,
        "collate",
        "t.feedback.reward",
        "(t is e.turns[-1]) * t.feedback.reward",
        "tokens",
    ),
    "feedback belongs to the attempt before": (
        ppo,
        "collate",
        "turns[i, t.start:t.end]",
        "turns[i, t.start:t.end + 1]",
        "tokens",
    ),
    "the mask begins a token late": (
        ppo,
        "collate",
        "turns[i, t.start:t.end]",
        "turns[i, t.start + 1:t.end]",
        "tokens",
    ),
    "sampled at another temperature": (ppo, "rollout", "config.temperature", "1.0", "tokens"),
    "an attempt too few": (ppo, "rollout", "config.attempts + config.published", "config.attempts", "as published"),
    "the limit is forgotten": (ppo, "rollout", "config.max_new_tokens or None", "None", "tokens"),
    "every round has the same random numbers": (ppo, "rollout", "(config.seed, round)", "(config.seed, 0)", "tokens"),
    "every round plays the same problems": (ppo, "round_problems", "{config.seed}:{i}", "{config.seed}:0", "tokens"),
    "RL plays what is for validation": (ppo, "round_problems", "'train'", "'validation'", "tokens"),
    "the scores of rows change places": (ppo, "_score_together", "x[order] = y", "x[:] = y", "tokens"),
    "scored at another temperature": (ppo, "_score_together", "config.temperature", "1.0", "tokens"),
    "the reference is the policy": (
        ppo.Learner,
        "_reference_logp",
        "self.reference, batch",
        "self.net, batch",
        "tokens, kl in the loss",
    ),
    "values for log-probabilities": (ppo.Learner, "score", "logp, values = _score", "values, logp = _score", "tokens"),
    "gamma and lambda change places": (
        ppo.Learner,
        "advantages",
        "config.gamma, config.lam",
        "config.lam, config.gamma",
        "tokens, kl in the loss",
    ),
    "whitened over padding": (
        ppo.Learner,
        "advantages",
        "batch.mask, acts)",
        "batch.attention >= 0, batch.attention >= 0)",
        "tokens",
    ),
    "whitened over prompts too": (
        ppo.Learner,
        "advantages",
        "whiten(found, batch.mask, acts)",
        "whiten(found, batch.mask, batch.attention > 0)",
        "tokens",
    ),
    "whitened over tokens where turns act": (ppo.Learner, "advantages", "batch.mask, acts)", "batch.mask)", "turns"),
    "not whitened": (ppo.Learner, "advantages", "if config.whiten", "if False", "tokens"),
    "always whitened": (ppo.Learner, "advantages", "if config.whiten", "if True", "tokens, kl in the loss"),
    "the KL is not in the reward": (
        ppo.Learner,
        "advantages",
        "config.kl == 'reward'",
        "False",
        "tokens, kl in the reward",
    ),
    "policy and reference change places in the reward": (
        ppo.Learner,
        "advantages",
        "rewards, logp, ref_logp",
        "rewards, ref_logp, logp",
        "tokens, kl in the reward",
    ),
    "the importance is upside down": (
        ppo.Learner,
        "advantages",
        "logp - batch.sampled",
        "batch.sampled - logp",
        "tokens of another engine",
    ),
    "the importance has no cap": (
        ppo.Learner,
        "advantages",
        ".clamp(max=config.importance_cap)",
        "",
        "tokens of another engine",
    ),
    "untold tokens weigh nothing": (
        ppo.Learner,
        "advantages",
        "nan_to_num(1.0)",
        "nan_to_num(0.0)",
        "tokens of another engine",
    ),
    "tokens act where turns should": (ppo.Learner, "advantages", "config.level == 'turn'", "False", "turns"),
    "an episode that failed ends as a solved one": (
        ppo.Learner,
        "advantages",
        "e.solved for",
        "True for",
        "as published",
    ),
    "the rewards of a turn without its KL": (
        ppo,
        "compute_gae",
        "_turn_sum(rewards, turns) * starts",
        "_turn_sum(rewards * (rewards.abs() > 0.3), turns) * starts",
        "turns, kl in the reward",
    ),
    "present values for old ones": (
        ppo.Learner,
        "piece_loss",
        "e.values, e.weights",
        "values, e.weights",
        "tokens, kl in the loss",
    ),
    "present log-probabilities for old ones": (
        ppo.Learner,
        "piece_loss",
        "logp, e.logp",
        "logp, logp.detach()",
        "tokens",
    ),
    "old and new change places": (ppo.Learner, "piece_loss", "logp, e.logp", "e.logp, logp", "tokens"),
    "returns for advantages": (
        ppo.Learner,
        "piece_loss",
        "e.advantages, values, e.returns",
        "e.returns, values, e.advantages",
        "tokens",
    ),
    "the loss at another temperature": (ppo.Learner, "piece_loss", "config.temperature", "1.0", "tokens"),
    "no importance in the loss": (
        ppo.Learner,
        "piece_loss",
        "e.weights, n_tokens",
        "None, n_tokens",
        "tokens of another engine",
    ),
    "no reference in the loss": (ppo.Learner, "piece_loss", "e.ref_logp, n,", "e.logp, n,", "tokens, kl in the loss"),
    "entropy over the tokens of a piece": (
        ppo.Learner,
        "piece_loss",
        "e.weights, n_tokens",
        "e.weights, None",
        "tokens, kl in the loss",
    ),
    "a mean over the piece": (ppo.Learner, "piece_loss", "e.ref_logp, n,", "e.ref_logp, None,", "tokens"),
    "the entropy has no gradient": (
        ppo.Learner,
        "piece_loss",
        "config.entropy_coef != 0",
        "False",
        "tokens, kl in the loss",
    ),
    "a clip on one side only": (
        ppo,
        "_surrogate",
        "ratio.clamp(1 - clip, 1 + clip)",
        "ratio.clamp(max=1 + clip)",
        "tokens",
    ),
    "a clip on the other side only": (
        ppo,
        "_surrogate",
        "ratio.clamp(1 - clip, 1 + clip)",
        "ratio.clamp(min=1 - clip)",
        "tokens",
    ),
    "actions of the whole round": (ppo.Learner, "step", "e.acts[rows].sum()", "e.acts.sum()", "tokens"),
    "padding counts as tokens": (
        ppo.Learner,
        "step",
        "e.batch.mask[rows].sum()",
        "(e.batch.attention[rows] >= 0).sum()",
        "tokens, kl in the loss",
    ),
    "prompts count as tokens": (
        ppo.Learner,
        "step",
        "e.batch.mask[rows].sum()",
        "e.batch.attention[rows].sum()",
        "tokens, kl in the loss",
    ),
    "the last piece alone": (
        ppo.Learner,
        "step",
        "accelerator.backward(loss * ranks)",
        "k + 1 == len(pieces) and accelerator.backward(loss * ranks)",
        "tokens",
    ),
    "a piece twice": (ppo.Learner, "step", "e[piece], count", "e[mine[:len(piece)]], count", "tokens"),
    "gradients of two steps": (ppo.Learner, "step", "self.optimizer.zero_grad()", "pass", "tokens"),
    "gradients are not clipped": (ppo.Learner, "step", "config.max_grad_norm", "1000000000.0", "tokens"),
    "one epoch": (ppo, "_minibatches", "range(config.epochs)", "range(1)", "tokens"),
    "every epoch in the same order": (ppo, "_minibatches", "e.round, epoch", "e.round, 0", "tokens"),
    "the rates change places": (
        ppo,
        "_set_rates",
        "(config.lr, config.value_lr)",
        "(config.value_lr, config.lr)",
        "tokens",
    ),
    "the rate of the round before": (
        ppo.Learner,
        "update",
        "steps + len(norms)",
        "len(norms)",
        "tokens, kl in the reward",
    ),
    "the stop is never": (ppo.Learner, "update", "config.target_kl and", "False and", "a critic, and a stop"),
    "the stop comes too late": (
        ppo.Learner,
        "update",
        "/ n > config.target_kl",
        "/ (1000 * n) > config.target_kl",
        "a critic, and a stop",
    ),
    "a value head of the policy's states": (
        ppo.ActorCritic,
        "_values",
        "self.critic is None",
        "True",
        "a critic, and a stop",
    ),
    "the end is written twice": (playing, "retry_ids", "tokenizer.decode(ids[:at]).strip()", "True", "tokens"),
    "the end is never written": (
        playing,
        "_attempts",
        "last.ended, e.ids[-1]",
        "True, tokenizer.eos_token_id",
        "tokens",
    ),
}


# all of them take minutes: every sixth each time, the others weekly
ONE_IN_SIX = [name if i % 6 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(BUGS)]


@pytest.mark.parametrize("name", ONE_IN_SIX)
def test_a_bug_of_the_wiring_is_caught(name, monkeypatch):
    owner, function, old, new, case = BUGS[name]
    plant(monkeypatch, owner, function, old, new)
    with pytest.raises(Exception) as caught:
        check(*CASES[case])
    told = caught.type is AssertionError or caught.type in (TypeError, RuntimeError, IndexError, KeyError)
    assert told, f"{caught.type}: {caught.value}"
