"""Merge first, or RL first? Tables of the study of the order.

    python scripts/order.py RUN OUT --seeds 6 7 8 9 10 11 [--tables nbs/studies/order]  # twenty minutes of a core

RUN is what `gp-spectral study` leaves of a preset with six bases; of its repetitions those of --seeds are read. SFT_End
is taken 40 % of the way back to the base, and RL starts from there, with the study's settings, beside RL on a constant
reward; SFT_End and what RL made of it are taken back to the base step by step; RL starts from the base, too. What is
finished in OUT is not made again. The plan is in nbs/studies/order.ipynb.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
FAR, SHARES = 0.4, (0.2, 0.4, 0.6, 0.8)  # of the way to the base
DRAWS = 300  # added to the repetition's seed, so that RL here draws what no other RL has drawn
RL = {"merged, RL": None, "merged, constant": "constant"}  # training: its twin


def merged(target, base, share, out):
    "A checkpoint on the straight line to its base, embeddings included."
    from gp_spectral.recovery import recover

    told = dict(options=dict(alpha=share), include=("embeddings",), certify="quick", progress=False, workers=1)
    return recover(target, base, out, "interpolate", **told)


def asked(study, folder, **about):
    "First answers to the study's test problems under both rules."
    from gp_spectral.models import load_model
    from gp_spectral.play import evaluate

    loaded, tables = load_model(str(folder)), []
    for rule, task in study.tasks.items():
        problems = study.problems(rule, study.preset.test_problems)
        rows = evaluate(loaded, task, problems=problems, attempts=1, share=True)
        tables.append(rows[["problem", "hand", "solved_first", "read"]].assign(rule=rule, **about))
    return pd.concat(tables)


def of_line(study, name, target, base, part):
    "Answers along the line from a checkpoint to its base, the ends included."
    yield asked(study, target, arm=name, share=0.0)
    for share in SHARES:
        folder = merged(target, base, share, part / "edited")
        yield asked(study, folder, arm=name, share=share)
        shutil.rmtree(folder)


def trained(study, seed, start, out, twin):
    "RL from a merged checkpoint, or its twin; (the checkpoint, share of the first round's answers that were right)."
    if not (out / "checkpoint").exists():
        shutil.rmtree(out, ignore_errors=True)
        told = [start, out, seed + DRAWS]
        study.twin_from(*told, twin) if twin else study.rl_from(*told)
    return out / "checkpoint", pd.read_parquet(out / "log.parquet").success.iloc[0]


def named(study, seed):
    return {name: ROOT / path for name, path in study.checkpoints(seed).items()}


def measured(study, seed, out):
    "(answers, gate) of one repetition."
    of = named(study, seed)
    part = out / f"{seed}.part"
    shutil.rmtree(part, ignore_errors=True)
    start = out / f"{seed}-merged"
    if not start.exists():
        merged(of["end"], of["base"], FAR, start)
    answers, gate = [asked(study, of["base"], arm="base", share=1.0)], []
    for name in ("end", "rl"):
        answers += of_line(study, name, of[name], of["base"], part)
    for name, twin in RL.items():
        folder, right = trained(study, seed, start, out / f"{seed}-{twin or 'rl'}", twin)
        answers.append(asked(study, folder, arm=name, share=0.0))
        gate.append(dict(arm=name, right=right))
    shutil.rmtree(part, ignore_errors=True)
    return pd.concat(answers), pd.DataFrame(gate)


def from_base(study, seed, out):
    "(answers, gate) of RL without SFT."
    folder, right = trained(study, seed, named(study, seed)["base"], out / f"{seed}-base", None)
    return asked(study, folder, arm="base, RL", share=0.0), pd.DataFrame([dict(arm="base, RL", right=right)])


def main():
    from gp_spectral.stages import Study

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N", help="repetitions, one a base")
    parser.add_argument("--tables", type=Path, default=ROOT / "nbs/studies/order")
    args = parser.parse_args()
    study, found = Study.open(args.run), {"answers": [], "gate": []}
    args.out.mkdir(parents=True, exist_ok=True)
    args.tables.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for make in (measured, from_base):
            files = {name: args.out / f"{seed}.{make.__name__}.{name}.parquet" for name in found}
            if not files["gate"].exists():
                for name, table in zip(found, make(study, seed, args.out)):
                    table.assign(seed=seed, base=study.number(seed)).to_parquet(files[name])
            for name, file in files.items():
                found[name].append(pd.read_parquet(file))
        print(seed, "done", flush=True)
    for name, tables in found.items():
        pd.concat(tables, ignore_index=True).to_parquet(args.tables / f"{args.run.name}.{name}.parquet")


if __name__ == "__main__":
    main()
