"Large tables take time in proportion; the figures: `python -m tests.faults.growth`."

import pytest

from .growth import BOUND, LARGE, measured

QUICK = {"open a checkpoint"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LARGE])
def test_growth_is_linear(name):
    assert measured(name)["ratio"] < BOUND
