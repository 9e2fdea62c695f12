"""Who is given which hands. What a model reads, in training and when it is asked, is taken down where it goes into the
model, as text, and its hands are looked up: those that are learnt, those that choose a checkpoint, and those on which
everything is judged must never meet."""

import re

import pytest
import torch
from transformers.generation import GenerationMixin

from gp_spectral import grpo, ppo, sft, stages
from gp_spectral.env import GeneralPoints, hand_splits
from gp_spectral.grpo import GRPOConfig, train_grpo
from gp_spectral.models import load_model
from gp_spectral.preset import load_preset
from gp_spectral.stages import Study
from test_ppo import plant

LITTLE = dict(
    sft_steps=2,
    sft_points=1,
    sft_examples=40,
    sft_hands=12,
    sft_batch=8,
    ppo_starts="1.0",
    ppo_iterations=2,
    ppo_samples=24,
    ppo_minibatch=24,
    ppo_epochs=1,
    curve_problems=24,
    test_problems=30,
    retry_problems=8,
    forced_problems=8,
    sampled_problems=4,
    test_attempts=2,
    sft_splits="train",
    rl_splits="train",
    rl_hands="unseen",
    twins="constant worked rft",
)
ASKED = re.compile(r"J Q K = (\d+) (\d+) (\d+) ; target \d+ ; cards ((?:[\dAJQK]+ )+)")


def hand(text):
    "The numbers of the cards of a prompt, sorted, under the rule that it tells."
    *faces, cards = ASKED.search(text).groups()
    numbers = dict(zip("JQK", map(int, faces))) | {"A": 1}
    return tuple(sorted(numbers[c] if c in numbers else int(c) for c in cards.split()))


class Audit:
    "Takes down by name which hands go into a model."

    def __init__(self, monkeypatch):
        self.found, self.name, self.tokenizer = {}, [], load_model("tiny")[1]
        audit, end = self, self.tokenizer.eos_token_id

        def generate(model, input_ids, **kwargs):
            audit.take(input_ids, "asked")
            return torch.cat([input_ids, torch.full((len(input_ids), 1), end)], 1)  # all answers are empty

        monkeypatch.setattr(GenerationMixin, "generate", generate)
        self.wrap(monkeypatch, ppo.Learner, "roll_out", "rl")
        for module in (sft, ppo, grpo):
            self.wrap(monkeypatch, module, "evaluate", "curve")
        self.wrap(monkeypatch, stages, "evaluate", "judged")
        self.wrap(monkeypatch, stages, "answer_loss", "curve")
        run, loss = sft._run_trl, stages._padded

        def shown(network, tokenizer, data, *more):
            audit.found.setdefault((*audit.name, "sft"), set()).update(
                hand(r["prompt"][0]["content"] + " ") for r in data
            )
            return run(network, tokenizer, data, *more)

        def padded(rows, pad):
            audit.take([prompt for prompt, _ in rows], "asked")
            return loss(rows, pad)

        monkeypatch.setattr(sft, "_run_trl", shown)
        monkeypatch.setattr(stages, "_padded", padded)

    def take(self, rows, default):
        kind = (*self.name, default)
        self.found.setdefault(kind, set()).update(hand(self.tokenizer.decode(ids)) for ids in rows)

    def wrap(self, monkeypatch, owner, name, word):
        original = getattr(owner, name)

        def inside(*args, **kwargs):
            self.name.append(word)
            try:
                return original(*args, **kwargs)
            finally:
                self.name.pop()

        monkeypatch.setattr(owner, name, inside)

    def stage(self, name, run, *args):
        self.name.append(name)
        run(*args)
        self.name.pop()

    def of(self, stage, *word):
        "All hands of a stage of one kind."
        return set().union(*(v for k, v in self.found.items() if k[0] == stage and k[1 : 1 + len(word)] == word))


def run(audit, tmp_path, only=None, **more):
    "The stages of a small study, or those that are named, in the order in which they need each other."
    study = Study(load_preset("tiny", {k: str(v) for k, v in (LITTLE | more).items()}), tmp_path, 1)
    end = study.preset.sft_steps
    work = dict(sft=(study.sft, 0), rl=(study.rl, 0, end))
    work |= {twin: (study.twin, 0, twin) for twin in study.twins}
    work |= dict(evaluations=(study.evaluations, 0))
    for name, call in work.items():
        if only is None or name in only:
            audit.stage(name, *call)


def check_stages(audit, only=None):
    "Where each stage's hands come from."
    split = hand_splits()
    of = lambda hands: {split[h] for h in hands}
    learnt = audit.of("sft", "sft")
    wants = dict(sft=("sft",), rl=("rl",), constant=("rl",), rft=("rl",), worked=("sft",))
    for name, word in wants.items():
        if only is None or name in only:
            hands, curve = audit.of(name, *word), audit.of(name, "curve")
            assert hands and of(hands) == {"train"}, (name, of(hands))
            if name != "sft":
                assert not hands & learnt, f"{name} is given hands that SFT has learnt"
            seen = hands if name in ("sft", "worked") else set()  # the curve of those has hands of training beside
            assert of(curve - seen) == {"validation"} and curve - seen, (name, of(curve - seen))
            assert curve & seen or not seen, f"no hand of the training in the curve of {name}"
    if only is None or "evaluations" in only:
        assert of(audit.of("evaluations", "judged")) == {"test"}
        assert of(audit.of("evaluations", "curve")) == {"validation"}


