"GRPO and RLOO: settings that make no sense, what the model is really asked, and runs that are killed or diverge."

import json
import math
import subprocess
import sys
import pandas as pd
import pytest
import torch
from made import Parity
from safetensors.torch import load_file

from gp_spectral import models
from gp_spectral.env import Feedback, GeneralPoints
from gp_spectral.grpo import GRPOConfig, Verifier, group_advantages, prompt_dataset, train_grpo
from gp_spectral.folders import TINY
from gp_spectral.models import load_model
from gp_spectral.play import prompt_ids

ID = GeneralPoints()
SMALL = GRPOConfig(iterations=2, samples=16, generations=4, minibatch=8, temperature=2.0)
run = lambda out, config=SMALL, task=None, **more: train_grpo(
    "tiny", out, task or Parity(), config, progress=False, **more
)
log = lambda out: pd.read_parquet(out / "log.parquet").drop(columns=["seconds", "tokens_per_second"])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(samples=100),
        dict(samples=0),
        dict(samples=96.0),
        dict(generations=1),
        dict(samples=192, minibatch=80),
        dict(minibatch=96, microbatch=64),
        dict(attempts=5),
        dict(iterations=True),
        dict(temperature=0),
        dict(temperature="1"),
        dict(lr=math.nan),
        dict(lr=-1e-4),
        dict(lr_end=math.inf),
        dict(clip=0),
        dict(kl="yes"),
        dict(kl_coef=-1),
        dict(loss_type="ppo"),
        dict(scale_rewards="std"),
        dict(dtype="int8"),
        dict(precision="tf32"),
        dict(lora=-1),
        dict(max_new_tokens=-3),
        dict(reward_scale=0),
        dict(max_grad_norm=0),
        dict(epochs=0),
    ],
    ids=lambda w: "-".join(map(str, next(iter(w.items())))),
)
def test_bad_configs(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"GRPOConfig\.{name} is {value!r}: expected"):
        GRPOConfig(**wrong)


def test_bad_methods(tmp_path):
    with pytest.raises(ValueError, match="method is 'ppo': expected grpo or rloo"):
        run(tmp_path / "a", method="ppo")
    for method, kl in (("grpo", "reward"), ("rloo", "loss")):
        with pytest.raises(ValueError, match=f"GRPOConfig.kl is '{kl}'"):
            run(tmp_path / "a", GRPOConfig(kl=kl), method=method)
    assert not (tmp_path / "a").exists()


def test_too_few_problems(tmp_path):
    class Nothing(Parity):
        def problems(self, split, n, seed=0):
            return []

    with pytest.raises(ValueError, match="Nothing gave 0 problems.*expected 4"):
        run(tmp_path, task=Nothing())


class Game:
    "Problems that no dataset could hold, and prompts of different lengths; keeps what is asked of it."

    max_new_tokens = 3

    def __init__(self):
        self.dealt, self.asked = [], []

    def problems(self, split, n, seed=0):
        self.dealt += [(split, n, seed)]
        return [lambda s=seed, i=i: f"target {i} ; {s.split(':')[1]}" + " A" * i for i in range(n)]

    def prompt(self, problem):
        return problem()

    def verify(self, problem, text):
        self.asked.append((problem(), text))
        return Feedback(float(len(self.asked) % 3), "", False)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.filterwarnings("ignore:no answer of round")
