"""Of what kind the updates of the rule study are: tables of the study of updates.

    python scripts/updates.py RUN OUT [--tables nbs/studies/updates]  # twenty minutes of one core

RUN is what `gp-spectral study --preset tiny-rule-bases` leaves; of its repetitions those of --seeds are read. What is
finished in OUT is not made again. The plan is in nbs/studies/updates.ipynb.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, PROBLEMS = 100, 200
AFTER = {"rl": "RL", "constant": "RL on a constant reward", "rft": "RFT", "worked": "SFT that goes on"}


def updated(of, seed):
    "(rows, pairs) of SFT's update of the base, and of those that begin where SFT has ended; `of`: checkpoints by name."
    from gp_spectral.updates import updates

    after = {"the way back": of["base"]} | {name: of[key] for key, name in AFTER.items()}
    tables = []
    for since, before, others in (("base", of["base"], {"SFT": of["end"]}), ("SFT_End", of["end"], after)):
        found = updates(before, others, seed=seed, progress=False, cache=None)
        tables.append([t.assign(since=since) for t in found])
    return [pd.concat(t, ignore_index=True) for t in zip(*tables)]


def trained_again(end, out, seed, rl):
    "RL or RFT from where SFT ended, with other draws than the study's."
    folder = out / f"{rl}-{seed}"
    if not (folder / "checkpoint").exists():
        shutil.rmtree(folder, ignore_errors=True)
        words = ["ppo", end, folder, "--preset", "tiny-rule-bases", "--seed", seed + 100, "--rl", rl]
        words += ["--set", "curve_problems=20"]  # of a curve that is not used
        subprocess.run([sys.executable, "-m", "gp_spectral", *map(str, words)], check=True, cwd=ROOT)
    return folder / "checkpoint"


def again(of, out, seed):
    "What the updates of RL and RFT have in common with those of other draws, a row for each two."
    from gp_spectral.updates import overlap_summary, updates

    others = {name: of[key] for key, name in AFTER.items() if key in ("rl", "rft")}
    others |= {f"{name} again": trained_again(of["end"], out, seed, rl) for rl, name in (("ppo", "RL"), ("rft", "RFT"))}
    found = updates(of["end"], others, seed=seed, progress=False, cache=None)
    return overlap_summary(found)


def log_probabilities(model, episodes):
    "Of each episode's first answer: (tokens, words), under a model."
    found = []
    for e in episodes:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([e.ids])).logits[0].double().log_softmax(-1)
        found.append(logits[e.turns[0].start - 1 : e.turns[0].end - 1])
    return found


def divergence(p, q):
    "The Kullback–Leibler divergence of q from p, summed over the tokens of an answer; the mean over answers, in nats."
    return sum((a.exp() * (a - b)).sum().item() for a, b in zip(p, q)) / len(p)


def change_of(base, other):
    "How large the change of all weights is, as a share of them."
    old, new = (dict(m.named_parameters()) for m in (base, other))
    size = lambda tensors: sum(t.double().square().sum().item() for t in tensors) ** 0.5
    return size(new[k].double() - old[k].double() for k in old) / size(old.values())


def foretold(base, checkpoints, preset, seed):
    "A row for each checkpoint: what may foretell forgetting, and success under both rules."
    from gp_spectral.models import load_model
    from gp_spectral.play import evaluate, play

    tasks, first, rows = preset.tasks(), load_model(str(base), dtype="float32"), []
    asked = tasks["ID"].problems("validation", PROMPTS, seed)
    sampled = lambda loaded: play(*loaded, tasks["ID"], asked, attempts=1, temperature=1.0, seed=(seed,))
    own = sampled(first)
    before = log_probabilities(first[0], own)
    for name, folder in checkpoints.items():
        loaded = load_model(str(folder), dtype="float32")
        answers = sampled(loaded)
        back = [log_probabilities(m, answers) for m in (loaded[0], first[0])]
        row = dict(checkpoint=name, kl=divergence(before, log_probabilities(loaded[0], own)))
        row |= dict(reverse=divergence(*back), change=change_of(first[0], loaded[0]))
        for rule, task in tasks.items():
            row[rule] = evaluate(loaded, task, n=PROBLEMS, attempts=1, even=True, seed=1).solved_first.mean()
        rows.append(row)
    return pd.DataFrame(rows)


def measured(study, seed, of):
    "The tables of one repetition, without `again`."
    from gp_spectral.stages import along

    steps = {f"SFT {step}": folder for step, folder in along(study.folder(seed) / "sft").items()}
    ends = {f"RL from {s}": of["rl" if s == study.preset.sft_steps else f"rl_{s}"] for s in study.starts}
    ends |= {name: of[key] for key, name in AFTER.items() if key != "rl"}
    rows, pairs = updated(of, seed)
    about = dict(seed=seed, base=study.number(seed))
    tables = dict(rows=rows, pairs=pairs, foretold=foretold(of["base"], steps | ends, study.preset, seed))
    return {name: t.assign(**about) for name, t in tables.items()}


def main():
    from gp_spectral.stages import Study

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(6, 12)), metavar="N", help="default: 6 to 11"
    )
    parser.add_argument("--tables", type=Path, default=ROOT / "nbs/studies/updates")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.tables.mkdir(parents=True, exist_ok=True)
    study, found = Study.open(args.run), []
    for seed in args.seeds:
        of = {name: ROOT / path for name, path in study.checkpoints(seed).items()}
        files = {name: args.out / f"{seed}.{name}.parquet" for name in ("rows", "pairs", "foretold", "again")}
        if not files["foretold"].exists():
            for name, table in measured(study, seed, of).items():
                table.to_parquet(files[name])
        if not files["again"].exists():
            again(of, args.out, seed).assign(seed=seed, base=study.number(seed)).to_parquet(files["again"])
        found.append({name: pd.read_parquet(f) for name, f in files.items()})
        print(seed, "done", flush=True)
    for name in found[0]:
        pd.concat([t[name] for t in found], ignore_index=True).to_parquet(args.tables / f"{name}.parquet")


if __name__ == "__main__":
    main()
