"Killed, starved of disk, fed with NaN: what a training does then, and what it leaves behind."

import errno
import json
import subprocess
import sys
import pandas as pd
import pytest
import torch
from made import Parity

from gp_spectral import models, ppo, sft
from gp_spectral.book import Book
from gp_spectral.env import GeneralPoints
from gp_spectral.ppo import PPOConfig, train_ppo
from gp_spectral.models import load_model
from gp_spectral.sft import train_sft

ID, OOD = GeneralPoints(), GeneralPoints("faces_as_rank")

DRIVER = """
"Runs a training undisturbed, then in children that are killed as often as asked, then to its end; forked, to be quick."

import os, random, shutil, signal, sys, time, warnings

warnings.filterwarnings("ignore")
import torch

torch.set_num_threads(1)
from gp_spectral.env import GeneralPoints
from gp_spectral.ppo import PPOConfig, train_ppo
from gp_spectral.sft import train_sft
import trl.trainer.sft_trainer

kind, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
ID, OOD, kept = (
    GeneralPoints(),
    GeneralPoints("faces_as_rank"),
    folder + "/killed/resume." + ("pt" if "ppo" in kind else "json"),
)


def train(out):
    if "ppo" in kind:
        more = (
            dict(lora=2, value_head="model")
            if "lora" in kind
            else dict(microbatch=5, attempts=2, kl="loss", lr_end=0.0)
        )
        train_ppo(
            "tiny",
            out,
            ID,
            PPOConfig(iterations=6, samples=24, minibatch=12, **more),
            {"OOD": OOD},
            2,
            10,
            progress=False,
        )
    else:
        train_sft(
            "tiny",
            out,
            ID,
            {"ID": ID, "OOD": OOD},
            steps=24,
            points=3,
            n_eval=10,
            examples=60,
            batch_size=8,
            save_every=3,
            lora=2 * ("lora" in kind),
            progress=False,
        )


def child(out):
    pid = os.fork()
    if pid == 0:
        train(out)
        os._exit(0)
    return pid


def states():
    return os.stat(kept).st_mtime_ns if os.path.exists(kept) else None


def live(seconds, progress):
    "A life: so long, and, where asked for, until it has kept a new state. False: it ended before it was killed."
    pid, begun, before = child(folder + "/killed"), time.time(), states()
    while time.time() - begun < seconds or progress and states() == before:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    return True


def undisturbed(out):
    begun = time.time()
    assert os.waitpid(child(out), 0)[1] == 0
    return time.time() - begun


whole, rng, done, went_on = undisturbed(folder + "/whole"), random.Random(), 0, 0
while done < kills:  # some kills come before there is anything to go on from, most after
    went_on += states() is not None
    left = max(0.02, 0.5 * (1 - done / kills))  # the less is left of the run, the shorter the lives
    if live(rng.uniform(0, left) * whole, progress=done == 1 or rng.random() < 0.2):
        done += 1
    else:
        shutil.rmtree(folder + "/killed")
        # it was quicker than the killer: from the beginning, the kills so far count
undisturbed(folder + "/killed")
print("kills:", done, "of these with something kept:", went_on)
"""


def equal_files(a, b, names):
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize(
    "kind, kills",
    [
        ("ppo", 3),
        ("sft", 3),
        pytest.param("ppo", 10, marks=pytest.mark.slow),
        pytest.param("sft", 10, marks=pytest.mark.slow),
        pytest.param("ppo lora", 10, marks=pytest.mark.slow),
        pytest.param("sft lora", 10, marks=pytest.mark.slow),
    ],
)
def test_killed_it_ends_with_the_same_bits(tmp_path, kind, kills):
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), kind, str(tmp_path), str(kills)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"kills: {kills} of these" in done.stdout and "something kept: 0" not in done.stdout, done.stdout
    a, b = tmp_path / "whole", tmp_path / "killed"
    pd.testing.assert_frame_equal(
        pd.read_parquet(a / "curve.parquet"), pd.read_parquet(b / "curve.parquet"), check_exact=True
    )
    logs = [
        pd.read_parquet(x / "log.parquet").drop(columns=["seconds", "tokens_per_second"], errors="ignore")
        for x in (a, b)
    ]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    last = "checkpoint" if "ppo" in kind else "step-00024"
    equal_files(a, b, [f"{last}/model.safetensors"])
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())  # nothing half written is left


SMALL = PPOConfig(iterations=4, samples=12, minibatch=6)