def test_what_the_model_is_asked(tmp_path, monkeypatch, method):
    "Token for token: the prompts that `prompt_ids` makes, each problem to a whole group, the rounds in order."
    seen, load = [], models.load_model

    def spied(*a, **k):
        model, tokenizer = load(*a, **k)
        generate = model.generate
        model.generate = lambda *a, **k: (
            seen.append((k["input_ids"], k["attention_mask"], k["generation_config"], model.generation_config))
            or generate(*a, **k)
        )
        model.generation_config.update(
            do_sample=True, top_k=3, no_repeat_ngram_size=1
        )  # a checkpoint's own settings have no say
        return model, tokenizer

    monkeypatch.setattr(models, "load_model", spied)
    game, config = (
        Game(),
        GRPOConfig(iterations=2, samples=16, generations=4, minibatch=8, microbatch=4, epochs=2, temperature=0.7),
    )
    run(tmp_path, config, game, method=method)
    tokenizer = load("tiny")[1]
    assert game.dealt == [("train", 4, "0:0"), ("train", 4, "0:1")]
    wanted = [
        [prompt_ids(tokenizer, game, p) for p in Game().problems("train", 4, f"0:{i}") for _ in range(4)]
        for i in range(2)
    ]
    assert [[ids[mask.bool()].tolist() for ids, mask in zip(x, m)] for x, m, *_ in seen] == wanted
    assert [problem for problem, _ in game.asked] == [
        p() for i in range(2) for p in Game().problems("train", 4, f"0:{i}") for _ in range(4)
    ]
    for *_, given, own in seen:
        assert (
            (given.temperature, given.do_sample, given.max_new_tokens) == (0.7, True, 3)
            and given.top_k in (0, None)
            and given.top_p in (1.0, None)
        )
        assert given.eos_token_id == [tokenizer.eos_token_id] and not own.top_k and not own.no_repeat_ngram_size
    kept, tiny = (json.loads((x / "config.json").read_text()) for x in (tmp_path / "checkpoint", TINY))
    assert (
        kept == tiny
        and json.loads((tmp_path / "checkpoint/generation_config.json").read_text())["no_repeat_ngram_size"] == 1
    )  # nor is anything of TRL's left in it


def test_rewards(tmp_path):
    tokenizer = load_model("tiny")[1]
    problems, end, metrics = ID.problems("train", 3), tokenizer.eos_token_id, {}
    right, wrong = (tokenizer(t, add_special_tokens=False).input_ids for t in (ID.answer(problems[2]), "A A A"))
    verifier = Verifier(ID, problems, tokenizer, [end], 0.2)
    found = verifier([right + [end], wrong + [end], wrong[:1]], [2, 2, 0], log_metric=metrics.__setitem__)
    assert (
        found == pytest.approx([1.0, -0.6, -0.6])
        and metrics["task_reward"] == pytest.approx(-1 / 3)
        and metrics["success"] == pytest.approx(1 / 3)
    )

    class Broken(Parity):
        def verify(self, problem, text):
            return Feedback(math.nan, "", False)

    with pytest.raises(ValueError, match="Broken gave the reward nan"):
        Verifier(Broken(), ["A"], tokenizer, [end])([[end]], [0])


