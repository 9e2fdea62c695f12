"""Proves on one NVIDIA GPU what README says of GPUs, the most valuable first; rehearses it without one.

    python scripts/gpu_check.py --out DIR  # every part, some 12 minutes: DIR/results.md, DIR/<part>.json
    python scripts/gpu_check.py --out DIR --only smollm2  # one part; what is complete stays
    python scripts/gpu_check.py --out DIR --rehearse          # all parts at toy size, on any machine
    python scripts/gpu_check.py --pack DIR  # with a network: what has to travel, in pieces of 35 MB
    python scripts/gpu_check.py --unpack DIR                  # on the machine with the GPU: puts the pieces together

Parts:
    right      one training, comparison and repair of the tiny model, by a CPU and by the GPU: are the numbers the same?
    spectral   how quick and how exact the routes to a decomposition are, and a comparison in the shapes of a 7B model
    smollm2    taught base, SFT, PPO, spectra and recovery of SmolLM2 (preset smollm2-gpu, or --preset), what there is
               to train shared out among --processes; some ten minutes, and the stages that are finished count
    training   SFT and PPO on SmolLM2: tokens a second, share of the card's peak, memory; what decoding waits for;
               configs/single_gpu.yaml as it is
    large      the same for random models of 1.2 and of 7 billion parameters, the latter with LoRA

Each part runs in a process of its own and within its share of --minutes, prints one line of JSON and a table, and is
killed when its time is up; what it had finished stays in DIR and counts.

Without a network the machine needs a PyTorch with CUDA, transformers, accelerate, peft, pandas and pyarrow; --pack
brings the rest (trl, datasets, what draws pages, and the file of SmolLM2, with checksums). --unpack installs the
wheels beside the folder, in DIR/site, and says which PYTHONPATH and GP_SPECTRAL_MODELS to set. Pieces may arrive in
several journeys: --unpack takes what is there and says what is missing.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = dict(right=0.09, spectral=0.15, smollm2=0.52, training=0.1, large=0.14)  # name: share of the minutes
PIECE = 35_000_000
WHEELS = (
    "trl",
    "datasets",
    "dill",
    "multiprocess",
    "xxhash",
    "fastcore",
    "gguf",
    "filelock",
    "tqdm",
    "seaborn",
    "altair",
    "narwhals",
    "jsonschema",
    "jsonschema-specifications",
    "referencing",
    "rpds-py",
    "attrs",
    "vl-convert-python",
)  # what an image with PyTorch seldom has


# --- packing


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def pinned():
    "{package: version} of constraints.txt."
    lines = [l.split(";")[0].strip() for l in (ROOT / "constraints.txt").read_text().splitlines() if "==" in l]
    return dict(l.split("==") for l in lines)


def cut(file, out):
    "Writes a file as pieces, and manifest.json with all checksums; the pieces."
    whole, pieces = file.read_bytes(), []
    for i, at in enumerate(range(0, len(whole), PIECE)):
        piece = out / f"{file.name}.{i:02d}"
        piece.write_bytes(whole[at : at + PIECE])
        pieces.append(dict(name=piece.name, sha256=digest(piece)))
    wheels = sorted(f.name for f in out.glob("*.whl"))
    (out / "manifest.json").write_text(
        json.dumps(dict(file=file.name, sha256=digest(file), pieces=pieces, wheels=wheels), indent=1)
    )
    return pieces


def pack(out):
    """Writes wheels for Python 3.12 and the model's file, the latter cut into pieces, and manifest.json with their
    checksums."""
    from gp_spectral.smollm2 import find_gguf, model_folder

    model_folder().mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    versions = pinned()
    wanted = [f"{w}=={versions[w]}" for w in WHEELS]
    platforms = [
        x
        for p in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
        for x in ("--platform", f"{p}_x86_64")
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            "3.12",
            "--implementation",
            "cp",
            *platforms,
            "--dest",
            out,
            *wanted,
        ],
        check=True,
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, str(ROOT)], check=True
    )
    pieces = cut(find_gguf(model_folder()), out)
    print(
        f"{out}: the model in {len(pieces)} pieces, {len(list(out.glob('*.whl')))} wheels, "
        f"{sum(f.stat().st_size for f in out.iterdir()) / 1e6:.0f} MB"
    )


def unpack(folder, site=None):
    """Installs the wheels into folder/site, joins the pieces into folder/models; whatever has not arrived yet is
    said and left for the next call."""
    note = json.loads((folder / "manifest.json").read_text())
    site, models = site or folder / "site", folder / "models"
    part = site.with_name(f"{site.name}.part")
    lost = [w for w in note["wheels"] if not (folder / w).exists() and not site.exists()]
    if not lost and not site.exists():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        if note["wheels"]:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "-q",
                    "--no-index",
                    "--no-deps",
                    "--no-compile",
                    "--target",
                    part,
                    *(folder / w for w in note["wheels"]),
                ],
                check=True,
            )
        part.rename(site)
    missing = [p["name"] for p in note["pieces"] if not (folder / p["name"]).exists()]
    broken = [
        p["name"] for p in note["pieces"] if p["name"] not in missing and digest(folder / p["name"]) != p["sha256"]
    ]
    if broken:
        raise SystemExit(f"{', '.join(broken)} in {folder}: not what was packed (another checksum); bring them again")
    if not missing:
        models.mkdir(exist_ok=True)
        part = models / f"{note['file']}.part"
        with open(part, "wb") as f:
            f.writelines((folder / p["name"]).read_bytes() for p in note["pieces"])
        if digest(part) != note["sha256"]:
            raise SystemExit(f"{note['file']} does not have the checksum that it was packed with")
        part.replace(models / note["file"])
    print(
        f"export PYTHONPATH={site.resolve()} GP_SPECTRAL_MODELS={models.resolve()}"
        if not missing + lost
        else f"still to come: {', '.join(missing + lost)}"
    )


# --- what the parts share


def on_gpu():
    import torch

    return torch.cuda.is_available()


def wait():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(action):
    "(seconds, result)."
    wait()
    begun = time.perf_counter()
    found = action()
    wait()
    return time.perf_counter() - begun, found


def memory():
    "Largest GPU memory in use since it was last asked, GB; nan without one."
    import torch

    if not torch.cuda.is_available():
        return float("nan")
    found = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return found


def about():
    "What the numbers were made with."
    import platform
    from importlib import metadata
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return dict(
        card=card,
        built_for_cuda=torch.version.cuda,
        python=platform.python_version(),
        **{p: metadata.version(p) for p in ("torch", "transformers", "trl", "accelerate", "peft")},
    )


def keep(out, part, rows, **more):
    "Writes a part's result; called again and again while it grows, so that a kill loses only what was under way."
    file = out / f"{part}.json"
    file.with_suffix(".part").write_text(json.dumps(dict(part=part, rows=rows, **more), indent=1, default=float))
    file.with_suffix(".part").replace(file)


def cell(x):
    return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


def as_table(rows):
    names = list(dict.fromkeys(k for r in rows for k in r))
    return "\n".join(
        "| " + " | ".join(map(cell, r)) + " |"
        for r in (names, ["---"] * len(names), *([r.get(n) for n in names] for r in rows))
    )


# --- right: the same numbers?


def right_run(folder, rehearse):
    "SFT, PPO, answers, log-probabilities, spectra and a repair of the tiny model; leaves tables in `folder`."
    import pandas as pd
    import torch
    from gp_spectral.angles import compare_all
    from gp_spectral.env import GeneralPoints
    from gp_spectral.ppo import ActorCritic, PPOConfig, collate, score, train_ppo
    from gp_spectral.recovery import recover
    from gp_spectral.models import load_model
    from gp_spectral.play import evaluate, play
    from gp_spectral.sft import train_sft
    from gp_spectral.svd import spectrum
    from gp_spectral.sweep import sweep

    folder.mkdir(parents=True, exist_ok=True)
    game, n, seconds = (
        {r: GeneralPoints(rule) for r, rule in (("ID", "faces_as_ten"), ("OOD", "faces_as_rank"))},
        16 if rehearse else 48,
        {},
    )

    def step(name, action):
        seconds[name], found = timed(action)
        return found

    step(
        "sft, 3 steps",
        lambda: train_sft(
            "tiny", folder / "sft", game["ID"], game, steps=3, points=1, n_eval=n, precision="no", progress=False
        ),
    )
    config = PPOConfig(iterations=2, samples=n, minibatch=n, precision="no")
    step(
        "ppo, 2 rounds",
        lambda: train_ppo(folder / "sft/step-00003", folder / "ppo", game["ID"], config, game, 2, n, progress=False),
    )
    answers = step("evaluate", lambda: pd.concat([evaluate("tiny", t, n=n).assign(rule=r) for r, t in game.items()]))
    answers.to_parquet(folder / "answers.parquet")
    model, tokenizer = load_model("tiny")
    episodes = play(
        *load_model("tiny", device="cpu"), game["OOD"], game["OOD"].problems("test", n), 2
    )  # greedy, on the CPU: the same for both
    batch = collate(episodes, tokenizer.pad_token_id).to(model.device)
    torch.save([x.cpu() for x in score(ActorCritic(model), batch)], folder / "logp.pt")
    chain = ["tiny", folder / "sft/step-00003", folder / "ppo/checkpoint"]
    found = step(
        "compare", lambda: compare_all(chain, cache=folder / "factors", out=folder / "comparison", progress=False)
    )
    spectrum(chain[0], progress=False, cache=folder / "factors").to_parquet(folder / "spectrum.parquet")
    step("recover", lambda: recover(chain[2], chain[0], folder / "repaired", cache=folder / "factors", progress=False))
    step(
        "sweep", lambda: sweep(chain[2], chain[0], ks=(0.1, 0.2), cache=folder / "factors", progress=False)
    ).to_parquet(folder / "sweep.parquet")
    (folder / "about.json").write_text(json.dumps(dict(seconds=seconds, peak_gb=memory(), matrices=len(found.changes))))


def right(out, a):
    import numpy as np
    import pandas as pd
    import torch
    from safetensors.torch import load_file

    sides = dict(cpu=dict(CUDA_VISIBLE_DEVICES=""), gpu={})
    running = []
    for name, env in sides.items():
        if not (out / "right" / name / "about.json").exists():
            shutil.rmtree(out / "right" / name, ignore_errors=True)
            code = (
                f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; from "
                f"gpu_check import right_run; right_run(Path({str(out / 'right' / name)!r}), {a.rehearse})"
            )
            running.append(subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **env}))
    if any([p.wait() for p in running]):
        raise SystemExit("one of the two sides came to a bad end, see above")
    cpu, gpu = (out / "right" / s for s in sides)
    told = [json.loads((f / "about.json").read_text()) for f in (cpu, gpu)]
    read = lambda name: [pd.read_parquet(f / name) for f in (cpu, gpu)]

    def weights(path):
        x, y = (load_file(f / path / "model.safetensors") for f in (cpu, gpu))
        return max(float((x[k] - y[k]).norm() / x[k].norm()) for k in x)

    rows = []

    def check(what, measured, at_most):
        rows.append(dict(what=what, measured=measured, at_most=at_most, right=bool(measured <= at_most)))
        keep(out, "right", rows)

    x, y = read("spectrum.parquet")
    check(
        "σ of the tiny model, largest relative difference to σ₁",
        float(((x.sigma - y.sigma).abs() / x.groupby("matrix").sigma.transform("max")).max()),
        1e-6,
    )
    logp = [torch.load(f / "logp.pt", weights_only=True)[0] for f in (cpu, gpu)]
    check("log-probabilities of the same answers, float32", float((logp[0] - logp[1]).abs().max()), 1e-4)
    x, y = read("answers.parquet")
    check("greedy answers judged otherwise, share", float((x.solved_first != y.solved_first).mean()), 0.01)
    check("weights after 3 steps of SFT, relative", weights("sft/step-00003"), 1e-4)
    check(
        "weights after 2 rounds of PPO, relative", weights("ppo/checkpoint"), 1e-3
    )  # a token drawn otherwise is an episode more or less
    x, y = read("ppo/log.parquet")
    check("reward of PPO's first round", float(abs(x.reward[0] - y.reward[0])), 0.05)
    x, y = read("comparison/angles.parquet")
    first = [t[t.other == t.other.iloc[0]] for t in (x, y)]
    close = np.abs(first[0]["mean"].to_numpy() - first[1]["mean"].to_numpy()) / np.maximum(
        first[0]["mean"].to_numpy(), 1e-12
    )
    check(
        "angles base → SFT, median relative difference (the weights differ a little, see above)",
        float(np.median(close)),
        1e-2,
    )
    check(
        "verdicts of the comparison that differ, share",
        float((x.verdict.to_numpy() != y.verdict.to_numpy()).mean()),
        0.02,
    )
    from gp_spectral.angles import compare_all

    for side, device in (("by_cpu", "cpu"), ("by_gpu", None)):
        compare_all(
            [gpu / "sft/step-00000", gpu / "ppo/checkpoint"], cache=None, out=gpu / side, device=device, progress=False
        )
    x, y = (pd.read_parquet(gpu / s / "angles.parquet") for s in ("by_cpu", "by_gpu"))
    off = (
        np.abs(x["mean"] - y["mean"])
        / np.where(x["mean"] > 1e-2, 1e-6, np.where(x["mean"] > 1e-5, 1e-3, 1.0))
        / np.maximum(x["mean"], 1e-5)
    )
    check(
        "angles of one pair of checkpoints, CPU and GPU, in units of the tests' tolerance (1e-3 at 1e-5 rad, 1e-6 at "
        "1e-2 rad)",
        float(off.max()),
        1.0,
    )
    check("repaired weights, relative", weights("repaired"), 1e-3)
    x, y = read("sweep.parquet")
    check(
        "sweep: size of the edits, largest relative difference",
        float(((x.edit_norm - y.edit_norm) / x.edit_norm).abs().max()),
        1e-2,
    )
    speed = [
        dict(what=k, cpu_seconds=told[0]["seconds"][k], gpu_seconds=told[1]["seconds"][k]) for k in told[0]["seconds"]
    ]
    keep(
        out,
        "right",
        rows,
        seconds=speed,
        peak_gb=told[1]["peak_gb"],
        float32_matmul=torch.backends.cuda.matmul.fp32_precision if on_gpu() else "no GPU",
        done=True,
    )
    print(as_table(speed))


# --- spectral


def refined(W, rounds=3):
    """Right vectors and σ: eigenvectors of the float32 Gram matrix, improved in float64 (Ogita and Aishima, 2018,
    algorithm 1)."""
    import torch

    G = W.T @ W
    lam, X = torch.linalg.eigh(G.float())
    X = X.double()
    for _ in range(rounds):
        R, S = torch.eye(len(G), dtype=X.dtype, device=X.device) - X.T @ X, X.T @ (G @ X)
        lam = S.diagonal() / (1 - R.diagonal())
        gap = lam[None] - lam[:, None]
        E = torch.where(
            gap.abs()
            > 2
            * (torch.linalg.matrix_norm(S - torch.diag(lam)) + lam.abs().max() * torch.linalg.matrix_norm(R))
            / len(G),
            (S + lam[None] * R) / gap,
            R / 2,
        )
        X = X + X @ E
    order = lam.argsort(descending=True)
    return X[:, order], lam[order].clamp(min=0).sqrt()


def routes():
    import torch
    from gp_spectral.svd import DRIVERS

    def gesvda(W):
        _, s, Vh = torch.linalg.svd(W, full_matrices=False, driver="gesvda")
        return Vh.T, s

    found = {"gram (float64)": DRIVERS["gram"], "float32 Gram, refined": refined}
    if on_gpu():
        found |= {"gesvdj": DRIVERS["gesvdj"], "gesvda": gesvda, "gesvd": DRIVERS["gesvd"]}
    else:
        found |= {"gesdd": DRIVERS["gesdd"]}
    return found


def heavy_tailed(m, n, seed=0):
    """A Gaussian matrix scaled along its short side by a factor of a hundred, rounded to bfloat16: a spectrum with a
    heavy tail."""
    import torch

    scale = torch.logspace(0.7, -1.3, min(m, n))
    W = 0.02 * torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * (scale if n <= m else scale[:, None])
    return W.bfloat16().double().to("cuda" if on_gpu() else "cpu")


def exactness(W, V, s):
    "(‖Wᵀ W V − V S²‖ relative to σ₁², largest |VᵀV − 1|)."
    import torch

    residual = torch.linalg.matrix_norm(W.T @ (W @ V) - V * s * s) / s[0] ** 2
    return float(residual), float((V.T @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).abs().max())


def spectral(out, a):
    from gp_spectral.svd import choose_driver

    shapes = (
        ((64, 48), (96, 48)) if a.rehearse else ((1024, 4096), (2048, 2048), (4096, 4096), (11008, 4096), (14336, 4096))
    )
    limit, rows, last = 8.0, [], {}  # seconds that a route may take: it is left out where more is to be expected
    for route in routes().values():
        route(heavy_tailed(64, 48))
        route(heavy_tailed(*((64, 48) if a.rehearse else (1024, 1024))))
    for m, n in shapes:
        W = heavy_tailed(m, n)
        W = W if m >= n else W.T
        work = W.shape[0] * W.shape[1] ** 2
        reference = None
        for name, route in routes().items():
            expected = last[name][0] * work / last[name][1] if name in last else 0.0
            row = dict(shape=f"{m} × {n}", route=name)
            if expected > limit:
                rows.append(row | dict(seconds=f"left out, some {expected:.0f} expected"))
                continue
            try:
                seconds, (V, s) = timed(lambda: route(W))
            except RuntimeError as e:
                rows.append(row | dict(seconds=f"fails: {str(e).splitlines()[0][:60]}"))
                continue
            last[name] = seconds, work
            reference = s if reference is None else reference
            residual, off = exactness(W, V, s)
            rows.append(
                row
                | dict(
                    seconds=seconds,
                    residual=residual,
                    orthogonality=off,
                    sigma_off=float(((s - reference).abs() / reference[0]).max()),
                )
            )
            keep(out, "spectral", rows)
        if on_gpu():
            seconds, chosen = timed(lambda: choose_driver((m, n), "cuda"))
            rows.append(dict(shape=f"{m} × {n}", route=f"chosen: {chosen}", seconds=seconds))
            keep(out, "spectral", rows)
    seven = seven_shape(out, a, rows)
    keep(out, "spectral", rows, seven_b=seven, peak_gb=memory(), done=True)
    print(as_table(seven))


def seven_shape(out, a, rows):
    """compare, factors included, of one layer in the shapes of a 7B model, reckoned for all layers, beside the
    floor: the factorisation alone."""
    sys.path.insert(0, str(Path(__file__).parent))
    import random_checkpoint as made
    from gp_spectral.angles import compare_all
    from gp_spectral.checkpoint import Checkpoint
    from gp_spectral.svd import short_factors

    made.SHAPES |= {"7b-check": (64, 160, 2, 4, 4, 64) if a.rehearse else (4096, 11008, 32, 32, 32, 64)}
    folder, found = out / "pair", []
    if not (folder / "tuned").exists():
        if not (folder / "base").exists():
            made.write(folder / "base", "7b-check", layers=1)
        made.perturb(folder / "tuned", folder / "base")
    pair, device = [Checkpoint(folder / n) for n in ("base", "tuned")], "cuda" if on_gpu() else "cpu"
    floor, _ = timed(lambda: [short_factors(c, m, False, device) for c in pair for m in c.matrices()])
    found.append(
        dict(
            what="floor: σ and the short side's vectors of both checkpoints",
            workers=1,
            seconds_for_a_layer=floor,
            minutes_for_32=floor * 32 / 60,
        )
    )
    for workers in (1, 4, 8):
        seconds, _ = timed(lambda: compare_all(pair, cache=False, device=device, workers=workers, progress=False))
        found.append(
            dict(
                what="compare, all of it",
                workers=workers,
                seconds_for_a_layer=seconds,
                minutes_for_32=seconds * 32 / 60,
            )
        )
        keep(out, "spectral", rows, seven_b=found)
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.runcall(lambda: _one_by_one(pair, device))
    stats = pstats.Stats(profile).stats
    total = sum(v[2] for v in stats.values())
    for where, v in sorted(stats.items(), key=lambda x: -x[1][2])[:12]:
        found.append(dict(what=f"of it, in {Path(where[0]).name}:{where[2]}", workers=1, share=v[2] / total))
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _one_by_one(pair, device):
    "The measuring of a comparison, in this thread, where a profiler sees it."
    from gp_spectral.angles import _measure
    from gp_spectral.svd import one_thread

    with one_thread():
        for m in pair[0].matrices()[:4]:
            _measure(pair, [(0, 1)], m, 0.2, True, None, device)
            wait()


# --- SmolLM2

TOY = dict(
    model="tiny",
    seeds=2,
    teach_steps=2,
    teach_examples=64,
    sft_batch=8,
    sft_examples=60,
    sft_hands=20,
    sft_steps=6,
    sft_points=1,
    sft_at="",
    cards=4,
    target=24,
    max_new_tokens=0,
    test_problems=12,
    retry_problems=4,
    sampled_problems=2,
    curve_problems=8,
    test_attempts=2,
    ppo_iterations=2,
    ppo_samples=8,
    ppo_minibatch=8,
    recovery_problems=8,
)


def smollm2(out, a):
    "The preset, its trainings shared out among processes."
    from gp_spectral.preset import load_preset

    overrides = {k: str(v) for k, v in TOY.items()} if a.rehearse else dict(x.split("=", 1) for x in a.set)
    preset = load_preset(a.preset, overrides)
    count = a.processes or preset.seeds
    threads = str(max(1, len(os.sched_getaffinity(0)) // count // 2))
    if not a.rehearse:
        from gp_spectral.models import resolve

        print(f"base: {resolve(preset.model)}", flush=True)  # made once, before three ask for it

    def start(i):
        command = [
            sys.executable,
            "-m",
            "gp_spectral",
            "study",
            "--preset",
            a.preset,
            "--workers",
            "1",
            "--out",
            str(out),
            *(x for k, v in overrides.items() for x in ("--set", f"{k}={v}")),
        ]
        log = open(out / f"smollm2-{i}.log", "a")
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=out, env={**os.environ, "OMP_NUM_THREADS": threads}
        )

    begun, running = time.time(), [start(i) for i in range(count)]
    try:
        codes = [p.wait() for p in running]
    finally:
        gather_smollm2(out, a.preset)
    if any(codes):
        raise SystemExit(
            f"a study ended with {codes}:\n"
            + "\n".join((out / f"smollm2-{i}.log").read_text()[-1500:] for i in range(count))
        )
    gather_smollm2(out, a.preset, done=True, minutes=(time.time() - begun) / 60)


def gather_smollm2(out, preset, **more):
    "The tables of all stages that are finished, in out/tables; the result says how far each seed came."
    import pandas as pd

    root, tables, rows = out / preset, {}, []

    def add(name, file, **where):
        if file.exists():
            tables.setdefault(name, []).append(pd.read_parquet(file).assign(**where))

    for curve in (*root.glob("taught.part/curve.parquet"), *root.glob("taught/curve.parquet")):
        add("taught_curve", curve)
    for seed in sorted(p for p in root.glob("[0-9]*") if p.is_dir()):
        s = int(seed.name)
        for stage in sorted(p for p in seed.iterdir() if p.is_dir()):
            name, done = stage.name.removesuffix(".part"), not stage.name.endswith(".part")
            seconds = (
                json.loads((stage / "record.json").read_text())["seconds"] if (stage / "record.json").exists() else None
            )
            rows.append(dict(seed=s, stage=name, finished=done, seconds=seconds))
            if name.startswith(("sft", "ppo", "twin")):
                kind = name if name.startswith("twin") else name[:3]
                add(f"{kind}_curve", stage / "curve.parquet", seed=s)
                add(f"{kind}_log", stage / "log.parquet", seed=s)
            for file in stage.glob("*.parquet"):
                if file.stem not in ("curve", "log", "spectrum"):  # all σ of all matrices: too much to be carried
                    add(file.stem, file, seed=s)
    (out / "tables").mkdir(exist_ok=True)
    for name, parts in tables.items():
        pd.concat(parts, ignore_index=True).to_parquet(out / "tables" / f"{name}.parquet")
    if (root / "preset.json").exists():
        shutil.copy(root / "preset.json", out / "tables" / "preset.json")
    if (root / "tables" / "claims.parquet").exists():
        shutil.copy(root / "tables" / "claims.parquet", out / "tables" / "claims.parquet")
    if "evaluations" in tables:
        e = pd.concat(tables["evaluations"]).query("allowed == 1")
        for (name, rule), t in e.groupby(["checkpoint", "rule"], sort=False):
            rows.append(
                dict(
                    stage=name,
                    rule=rule,
                    success=float(t.groupby("seed").solved_first.mean().mean()),
                    seeds=t.seed.nunique(),
                )
            )
    keep(out, "smollm2", rows, **more)


# --- speed of training

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, from the vendor's data sheets
BANDWIDTH = 3.35e12  # bytes/s of an H100's memory, likewise
SIZES = {
    "1.2b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
    ),
    "7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    ),
    "toy": dict(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    ),
}


VOCABULARY = 49152  # of the random models; their words are those of the tiny model


def small_model(a):
    if a.rehearse:
        return "tiny"
    from gp_spectral.smollm2 import smollm2

    return smollm2()


@contextlib.contextmanager
def random_model(size, source):
    """Has trainings load a Llama with random weights, made where it is needed; its checkpoints are not written: what
    is timed is not the disk."""
    import torch
    import transformers
    from gp_spectral import models, ppo, sft

    kept = models.load_model, sft.save_model, ppo.save_model, ppo.Learner.keep

    def load(checkpoint, dtype="auto", device=None):
        if size is None:
            return kept[0](source, dtype, device)
        torch.manual_seed(0)
        tokenizer = kept[0](source, device="cpu")[1]
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **SIZES[size],
        )
        with torch.device(device or ("cuda" if on_gpu() else "cpu")):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
            )
        return model.eval(), tokenizer

    models.load_model = load
    sft.save_model = ppo.save_model = lambda *args, **kwargs: None
    ppo.Learner.keep = lambda *args, **kwargs: None
    try:
        yield
    finally:
        models.load_model, sft.save_model, ppo.save_model, ppo.Learner.keep = kept


def speed_of(out, size, source, a, record, steps=8, batch=32, micro=None, **options):
    "Seconds of an optimizer step of `train_sft` and of an iteration of `train_ppo`; `record` is told each as it comes."
    import pandas as pd
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from gp_spectral.env import GeneralPoints
    from gp_spectral.ppo import PPOConfig, train_ppo
    from gp_spectral.sft import train_sft

    game = GeneralPoints(style="paper", max_new_tokens=8)
    row = dict(model=size or "smollm2", **options, batch=batch)
    folder = out / "speed"
    shutil.rmtree(folder, ignore_errors=True)
    memory()
    ends = []

    def ended(*_):
        wait()
        ends.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(ended)
    with random_model(size, source):
        try:
            train_sft(
                str(source),
                folder / "sft",
                game,
                {"ID": game},
                steps=steps,
                batch_size=batch,
                microbatch=micro,
                points=1,
                n_eval=2,
                examples=64,
                progress=False,
                **options,
            )
            log = pd.read_parquet(folder / "sft/log.parquet")
        finally:
            hook.remove()
        third = len(ends) // 3
        seconds, tokens = (ends[-1] - ends[third]) / (len(ends) - 1 - third), float(log.tokens.iloc[-1]) / steps
        parameters = count(size, source)
        row |= dict(
            sft_seconds_a_step=seconds,
            sft_tokens_a_second=tokens / seconds,
            mfu=6 * parameters * tokens / seconds / peak() if on_gpu() else None,
            sft_peak_gb=memory(),
        )
        record(row)
        config = PPOConfig(
            iterations=3,
            samples=batch,
            minibatch=batch,
            microbatch=micro or batch,
            epochs=2,
            max_new_tokens=4 if a.rehearse else 64,
            **{k: v for k, v in options.items() if k in ("lora", "dtype", "gradient_checkpointing")},
        )
        train_ppo(str(source), folder / "ppo", game, config, progress=False)
        last = pd.read_parquet(folder / "ppo/log.parquet").iloc[-1]
        rollout = last.length * batch * last.attempts / last.tokens_per_second
        row |= dict(
            ppo_seconds_a_round=last.seconds,
            of_it_rolling_out=rollout / last.seconds,
            rollout_tokens_a_second=last.tokens_per_second,
            ppo_peak_gb=memory(),
        )
        record(row)
    shutil.rmtree(folder, ignore_errors=True)


def peak():
    import torch

    name = torch.cuda.get_device_name()
    return next((v for k, v in PEAK.items() if k in name), float("nan"))


def count(size, source):
    import torch
    import transformers
    from gp_spectral.models import load_model

    if size is None:
        return sum(p.numel() for p in load_model(source, device="cpu")[0].parameters())
    with torch.device("meta"):
        return sum(
            p.numel()
            for p in transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(vocab_size=VOCABULARY, **SIZES[size])
            ).parameters()
        )


def decoding(source, a):
    """How long one decoding step takes, beside the least that reading the weights once takes: how much a captured
    graph could give."""
    import torch
    from gp_spectral.env import GeneralPoints
    from gp_spectral.models import load_model
    from gp_spectral.play import generate, prompt_ids

    model, tokenizer = load_model(source, dtype="float32")
    game, new, found = GeneralPoints(), 4 if a.rehearse else 48, []
    bytes_ = sum(p.numel() for p in model.parameters()) * 2
    for n in (4,) if a.rehearse else (64, 512):
        prompts = [prompt_ids(tokenizer, game, p) for p in game.problems("test", n)]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu()):

            def go():
                return generate(model, tokenizer, prompts, new, 1.0)

            timed(go)
            seconds, answers = timed(go)
        steps = max(len(ids) for ids, _ in answers)
        found.append(
            dict(
                what="decoding, tokens one after the other",
                conversations=n,
                ms_a_step=1e3 * seconds / steps,
                ms_to_read_the_weights=1e3 * bytes_ / BANDWIDTH if on_gpu() else None,
            )
        )
    return found


def measured(out, part, plans, source, a, rows):
    "A row for each plan, (size, options)."
    for size, options in plans:
        speed_of(out, size, source, a, lambda row: keep(out, part, [*rows, row]), **options)
        rows += json.loads((out / f"{part}.json").read_text())["rows"][len(rows) :]
        print(as_table(rows[-1:]), flush=True)


def training(out, a):
    source, rows, toy = small_model(a), [], dict(batch=4, steps=3)
    measured(
        out,
        "training",
        [(None, toy)] if a.rehearse else [(None, {}), (None, dict(gradient_checkpointing=True)), (None, dict(lora=16))],
        source,
        a,
        rows,
    )
    rows += decoding(source, a)
    keep(out, "training", rows)
    as_here = (
        ("--cpu", "--mixed_precision", "no", "--num_processes", "1")
        if a.rehearse
        else ("--config_file", str(ROOT / "configs/single_gpu.yaml"))
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *as_here,
        "-m",
        "gp_spectral",
        "sft",
        "tiny",
        str(out / "launched"),
        "--set",
        "sft_steps=4",
        "--set",
        "sft_points=1",
        "--set",
        "curve_problems=16",
    ]
    shutil.rmtree(out / "launched", ignore_errors=True)
    done, settings = subprocess.run(launch, capture_output=True, text=True, cwd=out), out / "launched" / "settings.json"
    precision = json.loads(settings.read_text())["precision"] if settings.exists() else done.stderr[-200:]
    rows.append(
        dict(
            what=f"accelerate launch {' '.join(map(str, as_here)).replace(str(ROOT) + '/', '')} … sft tiny",
            exit=done.returncode,
            precision=precision,
        )
    )
    keep(out, "training", rows, done=True)


def large(out, a):
    rows, lora = [], dict(lora=16, dtype="bfloat16", gradient_checkpointing=True)
    plans = (
        [("toy", lora | dict(batch=4, steps=3))]
        if a.rehearse
        else [
            ("1.2b", {}),
            ("7b", lora | dict(batch=16, micro=8, steps=4)),
            ("1.2b", dict(gradient_checkpointing=True)),
            ("1.2b", dict(lora=16, dtype="bfloat16")),
        ]
    )
    measured(out, "large", plans, "tiny", a, rows)
    keep(out, "large", rows, done=True)


# --- the parts, one after the other


def run_part(name, out, a, seconds):
    "One part in a process of its own, killed with all that it started when its time is up; how it ended."
    file, how = out / f"{name}.json", dict(rehearsal=a.rehearse, set=a.set, preset=a.preset)
    if file.exists():
        known = json.loads(file.read_text())
        if {k: known.get(k, how[k]) for k in how} != how:
            raise SystemExit(
                f"{file} comes of {'a rehearsal' if known['rehearsal'] else 'other settings'}: give another --out, "
                "or delete that folder"
            )
        if known.get("done"):
            return "done before"
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--out",
        str(out),
        "--part",
        name,
        *(["--rehearse"] if a.rehearse else []),
        *(x for s in a.set for x in ("--set", s)),
        "--preset",
        a.preset,
        "--processes",
        str(a.processes),
    ]
    begun = time.time()
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(15)
        code = f"stopped after {seconds:.0f} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if name == "smollm2" and code != 0:
        try:
            gather_smollm2(out, a.preset)
        except Exception as e:
            print(f"the tables of smollm2 could not be gathered: {e}", file=sys.stderr)  # the other parts go on
    found = json.loads(file.read_text()) if file.exists() else dict(part=name, rows=[])
    found |= how | dict(ended=code, seconds_in_all=round(time.time() - begun, 1), **about())
    file.write_text(json.dumps(found, indent=1))
    return code


def report(out):
    "results.md, from the parts' results."
    text = ["# What was seen on a GPU", ""]
    for name in PARTS:
        file = out / f"{name}.json"
        if not file.exists():
            continue
        x = json.loads(file.read_text())
        how = "complete" if x.get("done") else f"not complete: {x.get('ended')}"
        text += [
            f"## {name}",
            "",
            f"{x.get('card')}, torch {x.get('torch')}, transformers {x.get('transformers')}; "
            f"{x.get('seconds_in_all')} s, {how}",
            "",
        ]
        text += [as_table(x["rows"]), ""] if x["rows"] else []
        for more in ("seconds", "seven_b"):
            if isinstance(x.get(more), list):
                text += [as_table(x[more]), ""]
    (out / "results.md").write_text("\n".join(text))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="folder for the results")
    p.add_argument("--minutes", type=float, default=12, help="for all parts together (default 12)")
    p.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; the minutes are theirs alone"
    )
    p.add_argument("--rehearse", action="store_true", help="toy sizes, with or without a GPU")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="smollm2: overrides a setting of the preset; may be repeated",
    )
    p.add_argument("--preset", default="smollm2-gpu", metavar="NAME", help="smollm2: another preset (smollm2-rule)")
    p.add_argument(
        "--processes", type=int, default=0, metavar="N", help="smollm2: so many at once (default: one a seed)"
    )
    p.add_argument("--pack", type=Path, metavar="DIR", help="write what has to travel")
    p.add_argument("--unpack", type=Path, metavar="DIR", help="put it together")
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.pack:
        return pack(a.pack)
    if a.unpack:
        return unpack(a.unpack)
    if a.out is None:
        p.error("give --out DIR, --pack DIR or --unpack DIR")
    out = a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if a.part:
        return globals()[a.part](out, a)
    if not a.rehearse and not on_gpu():
        raise SystemExit("no GPU is seen here: --rehearse runs every part at toy size without one")
    chosen = a.only or list(PARTS)
    whole, failed = sum(PARTS[n] for n in chosen), []
    for name in chosen:
        ended = run_part(name, out, a, 60 * a.minutes * PARTS[name] / whole)
        x = json.loads((out / f"{name}.json").read_text())
        print(json.dumps({k: x.get(k) for k in ("part", "card", "seconds_in_all", "ended", "done")}))
        print(as_table(x["rows"]), flush=True)
        wrong = [r["what"] for r in x["rows"] if r.get("right") is False]
        if ended not in (0, "done before") or wrong:
            failed.append(f"{name}: {'; '.join(wrong) or ended}")
        report(out)
    print(f"\n{out / 'results.md'}" + "".join(f"\nNOT AS IT SHOULD BE  {f}" for f in failed))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
