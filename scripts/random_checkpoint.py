"""Writes a checkpoint of a real model's shapes with random weights, sharded, in little memory: something large to
try things on.

    python scripts/random_checkpoint.py OUT/base --shape llama-8b                # 16 GB, four shards
    python scripts/random_checkpoint.py OUT/tuned --perturb-of OUT/base  # the same weights, each matrix moved by 1 %
    python scripts/random_checkpoint.py OUT/small --shape 768mib                 # hidden 1024, 24 layers, 768 MiB

The matrices are Gaussian numbers whose columns fall in scale by a factor of a hundred, so that their spectra have a
heavy tail and do not look untrained. The numbers come from one block of 16 million draws, in which every tensor
begins at a place of its own, so that 16 GB are a matter of the disk and not of the generator; a tensor of more than
16 million numbers meets the block again, shifted against its columns.

--perturb-of adds such numbers, from another block, to the matrices inside the layers of any checkpoint with
safetensors, a real one for instance. --relative is the size of that change by the Frobenius norm of each matrix,
before it is rounded to the stored dtype. Everything else keeps its bytes.

A folder is written under another name and renamed when it is complete. transformers loads the result; nothing
sensible comes out of it.
"""

import argparse
import json
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads, vocabulary
    "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    "qwen-7b": (3584, 18944, 28, 28, 4, 152064),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256),
    "768mib": (1024, 4096, 24, 16, 8, 12288),
}
DTYPES = {"bf16": (torch.bfloat16, "BF16"), "fp16": (torch.float16, "F16"), "fp32": (torch.float32, "F32")}
BLOCK, PIECE = (
    16_777_259,
    1 << 21,
)  # numbers drawn: a prime, so that no row of a matrix repeats another; numbers written at once


def tensors(h, f, layers, heads, kv, vocabulary):
    "Names and shapes, in the order of the files."
    d = h // heads
    yield "model.embed_tokens.weight", (vocabulary, h)
    for i in range(layers):
        p = f"model.layers.{i}"
        yield f"{p}.input_layernorm.weight", (h,)
        yield from (
            (f"{p}.self_attn.{n}_proj.weight", s)
            for n, s in dict(q=(h, h), k=(kv * d, h), v=(kv * d, h), o=(h, h)).items()
        )
        yield f"{p}.post_attention_layernorm.weight", (h,)
        yield from ((f"{p}.mlp.{n}_proj.weight", s) for n, s in dict(gate=(f, h), up=(f, h), down=(h, f)).items())
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (vocabulary, h)


class Numbers:
    "Gaussian numbers from one block, read from a place that depends on the tensor."

    def __init__(self, seed):
        block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))
        self.block = torch.cat([block, block[:PIECE]])

    def __call__(self, place, start, size):
        at = (place * 2654435761 + start) % BLOCK
        return self.block[at : at + size]


