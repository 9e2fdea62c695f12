"""How the time of large tables grows: `python -m tests.faults.growth`.

Each task is made at a size and at four times that size. Work that is linear takes four times as long; sorting adds a
tenth to that, and memory that no longer fits a cache as much again as a half. So a ratio of 4 · 1.6 is the bound, and
work that is quadratic (16) is far beyond it. Of three runs the quickest counts, in time of the processor, and with
Python's collector of garbage switched off, which looks through everything at moments of its own. No bound is in
seconds."""

import argparse
import functools
import gc
import json
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from gp_spectral import report
from gp_spectral.angles import band_summary
from gp_spectral.checkpoint import Checkpoint, preflight
from gp_spectral.page import map_rows, what_turned

TABLES = Path(__file__).resolve().parents[2] / "nbs" / "studies" / "rule"
BOUND = 4 * 1.6
LARGE = {}  # name: (size, what it counts, function of a size that gives the work)


def large(size, what):
    "Registers a task with its larger size."

    def register(make):
        LARGE[make.__name__.replace("_", " ")] = size, what, make
        return make

    return register


def header_only(folder, n):
    "A checkpoint of n tensors of four numbers each, in layers of seven matrices."
    folder.mkdir(parents=True)
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = [f"model.layers.{i // 7}.{kinds[i % 7]}.weight" for i in range(n)]
    told = {x: dict(dtype="F32", shape=[2, 2], data_offsets=[16 * i, 16 * i + 16]) for i, x in enumerate(names)}
    text, body = json.dumps(told).encode(), np.arange(4 * n, dtype="<f4").tobytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    (folder / "config.json").write_text(json.dumps(dict(model_type="llama", tie_word_embeddings=False)))
    return folder


@large(10_000, "tensors")
def open_a_checkpoint(n, room):
    folder = header_only(room / f"a{n}", n)
    return lambda: Checkpoint(folder).matrices()


@large(10_000, "tensors")
def compare_two_by_their_headers(n, room):
    one, other = header_only(room / f"b{n}", n), header_only(room / f"c{n}", n)
    return lambda: preflight(one, other)


@large(10_000, "tensors")
def match_the_names_of_two(n, room):
    one, other = header_only(room / f"d{n}", n), header_only(room / f"e{n}", n)
    file = other / "model.safetensors"
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    text = raw[8 : 8 + size].replace(b'"model.', b'"model.language_model.')
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return lambda: preflight(one, other)


@functools.cache
def angles(n):
    "A table of angles with n rows, as of a comparison of many pairs."
    known = pd.read_parquet(TABLES / "angles.parquet")
    rows = pd.concat([known] * -(-n // len(known)), ignore_index=True)[:n]
    return rows.assign(isotropic=0.5 * rows["mean"] + 0.1)  # which the tables of that study do not have yet


@large(1_000_000, "rows")
def rows_of_the_map(n, room):
    return functools.partial(map_rows, angles(n))


@large(1_000_000, "rows")
def summary_of_bands(n, room):
    return functools.partial(band_summary, angles(n))


@large(1_000_000, "rows")
def sentences_of_the_page(n, room):
    table, key = angles(n), ["base", "other"]
    changes = table.drop_duplicates([*key, "matrix"]).assign(mean_abs_change=0.01)[[*key, "matrix", "mean_abs_change"]]
    parts = table.drop_duplicates(key).assign(change_norm=1.0, weight_norm=9.0, outside=0.1)
    return lambda: what_turned((table, changes, parts))


@large(1_000_000, "rows")
def map_of_the_explorer(n, room):
    from gp_spectral.page import furthest, map_rows

    table = angles(n)
    return lambda: furthest(map_rows(table))


@functools.cache
def of_seeds(n):
    "The tables of a study with n seeds: those of one that was run, again and again."
    known = {p.stem: pd.read_parquet(p) for p in TABLES.glob("*.parquet")}
    seeds = sorted(known["evaluations"].seed.unique())
    again = lambda t: pd.concat(
        [t[t.seed == seeds[i % len(seeds)]].assign(seed=i) for i in range(n)] if "seed" in t else [t], ignore_index=True
    )
    return {name: again(table) for name, table in known.items() if name != "claims"}


@large(52, "seeds")
def claims_of_a_study(n, room):
    preset = json.loads((TABLES / "preset.json").read_text())
    tables = of_seeds(n)
    return lambda: report.claims(tables, preset["sft_steps"], preset["band"])


def seconds(work, runs=3):
    "The quickest of some runs."
    found = []
    for _ in range(runs):
        gc.collect()
        gc.disable()
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
        gc.enable()
    return min(found)


def measured(name, runs=3):
    "A row: the time at a quarter of the size and at the size, and their ratio."
    size, what, make = LARGE[name]
    room = Path(tempfile.mkdtemp(prefix="growth-"))
    try:
        small, whole = (seconds(make(n, room), runs) for n in (size // 4, size))
    finally:
        shutil.rmtree(room)
    return dict(task=name, size=size, what=what, quarter=round(small, 4), whole=round(whole, 4), ratio=whole / small)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", help="also write the rows to this .json file")
    args = parser.parse_args(words)
    rows = []
    for name in LARGE:
        rows.append(measured(name))
        print("{task:32} {size:>9,} {what:8} {whole:8.3f} s, {ratio:.1f} times a quarter of it".format(**rows[-1]))
    if args.keep:
        Path(args.keep).write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["ratio"] > BOUND for row in rows))


if __name__ == "__main__":
    sys.exit(main())