def test_disk_full(tmp_path, monkeypatch):
    train_ppo("tiny", tmp_path / "whole", ID, SMALL, progress=False)
    train_ppo("tiny", tmp_path / "out", ID, SMALL, progress=False, stop_after=2)

    def full(value, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        with pytest.raises(OSError, match="round 3 could not be kept.*No space left.*goes on"):
            train_ppo("tiny", tmp_path / "out", ID, SMALL, progress=False)
    assert torch.load(tmp_path / "out/resume.pt", weights_only=True)["round"] == 2 and not list(
        (tmp_path / "out").glob("*.part")
    )
    train_ppo("tiny", tmp_path / "out", ID, SMALL, progress=False)
    equal_files(tmp_path / "whole", tmp_path / "out", ["checkpoint/model.safetensors"])


def test_disk_full_in_sft(tmp_path, monkeypatch):
    options = dict(steps=8, points=2, n_eval=4, examples=32, batch_size=8, progress=False)
    train_sft("tiny", tmp_path / "whole", ID, **options)
    good = sft.save_model

    def full(model, tokenizer, out, state=None):
        if out.name == "step-00008":
            raise OSError(errno.ENOSPC, "No space left on device", str(out))
        return good(model, tokenizer, out, state)

    with monkeypatch.context() as m:
        m.setattr(sft, "save_model", full)
        with pytest.raises(OSError, match="No space left"):
            train_sft("tiny", tmp_path / "out", ID, **options)
    assert (
        load_model(tmp_path / "out/step-00003")
        and json.loads((tmp_path / "out/resume.json").read_text())["checkpoint"] == "checkpoint-3"
    )
    train_sft("tiny", tmp_path / "out", ID, **options)
    equal_files(tmp_path / "whole", tmp_path / "out", ["step-00003/model.safetensors", "step-00008/model.safetensors"])
    for name in ("curve", "log"):
        pd.testing.assert_frame_equal(
            *(pd.read_parquet(tmp_path / x / f"{name}.parquet") for x in ("whole", "out")), check_exact=True
        )


def test_nan_loss(tmp_path, monkeypatch):
    train_ppo("tiny", tmp_path, ID, SMALL, progress=False, stop_after=2)
    before = (tmp_path / "resume.pt").read_bytes()
    loss = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *a, **k: (loss(*a, **k)[0] * float("nan"), loss(*a, **k)[1]))
    with pytest.raises(FloatingPointError, match="round 3.*last good round is kept"):
        train_ppo("tiny", tmp_path, ID, SMALL, progress=False)
    assert (tmp_path / "resume.pt").read_bytes() == before and not (tmp_path / "checkpoint").exists()


def test_diverging_ppo_stops(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"):
        train_ppo("tiny", tmp_path, ID, PPOConfig(iterations=3, samples=12, minibatch=6, lr=1e20), progress=False)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("step", [7, pytest.param(4, marks=pytest.mark.slow)])
def test_weights_that_are_no_numbers_are_no_state(tmp_path, monkeypatch, step):
    "Weights break in a step that is saved but not logged by itself; the run goes on from the state before."
    import trl

    options = dict(
        steps=12, points=1, n_eval=4, examples=32, batch_size=8, save_every=1 if step == 7 else 2, progress=False
    )
    train_sft("tiny", tmp_path / "whole", ID, **options)
    run_step = trl.SFTTrainer.training_step

    def breaks(self, model, *a, **k):
        loss = run_step(self, model, *a, **k)
        if self.state.global_step == step - 1:
            model.model.norm.weight.grad[2] = float("nan")
            self.args.max_grad_norm = 0  # loss and clipping see nothing
        return loss

    with monkeypatch.context() as m:
        m.setattr(trl.SFTTrainer, "training_step", breaks)
        with pytest.raises(
            FloatingPointError,
            match=f"weight holds NaN.*the state of step {step} is not written.*lower the learning rate",
        ):
            train_sft("tiny", tmp_path / "out", ID, **options)
    assert (
        json.loads((tmp_path / "out/resume.json").read_text())["checkpoint"]
        == f"checkpoint-{step - options['save_every']}"
    )
    train_sft("tiny", tmp_path / "out", ID, **options)
    equal_files(tmp_path / "whole", tmp_path / "out", ["step-00012/model.safetensors"])


def test_ppo_keeps_no_state_that_is_not_finite(tmp_path, monkeypatch):
    train_ppo("tiny", tmp_path, ID, SMALL, progress=False, stop_after=2)
    before, update = (tmp_path / "resume.pt").read_bytes(), ppo.Learner.update

    def breaks(learner, *more):
        row = update(learner, *more)
        learner.net.value_head[0].weight.data[0, 3] = float("inf")
        return row

    monkeypatch.setattr(ppo.Learner, "update", breaks)
    with pytest.raises(
        FloatingPointError,
        match="value_head.0.weight holds NaN or infinite values, the state of round 3 is not written",
    ):
        train_ppo("tiny", tmp_path, ID, SMALL, progress=False)
    assert (tmp_path / "resume.pt").read_bytes() == before


def test_a_diverged_model_is_not_written(tmp_path):
    model, tokenizer = load_model("tiny")
    models.save_model(model, tokenizer, tmp_path / "out")
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="model.norm.weight"):
        models.save_model(model, tokenizer, tmp_path / "out")
    assert load_model(tmp_path / "out")  # the good one is still there


