"The domains beside the card game: whatever an answer is, a verdict comes; the study plays them unchanged."

import random
import sys
from itertools import combinations
from pathlib import Path
import pytest
from made import add_package
from gp_spectral.domains import DOMAINS, Alphabet, Countdown, Operators, StatedProblem, Units, final_number
from gp_spectral.env import SPLITS, FormulaError
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


def test_no_number_of_a_school_answer_is_cut_in_two():
    with pytest.raises(FormulaError, match="no number behind"):
        final_number(" " * 19_993 + "#### 2722")  # 27, where it is cut


SCHOOL = {"#### 34": 34, "#### 34.": 34, "#### 34.0 miles": 34, "#### 34.5": 34.5, "####-1,234": -1234}
SCHOOL |= dict.fromkeys(["#### 34/2", "#### 3.4.5", "#### 34 #### x", "34", "#### " + "9" * 40])


@pytest.mark.parametrize("text", SCHOOL)
def test_a_school_answer_is_read_whole_or_not_at_all(text):
    if SCHOOL[text] is None:
        with pytest.raises(FormulaError, match="no number behind"):
            final_number(text)
    else:
        assert final_number(text) == SCHOOL[text]


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


THREE, SIGNS = StatedProblem((3, 6, 7), "-", 10), StatedProblem((7, "#", 3, "+", 5), "*")
EGGS, SORT = StatedProblem((3, True, "+", 4, False), 10), StatedProblem(("c", "a", "f"), tuple(range(8, 0, -1)))


@pytest.mark.parametrize(
    "problem, text, error, fault",
    [
        (THREE, "@ = - ; 7 @ 3 = 4 ; 4 6 ; 6 + 4 = 10", "", ""),
        (THREE, "@ = - ; 7 @ 3 = 99 ; 6 + 4 = 11", "", ""),  # what steps claim is not believed
        (THREE, "@ = - ; 7 + 3 = 10", "wrong_value", "bookkeeping"),  # a number is left over, and the sign
        (StatedProblem((3, 6, 7), "-", 4), "@ = - ; 7 @ 3 = 4", "wrong_value", "bookkeeping"),  # 6 is left over
        (THREE, "@ = - ; 7 @ 3 = 4 ; 7 @ 3 = 4 ; 6 + 4 = 10", "wrong_value", "bookkeeping"),
        (THREE, "@ = - ; 6 @ 3 = 3 ; 7 + 3 = 10", "", ""),
        (StatedProblem((3, 6, 7), "-", 16), "@ = - ; 7 + 3 = 10 ; 10 + 6 = 16", "wrong_value", "bookkeeping"),
        (THREE, "@ = - ; 7 @ 3 = 4 ; 6 + 4 = 10 ; 1 = 1", "format", "form"),
        (THREE, "@ = - ; 9 @ 3 = 6 ; 4 = 4", "format", "form"),
        (THREE, "@ = - ; 7 @ 6 = 1 ; 3 + 1 = 4", "wrong_value", "search"),
        (THREE, "7 @ 3 = 4", "format", "form"),
        (SIGNS, "7 * 3 + 5 ; 7 * 3 = 21 ; 21 + 5 = 26", "", ""),
        (SIGNS, "7 + 3 + 5 ; 7 + 3 = 10 ; 10 + 5 = 15", "wrong_rule", "reading"),
        (SIGNS, "7 * 3 + 5 ; 7 * 3 = 21 ; 21 + 5 =" + " " * 1965 + "267", "format", "form"),
        (EGGS, "dozen = 10 ; 3 * 10 = 30 ; 30 + 4 = 34 ; #### 34", "", ""),
        (EGGS, "dozen = 12 ; 3 * 12 = 36 ; 36 + 4 = 40 ; #### 40", "wrong_rule", "reading"),
        (SORT, "c a f = 6 8 3 ; 3 6 8 ; f c a", "", ""),
        (SORT, "c a f = 3 1 6 ; 1 3 6 ; a c f", "wrong_rule", "reading"),
    ],
)
def test_verdicts_by_hand(problem, text, error, fault):
    task = {THREE.meaning: Countdown("minus"), "*": Operators("times"), 10: Units("ten")}.get(
        problem.meaning, Alphabet("backwards")
    )
    assert (task.verify(problem, text).error, task.fault(problem, text)) == (error, fault)
    assert task.read_as_told(problem, text) == (fault != "reading" and ";" in text)


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=list(DOMAINS))
def test_no_hand_is_in_two_splits(domain):
    "Under either rule, and half of them are for pretraining."
    one, other = (domain(rule) for rule in domain.RULES)
    hands = {s: set(one.dealt(s)) for s in SPLITS}
    for a, b in combinations(hands, 2):
        assert not hands[a] & hands[b]
    assert all(
        hands[s] == set(other.dealt(s)) == set(domain(train_splits=("pretrain",)).dealt(s))
        for s in SPLITS
        if s != "train"
    )
    assert set(domain(train_splits=("pretrain", "train")).dealt("train")) == hands["pretrain"] | hands["train"]
    total = sum(map(len, hands.values()))
    assert all(
        abs(len(hands[s]) / total - (end - start)) < 4 * (0.25 / total) ** 0.5 for s, (start, end) in SPLITS.items()
    )


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


@pytest.mark.filterwarnings("ignore:the tokenizer has no token")
def test_the_player_deals_other_domains_too():
    "Its fields say the problem; under the other rule it is the same hand; what cannot be is told in words."
    from gp_spectral.player import player_widget

    preset = load_preset("tiny-domains", dict(task="countdown"))
    tasks = preset.tasks()
    deck = {rule: task.problems("test", 3, 0, even=True) for rule, task in tasks.items()}
    (top, below, about, talk) = player_widget({"a": "tiny"}, tasks, deck).children
    rule, (cards, target, step) = top.children[1], below.children
    assert (cards.value, target.value) == (deck["ID"][0].key, str(deck["ID"][0].target))
    assert "begins with @ = *" in about.value and "split test" in about.value and "numbers" in talk.value
    cards.value = "1 1 1"
    assert target.value and "target" in about.value and "reaches" in about.value  # three ones do not reach it
    target.value = "2"
    rule.value = "OOD"
    assert "target 2: under this rule 1 1 1 reaches 1" in about.value
    deal = top.children[2]
    deal.click()
    assert "begins with @ = -" in about.value and cards.value == deck["OOD"][1].key
    assert not step.disabled or "Correct" in talk.value


def test_a_task_of_another_package_has_a_name(tmp_path, monkeypatch):
    "By its entry point; a name that nobody has is told beside all that there are."
    source = (
        "from gp_spectral.domains import DOMAINS, Alphabet\nclass Theirs(Alphabet): pass\nDOMAINS['theirs'] = Theirs\n"
    )
    with pytest.raises(ValueError, match="task = 'theirs': expected one of points, operators"):
        load_preset("tiny-domains", dict(task="theirs"))
    add_package(tmp_path, monkeypatch, "gp_spectral.tasks", "their_task", source)
    monkeypatch.setattr("gp_spectral.domains.DOMAINS", kept := dict(DOMAINS))
    monkeypatch.setattr("gp_spectral.preset.DOMAINS", kept)
    preset = load_preset("tiny-domains", dict(task="theirs", cards="5"))
    assert repr(preset.tasks()["OOD"]) == "Theirs('backwards', size=5)"
