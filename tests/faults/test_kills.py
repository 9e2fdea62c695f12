"""A few kills in each run, of the command that no other test kills; a hundred over all of them with --slow.

The figures: `python -m tests.faults.kills --kills 100`. Other kills are in test_survival (sft, ppo), test_study,
test_compare and test_recovery (recover, search)."""

import json
import subprocess
import sys

import pytest

from .kills import COMMANDS


def run(tmp_path, *words):
    "The kills in a process of their own, which forks."
    command = [sys.executable, "-m", "tests.faults.kills", "--keep", str(tmp_path / "rows.json"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((tmp_path / "rows.json").read_text())["commands"]


def test_a_sweep_is_killed_starved_and_started_twice(tmp_path):
    [row] = run(tmp_path, "--commands", "sweep", "--kills", "3")
    assert row["kills"] == 3 and row["full"] >= 1 and not row["hidden_bytes"]


@pytest.mark.slow
def test_every_command_is_killed(tmp_path):
    rows = run(tmp_path, "--kills", "100")
    assert sum(row["kills"] for row in rows) == 100 and {row["command"] for row in rows} == {*COMMANDS}
    assert all(row["full"] >= 1 for row in rows) and sum(row["went_on"] for row in rows) > 20
