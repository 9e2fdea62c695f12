"Every kind of corrupt checkpoint, in every command that reads one: a clear error, and nothing is written."

import os
import shutil

import pytest
import torch

from gp_spectral.cli import main

from .corrupt import KINDS, good, small

COMMANDS = {
    "compare": ["compare", "base", "bad", "--out", "out"],
    "recover": ["recover", "bad", "--donor", "base", "--out", "out"],
    "recover, the donor": ["recover", "base", "--donor", "bad", "--out", "out"],
    "spectrum": ["spectrum", "bad", "--table", "out.csv"],
    "drift": ["drift", "bad", "base", "--prompts", "prompts.txt", "--table", "out.csv"],
}
# What a command does not look at cannot trouble it: spectrum shows the matrices that there are. compare counts a norm
# that is not finite among what it left out; recover tells of a matrix that only one of the two has in a note, and
# repairs the others.
UNSEEN = {("spectrum", "infinity in a norm"), ("compare", "infinity in a norm")}
UNSEEN |= {("spectrum", f"a matrix {x}") for x in ("is missing", "that is a vector", "without rows")}
UNSEEN |= {("spectrum", "integers instead of weights")}
UNSEEN |= {("recover", f"a matrix {x}") for x in ("without rows", "is missing", "that is a vector")}
# a model is loaded to see its drift, which takes its time: most kinds are tried with --slow
LOADED = {"cut in the tensors", "header of brackets", "nan in a matrix", "a pickle instead", "a shard is missing"}
LOADED |= {"a config of brackets", "a link to itself", "an adapter over itself", "an adapter of rank nought"}


def cases():
    for command in COMMANDS:
        for name in KINDS:
            slow = command == "drift" and name not in LOADED
            if (command, name) not in UNSEEN:
                yield pytest.param(command, name, marks=pytest.mark.slow if slow else ())


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "A folder with a good model, and prompts."
    root = tmp_path_factory.mktemp("corrupt")
    small(root / "base")
    (root / "prompts.txt").write_text("".join(f"cards {c} 5 A 3\n" for c in "J Q K 7".split()))
    return root


def contents(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def test_there_are_many_kinds():
    assert len(KINDS) >= 20 and {of for *_, of in KINDS.values()} == {"model", "shards", "adapter"}


@pytest.mark.parametrize("of", ["model", "shards", "adapter"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_damaged_is_read(command, of, room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    good(room / "bad", of, room / "base")
    try:
        assert main([f"out-{of}-{command}.csv" if w in ("out", "out.csv") else w for w in COMMANDS[command]]) == 0, (
            capsys.readouterr().err
        )
    finally:
        shutil.rmtree(room / "bad")


@pytest.mark.parametrize("command, name", [*cases()])
def test_a_corrupt_checkpoint_is_refused(command, name, room, monkeypatch, capsys):
    damage, words, of = KINDS[name]
    monkeypatch.chdir(room)
    damage(good(room / "bad", of, room / "base"))
    before = contents(room)
    try:
        code = main(COMMANDS[command])  # whatever is raised through it would be a traceback
        said = capsys.readouterr().err
        assert contents(room) == before
    finally:
        shutil.rmtree(room / "bad")
        shutil.rmtree(room / "out", ignore_errors=True)
    assert code == 2 and "Traceback" not in said
    error = next(line for line in said.splitlines() if line.startswith("gp-spectral "))
    told = said[said.index(error) :]
    assert all(word in told for word in (words if command != "drift" else [])), told[:600]
    assert len(told) < 3000, told[:600]
    assert not os.path.exists("/tmp/gp_spectral_was_here") and torch.get_default_dtype() == torch.float32