def test_the_scale_of_rewards(tmp_path):
    "The log tells rewards as the task gives them; the loss sees scaled ones."
    for scale in (1.0, 0.1):
        run(
            tmp_path / f"{scale}",
            GRPOConfig(
                iterations=1,
                samples=16,
                generations=8,
                minibatch=16,
                epochs=1,
                temperature=2.0,
                reward_scale=scale,
                max_grad_norm=1e9,
            ),
            method="rloo",
        )
    a, b = (log(tmp_path / x).iloc[0] for x in ("1.0", "0.1"))
    assert a.reward == b.reward == a.success > 0 and a.grad_norm == pytest.approx(10 * b.grad_norm, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_advantages(seed):
    r = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for method, scale in (("grpo", "group"), ("grpo", "batch"), ("grpo", "none"), ("rloo", "group")):
        a = group_advantages(r, method, scale)
        assert torch.allclose(a.sum(1), torch.zeros(6, dtype=a.dtype), atol=1e-12) and torch.allclose(
            group_advantages(r + 5, method, scale), a
        )
    others = torch.stack([r[:, [j for j in range(7) if j != i]].mean(1) for i in range(7)], 1)
    assert torch.allclose(group_advantages(r, "rloo"), r - others)


@pytest.mark.parametrize("method, kl", [("grpo", "loss"), ("rloo", "reward")])
def test_lora_and_kl(tmp_path, method, kl):
    run(
        tmp_path,
        GRPOConfig(
            iterations=2,
            samples=16,
            generations=4,
            minibatch=8,
            microbatch=4,
            lora=2,
            kl=kl,
            lr=1e-3,
            lr_end=1e-4,
            temperature=2.0,
            loss_type="grpo",
        ),
        method=method,
    )
    found = pd.read_parquet(tmp_path / "log.parquet")
    assert found.kl.abs().iloc[-1] > 0 and 1e-4 <= found.lr.iloc[-1] < found.lr.iloc[0] <= 1e-3
    name, (new, base) = (
        "model.layers.0.self_attn.q_proj.weight",
        (load_file(x / "model.safetensors") for x in (tmp_path / "checkpoint", TINY)),
    )
    assert set(new) == set(base) and 0 < torch.linalg.matrix_rank(new[name] - base[name], rtol=1e-3) <= 2


def test_microbatches_change_nothing(tmp_path):
    "One optimizer step, in one piece and in pieces; answers of different lengths."
    for name, micro in (("whole", 16), ("pieces", 4)):
        run(
            tmp_path / name,
            GRPOConfig(iterations=1, samples=16, generations=4, minibatch=16, microbatch=micro, epochs=1, lr=1e-4),
            ID,
        )
    a, b, base = (
        load_file(x / "model.safetensors")
        for x in (tmp_path / "whole/checkpoint", tmp_path / "pieces/checkpoint", TINY)
    )
    for k in a:
        assert (a[k] - b[k]).norm() <= 3e-2 * (a[k] - base[k]).norm() + 1e-7, k


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_diverging_stops(tmp_path, method):
    with pytest.raises(FloatingPointError, match="lower lr"):
        run(
            tmp_path,
            GRPOConfig(iterations=3, samples=16, generations=4, minibatch=16, epochs=1, lr=1e30, temperature=2.0),
            method=method,
        )
    assert not (tmp_path / "checkpoint").exists()


def test_nan_weights_are_no_state(tmp_path, monkeypatch):
    "A loss that is no number stops the run, and the last good state is still what it goes on from."
    whole = GRPOConfig(iterations=4, samples=16, generations=4, minibatch=8, temperature=2.0)
    run(tmp_path / "whole", whole, eval_every=1)
    import trl

    loss = trl.GRPOTrainer.compute_loss

    def breaks(self, *a, **k):
        return loss(self, *a, **k) * (math.nan if self.state.global_step >= 9 else 1.0)

    with monkeypatch.context() as m:
        m.setattr(trl.GRPOTrainer, "compute_loss", breaks)
        with pytest.raises(FloatingPointError, match="the loss is nan in round 3.*lower lr.*last good state"):
            run(tmp_path / "out", whole, eval_every=1)
    assert json.loads((tmp_path / "out/resume.json").read_text())["checkpoint"] == "checkpoint-8"
    (tmp_path / "out/trainer/checkpoint-12").mkdir()  # as if the kill had come while it was written
    with pytest.raises(ValueError, match=r"other settings \(lr, method\)"):
        run(tmp_path / "out", GRPOConfig(**{**vars(whole), "lr": 1e-5}), eval_every=1, method="rloo")
    run(tmp_path / "out", whole, eval_every=1)
    pd.testing.assert_frame_equal(log(tmp_path / "whole"), log(tmp_path / "out"), check_exact=True)


def test_absolute_positions_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    from gp_spectral.models import save_model

    tokenizer = load_model("tiny")[1]
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for w in gpt2.parameters():
        w.data += 0.1 * torch.randn_like(w)
    save_model(gpt2, tokenizer, tmp_path / "gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel gives .* padded"):
        train_grpo(tmp_path / "gpt2", tmp_path / "out", Game(), SMALL, progress=False)


def test_answers_that_never_end(tmp_path):
    with pytest.warns(UserWarning, match="no answer of round 1 ended within 3 tokens"):
        run(tmp_path, GRPOConfig(iterations=1, samples=8, generations=4, minibatch=8, max_new_tokens=3), ID)


DRIVER = """
"Runs a training undisturbed, then in children that are killed at random moments, until one ends; forked, to be quick."

import os, random, shutil, signal, sys, time, warnings

warnings.filterwarnings("ignore")
sys.path.insert(0, sys.argv[1])
import torch

torch.set_num_threads(1)
import trl.trainer.grpo_trainer, trl.trainer.rloo_trainer
from made import Parity
from gp_spectral.grpo import GRPOConfig, train_grpo

method, folder, kills, lora = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])


def train(out):
    train_grpo(
        "tiny",
        out,
        Parity(),
        GRPOConfig(
            iterations=12,
            samples=32,
            generations=4,
            minibatch=16,
            microbatch=8,
            temperature=2.0,
            lr_end=0.0,
            lora=lora,
        ),
        {"toy": Parity()},
        2,
        10,
        False,
        method,
    )


def child(out):
    pid = os.fork()
    if pid == 0:
        train(out)
        os._exit(0)
    return pid


begun = time.time()
assert os.waitpid(child(folder + "/whole"), 0)[1] == 0
whole = time.time() - begun
rng, went_on, done, kept = random.Random(), 0, 0, folder + "/killed/resume.json"
while done < kills:
    pid, begun, ended = child(folder + "/killed"), time.time(), False
    seconds = rng.uniform(0, max(0.02, 0.5 * (1 - done / kills))) * whole
    while not ended and (time.time() - begun < seconds or done == 0 and not os.path.exists(kept)):
        time.sleep(0.005)
        ended = os.waitpid(pid, os.WNOHANG)[0]
    # it was quicker than the killer: from the beginning, the kills so far count
    if ended:
        shutil.rmtree(folder + "/killed")
        continue
    went_on += os.path.exists(kept)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    done += 1
assert os.waitpid(child(folder + "/killed"), 0)[1] == 0
print("kills:", done, "of these with something kept:", went_on)
"""


@pytest.mark.parametrize(
    "method, kills, lora",
    [
        ("grpo", 2, 0),
        pytest.param("rloo", 10, 0, marks=pytest.mark.slow),
        pytest.param("grpo", 10, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_it_ends_with_the_same_bits(tmp_path, method, kills, lora):
    from pathlib import Path

    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [
            sys.executable,
            str(tmp_path / "driver.py"),
            str(Path(__file__).parent),
            method,
            str(tmp_path),
            str(kills),
            str(lora),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"kills: {kills} of these" in done.stdout and "something kept: 0" not in done.stdout, done.stdout
    a, b = tmp_path / "whole", tmp_path / "killed"
    pd.testing.assert_frame_equal(log(a), log(b), check_exact=True)
    pd.testing.assert_frame_equal(
        pd.read_parquet(a / "curve.parquet"), pd.read_parquet(b / "curve.parquet"), check_exact=True
    )
    assert (a / "checkpoint/model.safetensors").read_bytes() == (b / "checkpoint/model.safetensors").read_bytes()
    assert (
        sorted(p.name for p in a.iterdir())
        == sorted(p.name for p in b.iterdir())
        == ["checkpoint", "curve.parquet", "log.parquet", "settings.json"]
    )


def test_advantages_and_prompts_by_hand():
    "A group is divided by its own deviation; each row of the data says which problem it asks for."
    rewards = torch.tensor([[0.0, 1, 0, 1], [0.0, 9, 0, 9]])
    wanted = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards), wanted, atol=1e-3, rtol=1e-3)
    problems = ID.problems("train", 3)
    asked = [(row["problem"], row["prompt"][0]["content"]) for row in prompt_dataset(ID, problems)]
    assert asked == [(i, ID.prompt(p)) for i, p in enumerate(problems)]