def pieces(size, width):
    "(start, length) of whole rows."
    step = max(1, PIECE // width) * width
    return [(i, min(step, size - i)) for i in range(0, size, step)]


def raw(x):
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def new_folder(out, size):
    """A folder to write into, renamed to `out` at the end, and a bar for `size` bytes; it is removed when something
    goes wrong."""
    out = Path(out)
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise SystemExit(f"{out} exists already: give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(out.parent).free):
        raise SystemExit(f"{out} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc=str(out)) as bar:
            yield part, bar
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write(out, shape, dtype="bf16", seed=0, layers=None, shard=5e9):
    "A random checkpoint in the folder `out`."
    h, f, n, heads, kv, vocabulary = SHAPES[shape]
    n = layers or n
    (kind, code), shards, size, where = DTYPES[dtype], [[]], 0, {}
    for name, s in tensors(h, f, n, heads, kv, vocabulary):
        b = torch.Size(s).numel() * kind.itemsize
        if size + b > shard and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, s, b))
        size += b
    total, numbers, place = sum(b for some in shards for *_, b in some), Numbers(seed), 0
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=h,
        intermediate_size=f,
        num_hidden_layers=n,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        torch_dtype=str(kind)[6:],
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
    )
    with new_folder(out, total) as (part, bar):
        for i, some in enumerate(shards):
            file, header, at = (
                f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors",
                {"__metadata__": {"format": "pt"}},
                0,
            )
            for name, s, b in some:
                header[name] = dict(dtype=code, shape=s, data_offsets=[at, at + b])
                at += b
                where[name] = file
            head = json.dumps(header).encode()
            head += b" " * (-len(head) % 8)
            with open(part / file, "wb") as stream:
                stream.write(struct.pack("<Q", len(head)) + head)
                for name, s, b in some:
                    place += 1
                    if len(s) == 1:
                        bar.update(stream.write(raw(torch.ones(s, dtype=kind))))
                        continue
                    scale = 0.02 * torch.logspace(0.7, -1.3, s[1])
                    for start, length in pieces(s[0] * s[1], s[1]):
                        bar.update(
                            stream.write(raw((numbers(place, start, length).reshape(-1, s[1]) * scale).to(kind)))
                        )
        (part / "model.safetensors.index.json").write_text(
            json.dumps(dict(metadata=dict(total_size=total), weight_map=where))
        )
        (part / "config.json").write_text(json.dumps(config, indent=1))


def perturb(out, folder, relative=0.01, seed=1):
    "A copy of the checkpoint `folder` in `out`, with Gaussian noise in the matrices of its layers."
    from gp_spectral.checkpoint import Checkpoint, describe

    source = Checkpoint(folder)
    numbers = Numbers(seed)
    files = sorted({e.file for e in source.entries.values()})
    with new_folder(out, sum(f.stat().st_size for f in files)) as (part, bar):
        for f in source.path.iterdir():
            if f.is_file() and f.suffix in (".json", ".jinja", ".txt", ".model"):
                shutil.copyfile(f, part / f.name)
        for place, (file, inside) in enumerate(
            (f, sorted((e.start, n, e) for n, e in source.entries.items() if e.file == f)) for f in files
        ):
            with open(file, "rb") as old, open(part / file.name, "wb") as new:
                bar.update(new.write(old.read(inside[0][0])))  # the header
                for i, (start, name, e) in enumerate(inside):
                    width = max(1, e.shape[-1]) if e.shape else 1
                    parts = pieces((e.end - e.start) // e.dtype.itemsize, width)

                    def read(at, length):
                        old.seek(start + at * e.dtype.itemsize)
                        return torch.frombuffer(bytearray(old.read(length * e.dtype.itemsize)), dtype=e.dtype)

                    moves = len(e.shape) == 2 and e.dtype.is_floating_point and describe(name).layer is not None
                    std = (
                        relative
                        * (sum(float(read(*p).float().square().sum()) for p in parts) / (e.shape[0] * width)) ** 0.5
                        if moves
                        else 0
                    )
                    for p in parts:
                        x = read(*p)
                        bar.update(
                            new.write(
                                raw((x.float() + std * numbers(1000 * place + i, *p)).to(e.dtype) if moves else x)
                            )
                        )
                if new.tell() != file.stat().st_size:
                    raise SystemExit(f"{file} has bytes that belong to no tensor of the checkpoint: save it again")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", help="folder to make")
    p.add_argument("--shape", choices=SHAPES, default="llama-8b")
    p.add_argument("--layers", type=int, help="fewer layers than the model has")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--seed", type=int, help="default: 0, and 1 for a perturbation")
    p.add_argument(
        "--perturb-of",
        metavar="FOLDER",
        help="move the weights of this checkpoint instead of making new ones; shape and dtype are then its own",
    )
    p.add_argument(
        "--relative",
        type=float,
        default=0.01,
        help="size of the change, a share of each matrix's Frobenius norm (default 0.01)",
    )
    a = p.parse_args()
    if a.perturb_of:
        perturb(a.out, a.perturb_of, a.relative, 1 if a.seed is None else a.seed)
    else:
        write(a.out, a.shape, a.dtype, a.seed or 0, a.layers)


if __name__ == "__main__":
    main()
