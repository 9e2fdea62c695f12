"Two processes and one: DDP and FSDP2 over gloo, with generation before and between the updates, which is where FSDP2 goes wrong silently."
import os, subprocess, sys
import pandas as pd, pytest, torch
from made import furthest
from gp_spectral.sft import TINY

SCRIPT = """
import sys, warnings
warnings.filterwarnings("ignore")
from gp_spectral import sft
from gp_spectral.env import GeneralPoints
from gp_spectral.ppo import PPOConfig, train_ppo
ID, OOD = GeneralPoints(), GeneralPoints("faces_as_rank")
what, out = sys.argv[1:3]
if "trap" in what:                                              # passes without gradients leave the weights gathered
    import contextlib, torch
    from gp_spectral import ppo
    @contextlib.contextmanager
    def careless(model):
        with torch.no_grad(): yield
    sft.inference = ppo.inference = careless
def sharded():                                                  # a function: its tensors are gone before the process group is
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor
    from gp_spectral.ppo import _open, _prepare, rollout, score
    accelerator = Accelerator(cpu=True)
    net, tokenizer = _open("tiny", PPOConfig(), "cpu")
    _prepare(net, PPOConfig(), accelerator)
    whole = lambda: [n for n, p in net.named_parameters() if not isinstance(p, DTensor)]
    assert not whole() and sft.is_sharded(net)
    batch = rollout(net, tokenizer, ID, ID.problems("train", 6), share=True)
    assert not whole(), f"gathered after generating: {whole()}"
    score(net, batch)
    assert not whole(), f"gathered after scoring: {whole()}"
    import torch
    config = PPOConfig(dtype="bfloat16")                        # of which FSDP2 takes no float32 value head into one group
    net, tokenizer = _open("tiny", config, "cpu")
    optimizer = _prepare(net, config, accelerator)[1]
    logp, values, _ = net(batch.ids, batch.attention, 1.0, batch.mask)
    (logp.sum() + values.sum()).backward(); optimizer.step()
    assert {p.dtype for p in net.model.parameters()} == {torch.bfloat16} and {p.dtype for p in net.value_head.parameters()} == {torch.float32}
    assert all(p.abs().sum().full_tensor() > 0 for p in net.value_head.parameters())
if "sharded" in what: sharded()
elif "sft" in what:
    import os, time
    from transformers import trainer
    last = trainer.sort_checkpoints
    def late(output_dir, **kwargs):                             # the second process ends its training later than the first, and still looks there
        time.sleep(2 * sft.world().process_index)
        assert os.path.isdir(output_dir), "removed while a process was at work in it"
        return last(output_dir=output_dir, **kwargs)
    trainer.sort_checkpoints = late
    sft.train_sft("tiny", out, ID, {"ID": ID, "OOD": OOD}, steps=8, points=2, n_eval=10, examples=40, batch_size=8, lr=3e-5, warmup=2, lora=2 * ("lora" in what), progress=False)
else:
    train_ppo("tiny", out, ID, PPOConfig(iterations=2, samples=11, minibatch=7, microbatch=2, attempts=2, epochs=2, lr=3e-5, value_lr=3e-5, kl="loss", lora=2 * ("lora" in what), **eval(sys.argv[3])), {"OOD": OOD}, 1, 10, progress=False)
sft.end_world()
"""

def run(tmp_path, name, what, processes=1, fsdp=False, zero=0, **config):
    script, out = tmp_path / "run.py", tmp_path / name
    script.write_text(SCRIPT)
    start = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | ({"ACCELERATE_USE_FSDP": "true"} if fsdp else {})
    if zero: env |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *start, str(script), what, str(out), str(config)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, "\n".join(l for l in done.stderr.splitlines() if "elastic" not in l)[:4000]
    return out

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "One process: the reference of each kind of run, made once."
    made, tmp = {}, tmp_path_factory.mktemp("alone")
    return lambda what: made.setdefault(what, None) or made.update({what: run(tmp, what, what)}) or made[what]

@pytest.mark.parametrize("what, processes, fsdp", [("ppo", 2, False), pytest.param("ppo", 3, False, marks=pytest.mark.slow), ("ppo", 2, True), ("ppo lora", 2, True)])
def test_ppo_equals_one_process(tmp_path, alone, what, processes, fsdp):
    "Eleven episodes of unequal length in minibatches of seven, for two or three processes: nothing divides, nothing hangs, and nothing differs."
    one, many = alone(what), run(tmp_path, "many", what, processes, fsdp)
    assert furthest(one / "checkpoint", many / "checkpoint") < 1e-6 < 1e-5 < furthest(one / "checkpoint", TINY)
    a, b = pd.read_parquet(one / "log.parquet"), pd.read_parquet(many / "log.parquet")
    assert (a[["reward", "success", "length", "attempts"]] == b[["reward", "success", "length", "attempts"]]).all().all()        # the same episodes, token for token
    assert (a.grad_norm - b.grad_norm).abs().max() < 1e-6 * max(1, a.grad_norm.max())
    for name in ("policy_loss", "value_loss", "kl_ref", "entropy"): assert (a[name] - b[name]).abs().max() < 1e-4, name
    pd.testing.assert_frame_equal(pd.read_parquet(one / "curve.parquet"), pd.read_parquet(many / "curve.parquet"))

def test_deepspeed_equals_one_process(tmp_path):
    "Minibatches in pieces, clipped gradients, a rate that changes with each step: DeepSpeed steps inside `backward`, and does all that by itself."
    pytest.importorskip("deepspeed")
    same = dict(max_grad_norm=0.1, lr_end=0.0)
    one, two = run(tmp_path, "one", "ppo", **same), run(tmp_path, "two", "ppo", 2, zero=2, **same)
    assert furthest(one / "checkpoint", two / "checkpoint") < 1e-6 < 1e-5 < furthest(one / "checkpoint", TINY)
    a, b = pd.read_parquet(one / "log.parquet"), pd.read_parquet(two / "log.parquet")
    assert (a.grad_norm - b.grad_norm).abs().max() < 1e-5 * a.grad_norm.max() and (a.grad_norm > 0.1).all()      # the norm before clipping, which has something to do
    for name in ("lr", "optimizer_steps", "reward", "length"): assert (a[name] == b[name]).all(), name
    with pytest.raises(AssertionError, match="ValueError: train_ppo cannot play .* ZeRO-3"): run(tmp_path, "three", "ppo", 2, zero=3)

def test_the_trap_of_fsdp2(tmp_path):
    "After a pass without gradients FSDP2 leaves the outermost weights gathered, a copy that an optimizer step does not reach; `inference` shards them again."
    run(tmp_path, "x", "sharded", 2, True)
    with pytest.raises(AssertionError, match="gathered after generating"): run(tmp_path, "x", "sharded trap", 2, True)

@pytest.mark.parametrize("what", ["sft", "sft lora"])
def test_sft_equals_one_process(tmp_path, alone, what):
    one, two = alone(what), run(tmp_path, "two", what, 2)
    assert furthest(one / "step-00008", two / "step-00008") < 1e-6 < 1e-5 < furthest(one / "step-00008", TINY)
    a, b = pd.read_parquet(one / "log.parquet"), pd.read_parquet(two / "log.parquet")
    assert (a.grad_norm - b.grad_norm).abs().max() < 1e-6 and (a.tokens == b.tokens).all()
    pd.testing.assert_frame_equal(pd.read_parquet(one / "curve.parquet"), pd.read_parquet(two / "curve.parquet"))