def test_empty_rollouts(tmp_path):
    class Nothing(Parity):
        def problems(self, split, n, seed=0):
            return []

    with pytest.raises(ValueError, match="gave no problems"):
        train_ppo("tiny", tmp_path / "a", Nothing(), SMALL, progress=False)
    silent = lambda model, tokenizer, prompts, *more: [([], False) for _ in prompts]
    with pytest.raises(ValueError, match="not one token in round 1"):
        train_ppo("tiny", tmp_path / "b", ID, SMALL, progress=False, sampler=silent)


def test_answers_that_never_end(tmp_path):
    with pytest.warns(UserWarning, match="no answer of round 1 ended within 3 tokens"):
        train_ppo(
            "tiny", tmp_path, ID, PPOConfig(iterations=1, samples=8, minibatch=8, max_new_tokens=3), progress=False
        )
    log = pd.read_parquet(tmp_path / "log.parquet")
    assert log.ended[0] == 0 and log.length[0] == 3 and load_model(tmp_path / "checkpoint")


FEW = dict(steps=3, points=1, n_eval=4, examples=16, batch_size=4, progress=False)


def sft_(out, model="tiny", task=ID, **more):
    return train_sft(model, out, task, **(FEW | more))


def ppo_(out, model="tiny", task=ID, stop_after=None, keep=(), eval_tasks=None, **more):
    return train_ppo(
        model,
        out,
        task,
        PPOConfig(**(dict(iterations=2, samples=8, minibatch=8, epochs=1) | more)),
        eval_tasks,
        progress=False,
        stop_after=stop_after,
        keep=keep,
    )


def grpo_(out, model="tiny", task=ID, eval_every=10, **more):
    from gp_spectral.grpo import GRPOConfig, train_grpo

    return train_grpo(
        model,
        out,
        task,
        GRPOConfig(**(dict(iterations=2, samples=8, generations=4, minibatch=8, epochs=1) | more)),
        eval_every=eval_every,
        progress=False,
    )


OTHER = [
    ("task", dict(task=GeneralPoints(target=25))),
    ("task", dict(task=GeneralPoints("faces_as_rank"))),
    ("task", dict(task=GeneralPoints(style="paper"))),
    ("task", dict(task=GeneralPoints(n_cards=3))),
    ("lr", dict(lr=5e-4)),
]


ONE = [pytest.param(sft_, marks=pytest.mark.slow), ppo_, pytest.param(grpo_, marks=pytest.mark.slow)]  # the rest weekly


def unfinished(train, out):
    if train is ppo_:
        train(out, stop_after=1)
    else:

        def stop(*a, **k):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(Book, "finish", stop)
            train(out)


@pytest.mark.parametrize("train", [sft_, ppo_, grpo_])
def test_an_unfinished_run_is_not_gone_on_with_under_other_settings(tmp_path, train):
    unfinished(train, tmp_path / "out")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*")}
    for name, other in OTHER:
        with pytest.raises(ValueError, match=rf"an unfinished run with other settings \([^)]*\b{name}\b.*delete it"):
            train(tmp_path / "out", **other)
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize("train", [sft_, ppo_, grpo_])
def test_a_finished_run(tmp_path, train):
    "Asked for again it is there at once; asked for with other settings it is not trained over."
    curve = train(tmp_path / "out")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*") if f.is_file()}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(models, "load_model", None)  # nothing is loaded
        again = train(tmp_path / "out")
    pd.testing.assert_frame_equal(curve, again)
    for name, other in OTHER:
        with pytest.raises(ValueError, match=rf"a finished run with other settings \([^)]*\b{name}\b"):
            train(tmp_path / "out", **other)
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*") if f.is_file()}
    (tmp_path / "out/settings.json").unlink()  # what is there without a record is nobody's
    with pytest.raises(ValueError, match="holds (checkpoint|step-00000) of a run that has left no settings"):
        train(tmp_path / "out")


