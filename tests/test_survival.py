"Killed, starved of disk, fed with NaN: what a training does then, and what it leaves behind."
import errno, json, subprocess, sys
import pandas as pd, pytest, torch
from made import Parity

from gp_spectral import ppo, sft
from gp_spectral.env import GeneralPoints
from gp_spectral.ppo import PPOConfig, train_ppo
from gp_spectral.sft import TINY, load_model, train_sft

ID, OOD = GeneralPoints(), GeneralPoints("faces_as_rank")

DRIVER = """
"Runs a training undisturbed, then again in children that are killed at random moments, until one ends; forked, so that they need no time for imports."
import os, random, signal, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
from gp_spectral.env import GeneralPoints
from gp_spectral.ppo import PPOConfig, train_ppo
from gp_spectral.sft import train_sft
import trl.trainer.sft_trainer
kind, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
ID, OOD = GeneralPoints(), GeneralPoints("faces_as_rank")
def train(out):
    if kind == "ppo": train_ppo("tiny", out, ID, PPOConfig(iterations=6, samples=24, minibatch=12, microbatch=5, attempts=2, kl="loss", lr_end=0.0), {"OOD": OOD}, 2, 10, progress=False)
    if kind == "ppo lora": train_ppo("tiny", out, ID, PPOConfig(iterations=6, samples=24, minibatch=12, lora=2, value_head="model"), {"OOD": OOD}, 2, 10, progress=False)
    if kind == "sft": train_sft("tiny", out, ID, {"ID": ID, "OOD": OOD}, steps=24, points=3, n_eval=10, examples=60, batch_size=8, save_every=3, progress=False)
    if kind == "sft lora": train_sft("tiny", out, ID, {"ID": ID, "OOD": OOD}, steps=24, points=3, n_eval=10, examples=60, batch_size=8, save_every=3, lora=2, progress=False)
def child(out):
    pid = os.fork()
    if pid == 0: train(out); os._exit(0)
    return pid
begun = time.time(); assert os.waitpid(child(folder + "/whole"), 0)[1] == 0; whole = time.time() - begun
rng, went_on = random.Random(3), 0
for k in range(kills):
    pid = child(folder + "/killed"); time.sleep(rng.uniform(0.1, 0.9) * whole)
    went_on += os.path.exists(folder + ("/killed/resume.pt" if "ppo" in kind else "/killed/resume.json"))
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    if os.path.exists(folder + ("/killed/checkpoint" if "ppo" in kind else "/killed/picked.json")): break
assert os.waitpid(child(folder + "/killed"), 0)[1] == 0
print("kills:", k + 1, "of these with something kept:", went_on)
"""

def equal_files(a, b, names):
    for name in names: assert (a / name).read_bytes() == (b / name).read_bytes(), name

@pytest.mark.parametrize("kind, kills", [("ppo", 4), ("sft", 4), pytest.param("ppo", 10, marks=pytest.mark.slow), pytest.param("sft", 10, marks=pytest.mark.slow), pytest.param("ppo lora", 10, marks=pytest.mark.slow),
                                         pytest.param("sft lora", 10, marks=pytest.mark.slow)])
