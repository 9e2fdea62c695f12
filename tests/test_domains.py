"The domains beside the card game: whatever an answer is, a verdict comes; the study plays them unchanged."

import random
import sys
from dataclasses import replace
from pathlib import Path
import pandas as pd
import pytest
from gp_spectral.domains import DOMAINS, Countdown, Operators, Units
from gp_spectral.preset import Preset, load_preset
from gp_spectral.stages import Study

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
TASKS = [domain(rule) for domain in DOMAINS.values() for rule in domain.RULES]
WORDS = "7 3 12 0 999999999 -1 + - * / = ; #### # @ max min a b c h dozen , . ² ٣ 1e9 x".split()
FAULTS = {"", "form", "reading", "bookkeeping", "arithmetic", "search"}


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_any_text_gets_a_verdict(task):
    "Right answers in which words are changed, cut off or mixed up, and others' characters."
    rng = random.Random(0)
    for problem in task.problems("test", 400, 1):
        words = task.answer(problem).split()
        for _ in range(rng.randrange(4)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        if rng.random() < 0.3:
            rng.shuffle(words)
        text = " ".join(words[: rng.choice((len(words), len(words) // 2))]) + rng.choice(
            ("", "", ";", "\x00\n", " = 3")
        )
        feedback, fault = task.verify(problem, text), task.fault(problem, text)
        assert feedback.solved == (feedback.error == "") == (feedback.reward == 5) == (fault == "")
        assert fault in FAULTS and task.retry(feedback) and task.read_as_told(problem, text) in (True, False)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_long_answers_are_read_in_linear_time(task):
    problem = task.problems("test", 1)[0]
    for unit in ("; 1 + 1 = 2 ", "####", "a ", ";", "= "):
        assert not task.verify(problem, unit * 100_000).solved


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_right_answers_by_an_independent_evaluation(task):
    "Python's own arithmetic says the same of worked answers, and not of those to another meaning."
    mean = {"max": max, "min": min, "+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for problem in task.problems("test", 60, 3):
        parts = [p.split() for p in task.answer(problem).split(" ; ")]
        if type(task) is Operators:
            value, *rest = problem.items
            for op, b in zip(rest[::2], rest[1::2]):
                value = mean[problem.meaning if op == "#" else op](value, b)
            assert parts[-1][-1] == str(value)
        if type(task) is Units:
            total = problem.items[0] * (problem.meaning if problem.items[1] else 1)
            for op, n, of_dozens in zip(*(problem.items[i::3] for i in (2, 3, 4))):
                total = mean[op](total, n * (problem.meaning if of_dozens else 1))
            assert parts[-1] == ["####", str(total)]
        if type(task) is Countdown:
            held, signs = list(problem.items), 0
            for a, op, b, _, c in (p for p in parts[1:] if "=" in p):
                held.remove(int(a)), held.remove(int(b))
                held.append(mean[problem.meaning if op == "@" else op](int(a), int(b)))
                signs += op == "@"
                assert held[-1] == int(c)
            assert held == [problem.target] and signs
        assert task.verify(problem, task.answer(problem)).solved


def test_a_preset_names_the_domain():
    preset = load_preset("tiny-domains", dict(task="alphabet", cards="5"))
    assert [repr(t) for t in preset.tasks().values()] == [
        "Alphabet('forwards', size=5)",
        "Alphabet('backwards', size=5)",
    ]
    assert [t.rule for t in Preset().tasks().values()] == ["faces_as_ten", "faces_as_rank"]
    assert [t.rule for t in Preset(task="units", cards=3, id_rule="ten").tasks().values()] == ["ten", "ten"]
    for more, message in (
        (dict(target="10"), "target = '10': expected 24 where task is not points"),
        (dict(style="paper"), "style = 'paper': expected compact"),
        (dict(sft_rules="many"), "sft_rules = 'many': expected one"),
    ):
        with pytest.raises(ValueError, match=message):
            Preset(task="units", **more)
    with pytest.raises(ValueError, match="unknown rule 'faces_as_ten'"):
        Preset(task="units", cards=3, id_rule="faces_as_ten").tasks()
    with pytest.raises(ValueError, match="unknown size 5"):
        Preset(task="units", cards=5).tasks()


def test_stages_depend_on_the_domain_and_those_of_the_game_on_what_they_did(tmp_path):
    game = Study(load_preset("tiny"), tmp_path).depends("sft")
    assert "task" not in game and (game["id_rule"], game["ood_rule"]) == ("faces_as_ten", "faces_as_rank")
    other = Study(load_preset("tiny-domains", dict(task="countdown")), tmp_path).depends("sft")
    assert other["task"] == "countdown" and other["ood_rule"] == "minus"


def test_what_pretraining_draws(tmp_path):
    "Shares of the meanings are those that are asked for, hands those of pretraining, words all known."
    import pretrain

    tokenizer = pretrain.build_tokenizer(pretrain.DOMAIN_WORDS)
    for name, domain in DOMAINS.items():
        data = pretrain.DomainData(tokenizer, 0, domain, 3, dict(id=0.5, ood=0.5))
        drawn = [data.dealt()[0] for _ in range(200)]
        assert {p.meaning for p in drawn} == set(domain.RULES.values())
        assert {p.items for p in drawn} <= set(data.game.dealt("pretrain"))
        ids, labels = data.batch(16)
        assert tokenizer.unk_token_id not in ids and (labels != -100).any(1).all()
        for p in drawn[:20]:
            text = data.game.prompt(p) + " " + data.game.answer(p) + " " + data.wrong_answer(p)
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
            assert replace(p, meaning=p.meaning) == p and pd.notna(p.key)
