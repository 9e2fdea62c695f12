"RL's twins: the same rounds, learnt otherwise or not at all; and a bug for each check that must catch it."

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from gp_spectral import ppo, stages
from gp_spectral.env import REWARDS, GeneralPoints
from gp_spectral.grpo import GRPOConfig, training_problems
from gp_spectral.models import load_model
from gp_spectral.ppo import ActorCritic, PPOConfig, compute_gae, ppo_loss, rollout, train_ppo, whiten
from gp_spectral.preset import load_preset
from gp_spectral.sft import sft_dataset
from gp_spectral.twins import ConstantReward, RFTConfig, RFTLearner, RLPrompts, train_rft
from made import Parity
from test_ppo import plant

ID = GeneralPoints()
LITTLE = dict(samples=24, minibatch=24, epochs=1, attempts=2, temperature=0.7)


def weights(folder):
    return (folder / "checkpoint/model.safetensors").read_bytes()


def log_of(folder):
    return pd.read_parquet(folder / "log.parquet")


def by_hand(episodes, temperature):
    "(cross-entropy, norm of its gradient, tokens) of the model's tokens in solved episodes, one after the other."
    model, losses = load_model("tiny", dtype="float32")[0].eval(), []
    for e in (e for e in episodes if e.solved):
        logits = model(input_ids=torch.tensor([e.ids])).logits[0] / temperature
        for t in e.turns:
            wanted = torch.tensor(e.ids[t.start : t.end])
            losses.append(torch.nn.functional.cross_entropy(logits[t.start - 1 : t.end - 1], wanted, reduction="none"))
    losses = torch.cat(losses)
    losses.mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return losses.mean().item(), norm.item(), len(losses)


# --- the checks


def check_a_step_by_hand(tmp_path):
    "Loss and gradient of one step, in pieces, against `transformers` on what was solved."
    config = RFTConfig(iterations=1, microbatch=5, **LITTLE)
    train_rft("tiny", tmp_path, ID, config, progress=False)
    episodes = rollout(*load_model("tiny", dtype="float32"), ID, ID.problems("train", 24, "0:0"), config).episodes
    assert any(e.solved and len(e.turns) > 1 for e in episodes) and not all(e.solved for e in episodes)
    loss, norm, tokens = by_hand(episodes, config.temperature)
    [row] = log_of(tmp_path).to_dict("records")
    assert (row["tokens"], row["kept"], row["optimizer_steps"]) == (tokens, sum(e.solved for e in episodes), 1)
    np.testing.assert_allclose((row["loss"], row["grad_norm"]), (loss, norm), rtol=1e-3)


BUGS = {
    "what was wrong is learnt, too": ("experience", "batch.mask & solved[:, None]", "batch.mask"),
    "what was right is thrown away": ("experience", "solved[:, None]", "~solved[:, None]"),
    "the prompt is learnt, too": ("piece_loss", "temperature, e.acts", "temperature, e.batch.attention"),
    "a mean of means over pieces": ("piece_loss", "loss / n", "loss / e.acts.sum()"),
    "the temperature is forgotten": ("piece_loss", "self.config.temperature", "1.0"),
    "the wrong sign": ("piece_loss", "-(logp", "(logp"),
}


def test_a_step_by_hand(tmp_path):
    check_a_step_by_hand(tmp_path)


@pytest.mark.parametrize(
    "name", [name if i % 3 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(BUGS)]
)
def test_a_bug_is_caught(name, monkeypatch, tmp_path):
    plant(monkeypatch, RFTLearner, *BUGS[name])
    with pytest.raises(AssertionError):
        check_a_step_by_hand(tmp_path)


# --- the twin of PPO


def test_it_learns(tmp_path):
    config = RFTConfig(iterations=5, samples=96, minibatch=48, epochs=4, lr=3e-4)
    train_rft("tiny", tmp_path, Parity(), config, progress=False)
    assert log_of(tmp_path).success.iloc[-1] > 0.85 > 0.6 > log_of(tmp_path).success.iloc[0]


def test_the_first_round_is_PPOs(tmp_path):
    told = dict(iterations=1, **LITTLE)
    train_rft("tiny", tmp_path / "rft", ID, RFTConfig(**told), progress=False)
    train_ppo("tiny", tmp_path / "ppo", ID, PPOConfig(**told), progress=False)
    same = ["round", "reward", "success", "attempts", "ended", "length", "optimizer_steps", "lr"]
    pd.testing.assert_frame_equal(log_of(tmp_path / "rft")[same], log_of(tmp_path / "ppo")[same])


