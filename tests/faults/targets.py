"""What is fuzzed: readers of text and files that somebody else wrote, each as a function of bytes.

A target returns whether its input was accepted, and fails where a reader says something else than it documents:
another error than its own, a "solved" that an independent evaluator does not find, a tensor that safetensors reads
otherwise."""

import json
import os
import re
import shutil
import tempfile
import time
from fractions import Fraction
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gp_spectral.checkpoint import Checkpoint, preflight, read_header
from gp_spectral.domains import DOMAINS, Countdown
from gp_spectral.env import FormulaError, GeneralPoints, evaluate_formula, verify
from gp_spectral.folders import CheckpointError

from . import evaluator
from .corrupt import FILE, INDEX, adapter, header_of, in_shards, small, told

LONGEST = 5.0  # seconds that one input may take, on a machine that does other things besides
ROOM, GOOD = {}, {}  # kind: a folder in memory, made once, and what a good file was before targets wrote into it
WRITTEN = {"index": f"base/{INDEX}", "config": "base/config.json", "adapter": "adapter/adapter_config.json"}


def text_of(data):
    return data.decode("utf-8", "surrogateescape")


def formula(data):
    "`evaluate_formula` against the independent evaluator: the same value, or both refuse."
    text = text_of(data)
    try:
        found = evaluate_formula(text)
    except FormulaError:
        found = None
    try:
        expected = evaluator.value(text)[0]
    except evaluator.NoFormula:
        expected = None
    assert found == expected and (found is None or type(found) is Fraction), (text, found, expected)
    return found is not None


TASKS = [
    GeneralPoints(rule, style=style) for style in ("compact", "paper") for rule in ("faces_as_ten", "faces_as_rank")
]
PROBLEMS = [task.problems("train", 40, 1) for task in TASKS]


def answer(data):
    "Readers of answers: the first two bytes choose the game and the problem, and what follows is the answer."
    task = TASKS[data[0] % 4] if data else TASKS[0]
    problem, text = PROBLEMS[TASKS.index(task)][data[1] % 40 if len(data) > 1 else 0], text_of(data[2:])
    found = verify(problem, text, task.style)
    fault, stated = task.fault(problem, text), task.reading(problem, text)
    assert found.solved == (found.reward == 5) == (fault == "") and type(found.message) is str, text
    assert stated is None or all(type(n) is int for n in stated)
    if found.solved:
        assert evaluator.solves(found.formula, problem.numbers, problem.target), (problem, text, found)
    if task.style == "paper" and found.solved:
        assert found.formula in text
    if task.style == "compact":
        led = evaluator.played(text, problem.numbers, problem.target)
        assert led is None or led == found.solved, (problem, text, found, led)
    return found.solved


STATED = [domain(rule) for domain in DOMAINS.values() for rule in domain.RULES]
ASKED = [task.problems("train", 40, 1) for task in STATED]


def domain(data):
    "The same of the other domains: a verdict comes of any text, and only one that ends as it should is solved."
    task = STATED[data[0] % len(STATED)] if data else STATED[0]
    problem, text = ASKED[STATED.index(task)][data[1] % 40 if len(data) > 1 else 0], text_of(data[2:])
    found, fault = task.verify(problem, text), task.fault(problem, text)
    assert found.solved == (found.reward == 5) == (found.error == "") == (fault == "") and type(found.message) is str
    if found.solved and type(task) is not Countdown:  # there it is computed, not read
        end = task.right(problem)
        assert re.search(rf"(?<!\d)0*{end}(?!\d)" if type(end) is int else r"\s+".join(end), text), (problem, text)
    return found.solved


def in_eight_bits(folder):
    "One of the matrices in eight bits with a scale for each block, as the config has to explain."
    found = load_file(folder / FILE)
    name = "model.layers.0.mlp.up_proj.weight"
    found[name] = found[name].to(torch.float8_e4m3fn)
    found[f"{name}_scale_inv"] = torch.ones(3, 1)
    save_file(found, folder / FILE, metadata={"format": "pt"})
    told(folder, quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128]))


def room(kind):
    "A folder in memory that a target writes into, with what belongs there."
    if kind not in ROOM:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        ROOM[kind] = folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory))
        small(folder / "base")
        small(folder / "good")
        if kind == "config":
            in_eight_bits(folder / "base")
        if kind == "index":
            in_shards(folder / "base")
        if kind == "adapter":
            adapter(folder / "adapter", folder / "base")
        if kind in WRITTEN:
            GOOD[kind] = (folder / WRITTEN[kind]).read_bytes()
    return ROOM[kind]


