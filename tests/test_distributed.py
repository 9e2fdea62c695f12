"Two processes and one, as configs/ launches them: DDP, FSDP2, DeepSpeed over gloo, generating between the updates."

import json
import os
import subprocess
import sys
from pathlib import Path
import pandas as pd
import pytest
import torch
from made import furthest
from safetensors.torch import load_file
from gp_spectral.folders import TINY

SCRIPT = """
import json, os, sys, warnings
import torch

warnings.filterwarnings("ignore")
from gp_spectral import models
from gp_spectral.env import GeneralPoints
from gp_spectral.ppo import PPOConfig, train_ppo
from gp_spectral.sft import train_sft

ID, OOD = GeneralPoints(), GeneralPoints("faces_as_rank")
what, out = sys.argv[1:3]
# accelerate keeps FSDP for accelerators: for it, these processors are some
if os.environ.get("ACCELERATE_USE_FSDP"):
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    start = AcceleratorState.__init__

    def passing_for_gpus(self, *args, cpu=False, **kwargs):
        if PartialState(cpu).distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        start(self, *args, cpu=cpu, **kwargs)

    AcceleratorState.__init__ = passing_for_gpus
if "trap" in what:  # passes without gradients leave the weights gathered
    import contextlib
    from gp_spectral import play, ppo

    @contextlib.contextmanager
    def careless(model):
        with torch.no_grad():
            yield

    play.inference = ppo.inference = careless


def sharded():  # a function: its tensors are gone before the process group is
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor
    from gp_spectral.ppo import _open, _prepare, rollout, score

    accelerator = Accelerator(cpu=True)
    net, tokenizer = _open("tiny", PPOConfig(), "cpu")
    _prepare(net, PPOConfig(), accelerator)
    whole = lambda: [n for n, p in net.named_parameters() if not isinstance(p, DTensor)]
    assert not whole() and models.is_sharded(net)
    batch = rollout(net, tokenizer, ID, ID.problems("train", 6), share=True)
    assert not whole(), f"gathered after generating: {whole()}"
    score(net, batch)
    assert not whole(), f"gathered after scoring: {whole()}"
    config = PPOConfig(dtype="bfloat16")  # of which FSDP2 takes no float32 value head into one group
    net, tokenizer = _open("tiny", config, "cpu")
    optimizer = _prepare(net, config, accelerator)[1]
    logp, values, _ = net(batch.ids, batch.attention, 1.0, batch.mask)
    (logp.sum() + values.sum()).backward()
    optimizer.step()
    assert {p.dtype for p in net.model.parameters()} == {torch.bfloat16} and {
        p.dtype for p in net.value_head.parameters()
    } == {torch.float32}
    assert all(p.abs().sum().full_tensor() > 0 for p in net.value_head.parameters())


def rounded():
    from accelerate import Accelerator
    from gp_spectral.ppo import _open, _prepare, rollout, score

    accelerator, config = Accelerator(cpu=True), PPOConfig()
    assert accelerator.mixed_precision == "bf16"
    net, tokenizer = _open("tiny", config, "cpu")
    optimizer = _prepare(net, config, accelerator)[1]
    with accelerator.autocast():
        batch = rollout(net, tokenizer, ID, ID.problems("train", 6), share=True)
    logp = score(net, batch)[0][batch.mask]
    assert logp.dtype == torch.float32 and (logp != logp.bfloat16()).any(), "rounded to 16 bits"
    logp, values, _ = net(batch.ids, batch.attention, 1.0, batch.mask)
    accelerator.backward(logp.sum() + values.sum())
    optimizer.step()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters() if p.grad is not None)


# the first process is killed in its sixth step of SFT, or before its second round of updates
if "dies" in what:
    import signal
    from transformers.trainer_callback import CallbackHandler
    from gp_spectral import ppo

    def deadly(action, moment, seen=[]):
        def acts(*args, **kwargs):
            seen.append(action)
            if seen.count(action) == moment and models.world().is_main_process:
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*args, **kwargs)

        return acts

    CallbackHandler.on_step_begin, ppo.Learner.update = (
        deadly(CallbackHandler.on_step_begin, 6),
        deadly(ppo.Learner.update, 2),
    )
if "sharded" in what:
    sharded()
elif "rounded" in what:
    rounded()
elif what == "both":  # as in a study: what the trainer of SFT leaves behind is not what PPO wants
    train_sft(
        "tiny",
        out + "/sft",
        ID,
        {"ID": ID, "OOD": OOD},
        steps=2,
        points=1,
        n_eval=4,
        examples=32,
        batch_size=8,
        microbatch=2,
        lr=1e-6,
        progress=False,
    )
    train_ppo(
        "tiny",
        out + "/ppo",
        ID,
        PPOConfig(iterations=1, samples=8, minibatch=8, microbatch=2, dtype=sys.argv[4]),
        {"OOD": OOD},
        1,
        4,
        progress=False,
    )
elif what == "study":
    from pathlib import Path
    import pandas as pd
    from gp_spectral.cli import main
    from gp_spectral.preset import load_preset
    from gp_spectral.stages import Cell, Study, in_one_process, share_work, stage

    root, ran = Path(out), []

    def one(seed, needs=()):
        folder = root / str(seed) / "sft"
        run = lambda: ran.append(stage(folder, dict(seed=seed), ["tiny"], lambda part: None))
        return Cell(seed, "sft", folder, needs, run)

    share_work([one(0, (root / "1/sft",)), one(1)])  # the first needs the second
    assert ran == [root / "1/sft", root / "0/sft"]
    in_one_process(
        lambda: pd.DataFrame([dict(step=s, rule="OOD", set="validation", rate=0.5) for s in (0, 320)]).to_parquet(
            root / "0/sft/curve.parquet"
        )
    )
    # as for the report: by the first process alone
    in_one_process(lambda: Study(load_preset("tiny", dict(teach_steps="1")), root).checkpoints(0))
    assert main(["sft", "tiny", "/proc/nowhere/out"]) == 2  # both are told
elif "sft" in what:
    import time
    from transformers import trainer

    last = trainer.sort_checkpoints

    # the second process ends its training later than the first, and still looks there
    def late(output_dir, **kwargs):
        time.sleep(2 * models.world().process_index)
        assert os.path.isdir(output_dir), "removed while a process was at work in it"
        return last(output_dir=output_dir, **kwargs)

    trainer.sort_checkpoints = late
    train_sft(
        "tiny",
        out,
        ID,
        {"ID": ID, "OOD": OOD},
        steps=8,
        points=2,
        save_every=2,
        n_eval=10,
        examples=40,
        batch_size=8,
        lr=3e-5,
        warmup=2,
        lora=2 * ("lora" in what),
        progress=False,
    )
elif what in ("grpo", "rloo"):
    from gp_spectral.grpo import GRPOConfig, train_grpo

    train_grpo(
        "tiny",
        out,
        ID,
        GRPOConfig(iterations=2, samples=16, minibatch=16, microbatch=4, lr=3e-5),
        {"OOD": OOD},
        1,
        10,
        progress=False,
        method=what,
    )
    from accelerate.state import AcceleratorState

    policy = getattr(getattr(AcceleratorState(), "fsdp_plugin", None), "mixed_precision_policy", None)
    assert policy is None or policy.output_dtype is None and policy.reduce_dtype == torch.float32
elif what == "rft":
    from gp_spectral.twins import RFTConfig, train_rft

    config = RFTConfig(iterations=2, samples=11, minibatch=7, microbatch=2, attempts=2, lr=3e-5)
    train_rft("tiny", out, ID, config, {"OOD": OOD}, 1, 10, progress=False)
else:
    train_ppo(
        "tiny",
        out,
        ID,
        PPOConfig(
            iterations=2,
            samples=11,
            minibatch=7,
            microbatch=2,
            attempts=2,
            epochs=2,
            lr=3e-5,
            value_lr=3e-5,
            kl="loss",
            lora=2 * ("lora" in what),
            **json.loads(sys.argv[3]),
        ),
        {"OOD": OOD},
        1,
        10,
        progress=False,
    )
models.end_world()
"""