def test_killed_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    config, measured = RFTConfig(iterations=3, **LITTLE | dict(minibatch=9, epochs=2, lr_end=0.0)), ({"ID": ID}, 1, 6)
    train_rft("tiny", tmp_path / "whole", ID, config, *measured, progress=False)
    step, made = RFTLearner.step, itertools.count()

    def deadly(self, *args):
        if next(made) == 8:  # in the second round, after two of its six steps
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as m:
        m.setattr(RFTLearner, "step", deadly)
        with pytest.raises(KeyboardInterrupt):
            train_rft("tiny", tmp_path / "killed", ID, config, *measured, progress=False)
    with pytest.raises(ValueError, match="an unfinished run with other settings"):
        told = {k: v for k, v in dataclasses.asdict(config).items()}
        train_ppo("tiny", tmp_path / "killed", ID, PPOConfig(**told), *measured, progress=False)
    assert len(torch.load(tmp_path / "killed/resume.pt", weights_only=True)["log"]) == 1
    train_rft("tiny", tmp_path / "killed", ID, config, *measured, progress=False)
    a, b = tmp_path / "whole", tmp_path / "killed"
    assert weights(a) == weights(b)
    for table, but in (("log", ["seconds", "tokens_per_second"]), ("curve", [])):
        one, two = (pd.read_parquet(x / f"{table}.parquet").drop(columns=but) for x in (a, b))
        pd.testing.assert_frame_equal(one, two, check_exact=True)


class Fails(GeneralPoints):
    "Nothing is right in the rounds that are named."

    def problems(self, split, n, seed=0, distinct=None):
        self.now = seed
        return super().problems(split, n, seed, distinct)

    def verify(self, problem, text):
        found = super().verify(problem, text)
        return dataclasses.replace(found, solved=False) if self.now in ("0:0", "0:2") else found


def test_a_round_without_a_right_answer_makes_no_step(tmp_path):
    config = RFTConfig(iterations=3, **LITTLE | dict(attempts=1))
    train_rft("tiny", tmp_path, Fails(), config, progress=False, keep=(1, 2))
    log = log_of(tmp_path)
    assert log.notna().all().all() and log.optimizer_steps.tolist() == [0, 1, 0]
    assert log.kept[1] > 0 == log.kept[0] == log.kept[2] == log.loss[0] == log.grad_norm[2]
    first, second, last = (
        load_model(tmp_path / n)[0].state_dict() for n in ("round-00001", "round-00002", "checkpoint")
    )
    base = load_model("tiny")[0].state_dict()
    assert all(torch.equal(base[k], first[k]) and torch.equal(second[k], last[k]) for k in base)
    assert any(not torch.equal(base[k], second[k]) for k in base)


@pytest.mark.parametrize("options", [dict(lora=2), dict(gradient_checkpointing=True), dict(dtype="bfloat16")], ids=str)
def test_options_run(options, tmp_path):
    train_rft("tiny", tmp_path, ID, RFTConfig(iterations=2, **LITTLE, **options), progress=False)
    before, after = load_model("tiny")[0].state_dict(), load_model(tmp_path / "checkpoint")[0].state_dict()
    assert set(after) == set(before) and any(not torch.equal(after[k].float(), before[k].float()) for k in after)


def test_it_says_what_is_wrong_by_its_own_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="train_rft.keep holds 5: expected rounds from 1 to 2"):
        train_rft("tiny", tmp_path / "x", ID, RFTConfig(iterations=2), keep=(5,), progress=False)
    with pytest.raises(ValueError, match="RFTConfig.lr is nan"):
        RFTConfig(lr=math.nan)
    loss = RFTLearner.piece_loss
    monkeypatch.setattr(RFTLearner, "piece_loss", lambda self, *a: (loss(self, *a)[0] * math.nan, {}))
    with pytest.raises(FloatingPointError, match="the loss of RFT is nan in round 1: lower lr; the last good round"):
        train_rft("tiny", tmp_path / "x", ID, RFTConfig(iterations=1, **LITTLE), progress=False)


def test_every_setting_is_one_of_PPOs():
    ours, theirs = ({f.name: f.default for f in dataclasses.fields(c)} for c in (RFTConfig, PPOConfig))
    assert ours.items() <= theirs.items()
    assert not {"clip", "kl", "whiten", "value_head", "value_lr", "reward_scale", "vllm"} & set(ours)


# --- a reward that says nothing


def gradient(loaded, task, config):
    "Of PPO's loss at the policy that played; no value function."
    model, batch = loaded[0], rollout(*loaded, task, task.problems("train", 256), config)
    model.zero_grad()
    logp, values, _ = ActorCritic(model)(batch.ids, batch.attention, 1.0, batch.mask)
    found, returns = compute_gae(batch.rewards, torch.zeros_like(logp), batch.mask, 1.0, config.lam)
    found = whiten(found, batch.mask) if config.whiten else found
    ppo_loss(logp, logp.detach(), found, values, returns, batch.turns, config)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def systematic(task, **settings):
    "Squared norm of the mean of eight gradients, over the mean of theirs: 1 for a direction, 1/8 for noise."
    loaded = load_model("tiny", dtype="float32")
    told = dict(value_coef=0.0, reward_scale=1.0) | settings
    g = torch.stack([gradient(loaded, task, PPOConfig(seed=s, **told)) for s in range(8)])
    return (g.mean(0).norm() ** 2 / g.norm(dim=1).square().mean()).item()


def test_a_constant_reward_moves_nothing_systematically():
    "Where every token has the same advantage, gradients are noise; with a real reward they have a direction."
    plain = dict(lam=1.0, whiten=False)
    assert systematic(Parity(), **plain) > 0.8 > 0.4 > systematic(ConstantReward(Parity()), **plain)


