"The solver against brute force, the parser against known values, the verifier against whatever comes."

import random
import re
import time
from collections import Counter
from fractions import Fraction
from itertools import permutations
import pytest
from gp_spectral.env import (
    FormulaError,
    GeneralPoints,
    Problem,
    RULES,
    STYLES,
    card_numbers,
    evaluate_formula,
    hand_splits,
    judge,
    read_compact,
    solve,
    steps_to,
    verify,
)


def reachable(numbers):
    "Every value that two numbers after another can make, without any memory or normal form."
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for c in (a + b, a - b, a * b, *([a / b] if b else [])):
            found |= reachable([c, *rest])
    return found


@pytest.mark.parametrize("seed", range(12))
def test_solver_against_brute_force(seed):
    rng = random.Random(seed)
    numbers = [rng.randint(1, 13) for _ in range(rng.choice((2, 3, 3, 4)))]
    values = reachable([Fraction(n) for n in numbers])
    for target in {0, 1, 24, *rng.sample([v for v in values if v.denominator == 1], 3)}:
        found = solve(numbers, target)
        assert bool(found) == (target in values), (numbers, target)
        assert len(set(found)) == len(found)
        for f in found:
            assert evaluate_formula(f) == target
            assert (
                judge(
                    Problem(tuple(str(n) if n > 1 else "A" for n in numbers if n <= 10), target=int(target)), f
                ).solved
                or max(numbers) > 10
            )


def test_solutions_are_different_formulas():
    assert solve([6, 6, 6, 6]) == sorted(set(solve([6, 6, 6, 6])))
    assert solve([2, 3, 4]) == ["2 * 3 * 4"] or "4 * 3 * 2" in solve(
        [2, 3, 4]
    )  # one product, whatever the order of its factors
    assert sum("*" in s and "+" not in s and "-" not in s and "/" not in s for s in solve([2, 3, 4])) == 1


def random_formula(rng, depth):
    "(text, value, is a sum) of a random formula."
    if depth == 0 or rng.random() < 0.2:
        n = rng.randint(0, 99)
        return str(n), Fraction(n), 0
    (a, x, p), (b, y, q) = random_formula(rng, depth - 1), random_formula(rng, depth - 1)
    op = rng.choice("+-*/")
    if op == "/" and y == 0:
        op = "*"
    rank = 1 if op in "*/" else 2  # 0 number, 1 product, 2 sum
    if p > rank:
        a = f"({a})"
    if q >= rank:
        b = f"({b})"
    return f"{a}{rng.choice(['', ' '])}{op}{b}", {"+": x + y, "-": x - y, "*": x * y}[op] if op != "/" else x / y, rank


@pytest.mark.parametrize("seed", range(200))
def test_parser_against_known_values(seed):
    text, value, _ = random_formula(random.Random(seed), 4)
    if len(text) <= 200:
        assert evaluate_formula(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "()",
        "1+",
        "*1",
        "1 2",
        "1..2",
        "1e9",
        "0x10",
        "1//2",
        "2**3",
        "a",
        "1+(2",
        "1)+2",
        "9999999",
        "1/0",
        "1/(2-2)",
        "١+١",
        "²",
        "1,000",
        "__import__('os').system('true')",
        "lambda: 1",
        "\x00",
        "1\n+",
        "(" * 199,
        "-1",
        "+1",
        "1=1",
    ],
)
def test_parser_refuses(text):
    with pytest.raises(FormulaError):
        evaluate_formula(text)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(60))
