"The solver against brute force, the parser against known values, the verifier against whatever comes."

import random
import time
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
    judge,
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
    from gp_spectral.env import hand_splits

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


def test_solve_takes_integers():
    with pytest.raises(ValueError, match="2.7"):
        solve([2.7, 2, 2, 3])
    assert solve([2.0, 3.0, 4.0]) == solve([2, 3, 4])