def leave():
    "Removes what targets have written."
    for folder in ROOM.values():
        shutil.rmtree(folder, ignore_errors=True)
    ROOM.clear()


def read_all(folder):
    "Everything that is read of a checkpoint before arithmetic."
    c = Checkpoint(folder)
    for heads in (False, True):
        for m in c.matrices(heads=heads)[-4:]:
            c.matrix(m)
    preflight(folder.parent / "good", c)
    return c


def header(data):
    "The header of a safetensors file, as a whole file: what we read, safetensors reads in the same way."
    file = room("header") / "x.safetensors"
    file.write_bytes(data)
    try:
        found = read_header(file)
    except CheckpointError as e:
        assert str(file) in str(e)
        return False
    with safe_open(file, "pt") as f:  # ours is the stricter reader: what it takes, safetensors takes
        assert sorted(f.keys()) == sorted(found)
        for name, e in found.items():
            assert tuple(f.get_slice(name).get_shape()) == e.shape, name
    return True


def config(data):
    "A model's config.json."
    folder = room("config") / "base"
    (folder / "config.json").write_bytes(data)
    return opened(folder)


def opened(folder):
    try:
        read_all(folder)
    except CheckpointError as e:
        assert str(e)
        return False
    return True


def index(data):
    "The index of a checkpoint in shards."
    folder = room("index") / "base"
    (folder / INDEX).write_bytes(data)
    return opened(folder)


def adapter_config(data):
    "The config of an adapter."
    folder = room("adapter") / "adapter"
    (folder / "adapter_config.json").write_bytes(data)
    return opened(folder)


@cache
def presets():
    "What reads settings: imported late, for it brings the trainings along."
    from gp_spectral.preset import Preset, load_preset

    return Preset, load_preset


def settings(data):
    "A settings.ini: either a preset comes of it, or a `ValueError`."
    Preset, load_preset = presets()
    file = room("settings") / "settings.ini"
    file.write_bytes(data)
    try:
        found = load_preset("mine", files=[file])
    except ValueError as e:
        assert str(e)
        return False
    assert isinstance(found, Preset)
    return True


TARGETS = dict(
    formula=formula,
    answer=answer,
    domain=domain,
    header=header,
    index=index,
    adapter=adapter_config,
    config=config,
    settings=settings,
)


def seeds(name):
    "Good inputs of a target, to begin with."
    if name == "formula":
        return [b"(1 + 2) * 8", b"5 * (5 - 1 / 5)", b"10*10-4/4", "6×(3÷1−[2–1])".encode(), b"1 + (2", b"7 / (3 - 3)"]
    if name == "answer":
        found = []
        for i, task in enumerate(TASKS):
            for j, problem in enumerate(PROBLEMS[i][:10]):
                try:
                    found.append(bytes([i, j]) + task.answer(problem, j).encode())
                except ValueError:
                    continue
        return found
    if name == "domain":
        return [bytes([i, j]) + task.answer(ASKED[i][j], j).encode() for i, task in enumerate(STATED) for j in range(5)]
    if name == "settings":
        presets()
        mine = b"[mine]\nsft_steps = 30\ntarget = 10-30\nppo_starts = 0.5 1.0\nlora = 8\n"
        return [mine, b"[DEFAULT]\nmodel = tiny\n[mine]\nextends = other\n[other]\nrl = grpo\n"]
    if name == "header":
        whole = (room(name) / "base" / FILE).read_bytes()
        entries, body = header_of(room(name) / "base" / FILE)
        few = {k: v | dict(data_offsets=[0, 128]) | dict(shape=[32]) for k, v in entries.items() if "model.norm" in k}
        text = json.dumps(few | dict(__metadata__=dict(format="pt"))).encode()
        return [len(text).to_bytes(8, "little") + text + body[:128], whole[:3000]]
    room(name)
    return [GOOD[name]]


def tried(name, data):
    "Runs a target on an input, and fails where it takes too long."
    begun = time.perf_counter()
    found = TARGETS[name](data)
    took = time.perf_counter() - begun
    assert took < LONGEST, f"{name} took {took:.1f} s"
    return found