def test_any_text_has_an_answer(style, seed):
    rng, task = random.Random(seed), GeneralPoints("faces_as_rank", style=style)
    problem = task.problems("train", 1, seed)[0]
    try:
        right = task.answer(problem, seed)
    except ValueError:
        right = "1 + 1 = 2"
    assert verify(problem, right, style).solved or right == "1 + 1 = 2"
    text = list(right)
    for _ in range(rng.randint(1, 12)):  # a right answer, damaged
        i = rng.randrange(len(text) + 1)
        text[i : i + rng.randint(0, 3)] = rng.choice(
            [[], list("24"), ["("], [";"], ["="], ["\u0000"], list("formula"), ['"'], ["½"]]
        )
    feedback = verify(problem, "".join(text), style)
    assert (
        feedback.solved == (feedback.reward == 5) and isinstance(feedback.message, str) and len(feedback.message) < 500
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("unit", ["(", "1+", "formula", '"formula": "1+', ";1 + 1 = 2", "9", "\n", "{"])
def test_time_is_linear(style, unit):
    problem = Problem(("4", "6", "A", "A"))

    def seconds(n):
        text, best = (unit * n)[:n], 9.0
        for _ in range(3):
            start = time.perf_counter()
            verify(problem, text, style)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(4_000_000) < 10 * seconds(1_000_000) + 0.02  # a quadratic reader takes sixteen times as long


def test_every_dealt_hand_belongs_to_its_split_and_rule():
    for rule in RULES:
        for split in ("pretrain", "train", "validation", "test"):
            for p in GeneralPoints(rule).problems(split, 50):
                numbers = tuple(sorted(card_numbers(p.cards, rule)))
                assert hand_splits()[numbers] == split and solve(numbers) and p.numbers == card_numbers(p.cards, rule)


def test_step_solutions_are_solutions():
    task = GeneralPoints("faces_as_rank")
    for i, p in enumerate(task.problems("train", 80)):
        if steps_to(tuple(sorted(p.numbers)), 24):
            assert task.verify(p, task.answer(p, i)).solved
        else:
            assert any("/" in s for s in solve(p.numbers))


@pytest.mark.parametrize(
    "after", ["", "\n}\nThis formula uses each card once.", "\n}\nThe formula: it uses each card once.", "\n} formula"]
)
@pytest.mark.parametrize("key", ['"formula": ', '"formula" :\n    ', "'formula': ", "formula: "])
def test_what_follows_an_answer_is_no_answer(key, after):
    problem = Problem(("3", "3", "8", "8"))
    expected = verify(problem, f'{{{key}"8/(3-8/3)=24"{after}', "paper").solved
    assert expected or (key == "formula: " and "formula: it" in after)  # of two bare keys the last one counts


def test_zero_times_anything_is_zero():
    assert {"(3 + 2) * (1 - 1)", "(1 - 1) / (3 + 2)"} <= set(solve([1, 1, 2, 3], 0))


def test_what_the_judge_objects_to():
    "Numbers that come too often, an open formula of other numbers, and a step that claims what it does not give."
    problem = Problem(("3", "3", "8", "8"))
    assert judge(problem, "8/(3-8/3)+3-3").error == "wrong_number"  # right in value, and nothing is left over
    open_one, foreign = judge(problem, "8/(3-8/3"), judge(problem, "(4*6")
    assert (open_one.reward, open_one.message) == (1, "partial solution") and foreign.reward == -3 - 2 - 2
    believed = "3 3 8 8 = 3 3 8 8 ; 3 + 3 = 16 ; 16 8 8 ; 16 + 8 = 24 ; 24 8 ; 24 * 8 = 192"
    said = judge(problem, read_compact(problem, believed))
    assert said == verify(problem, believed) and said.error == "wrong_number"
    assert "invalid numbers: [16]" in said.message
    with pytest.raises(FormulaError, match="401 characters"):
        evaluate_formula("1" + "+1" * 200)


def test_solve_takes_integers():
    with pytest.raises(ValueError, match="2.7"):
        solve([2.7, 2, 2, 3])
    assert solve([2.0, 3.0, 4.0]) == solve([2, 3, 4])


HAND = Problem(("J", "5", "A", "Q"), faces=(11, 12, 13))
PAPER = "{{\n  \"cards\": ['J', '5', 'A', 'Q'],\n  \"number\": [{}],\n  \"formula\": \"{}\",\n}}"
FAULTY = [
    ("compact", "", "form"),
    ("compact", "24", "form"),
    ("compact", "J 5 A Q = 11 5 1 12", "form"),  # no step
    ("compact", "J 5 A Q = J 5 A Q ; 11 - 1 = 10", "form"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 - 1 = ten", "form"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 - 1 = 10 ; five 10 12", "form"),
    ("compact", "J 5 A Q = 10 5 1 10 ; 10 + 10 = 20 ; 1 5 20 ; 20 + 5 = 25 ; 1 25 ; 25 - 1 = 24", "reading"),
    ("compact", "J 5 A Q = 11 5 2 12 ; 11 - 1 = 10", "reading"),  # not a face, and yet not what was told
    ("compact", "J 5 Q = 11 5 12 ; ?", "reading"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 - 10 = 1", "bookkeeping"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 5 + 5 = 10", "bookkeeping"),  # it has one 5
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 - 1 = 10 ; 5 10 10", "bookkeeping"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 - 1 = 10 ; 5 10", "bookkeeping"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 - 1 = 10 ; 5 10 12 ; 10 * 12 = 110", "arithmetic"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 / 5 = 2", "arithmetic"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 12 + 11 = 23 ; 1 5 23 ; 23 + 1 = 24 ; 5 24 ; 5 + 24 = 24", "search"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 12 + 11 = 23 ; 1 5 23 ; 23 + 1 = 24 ; 5 24 ; 5 + 24 = 28", "arithmetic"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 12 + 11 = 24 ; 1 5 24", "arithmetic"),  # not the last step
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 - 1 = 10 ; 10 - 5 = 5 ; 5 - 5 = 0", "bookkeeping"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 5 - 5 = 0 ; 11 / 0 = 0", "bookkeeping"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 12 + 11 = 23 ; 1 5 23 ; 23 + 1 = 24", "search"),  # the 5 is left over
    ("compact", "J 5 A Q = 11 5 1 12 ; 5 - 11 = -6", "search"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 + 12 = 23 ; 23 + 5 = 28 ; 28 - 1 = 27 ; 27", "search"),
    ("compact", "J 5 A Q = 11 5 1 12 ; 11 - 1 = 10 ; 5 10 12 ; 12 * 10 = 120 ; 5 120 ; 120 / 5 = 24", ""),
    ("compact", "? ; 11 - 1 = 10 ; 12 * 10 = 120 ; 120 / 5 = 42 ; ?", ""),  # forgiven
    ("paper", "", "form"),
    ("paper", PAPER.format("11, 5, 1, 12", "(11-1)*12/"), "form"),
    ("paper", PAPER.format("11, 5, 1, 12", "(11-1)*12/5=24").replace("formula", "idea"), "form"),
    ("paper", PAPER.format("J, 5, A, Q", "11+12"), "form"),
    ("paper", PAPER.format("10, 5, 1, 10", "10+10+5-1=24"), "reading"),
    ("paper", PAPER.format("11, 5, 1, 12", "10+10+5-1=24"), "bookkeeping"),
    ("paper", PAPER.format("11, 5, 1, 12", "12+11+1=24"), "bookkeeping"),
    ("paper", PAPER.format("11, 5, 1, 12", "12+11+5-1=24"), "search"),
    ("paper", PAPER.format("11, 5, 1, 12", "(11-1)*12/5=24"), ""),
    ("paper", PAPER.format("10, 5, 1, 10", "(11-1)*12/5=42"), ""),  # forgiven
]


@pytest.mark.parametrize("style, text, fault", FAULTY)
def test_the_first_fault(style, text, fault):
    task = GeneralPoints("faces_as_rank", style=style)
    assert task.fault(HAND, text) == fault
    assert task.verify(HAND, text).solved == (not fault)


def test_division_by_zero_is_arithmetic():
    hand, task = Problem(("5", "5", "A", "2")), GeneralPoints()
    assert task.fault(hand, "5 5 A 2 = 5 5 1 2 ; 5 - 5 = 0 ; 2 / 0 = 0") == "arithmetic"


@pytest.mark.parametrize("style", STYLES)
def test_what_an_answer_takes_its_cards_for(style):
    task = GeneralPoints("faces_as_rank", style=style)
    write = lambda numbers: (
        PAPER.format(numbers.replace(" ", ", "), "1+1") if style == "paper" else f"J 5 A Q = {numbers} ; 1 + 1 = 2"
    )
    told = {"11 5 1 12": True, "11 9 9 12": True, "10 5 1 12": False, "12 5 1 11": False, "11 5 12": False}
    for numbers, read in told.items():
        assert task.reading(HAND, write(numbers)) == [int(n) for n in numbers.split()]
        assert task.read_as_told(HAND, write(numbers)) is read
    for unclear in ("", "J 5 A Q", "11 5 1 1234567", "١١ 5 1 12"):
        assert task.reading(HAND, write(unclear)) is None and not task.read_as_told(HAND, write(unclear))
    assert task.read_as_told(Problem(("2", "5", "A", "10")), write("9"))  # no face, nothing to misread
    for problem in task.problems("train", 20):
        begun = task.forced(problem)
        assert task.reading(problem, begun) == list(problem.numbers) and task.read_as_told(problem, begun)
        try:
            assert task.answer(problem).startswith(begun)
        except ValueError:
            continue


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(40))
def test_no_fault_is_a_solution(style, seed):
    "Whatever the text: of right answers with words put elsewhere, some are still solved."
    rng, task = random.Random(seed), GeneralPoints("faces_as_rank", style=style, n_cards=3, target=(1, 30))
    problem = next(p for p in task.problems("train", 50, seed) if steps_to(tuple(sorted(p.numbers)), p.target))
    for _ in range(60):
        words = re.split(r"(\W+)", task.answer(problem, rng.random()))
        for _ in range(rng.randint(0, 3)):
            i, j = (rng.randrange(len(words)) for _ in "ij")
            words[i] = rng.choice([words[j], "", "9", "½", ";", "=", "\x00", "24"])
        text = "".join(words)
        fault, feedback = task.fault(problem, text), task.verify(problem, text)
        assert (fault == "") == feedback.solved and isinstance(task.read_as_told(problem, text), bool), text
        assert fault != "search" or task.reading(problem, text) == list(problem.numbers)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "unit", ["(", "number", '"number": [', '"number": [1', "= 1 ", "; 1 ", ";1 + 1 = 2", "1,", "\n"]
)
def test_faults_take_linear_time(style, unit):
    task = GeneralPoints("faces_as_rank", style=style)

    def seconds(n):
        text, best = (unit * n)[:n], 9.0
        for _ in range(3):
            start = time.perf_counter()
            assert task.fault(HAND, text) in ("form", "reading", "bookkeeping")
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(2_000_000) < 10 * seconds(500_000) + 0.02


