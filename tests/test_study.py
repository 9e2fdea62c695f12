"The study as a program: killed at any moment it goes on, and bad settings are refused before anything is written."

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import pandas as pd
import psutil
import pytest
import torch
from filelock import FileLock
from gp_spectral.folders import write_json
from gp_spectral import stages
from gp_spectral import study as work_module
from gp_spectral.cli import main
from gp_spectral.preset import load_preset, read_preset, settings_table
from gp_spectral.report import write_report
from gp_spectral.stages import Study, Unseen, recovery_plan
from gp_spectral.study import _how_many, _Progress, _threads
from gp_spectral.study import study as run_study
from gp_spectral.study import study_again

LITTLE = dict(
    test_problems=24,
    retry_problems=8,
    forced_problems=8,
    sampled_problems=2,
    curve_problems=16,
    sft_steps=6,
    sft_points=2,
    sft_examples=64,
    ppo_starts="0.25 1.0 2.0",
    twins="constant",
    ppo_iterations=3,
    ppo_samples=24,
    ppo_minibatch=24,
    tops="0.2",
    recovery_problems=16,
    test_attempts=2,
)
COMMAND = ["study", "--preset", "tiny", "--seeds", "1", "--workers", "1"]
COMMAND += [x for k, v in LITTLE.items() for x in ("--set", f"{k}={v}")]


def start(out, *more, log="log.txt"):
    "The study in a process of its own."
    with open(out / log, "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gp_spectral", *COMMAND, *more, "--out", str(out)], stdout=log, stderr=log, cwd=out
        )


def complete(out, *more):
    assert start(out, *more).wait() == 0, (out / "log.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, worker_id):
    "A study, run once for all workers of pytest, of which each has a copy."
    own = tmp_path_factory.mktemp("study")
    if worker_id == "master":
        complete(own)
        return own / "tiny"
    shared = tmp_path_factory.getbasetemp().parent / "study"
    with FileLock(f"{shared}.lock"):
        if not (shared / "tiny/report.html").exists():
            shared.mkdir(exist_ok=True)
            complete(shared)
    return shutil.copytree(shared, own, dirs_exist_ok=True) / "tiny"


def same_files(one, other):
    "The same files, tables (times aside) and weights, to the bit; none is half made, no claim is left."
    files = lambda root, kind: sorted(p.relative_to(root) for p in root.rglob(kind))
    assert files(one, "*") == files(other, "*") and not files(other, "*.part")
    for name in files(one, "*.parquet"):
        if name.name not in ("times.parquet", "log.parquet"):
            pd.testing.assert_frame_equal(*(pd.read_parquet(x / name) for x in (one, other)), check_exact=True)
    assert len(weights := files(one, "*.safetensors")) == 9
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in weights)


@pytest.mark.slow  # in the default run: what workers do with small cells, and each training killed by itself
@pytest.mark.parametrize("kills", [1, 10])
def test_killed_it_goes_on_whatever_the_number_of_workers(finished, tmp_path, kills):
    "Killed with two workers and gone on with by two: the files that one process writes undisturbed."
    for moment in range(kills):
        process, begun = start(tmp_path, "--workers", "2"), time.time()
        while process.poll() is None and time.time() - begun < 6 + 25 * (moment + 1) / (kills + 1):
            time.sleep(0.2)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert moment or process.returncode == -signal.SIGKILL  # at least the first kill came in time
    before, torch_threads = (finished / "0/sft/record.json").read_bytes(), torch.get_num_threads()
    if kills == 1:  # by the record of the other: the settings need not be said again
        study_again(finished / "study.json", tmp_path, progress=False, workers=2)
    else:
        run_study("tiny", 1, tmp_path, {k: str(v) for k, v in LITTLE.items()}, progress=False, workers=2)
    (tmp_path / "log.txt").unlink()
    same_files(finished, tmp_path / "tiny")
    assert (finished / "study.json").read_bytes() == (tmp_path / "tiny/study.json").read_bytes()
    assert (finished / "0/sft/record.json").read_bytes() == before and torch.get_num_threads() == torch_threads


