"""The script that proves things on a GPU, rehearsed without one: what it says is said once it is needed, not tried
for the first time then."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def check(*words, **env):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    import gpu_check

    yield gpu_check
    sys.path.remove(str(SCRIPT.parent))


# the trainings take minutes: with --slow, and so in the weekly job
LONG = [pytest.param(part, marks=pytest.mark.slow) for part in ("right", "smollm2", "training", "large")]


@pytest.mark.parametrize("part", ["spectral", *LONG])
def test_rehearsal(tmp_path, part):
    done = check("--out", tmp_path, "--rehearse", "--only", part, "--minutes", 8)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / f"{part}.json").read_text())
    said = json.loads(next(l for l in done.stdout.splitlines() if l.startswith('{"part"')))
    assert result["done"] and said["part"] == part and result["rows"] and result["torch"]
    assert f"## {part}" in (tmp_path / "results.md").read_text()
    if part == "right":
        assert all(r["right"] for r in result["rows"]) and len(result["rows"]) >= 10
    if part == "smollm2":
        assert {"evaluations", "angles", "recovery", "ppo_log", "taught_curve", "claims"} <= {
            f.stem for f in (tmp_path / "tables").glob("*.parquet")
        }
        assert set(pd.read_parquet(tmp_path / "tables/evaluations.parquet").seed) == {0, 1}
    begun = (tmp_path / f"{part}.json").stat().st_mtime_ns
    assert check("--out", tmp_path, "--rehearse", "--only", part).returncode == 0
    assert (tmp_path / f"{part}.json").stat().st_mtime_ns == begun  # what is complete is not run again


def test_a_part_is_stopped_when_its_time_is_up(tmp_path):
    done = check("--out", tmp_path, "--rehearse", "--only", "smollm2", "--minutes", 0.2)
    assert done.returncode == 1 and "stopped after 12 s" in done.stdout
    assert json.loads((tmp_path / "smollm2.json").read_text())["ended"] == "stopped after 12 s"
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in left  # and nothing that it started goes on


def test_numbers_that_differ_are_not_passed_over(tmp_path, script):
    script.keep(tmp_path, "right", [dict(what="σ", measured=1.0, at_most=1e-6, right=False)], done=True)
    done = check("--out", tmp_path, "--rehearse", "--only", "right")
    assert done.returncode == 1 and "NOT AS IT SHOULD BE  right: σ" in done.stdout


def test_a_rehearsal_is_no_proof(tmp_path, script):
    script.keep(tmp_path, "right", [dict(what="σ", right=True)], done=True, rehearsal=False, set=[])
    done = check("--out", tmp_path, "--rehearse", "--only", "right")
    assert done.returncode == 1 and "give another --out" in done.stderr


def test_pieces_are_put_together(tmp_path, script, monkeypatch):
    folder, whole = tmp_path / "pack", bytes(range(256)) * 50
    folder.mkdir()
    monkeypatch.setattr(script, "PIECE", 5000)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(whole)
    script.cut(gguf, folder)
    assert len(list(folder.glob("model.gguf.*"))) == 3
    (folder / "model.gguf.01").rename(tmp_path / "later")
    said = check("--unpack", folder)
    assert said.returncode == 0 and "still to come: model.gguf.01" in said.stdout and not (folder / "models").exists()
    (folder / "model.gguf.01").write_bytes(b"not this")
    said = check("--unpack", folder)
    assert said.returncode and "model.gguf.01" in said.stderr and not (folder / "models").exists()
    (tmp_path / "later").replace(folder / "model.gguf.01")
    assert "GP_SPECTRAL_MODELS" in check("--unpack", folder).stdout
    assert (folder / "models/model.gguf").read_bytes() == whole


def test_the_wheels_have_versions(script):
    assert set(script.WHEELS) <= set(script.pinned())


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_without_a_gpu_it_says_what_can_be_done(tmp_path):
    done = check("--out", tmp_path)
    assert done.returncode == 1 and "--rehearse" in done.stderr