def test_lambda_makes_a_constant_reward_one_for_short_answers():
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    rewards = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    first = lambda lam: compute_gae(rewards, torch.zeros(2, 4), mask, 1.0, lam)[0][:, 0].tolist()
    assert first(1.0) == [1.0, 1.0] and first(0.95) == pytest.approx([0.95, 0.95**3])


def test_a_constant_reward_leaves_verdicts_and_attempts_alone():
    same, loaded, config = ConstantReward(ID), load_model("tiny"), PPOConfig(attempts=3)
    a, b = (rollout(*loaded, task, ID.problems("train", 20), config).episodes for task in (ID, same))
    assert [e.ids for e in a] == [e.ids for e in b] and {len(e.turns) for e in b} > {1}
    for x, y in zip(a, b):
        assert [dataclasses.replace(t.feedback, reward=5) for t in x.turns] == [t.feedback for t in y.turns]
    assert same.reward == REWARDS["correct"] and ConstantReward(Parity()).reward == 1.0
    assert repr(ConstantReward(ID, -1)) == f"ConstantReward({ID!r}, reward=-1)"


def test_a_task_without_answers_is_told_its_reward():
    class Mute(Parity):
        answer = property()  # there is none

    with pytest.raises(ValueError, match="Mute has no answers .* give ConstantReward.reward"):
        ConstantReward(Mute())
    assert ConstantReward(Mute(), 2.0).verify("A2", "7").reward == 2.0


# --- SFT goes on


@pytest.mark.parametrize("train, config", [(train_ppo, PPOConfig), (train_rft, RFTConfig)])
def test_the_prompts_are_those_of_the_rounds(tmp_path, monkeypatch, train, config):
    "All that the rounds play, in order, against what SFT is shown."
    played, play = [], ppo.play
    monkeypatch.setattr(
        ppo,
        "play",
        lambda m, t, task, problems, *a, **k: played.extend(problems) or play(m, t, task, problems, *a, **k),
    )
    end = load_model("tiny")[1].eos_token_id
    stub = lambda model, tokenizer, prompts, *a: [([5, end], True) for _ in prompts]
    task = GeneralPoints(target=(10, 40))
    settings = config(iterations=3, samples=40, minibatch=40, epochs=1, seed=4)
    train("tiny", tmp_path, task, settings, sampler=stub, progress=False)
    prompts = RLPrompts(task, settings)
    has = lambda p: isinstance(task.answer(p), str)

    def answered(p):
        try:
            return has(p)
        except ValueError:
            return False

    assert len(played) == 120 and prompts.dealt == [p for p in played if answered(p)]
    n = len(prompts.dealt)
    shown, data = sft_dataset(prompts, n, seed=9)
    assert shown == prompts.dealt and [r["prompt"][0]["content"] for r in data] == [task.prompt(p) for p in shown]
    assert all(task.verify(p, r["completion"][0]["content"]).solved for p, r in zip(shown, data))
    with pytest.raises(ValueError, match=f"RL is given {n} prompts with an answer, not {n + 1}"):
        sft_dataset(prompts, n + 1)
    assert prompts.problems("test", 3, 1) == task.problems("test", 3, 1)
    assert prompts.problems("train", 3) == prompts.dealt[:3] != prompts.dealt[-3:]


def test_prompts_without_an_answer_are_left_out():
    class Some(Parity):
        def answer(self, problem, seed=0):
            if problem == "J3":
                raise ValueError("no form for this")
            return super().answer(problem)

    prompts = RLPrompts(Some(), PPOConfig(iterations=2, samples=6))
    assert prompts.dealt == ["A2"] * 6 and repr(prompts) == "RLPrompts(Some, 2 rounds of 6, seed 0, 6 with an answer)"


def test_the_prompts_of_GRPO_are_its_own():
    config = GRPOConfig(iterations=2, samples=16, minibatch=16)
    assert RLPrompts(ID, config).dealt == training_problems(ID, config) and len(training_problems(ID, config)) == 4
    assert training_problems(ID, config) == [p for i in range(2) for p in ID.problems("train", 2, f"0:{i}")]


# --- in a study


def test_a_study_with_rejection_fine_tuning(tmp_path, monkeypatch):
    told = dict(rl="rft", ppo_lr="0.5", ppo_clip="0.3", ppo_keep="2", lora="4", ppo_kl="loss")
    study, asked = stages.Study(load_preset("tiny", told), tmp_path), []
    config = study.preset.rl_config(5)
    assert type(config) is RFTConfig and (config.lr, config.seed, config.lora) == (0.5, 5, 4)
    monkeypatch.setattr(stages, "train_rft", lambda *a, **k: asked.append((a, k)))
    study.check()
    study.rl_from("tiny", tmp_path / "x", 5)
    [(args, more)] = asked
    assert args[:2] == ("tiny", tmp_path / "x") and repr(args[2]) == repr(study.rl_task(5))
    assert args[3] == config and more["keep"] == (2,)
    assert study.rl_folder(5, 320) == tmp_path / "5/rft-00320"
