"The study as a program: killed at any moment it goes on, and bad settings are refused before anything is written."
import os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd, pytest
from gp_spectral.study import main

LITTLE = dict(test_problems=24, retry_problems=8, curve_problems=16, sft_steps=6, sft_points=2, sft_examples=64, ppo_iterations=3, ppo_samples=24, ppo_minibatch=24, tops="0.2",
              recovery_problems=16, test_attempts=2)
COMMAND = ["study", "--seeds", "1", *(x for k, v in LITTLE.items() for x in ("--set", f"{k}={v}"))]

def start(out):
    "The study in a process of its own, always with the same number of threads: other tests may have changed theirs."
    with open(out / "log.txt", "a") as log:
        return subprocess.Popen([sys.executable, "-m", "gp_spectral.study", *COMMAND, "--out", str(out)], stdout=log, stderr=log, cwd=out)

def complete(out):
    assert start(out).wait() == 0, (out / "log.txt").read_text()[-3000:]

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    complete(out)
    return out / "tiny"

@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_it_goes_on(finished, tmp_path, kills):
    for moment in range(kills):
        process, begun = start(tmp_path), time.time()
        while process.poll() is None and time.time() - begun < 6 + 25 * (moment + 1) / kills: time.sleep(0.2)
        if process.poll() is not None: break
        process.send_signal(signal.SIGKILL); process.wait()
    complete(tmp_path)
    for name in ("evaluations", "sigma", "angles", "recovery", "sft_curve", "ppo_curve"):
        a, b = (pd.read_parquet(root / "tables" / f"{name}.parquet") for root in (finished, tmp_path / "tiny"))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert not list(tmp_path.rglob("*.part"))

def test_report_opens_offline(finished):
    page = (finished / "report.html").read_text()
    assert "src='http" not in page and "href=" not in page and "<script" not in page and page.count("<img") == 6

@pytest.mark.parametrize("arguments, message", [
    (["study", "--preset", "huge"], "unknown preset 'huge'"), (["study", "--set", "sft_stepz=3"], "unknown key 'sft_stepz'"),
    (["study", "--set", "sft_steps"], "KEY=VALUE"), (["study", "--set", "sft_lr=fast"], "sft_lr = 'fast'"), (["study", "--set", "model=nowhere"], "nowhere is not a folder"),
    (["study", "--seeds", "0"], "at least 1"), (["evaluate", "nowhere"], "nowhere is not a folder"), (["angles", "nowhere"], "at least two"),
    (["angles", "nowhere", "either"], "nowhere is not a folder"), (["spectrum", "nowhere"], "nowhere is not a folder"), (["sft", "nowhere", "out"], "nowhere is not a folder")])
def test_bad_input_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))

def test_a_settings_file_in_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[tiny]\nspeed = 3\n")
    assert main(["study"]) == 2
    assert "settings.ini [tiny]" in (error := capsys.readouterr().err) and "'speed'" in error

def test_other_settings_are_refused(finished, capsys):
    assert main([*COMMAND, "--set", "sft_lr=1e-5", "--out", str(finished.parent)]) == 2
    assert "sft_lr" in capsys.readouterr().err

def test_each_stage_by_hand(tmp_path, capsys):
    few = ["--set", "curve_problems=8", "--set", "sft_steps=3", "--set", "sft_points=1", "--set", "sft_examples=32", "--set", "ppo_iterations=1", "--set", "ppo_samples=8", "--set", "ppo_minibatch=8",
           "--set", "test_problems=8", "--set", "test_attempts=1"]
    sft, rl, fixed = tmp_path / "sft", tmp_path / "rl", tmp_path / "fixed"
    assert main(["sft", "tiny", str(sft), *few]) == 0
    assert main(["ppo", str(sft / "step-00003"), str(rl), *few]) == 0
    assert main(["evaluate", str(sft / "step-00003"), str(rl / "checkpoint"), "--table", str(tmp_path / "e.parquet"), *few]) == 0
    assert main(["spectrum", str(sft / "step-00000"), "--kinds", "q_proj", "--plot", str(tmp_path / "s.png")]) == 0
    assert main(["compare", str(sft / "step-00000"), str(sft / "step-00003"), "--layers", "first 50%", "--out", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c" / "angles.parquet").exists()
    assert main(["recover", str(sft / "step-00003"), "--donor", str(sft / "step-00000"), "--out", str(fixed)]) == 0
    assert main(["recover", str(sft / "step-00003"), "--donor", str(sft / "step-00000"), "--out", str(fixed)]) == 2     # it exists
    assert (tmp_path / "s.png").stat().st_size > 5000 and len(pd.read_parquet(tmp_path / "e.parquet")) == 32
    assert main(["evaluate", str(fixed), *few]) == 0
    capsys.readouterr()