def test_killed_after_the_last_word(tmp_path, monkeypatch):
    "settings.json says that all is there; what is left over then is only removed."
    ppo_(tmp_path / "out", stop_after=1)
    with monkeypatch.context() as m:
        m.setattr(type(tmp_path), "unlink", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ppo_(tmp_path / "out")
    assert {"settings.json", "resume.pt", "checkpoint"} <= {p.name for p in (tmp_path / "out").iterdir()}
    ppo_(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoint",
        "curve.parquet",
        "log.parquet",
        "settings.json",
    ]


@pytest.mark.parametrize("train", ONE)
def test_killed_before_the_last_word(tmp_path, train):
    "The checkpoint is there and settings.json is not; there have been fewer rounds than lie between two states."

    def stop(*a, **k):
        raise KeyboardInterrupt

    seldom = {ppo_: dict(save_every=5), grpo_: dict(eval_every=5), sft_: {}}[train]
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Book, "finish", stop)
        train(tmp_path / "out", **seldom)
    assert not (tmp_path / "out/settings.json").exists()
    train(tmp_path / "out", **seldom)
    assert (tmp_path / "out/settings.json").exists() and not list((tmp_path / "out").glob("resume*"))


@pytest.mark.parametrize("eval_tasks", [pytest.param(None, marks=pytest.mark.slow), {"OOD": OOD}])
def test_grpo_killed_twice(tmp_path, eval_tasks):
    "Its log has every round once, and what it kept before the first kill is there after the second."
    from gp_spectral.grpo import GRPOConfig, _Rounds, train_grpo

    def go(kill_in):
        def log(self, args, state, control, logs=None, **more):
            if kill_in and len(self.book.log) + 1 == kill_in:
                raise KeyboardInterrupt
            return keep(self, args, state, control, logs=logs, **more)

        with pytest.MonkeyPatch.context() as m:
            keep = _Rounds.on_log
            m.setattr(_Rounds, "on_log", log)
            train_grpo(
                "tiny",
                tmp_path / "out",
                ID,
                GRPOConfig(iterations=6, samples=8, generations=4, minibatch=8, epochs=1),
                eval_tasks,
                eval_every=2,
                n_eval=4,
                progress=False,
            )

    for kill_in in (5, 5):
        with pytest.raises(KeyboardInterrupt):
            go(kill_in)
        assert json.loads((tmp_path / "out/resume.json").read_text())["checkpoint"] == "checkpoint-4"
    go(None)
    assert pd.read_parquet(tmp_path / "out/log.parquet")["round"].tolist() == [1, 2, 3, 4, 5, 6]


HOLD = """import sys, time
from gp_spectral.book import claimed
with claimed(sys.argv[1]) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("train", ONE)
def test_two_runs_do_not_write_into_one_folder(tmp_path, train):
    "The second is refused, before it has written anything; when the first has been killed, the folder is free."
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "True\n"
        with pytest.raises(ValueError, match="out is being written by another run"):
            train(tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == [".out.lock"]
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    unfinished(train, tmp_path / "out")
    train(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("train", [sft_, ppo_, grpo_])
def test_no_folder_before_the_inputs_are_good(tmp_path, train):
    for wrong in (
        dict(model=tmp_path / "nowhere"),
        dict(lr=float("nan")),
        dict(lr=-1.0),
        dict(minibatch=0) if train is not sft_ else dict(steps=0),
    ):
        with pytest.raises(ValueError):
            train(tmp_path / "out", **wrong)
        assert not (tmp_path / "out").exists(), wrong


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", float("nan")),
        ("lr", 0.0),
        ("steps", 0),
        ("steps", 2.5),
        ("batch_size", 0),
        ("examples", 0),
        ("points", 0),
        ("n_eval", 0),
        ("warmup", -1),
        ("hands", 0),
        ("microbatch", -4),
        ("lora", -1),
        ("save_every", -1),
        ("precision", "half"),
        ("dtype", "int8"),
    ],
    ids=str,
)
def test_settings_of_sft_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"SFTConfig\.{name} is {value!r}: expected"):
        sft_(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_further_steps(tmp_path):
    curve = sft_(tmp_path / "out", steps=8, at=(2, 5))
    assert sorted(p.name for p in (tmp_path / "out").glob("step-*")) == [
        "step-00000",
        "step-00002",
        "step-00005",
        "step-00008",
    ] and sorted(set(curve.step)) == [0, 2, 5, 8]
    log = pd.read_parquet(tmp_path / "out/log.parquet").set_index("step").loss
    assert all(
        row.loss == log[row.step] for row in curve[curve.step > 0].itertuples()
    )  # the loss of a point is that of its step
    with pytest.raises(ValueError, match="SFTConfig.at is 9: expected steps from 1 to 8"):
        sft_(tmp_path / "x", steps=8, at=(9,))
