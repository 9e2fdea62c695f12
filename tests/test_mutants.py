"The list of mutants can be planted as it stands; that they die is seen by `python tests/mutants.py`."

import pytest

import mutants


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_mutant_can_be_planted(name, monkeypatch):
    *bug, tests = mutants.MUTANTS[name]
    mutants.plant_everywhere(monkeypatch, *bug)
    file, _, test = tests.partition("::")
    assert f"def {test}" in (mutants.Path(mutants.__file__).parent / file).read_text()


def test_a_mutant_dies_and_another_lives(monkeypatch):
    alive = ("sft", "", "pick", "int(curve", "int(+curve", mutants.PICK)
    dead = mutants.MUTANTS["the latest best is picked"]
    monkeypatch.setattr(mutants, "MUTANTS", dict(dead=dead, alive=alive))
    assert [mutants.lives(m) for m in (dead, alive)] == [0, 1]
    assert mutants.main(["alive"]) == 1 and mutants.main(["dead"]) == 0
    monkeypatch.setattr(mutants, "EQUIVALENT", dict(alive="a plus"))
    assert mutants.main(["alive"]) == 0