slow = pytest.mark.slow
CONFIGS = Path(__file__).parents[1] / "configs"


def run(tmp_path, name, what, how=None, processes=2, precision="no", dtype="float32", **config):
    "The folder that `what` wrote: in this one process, or in several as configs/`how`.yaml says."
    script, out = tmp_path / "run.py", tmp_path / name
    script.write_text(SCRIPT)
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIGS / f"{how}.yaml",
        f"--num_processes={processes}",
        f"--mixed_precision={precision}",
        "--main_process_port=0",
    ]
    start = [] if how is None else launch
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *start, str(script), what, str(out), json.dumps(config), dtype],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, "\n".join(l for l in done.stderr.splitlines() if "elastic" not in l)[:4000]
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "One process: the reference of each kind of run, made once."
    made, tmp = {}, tmp_path_factory.mktemp("alone")
    return lambda what: made.setdefault(what, None) or made.update({what: run(tmp, what, what)}) or made[what]


@pytest.mark.parametrize(
    "what, how, processes",
    [
        ("ppo", "ddp", 2),
        pytest.param("ppo", "ddp", 3, marks=slow),
        ("ppo", "fsdp2", 2),
        pytest.param("ppo lora", "fsdp2", 2, marks=slow),
    ],
)
def test_ppo_equals_one_process(tmp_path, alone, what, how, processes):
    "Eleven episodes in minibatches of seven, for two or three processes: nothing divides, hangs or differs."
    one, many = alone(what), run(tmp_path, "many", what, how, processes)
    assert furthest(one / "checkpoint", many / "checkpoint") < 1e-6 < 1e-5 < furthest(one / "checkpoint", TINY)
    a, b = pd.read_parquet(one / "log.parquet"), pd.read_parquet(many / "log.parquet")
    assert (
        (a[["reward", "success", "length", "attempts"]] == b[["reward", "success", "length", "attempts"]]).all().all()
    )  # the same episodes, token for token
    assert (a.grad_norm - b.grad_norm).abs().max() < 1e-6 * max(1, a.grad_norm.max())
    for name in ("policy_loss", "value_loss", "kl_ref", "entropy"):
        assert (a[name] - b[name]).abs().max() < 1e-4, name
    pd.testing.assert_frame_equal(pd.read_parquet(one / "curve.parquet"), pd.read_parquet(many / "curve.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_rejection_fine_tuning_equals_one_process(tmp_path, alone, how):
    "What is kept of a minibatch divides even less."
    one, two = alone("rft"), run(tmp_path, "two", "rft", how)
    assert furthest(one / "checkpoint", two / "checkpoint") < 1e-6 < 1e-5 < furthest(one / "checkpoint", TINY)
    a, b = pd.read_parquet(one / "log.parquet"), pd.read_parquet(two / "log.parquet")
    same = ["reward", "success", "length", "attempts", "kept", "tokens", "optimizer_steps"]
    assert (a[same] == b[same]).all().all() and (a.tokens > 0).all()
    assert (a[["loss", "grad_norm"]] - b[["loss", "grad_norm"]]).abs().max().max() < 1e-5
    pd.testing.assert_frame_equal(pd.read_parquet(one / "curve.parquet"), pd.read_parquet(two / "curve.parquet"))


def test_deepspeed_equals_one_process(tmp_path):
    "Pieces, clipped gradients, a rate that changes: DeepSpeed steps inside `backward`, and does all that by itself."
    pytest.importorskip("deepspeed")
    same = dict(max_grad_norm=0.1, lr_end=0.0)
    one, two = run(tmp_path, "one", "ppo", **same), run(tmp_path, "two", "ppo", "zero2", **same)
    assert furthest(one / "checkpoint", two / "checkpoint") < 1e-6 < 1e-5 < furthest(one / "checkpoint", TINY)
    a, b = pd.read_parquet(one / "log.parquet"), pd.read_parquet(two / "log.parquet")
    assert (a.grad_norm - b.grad_norm).abs().max() < 1e-5 * a.grad_norm.max() and (
        a.grad_norm > 0.1
    ).all()  # the norm before clipping, which has something to do
    for name in ("lr", "optimizer_steps", "reward", "length"):
        assert (a[name] == b[name]).all(), name
    with pytest.raises(AssertionError, match="ValueError: a training cannot play .* ZeRO-3"):
        run(tmp_path, "three", "ppo", "zero3")


def test_a_study_in_two_processes(tmp_path):
    "They share seeds and stages as one; what one of them does alone waits for nobody; where one fails, both end."
    out = run(tmp_path, "study", "study", "ddp")
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == ["curve.parquet", "record.json", "record.json"]


@pytest.mark.slow
def test_the_trap_of_fsdp2(tmp_path):
    "After a pass without gradients FSDP2 leaves a copy of weights that no step reaches; `inference` shards again."
    run(tmp_path, "x", "sharded", "fsdp2")
    with pytest.raises(AssertionError, match="gathered after generating"):
        run(tmp_path, "x", "sharded trap", "fsdp2")


def test_fsdp2_in_16_bits_rounds_nothing_that_PPO_compares(tmp_path):
    "accelerate's own policy casts what a model puts out, log-probabilities too, to the 16 bits it calculates in."
    run(tmp_path, "x", "rounded", "fsdp2", precision="bf16")


@pytest.mark.parametrize(
    "what, how",
    [
        pytest.param("sft", "ddp", marks=slow),
        pytest.param("sft lora", "ddp", marks=slow),
        ("sft", "fsdp2"),
        pytest.param("sft lora", "fsdp2", marks=slow),
        ("sft", "zero2"),
        ("sft", "zero3"),
    ],
)
def test_sft_equals_one_process(tmp_path, alone, what, how):
    if "zero" in how:
        pytest.importorskip("deepspeed")
    one, two = alone(what), run(tmp_path, "two", what, how)
    assert furthest(one / "step-00008", two / "step-00008") < 1e-6 < 1e-5 < furthest(one / "step-00008", TINY)
    a, b = pd.read_parquet(one / "log.parquet"), pd.read_parquet(two / "log.parquet")
    assert (a.grad_norm - b.grad_norm).abs().max() < 1e-6 and (a.tokens == b.tokens).all()
    pd.testing.assert_frame_equal(pd.read_parquet(one / "curve.parquet"), pd.read_parquet(two / "curve.parquet"))


@pytest.mark.slow
def test_two_trainings_in_one_program(tmp_path):
    "PPO has weights of two types, for which FSDP2 needs a group of its own; DeepSpeed has batches of two sizes."
    run(tmp_path, "both", "both", "fsdp2", dtype="bfloat16")
    pytest.importorskip("deepspeed")
    run(tmp_path, "zero2", "both", "zero2")


@pytest.mark.parametrize("how", [pytest.param("fsdp2", marks=slow), "zero2", "zero3"])
def test_16_bits_do_not_reach_the_checkpoint(tmp_path, how):
    "DeepSpeed trains a rounded copy of the weights: written as they are, steps of 1e-6 would be lost."
    if how != "fsdp2":
        pytest.importorskip("deepspeed")
    a, b = (run(tmp_path, name, "sft", name, precision="bf16") for name in ("ddp", how))

    def moved(out):  # from the run's own start: DeepSpeed has rounded that once
        start, end = (load_file(out / f"step-{s}/model.safetensors") for s in ("00000", "00008"))
        assert {x.dtype for x in end.values()} == {torch.float32}
        return torch.cat([(end[k] - start[k]).flatten() for k in sorted(start)])

    x, y = moved(a), moved(b)
    assert torch.cosine_similarity(x, y, dim=0) > 0.9 and abs(y.norm() / x.norm() - 1) < 0.1


@slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("what", ["grpo", "rloo"])
def test_critic_free_RL_under_FSDP2_equals_DDP(tmp_path, what, precision):
    "Not one process: each process draws its own answers."
    a, b = (run(tmp_path, how, what, how, precision=precision) for how in ("ddp", "fsdp2"))
    if precision == "bf16":
        return  # it runs, and says what it calculates in
    assert furthest(a / "checkpoint", b / "checkpoint") < 1e-6 < 1e-5 < furthest(a / "checkpoint", TINY)
    same = ["reward", "success", "length", "clip_fraction"]
    pd.testing.assert_frame_equal(pd.read_parquet(a / "log.parquet")[same], pd.read_parquet(b / "log.parquet")[same])
    pd.testing.assert_frame_equal(pd.read_parquet(a / "curve.parquet"), pd.read_parquet(b / "curve.parquet"))


@slow
@pytest.mark.parametrize(
    "what, kept, made",
    [
        ("sft", "resume.json", "step-00008"),
        ("sft lora", "resume.json", "step-00008"),
        ("ppo", "resume.pt", "checkpoint"),
    ],
)
def test_killed_under_FSDP2_it_ends_with_the_same_bits(tmp_path, what, kept, made):
    whole = run(tmp_path, "whole", what, "fsdp2")
    with pytest.raises(AssertionError):
        run(tmp_path, "killed", what + " dies", "fsdp2")
    assert (tmp_path / "killed" / kept).exists() and not (tmp_path / "killed" / made).exists()
    killed = run(tmp_path, "killed", what, "fsdp2")
    assert furthest(whole / made, killed / made) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(whole / "curve.parquet"), pd.read_parquet(killed / "curve.parquet"))