@pytest.mark.parametrize("wrong", [(), ("test",), ("train", "validation"), ("exam",), "train"])
def test_training_is_dealt_from_no_split_of_the_tests(wrong):
    with pytest.raises(ValueError, match="'train', 'pretrain' or both"):
        GeneralPoints(train_splits=wrong)


def test_training_from_two_splits():
    both, order = (GeneralPoints(train_splits=s) for s in (("pretrain", "train"), ("train", "pretrain")))
    assert repr(both) == repr(order) and "train_splits=('pretrain', 'train')" in repr(both)
    assert "train_splits" not in repr(GeneralPoints(train_splits=["train"]))
    one = GeneralPoints()
    splits = hand_splits()
    dealt = Counter(splits[tuple(sorted(p.numbers))] for p in both.problems("train", 300))
    assert set(dealt) == {"pretrain", "train"} and dealt["pretrain"] > dealt["train"]
    for split in ("pretrain", "validation", "test"):
        assert both.problems(split, 20, 3) == one.problems(split, 20, 3)


@pytest.mark.parametrize("rule", RULES)
def test_evenly_dealt_hands(rule):
    task = GeneralPoints(rule, target=(10, 40))
    dealt = task.problems("test", 500, even=True)
    counts = Counter(p.key for p in dealt)
    assert len(counts) == len({p.key for p in task.problems("test", 20_000)})
    assert (
        max(counts.values()) - min(counts.values()) == 1 == Counter(p.key for p in dealt[: len(counts)])[dealt[0].key]
    )
    assert dealt == task.problems("test", 500, even=True) != task.problems("test", 500, 1, even=True)
    assert all(solve(p.numbers, p.target) for p in dealt) and len({p.target for p in dealt}) > 20
    assert all(hand_splits()[tuple(sorted(p.numbers))] == "test" for p in dealt)
    cards = Counter(c for p in dealt for c in p.cards)
    assert set(cards) == set("A 2 3 4 5 6 7 8 9 10 J Q K".split())  # also J, Q and K where they count as 10
    few = Counter(p.key for p in task.problems("train", 30, distinct=7, even=True))
    assert sorted(few.values()) == [4] * 5 + [5] * 2