def test_a_record_is_made_again_only_from_what_it_was_made_of(finished, tmp_path, capsys):
    "Another base is refused, and what is no record; other versions are told. Nothing is written."
    whole = json.loads((finished / "study.json").read_text())
    assert whole["seeds"] == [0] and whole["preset"]["sft_steps"] == 6 and len(whole["bases"]["tiny"]) == 64
    file = tmp_path / "kept" / "study.json"
    file.parent.mkdir()
    for change, message in (
        (dict(bases={"tiny": "0" * 64}), "begins with another tiny: the weights were 000000000000…, they are "),
        (dict(bases={}), "begins with another tiny"),
        (dict(preset=whole["preset"] | dict(lr=1)), "knows the setting lr, which a preset does not have"),
        (dict(preset=whole["preset"] | dict(model="./nowhere")), "nowhere is not a folder"),
        (dict(folder="../tiny"), "is no record of a study"),
        (dict(seeds=["a"]), "is no record of a study"),
    ):
        file.write_text(json.dumps(whole | change))
        assert main(["study", "--from-record", str(file), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    for text in ("", "[]", "{}", "null", "[" * 100_000):
        file.write_text(text)
        assert main(["study", "--from-record", str(file), "--out", str(tmp_path / "out")]) == 2
        assert "is no record of a study" in capsys.readouterr().err
    for more in (["--seeds", "2"], ["--set", "sft_steps=3"], ["--rl", "grpo"], ["--preset", "tiny"]):
        assert main(["study", "--from-record", str(finished), "--out", str(tmp_path / "out"), *more]) == 2
        assert "leave --preset, --set, --rl, --seeds out" in capsys.readouterr().err
    assert main(["study", "--from-record", str(finished), "--out", str(finished.parent)]) == 2
    assert "give another --out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    then = whole | dict(circumstances=whole["circumstances"] | dict(torch="1.0"))
    again = Study(read_preset(finished), tmp_path / "out" / "tiny", [0])
    with pytest.warns(UserWarning, match="the last bits may differ from the run in .*: torch 1.0, now "):
        work_module._check_record(then, again, file)


SMALL_WORK = """
"A study of seven cells that are done in no time, and what can happen in one of them."
import json, os, signal, sys, time
from pathlib import Path
from gp_spectral import workers
from gp_spectral.preset import Preset
from gp_spectral.stages import Cell, Study

MODE = os.environ.get("MODE")


def run(folder):
    with open(folder.parent / "pids", "a") as pids:
        print(folder.name, os.getpid(), file=pids)
    if MODE == "dies" and folder.name == "c" and not (folder.parent / "died").exists():
        (folder.parent / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "all die" and folder.name in "bcde":
        os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "fails" and folder.name == "c":
        raise ValueError("the hand is empty")
    if MODE == "hangs" and folder.name in "bc":
        time.sleep(600)
    if not folder.exists():
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps(dict(seconds=1)))


def work(self, abreast=False):
    at = lambda names: tuple(self.root / name for name in names)
    cell = lambda name, needs: Cell(0, name, *at(name), at(needs), lambda: run(*at(name)))
    return [cell("a", ""), *(cell(name, "a") for name in "bcdef"), cell("g", "bcdef")]


Study.work, Study.estimate = work, lambda self: {}
workers._WORKER = "from small import workers; workers.serve()"
if __name__ == "__main__":
    from gp_spectral import study

    whole = Study(Preset(), sys.argv[1], 1)
    study._run(whole, 2, 1, study._Progress(whole, study._say, 2))
"""


@pytest.fixture
def small(tmp_path):
    "Starts two workers on the small work, in which something happens."
    (tmp_path / "small.py").write_text(SMALL_WORK)
    (tmp_path / "run").mkdir()

    def start(mode):
        command = [sys.executable, str(tmp_path / "small.py"), str(tmp_path / "run")]
        env = os.environ | dict(MODE=mode)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    return start


def met(tmp_path):
    "(name, pid) of each cell that was run, in order."
    file = tmp_path / "run" / "pids"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def alive(pids):
    return [p for p in map(int, pids) if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def test_a_worker_that_is_killed(small, tmp_path):
    "The other one goes on, also with what the killed one was at, and a note says so."
    out, errors = (process := small("dies")).communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "at seed 0, c, was killed by signal 9; the others go on" in errors
    assert [line.split()[2] for line in out.splitlines() if line.startswith("seed 0")][0] == "a"
    assert sorted(line.split()[2] for line in out.splitlines() if line.startswith("seed 0")) == list("abcdefg")
    (tmp_path / "run" / "died").unlink()
    (tmp_path / "run" / "pids").unlink()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == list("abcdefg")


@pytest.mark.slow
def test_no_worker_is_left(small):
    _, errors = (process := small("all die")).communicate(timeout=300)
    assert process.returncode == 1 and "ChildProcessError: all workers have been killed" in errors


def test_an_error_in_a_worker(small, tmp_path):
    "It is told with its place, and stops the other worker."
    _, errors = (process := small("fails")).communicate(timeout=300)
    assert process.returncode == 1 and "at seed 0, c:\nTraceback" in errors and "in run" in errors
    assert errors.rstrip().endswith("ValueError: seed 0, c: the hand is empty")
    assert not alive(pid for _, pid in met(tmp_path)) and not (tmp_path / "run" / "g").exists()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
def test_workers_end_with_the_one_that_started_them(small, tmp_path, how):
    process = small("hangs")
    while {name for name, _ in met(tmp_path)} < {"a", "b", "c"}:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    pids = {pid for _, pid in met(tmp_path)}
    assert len(alive(pids)) == 2
    process.send_signal(how)
    process.communicate(timeout=180)
    end = time.time() + 30
    while alive(pids) and time.time() < end:
        time.sleep(0.2)
    assert not alive(pids) and process.returncode != 0


@pytest.mark.slow
def test_two_processes_share_the_seeds(finished, tmp_path):
    "Three get the same command, and one is killed: all seeds are run, whose numbers do not depend on who was there."
    a, b, c = (start(tmp_path, "--seeds", "3", log=f"{name}.txt") for name in "abc")
    while not all((tmp_path / "tiny" / s / "sft").exists() for s in "012"):  # each is at a seed of its own
        assert all(p.poll() is None for p in (a, b, c)), (tmp_path / "a.txt").read_text()
        time.sleep(0.2)
    c.kill()
    c.wait()
    assert (a.wait(), b.wait()) == (0, 0), (tmp_path / "a.txt").read_text() + (tmp_path / "b.txt").read_text()
    assert any("another process is at it" in (tmp_path / f"{name}.txt").read_text() for name in "ab")
    for name in ("evaluations", "sigma", "recovery", "sft_curve", "ppo_curve"):
        one, all_ = (pd.read_parquet(root / "tables" / f"{name}.parquet") for root in (finished, tmp_path / "tiny"))
        assert set(all_.seed) == {0, 1, 2}
        pd.testing.assert_frame_equal(one, all_[all_.seed == 0].reset_index(drop=True), check_exact=True)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".part", ".lock")]


def test_a_log_file_is_not_filled_with_progress(finished):
    log = (finished.parent / "log.txt").read_text()
    assert "SFT:   0%" in log and "1/12 [" not in log and log.count("\r") < 200


def test_report_opens_offline(finished):
    page = (finished / "report.html").read_text()
    words = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # Vega names its schemas by addresses; see test_page
    assert "://" not in words and "href=" not in words and "<script" not in words and "<link" not in words
    assert words.count("<img") == 5  # what no chart shows


def test_the_report_can_be_made_again(finished, tmp_path):
    "From what the stages left alone: the same tables, pictures and page."
    root = shutil.copytree(finished, tmp_path / "tiny")
    study, made = Study.open(root), [*(root / "tables").iterdir(), *(root / "figures").iterdir(), root / "report.html"]
    for file in made:
        file.unlink()
    assert write_report(study, shlex.join(["gp-spectral", *COMMAND[:5], *COMMAND[7:]])) == root / "report.html"
    for file in made:
        assert file.read_bytes() == (finished / file.relative_to(root)).read_bytes(), file.name
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["study", "--preset", "huge"], "unknown preset 'huge'"),
        (["study", "--set", "sft_stepz=3"], "unknown key 'sft_stepz'"),
        (["study", "--set", "sft_steps"], "KEY=VALUE"),
        (["study", "--set", "sft_lr=fast"], "sft_lr = 'fast'"),
        (["study", "--set", "model=nowhere"], "nowhere is not a folder"),
        (["study", "--seeds", "0"], "at least 1"),
        (["study", "--workers", "0"], "workers is 0: expected at least 1"),
        (["study", "--set", "test_attempts=0"], "test_attempts = 0"),
        (["study", "--set", "ppo_lr=nan"], "ppo_lr = nan"),
        (["study", "--set", "band=0.7"], "band = 0.7"),
        (["study", "--set", "ppo_starts=0.5"], "ppo_starts = (0.5,)"),
        (["study", "--set", "rl=dpo"], "rl = 'dpo'"),
        (["study", "--set", "sft_at=1.5"], "sft_at = '1.5'"),
        (["study", "--set", "sft_stpes=3"], "unknown key 'sft_stpes': did you mean sft_steps?"),
        (["study", "--preset", "smollm"], "unknown preset 'smollm': did you mean smollm2?"),
        (["study", "--rl", "dpo"], "rl = 'dpo': expected one of ppo, grpo, rloo"),
        (["evaluate", "nowhere"], "nowhere is not a folder"),
        (["compare", "nowhere"], "at least two"),
        (["compare", "nowhere", "either"], "nowhere is not a folder"),
        (["spectrum", "nowhere"], "nowhere is not a folder"),
        (["sft", "nowhere", "out"], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_settings_file_in_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[tiny-rule]\nspeed = 3\n")
    assert main(["study"]) == 2
    assert "settings.ini [tiny-rule]" in (error := capsys.readouterr().err) and "'speed'" in error
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = mine\nsft_stpes = 3\nsft_lr = 1e-3\n")
    assert main(["study"]) == 2
    error = capsys.readouterr().err
    assert "unknown key 'lib_name'" in error  # one key is ours, so all of them have to be
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nsft_stpes = 3\nsft_lr = 1e-3\n")
    assert main(["study"]) == 2
    assert "settings.ini [DEFAULT]: unknown key 'sft_stpes': did you mean sft_steps?" in capsys.readouterr().err
    (tmp_path / "settings.ini").write_text("[mine]\nextends = tiny\nsft_lr = 1e-4\n")
    assert load_preset("mine").sft.lr == 1e-4 and load_preset("tiny").sft.lr == 7e-4


def test_other_settings_are_refused(finished, capsys):
    assert main([*COMMAND, "--set", "sft_lr=1e-5", "--out", str(finished.parent)]) == 2
    assert "sft_lr" in capsys.readouterr().err


def test_each_stage_by_hand(tmp_path, capsys):
    few = [
        "--set",
        "curve_problems=8",
        "--set",
        "sft_steps=3",
        "--set",
        "sft_points=1",
        "--set",
        "sft_examples=32",
        "--set",
        "ppo_iterations=1",
        "--set",
        "ppo_samples=8",
        "--set",
        "ppo_minibatch=8",
        "--set",
        "test_problems=8",
        "--set",
        "test_attempts=1",
    ]
    sft, rl, fixed = tmp_path / "sft", tmp_path / "rl", tmp_path / "fixed"
    assert main(["sft", "tiny", str(sft), *few]) == 0
    assert main(["ppo", str(sft / "step-00003"), str(rl), *few]) == 0
    assert (
        main(
            ["evaluate", str(sft / "step-00003"), str(rl / "checkpoint"), "--table", str(tmp_path / "e.parquet"), *few]
        )
        == 0
    )
    assert main(["spectrum", str(sft / "step-00000"), "--kinds", "q_proj", "--plot", str(tmp_path / "s.png")]) == 0
    assert (
        main(
            [
                "compare",
                str(sft / "step-00000"),
                str(sft / "step-00003"),
                "--layers",
                "first 50%",
                "--out",
                str(tmp_path / "c"),
            ]
        )
        == 0
    )
    assert (tmp_path / "c" / "angles.parquet").exists()
    assert main(["recover", str(sft / "step-00003"), "--donor", str(sft / "step-00000"), "--out", str(fixed)]) == 0
    assert (
        main(["recover", str(sft / "step-00003"), "--donor", str(sft / "step-00000"), "--out", str(fixed)]) == 2
    )  # it exists
    assert (tmp_path / "s.png").stat().st_size > 5000 and len(pd.read_parquet(tmp_path / "e.parquet")) == 32
    assert main(["evaluate", str(fixed), *few]) == 0
    capsys.readouterr()


NBDEV = "[DEFAULT]\nrepo = mine\nlib_name = %(repo)s\nversion = 0.0.1\nblack_formatting = False\n"


@pytest.mark.parametrize(
    "text", [NBDEV, "[server]\nport = 3\n", "hello = 1\n"], ids=["nbdev 2", "another program", "no ini file"]
)
def test_a_foreign_settings_file_is_in_nobodys_way(tmp_path, monkeypatch, text):
    "One note says that it is not read. Where one of its sections is asked for, it is ours, and judged."
    shipped = load_preset("tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text(text)
    with pytest.warns(UserWarning, match="settings.ini has no setting of gp-spectral") as notes:
        assert load_preset("tiny") == shipped
    assert len(notes) == 1
    if "server" in text:
        with pytest.raises(ValueError, match="port"):
            load_preset("server")


def test_a_settings_file_of_ours_that_cannot_be_read_is_no_foreign_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("sft_steps = 3\n")  # without its section
    with pytest.raises(ValueError, match="settings.ini cannot be read: .*no section headers"):
        load_preset("tiny")


def test_the_note_is_told_on_stderr(tmp_path):
    (tmp_path / "settings.ini").write_text(NBDEV)
    arguments = [sys.executable, "-m", "gp_spectral", "evaluate", "nowhere"]
    said = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 2 and "nowhere is not a folder" in said.stderr
    assert said.stderr.count("note:") == 1 and "settings.ini has no setting of gp-spectral" in said.stderr


def test_a_key_is_one_setting_of_one_training():
    "Said under its key, a setting arrives in the training that the key names, and in no other place."
    told = dict(sft_lr="1", sft_batch="7", sft_hands="0", ppo_clip="0.3", ppo_kl="loss", lora="4", sft_at="10 20")
    preset = load_preset("tiny", told | dict(rl="rloo", ppo_lr="0.5", grpo_generations="6"))
    assert (preset.sft.lr, preset.sft.batch_size, preset.sft.hands, preset.sft.at) == (1.0, 7, None, (10, 20))
    assert (preset.ppo.clip, preset.ppo.kl, preset.ppo.lr) == (0.3, "loss", 0.5)
    assert (preset.grpo.generations, preset.grpo.clip, preset.rl_config(5).lr) == (6, 0.3, 0.5)
    assert {preset.sft.lora, preset.ppo.lora, preset.grpo.lora} == {4} and preset.rl_config(5).seed == 5


def test_presets_are_what_they_were():
    "Some values of each, from where they are said: a class, [DEFAULT], the section, the one that it extends."
    values = lambda name, *keys: [getattr(load_preset(name), key) for key in keys]
    keys = ("sft_steps", "sft_lr", "sft_hands", "ppo_iterations", "ppo_lr", "ppo_clip", "grpo_generations")
    assert values("tiny", *keys) == [320, 7e-4, 0, 16, 2e-4, 0.2, 8]
    assert values("tiny", "ppo_starts", "sft_at", "ppo_whiten", "target") == [(1.0,), (), True, "24"]
    assert values("smollm2", *keys) == [200, 3e-4, 0, 8, 2e-5, 0.2, 8]
    assert values("smollm2-gpu", *keys) == [200, 3e-4, 22, 16, 2e-5, 0.2, 8]
    assert values("smollm2-gpu", "rl_hands", "ppo_save_every", "target") == ["unseen", 8, "1-30"]
    assert values("qwen2.5-7b", *keys) == [800, 1e-6, 0, 300, 1e-6, 0.1, 8]
    assert values("llama-3.2-11b", "sft_at", "ppo_keep", "ppo_samples", "ppo_adam_eps") == [(140,), (69,), 512, 1e-7]


def test_the_table_of_settings():
    table = settings_table(load_preset("tiny", dict(band="0.1"))).set_index("key")
    assert list(table.loc["band", ["value", "default", "range"]]) == ["0.1", "0.2", "above 0 and at most 0.5"]
    assert list(table.loc["sft_lr", ["value", "default"]]) == ["0.0007", "0.001"]


def test_a_finished_study_is_opened(finished, tmp_path):
    study = Study.open(finished)
    assert (study.name, study.seeds, study.starts) == ("tiny", [0], [2, 6, 12])
    assert study.preset == load_preset("tiny", {k: str(v) for k, v in LITTLE.items()}) == read_preset(finished)
    assert set(study.checkpoints(0)) == {"base", "max_ood", "sft_2", "rl_2", "end", "rl", "sft_12", "rl_12", "constant"}
    assert all(path.exists() for path in study.checkpoints(0).values())
    assert study.tables is study.tables and {"claims", "angles", "recovery"} <= set(study.tables)
    with pytest.raises(ValueError, match="holds no finished study"):
        Study.open(tmp_path)


def test_a_study_finds_what_the_preset_says(finished, tmp_path):
    "The base that was taught, RL by another name: read from the run's own record, not guessed."
    shutil.copytree(finished / "tables", tmp_path / "tables")
    shutil.copytree(finished / "0", tmp_path / "0")
    preset = dataclasses.replace(load_preset("tiny", {k: str(v) for k, v in LITTLE.items()}), rl="grpo")
    (tmp_path / "preset.json").write_text(json.dumps(dataclasses.asdict(preset)))
    named = Study.open(tmp_path).checkpoints(0)
    assert named["rl"] == tmp_path / "0" / "grpo-00006" / "checkpoint"
    assert named["sft_12"] == tmp_path / "0" / "sft" / "step-00012"
    (tmp_path / "preset.json").unlink()
    with pytest.raises(ValueError, match="holds no study"):
        Study.open(tmp_path)


def test_forecast(tmp_path):
    "Teaching is counted once for all seeds, and no more when it is done; what stages took corrects the rest."
    said, preset = [], load_preset("tiny", dict(teach_steps="5"))
    finish = lambda cell, seconds: (
        cell.folder.mkdir(parents=True) or write_json(dict(seconds=seconds), cell.folder / "record.json")
    )

    def bar(seeds=2, workers=1):
        made = _Progress(Study(preset, tmp_path, seeds), said.append, workers)
        made.guess = made.study.stage_seconds(0.1, 0.01)
        return made

    new = bar()
    assert [c.what for c in new.left].count("taught") == 1 and len(new.left) == 2 + 2 * 8
    whole, taught = new.to_go(), new.left[0]
    assert whole == pytest.approx(sum(new.guess[c.kind] for c in new.left))
    finish(taught, 2 * new.guess["taught"])
    assert len(bar().left) == 17
    new.done(taught)
    new.done(taught)
    rest = whole - new.guess["taught"]
    assert new.to_go() == pytest.approx(2 * rest) and said[-1].startswith("base    taught") and len(said) == 1
    assert bar(workers=2).to_go() == pytest.approx(rest / 2)
    guess, one = new.guess, bar(1)
    chain = sum(guess[x] for x in ("sft", "ppo", "evaluations", "recovery"))  # these wait for each other
    assert bar(1, workers=99).to_go() == pytest.approx(chain)
    asked, sft = one.left[:2]
    one.elsewhere(sft)
    one.elsewhere(sft)  # one is taken, of what is free each process gets half
    free = sum(guess[c.kind] for c in one.left) - guess["sft"]
    assert said[-1].split() == "seed 0 sft another process is at it".split() and len(said) == 2
    assert one.to_go() == pytest.approx(max(free / 2, chain))
    one.begins(sft)  # the other was killed: its stage is to be run here
    assert one.to_go() == pytest.approx(free + guess["sft"], rel=0.01)
    one.leaves(sft)
    finish(sft, guess["sft"])
    one.done(sft)
    assert one.to_go() == pytest.approx(free)


def test_as_many_workers_as_there_is_room_and_work_for(tmp_path, monkeypatch):
    study, few = Study(load_preset("tiny", dict(ppo_starts="0.25 1.0 2.0")), tmp_path, 1), 791_168
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(work_module, "_cores", lambda: 6)
    monkeypatch.setattr(work_module, "_memory", lambda: 64 << 30)
    assert _how_many(study, 99, few) == 6  # a seed's RL from three starts and three twins
    assert _how_many(study, None, few) == 6
    assert _how_many(Study(study.preset, tmp_path, 3), None, few) == 6 and _how_many(study, 1, few) == 1
    assert _how_many(Study(study.preset, tmp_path, 3), None, 1_000_000_000) == 2  # of 33 GiB each
    assert (_threads(few, 6), _threads(few, 1), _threads(10**9, 1)) == (1, 1, None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert _threads(10**9, 2) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _how_many(study, None, few) == 1 and _threads(few, 1) is None
    with pytest.raises(ValueError, match="workers is 0"):
        _how_many(study, 0, few)


def test_rl_is_dealt_hands_that_sft_has_not_seen():
    from gp_spectral.sft import sft_dataset

    preset = load_preset("tiny", dict(rl_hands="unseen", sft_hands="30", rl_splits="train"))
    task = preset.tasks()["ID"]
    unseen, taught = Unseen(task, 400, 3, 30), {p.key for p in sft_dataset(task, 400, 3, 30)[0]}
    dealt = unseen.problems("train", 500, "3:0")
    assert len(dealt) == 500 and dealt == unseen.problems("train", 500, "3:0") != unseen.problems("train", 500, "3:1")
    assert taught and not taught & {p.key for p in dealt}  # neither does SFT's set hold all, nor RL's any of it
    assert {p.key for p in dealt} <= {
        p.key for p in task.problems("train", 3000)
    }  # and both are of the split for training
    assert unseen.problems("validation", 20, 1) == task.problems("validation", 20, 1)
    with pytest.raises(ValueError, match="sft_hands"):
        Unseen(task, 4000, 0, None).problems("train", 5)
    with pytest.raises(ValueError, match="rl_hands"):
        load_preset("tiny", dict(rl_hands="unseen", sft_hands="0"))
    with pytest.raises(ValueError, match="rl_hands"):
        load_preset("tiny", dict(rl_hands="others"))


def test_recovery_goes_on_where_it_was_killed(finished, tmp_path, monkeypatch):
    "Killed between two edits, it asks only those that are left, and the tables are the same."
    root = shutil.copytree(finished, tmp_path / "tiny")
    study = Study.open(root)
    shutil.rmtree(study.folder(0) / "recovery")
    edit, made = stages.recover, []

    def recover(*args, **kwargs):
        if len(made) == 4:
            raise KeyboardInterrupt  # nothing of the stage sees it
        made.append(kwargs["method"])
        return edit(*args, **kwargs)

    monkeypatch.setattr(stages, "recover", recover)
    with pytest.raises(KeyboardInterrupt):
        study.recovery(0)
    assert len(made) == 4 and not (study.folder(0) / "recovery").exists()
    monkeypatch.setattr(stages, "recover", lambda *a, **k: made.append(k["method"]) or edit(*a, **k))
    study.recovery(0)
    assert len(made) == len(recovery_plan(study.preset.tops, study.preset.band))  # none twice
    for name in ("recovery", "recovery_answers"):
        pd.testing.assert_frame_equal(
            *(pd.read_parquet(x / "0" / "recovery" / f"{name}.parquet") for x in (finished, root)), check_exact=True
        )


def test_the_command_by_its_module():
    said = [
        subprocess.run([sys.executable, "-m", "gp_spectral", word], capture_output=True, text=True)
        for word in ("--version", "--help")
    ]
    from importlib.metadata import version

    assert (
        [s.returncode for s in said] == [0, 0]
        and said[0].stdout == f"gp-spectral {version('gp_spectral')}\n"
        and "examples:" in said[1].stdout
    )
