"""The game's arithmetic once more, written from its rules and sharing no line with the package: what is solved?

A formula is read by recursive descent, character by character; a compact answer by playing its steps on the table."""

import re
import sys
from collections import Counter
from fractions import Fraction

SAME = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"}


class NoFormula(Exception):
    "Not a formula."


def value(text):
    "(value, numbers used) of a formula; `NoFormula` where there is none, or it is longer than is read."
    if len(text) > 200:
        raise NoFormula
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 2000)  # four calls deep for each parenthesis
    try:
        return _value(text)
    finally:
        sys.setrecursionlimit(before)


def _value(text):
    chars = [SAME.get(c, c) for c in text.strip()]
    used, at = [], 0

    def blank():
        nonlocal at
        while at < len(chars) and chars[at].isspace():
            at += 1

    def peek():
        blank()
        return chars[at] if at < len(chars) else ""

    def number():
        nonlocal at
        first = at
        while at < len(chars) and chars[at] in "0123456789":
            at += 1
        if not 1 <= at - first <= 6:
            raise NoFormula
        used.append(int("".join(chars[first:at])))
        return Fraction(used[-1])

    def factor():
        nonlocal at
        if peek() != "(":
            return number()
        at += 1
        inner = total()
        if peek() != ")":
            raise NoFormula
        at += 1
        return inner

    def chain(part, ops):
        nonlocal at
        left = part()
        while peek() and peek() in ops:
            op = chars[at]
            at += 1
            right = part()
            if op == "/" and right == 0:
                raise NoFormula
            left = {"+": left + right, "-": left - right, "*": left * right}[op] if op != "/" else left / right
        return left

    product = lambda: chain(factor, "*/")
    total = lambda: chain(product, "+-")
    found = total()
    if peek():
        raise NoFormula
    return found, used


def solves(formula, numbers, target):
    "Whether a formula reaches the target with each of the numbers once."
    try:
        found, used = value(formula)
    except NoFormula:
        return False
    return found == target and Counter(used) == Counter(numbers)


STEP = re.compile(r"\s*([0-9]{1,6})\s+([-+*/])\s+([0-9]{1,6})\s+=\s+\S+\s*")


def played(text, numbers, target):
    """Whether what the last step of a compact answer makes reaches the target with each of the numbers once.

    None where a step is unclear. A step takes what lies on the table; a number that does not is one of its own."""
    parts = [p for p in text[:2000].split(";")[1:] if "=" in p][:8]
    table, made = [(Fraction(n), Counter([n])) for n in numbers], None
    for part in parts:
        step = STEP.fullmatch(part)
        if not step:
            return None
        taken = []
        for n in (int(step[1]), int(step[3])):
            lies = [x for x in table if x[0] == n]
            taken.append(lies[0] if lies else (Fraction(n), Counter([n])))
            if lies:
                table.remove(lies[0])
        (a, one), (b, other) = taken
        if step[2] == "/" and b == 0:
            return False
        result = {"+": a + b, "-": a - b, "*": a * b}[step[2]] if step[2] != "/" else a / b
        made = result, one + other
        table.append(made)
    return made == (Fraction(target), Counter(numbers))