def check_apart(audit):
    "Nobody meets: hands of training, of curves (but for those shown as seen), and of the judgement."
    learnt = set().union(*(v for k, v in audit.found.items() if k[1] in ("sft", "rl")))
    judged, curve = audit.of("evaluations", "judged"), set()
    for k, v in audit.found.items():
        curve |= v if "curve" in k else set()
    assert learnt and judged and curve and not learnt & judged and not curve & judged
    apart = audit.of("evaluations", "curve") | audit.of("rl", "curve")
    assert apart and not apart & learnt


def test_no_hand_is_in_two_splits():
    "However the splits are made: each hand has one, and the seed of the shipped model is that of a game."
    for n in (2, 3, 4):
        split = hand_splits(n)
        assert set(split.values()) == {"pretrain", "train", "validation", "test"}
        game = GeneralPoints("faces_as_rank", n_cards=n, target=(1, 30) if n < 4 else 24)
        for name in set(split.values()):
            assert {split[tuple(sorted(p.numbers))] for p in game.problems(name, 40)} == {name}


def test_a_study_keeps_its_hands_apart(tmp_path, monkeypatch):
    audit = Audit(monkeypatch)
    run(audit, tmp_path)
    check_stages(audit)
    check_apart(audit)
    assert audit.of("rl", "rl") == audit.of("constant", "rl") == audit.of("rft", "rl")  # the twins' prompts are RL's
    assert audit.of("worked", "sft") <= audit.of("rl", "rl")


def test_grpo_learns_on_training_hands_and_is_measured_on_others(tmp_path, monkeypatch):
    audit, config = Audit(monkeypatch), GRPOConfig(iterations=2, samples=8, generations=4, minibatch=8, epochs=1)
    monkeypatch.setattr(grpo.TrainerBook, "train", lambda book, trainer: audit.trained(trainer))

    def trained(trainer):
        texts = [row["prompt"][0]["content"] + " " for row in trainer.train_dataset]
        audit.found["grpo", "rl"] = {hand(text) for text in texts}
        [rounds] = [c for c in trainer.callback_handler.callbacks if isinstance(c, grpo._Rounds)]
        rounds.book.add_curve(rounds.measure(trainer.model, 0))

    audit.trained, task = trained, GeneralPoints()
    audit.stage("grpo", lambda: train_grpo("tiny", tmp_path, task, config, {"ID": task}, n_eval=24, progress=False))
    split = hand_splits()
    assert {split[h] for h in audit.of("grpo", "rl")} == {"train"}
    assert {split[h] for h in audit.of("grpo", "curve")} == {"validation"}


# --- bugs: (owner, function, old, new, stages)

BUGS = {
    "SFT learns what is for validation": (sft, "_worked", "'train'", "'validation'", ("sft",)),
    "SFT learns what it is judged by": (sft, "_worked", "'train'", "'test'", ("sft",)),
    "SFT's curve is of the test": (sft, "_measured", "problems('validation'", "problems('test'", ("sft",)),
    "SFT's curve is of the training": (sft, "_measured", "problems('validation'", "problems('train'", ("sft",)),
    "RL learns on the test": (ppo, "round_problems", "'train'", "'test'", ("sft", "rl")),
    "RL learns on validation": (ppo, "round_problems", "'train'", "'validation'", ("sft", "rl")),
    "RL's curve is of the training": (ppo.Learner, "measure", "'validation', n", "'train', n", ("sft", "rl")),
    "RL's curve is of the test": (ppo.Learner, "measure", "'validation', n", "'test', n", ("sft", "rl")),
    "RL is given what SFT has learnt": (stages.Unseen, "problems", "p.key not in self.seen and", "", ("sft", "rl")),
    "checkpoints are judged by validation": (
        stages.Study,
        "problems",
        "problems('test'",
        "problems('validation'",
        ("sft", "rl", "constant", "worked", "rft", "evaluations"),
    ),
    "losses are of the test": (
        stages,
        "answered",
        "problems('validation'",
        "problems('test'",
        ("sft", "rl", "constant", "worked", "rft", "evaluations"),
    ),
}


# the others weekly: each is a small study
A_FEW = [name if i % 4 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(BUGS)]


@pytest.mark.parametrize("name", A_FEW)
def test_a_leak_is_caught(name, tmp_path, monkeypatch):
    owner, function, old, new, only = BUGS[name]
    plant(monkeypatch, owner, function, old, new)
    audit = Audit(monkeypatch)
    run(audit, tmp_path, only)
    with pytest.raises(AssertionError):
        check_stages(audit, only)