def test_killed_it_ends_with_the_same_bits(tmp_path, kind, kills):
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run([sys.executable, str(tmp_path / "driver.py"), kind, str(tmp_path), str(kills)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "something kept: 0" not in done.stdout, done.stdout
    a, b = tmp_path / "whole", tmp_path / "killed"
    pd.testing.assert_frame_equal(pd.read_parquet(a / "curve.parquet"), pd.read_parquet(b / "curve.parquet"), check_exact=True)
    logs = [pd.read_parquet(x / "log.parquet").drop(columns=["seconds", "tokens_per_second"], errors="ignore") for x in (a, b)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    last = "checkpoint" if "ppo" in kind else "step-00024"
    equal_files(a, b, [f"{last}/model.safetensors"])
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())          # nothing half written is left

SMALL = PPOConfig(iterations=4, samples=12, minibatch=6)

def test_disk_full(tmp_path, monkeypatch):
    train_ppo("tiny", tmp_path / "whole", ID, SMALL, progress=False)
    train_ppo("tiny", tmp_path / "out", ID, SMALL, progress=False, stop_after=2)
    save = torch.save
    def full(value, file): file.write_bytes(b"half"); raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        with pytest.raises(OSError, match="round 3 could not be kept.*No space left.*goes on"): train_ppo("tiny", tmp_path / "out", ID, SMALL, progress=False)
    assert torch.load(tmp_path / "out/resume.pt", weights_only=True)["round"] == 2 and not list((tmp_path / "out").glob("*.part"))
    train_ppo("tiny", tmp_path / "out", ID, SMALL, progress=False)
    equal_files(tmp_path / "whole", tmp_path / "out", ["checkpoint/model.safetensors"])

def test_disk_full_in_sft(tmp_path, monkeypatch):
    options = dict(steps=8, points=2, n_eval=4, examples=32, batch_size=8, progress=False)
    train_sft("tiny", tmp_path / "whole", ID, **options)
    good = sft.save_model
    def full(model, tokenizer, out, state=None):
        if out.name == "step-00008": raise OSError(errno.ENOSPC, "No space left on device", str(out))
        return good(model, tokenizer, out, state)
    with monkeypatch.context() as m:
        m.setattr(sft, "save_model", full)
        with pytest.raises(OSError, match="No space left"): train_sft("tiny", tmp_path / "out", ID, **options)
    assert load_model(tmp_path / "out/step-00003") and json.loads((tmp_path / "out/resume.json").read_text())["checkpoint"] == "checkpoint-3"
    train_sft("tiny", tmp_path / "out", ID, **options)
    equal_files(tmp_path / "whole", tmp_path / "out", ["step-00003/model.safetensors", "step-00008/model.safetensors"])
    for name in ("curve", "log"): pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / x / f"{name}.parquet") for x in ("whole", "out")), check_exact=True)

def test_nan_loss(tmp_path, monkeypatch):
    train_ppo("tiny", tmp_path, ID, SMALL, progress=False, stop_after=2)
    before = (tmp_path / "resume.pt").read_bytes()
    loss = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *a, **k: (loss(*a, **k)[0] * float("nan"), loss(*a, **k)[1]))
    with pytest.raises(FloatingPointError, match="round 3.*last good round is kept"): train_ppo("tiny", tmp_path, ID, SMALL, progress=False)
    assert (tmp_path / "resume.pt").read_bytes() == before and not (tmp_path / "checkpoint").exists()

def test_diverging_ppo_stops(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"): train_ppo("tiny", tmp_path, ID, PPOConfig(iterations=3, samples=12, minibatch=6, lr=1e20), progress=False)
    assert not (tmp_path / "checkpoint").exists()

def test_a_diverged_model_is_not_written(tmp_path):
    model, tokenizer = load_model("tiny")
    sft.save_model(model, tokenizer, tmp_path / "out")
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="model.norm.weight"): sft.save_model(model, tokenizer, tmp_path / "out")
    assert load_model(tmp_path / "out")                                                            # the good one is still there

def test_empty_rollouts(tmp_path):
    class Nothing(Parity):
        def problems(self, split, n, seed=0): return []
    with pytest.raises(ValueError, match="gave no problems"): train_ppo("tiny", tmp_path / "a", Nothing(), SMALL, progress=False)
    silent = lambda model, tokenizer, prompts, *more: [([], False) for _ in prompts]
    with pytest.raises(ValueError, match="not one token in round 1"): train_ppo("tiny", tmp_path / "b", ID, SMALL, progress=False, sampler=silent)

def test_answers_that_never_end(tmp_path):
    with pytest.warns(UserWarning, match="no answer of round 1 ended within 3 tokens"):
        train_ppo("tiny", tmp_path, ID, PPOConfig(iterations=1, samples=8, minibatch=8, max_new_tokens=3), progress=False)
    log = pd.read_parquet(tmp_path / "log.parquet")
    assert log.ended[0] == 0 and log.length[0] == 3 and load_model(tmp_path / "checkpoint")

def test_another_runs_folder(tmp_path):
    train_ppo("tiny", tmp_path / "ppo", ID, SMALL, progress=False, stop_after=1)
    with pytest.raises(ValueError, match="other settings \\(samples\\)"): train_ppo("tiny", tmp_path / "ppo", ID, PPOConfig(iterations=4, samples=18, minibatch=6), progress=False)
    def stop(*a, **k): raise KeyboardInterrupt
    def sft_(**more): train_sft("tiny", tmp_path / "sft", ID, **(dict(steps=8, points=2, n_eval=4, examples=32, batch_size=8, progress=False) | more))
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sft, "pick", stop); sft_()
    with pytest.raises(ValueError, match="other settings \\(lr\\)"): sft_(lr=5e-4)
