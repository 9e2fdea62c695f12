"What tests are made of, and nothing that is tested: matrices, small checkpoints, a small task."

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gp_spectral.checkpoint import Checkpoint
from gp_spectral.env import Feedback


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n, k, seed=0):
    return torch.linalg.qr(gaussian(n, k, seed=seed))[0]


def furthest(a, b):
    "The largest difference of any entry between two checkpoint folders."
    a, b = (load_file(x / "model.safetensors") for x in (a, b))
    assert set(a) == set(b)
    return max((a[k] - b[k]).abs().max().item() for k in a)


def trained(m, n, seed=0):
    "A matrix with a heavy-tailed, well-separated spectrum."
    r = min(m, n)
    return (orthonormal(m, r, seed) * torch.linspace(3, 0.02, r).double() ** 1.5) @ orthonormal(n, r, seed + 1).T


def write(folder, tensors, shards=1, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(model_type="llama") | config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = {f"model-{i + 1:05}-of-{shards:05}.safetensors": list(tensors)[i::shards] for i in range(shards)}
    for file, some in names.items():
        save_file({n: tensors[n] for n in some}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(dict(metadata={}, weight_map={n: f for f, some in names.items() for n in some}))
    )
    return folder


def weights(seed=0, dtype=torch.float32, layers=3):
    shapes = {
        "self_attn.q_proj": (24, 24),
        "self_attn.k_proj": (8, 24),
        "mlp.up_proj": (40, 24),
        "mlp.down_proj": (24, 40),
    }
    found = {"model.embed_tokens.weight": gaussian(30, 24, seed=seed), "model.norm.weight": gaussian(24, seed=seed + 1)}
    for i in range(layers):
        for j, (kind, shape) in enumerate(shapes.items()):
            found[f"model.layers.{i}.{kind}.weight"] = trained(*shape, seed=seed + 100 * i + 10 * j)
        found[f"model.layers.{i}.input_layernorm.weight"] = 1 + 0.1 * gaussian(24, seed=seed + i)
    return {k: v.to(dtype).contiguous() for k, v in found.items()}


def changed(tensors, size=0.2, seed=50):
    return {
        k: (v.double() + size * v.double().std() * gaussian(*v.shape, seed=seed + i)).to(v.dtype)
        for i, (k, v) in enumerate(tensors.items())
    }


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def checkpoints(request, tmp_path):
    donor = weights(dtype=request.param)
    return Checkpoint(write(tmp_path / "target", changed(donor))), Checkpoint(write(tmp_path / "donor", donor))


class Parity:
    "A task that is learned in seconds: an even number after 'A2', an odd one after 'J3'."

    max_new_tokens, attempts, rule = 2, 1, "parity"

    def problems(self, split, n, seed=0):
        return [("A2", "J3")[i % 2] for i in range(n)]

    def prompt(self, problem):
        return problem

    def answer(self, problem, seed=0):
        return problem[-1]

    def retry(self, feedback):
        return "again"

    def verify(self, problem, text):
        word = (text.split() or [""])[0]
        ok = word.isdigit() and int(word) % 2 == int(problem[-1]) % 2
        return Feedback(float(ok), "" if ok else "wrong", ok, "" if ok else "wrong_value")


def add_package(folder, monkeypatch, group, module, source):
    "A package of somebody else's with one module and one entry point; gives the file of its entry points."
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {module}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n")
    monkeypatch.syspath_prepend(folder)
    return info / "entry_points.txt"
