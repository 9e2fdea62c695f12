"""What methods on the change give back on the rule study's bases, beside interpolation: tables of the methods study.

    python scripts/methods.py OUT [--tables nbs/studies/methods]  # a quarter of an hour of one core

Behind each of the six bases SFT is run twice, on all weights and with LoRA; each end is edited with the base as donor,
and every result is asked 300 test problems under each rule. What is finished in OUT is not made again. The plan is in
nbs/studies/methods.ipynb.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
PRESET, SEED, PROBLEMS = "tiny-rule", 40, 300
ARMS = {"full": [], "lora": ["lora=16", "sft_lr=3e-3"]}
SETTINGS = ["sft_steps=40", "sft_points=2", "curve_problems=20"]
TENTHS = [round(i / 10, 1) for i in range(1, 10)]
EDITS = {  # arm: (method, its option, values)
    "full": [
        ("interpolate", "alpha", [*TENTHS, 0.25, 0.75]),
        ("dghard", "noise", [None]),
        ("delta_top", "share", [0.1, 0.25, 0.5]),
        ("lines", "first", [0.0, 0.5]),
        ("ties", "density", [0.1, 0.2, 0.5]),
        ("dare", "drop", [0.5, 0.9]),
        ("scale_intruders", "factor", [0.0]),
    ],
    "lora": [
        ("interpolate", "alpha", TENTHS[1::2]),
        ("dghard", "noise", [None]),
        ("delta_top", "share", [0.25]),
        ("scale_intruders", "factor", [0.5, 0.0]),
    ],
}


def trained(base, arm, out):
    "The end of an SFT run behind a base."
    folder = out / f"{base.name}-{arm}"
    if not (folder / "curve.parquet").exists():
        shutil.rmtree(folder, ignore_errors=True)
        told = [x for s in [*SETTINGS, *ARMS[arm]] for x in ("--set", s)]
        command = ["sft", base, folder, "--preset", PRESET, "--seed", SEED + int(base.name), *told]
        subprocess.run([sys.executable, "-m", "gp_spectral", *map(str, command)], check=True, cwd=ROOT)
    return max(folder.glob("step-*"))


def asked(folder, about):
    "Answers under both rules, a row per problem."
    from gp_spectral.models import load_model
    from gp_spectral.play import evaluate
    from gp_spectral.preset import load_preset

    loaded, tables = load_model(str(folder)), []
    for rule, task in load_preset(PRESET).tasks().items():
        rows = evaluate(loaded, task, n=PROBLEMS, attempts=1, even=True, seed=1)
        tables.append(rows[["problem", "hand", "solved_first", "read"]].assign(rule=rule, **about))
    return pd.concat(tables)


def edited(base, arm, target, part):
    "(answers, rows) of all edits of one checkpoint."
    from gp_spectral.angles import compare_all
    from gp_spectral.recovery import recover, recovery_record

    about = dict(base=int(base.name), arm=arm)
    answers = [asked(target, about | dict(method="target", value=None))]
    rows = []
    if arm == "full":
        answers.append(asked(base, about | dict(method="donor", value=None)))
    found = compare_all([base, target], cache=False, progress=False).changes[["intruders_U", "intruders_V"]].sum()
    rows.append(about | dict(method="target", option="", value=None, edit_norm=0.0) | found.to_dict())
    for method, option, values in EDITS[arm]:
        for value in values:
            told = dict(options={option: value}, include=("embeddings",), certify="quick", progress=False, workers=1)
            folder = recover(target, base, part / "edited", method, cache=part / "factors", **told)
            size = recovery_record(folder)[0]["edit_norm"]
            rows.append(about | dict(method=method, option=option, value=value, edit_norm=size))
            answers.append(asked(folder, about | dict(method=method, value=value)))
            shutil.rmtree(folder)
    return pd.concat(answers), pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tables", type=Path, default=ROOT / "nbs/studies/methods")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    for arm in ARMS:
        for base in sorted((ROOT / "nbs/studies/rule/bases").iterdir()):
            files = [args.out / f"{base.name}-{arm}.{x}.parquet" for x in ("edits", "answers")]
            if not files[1].exists():
                part = args.out / f"{base.name}-{arm}.part"
                shutil.rmtree(part, ignore_errors=True)
                answers, rows = edited(base, arm, trained(base, arm, args.out), part)
                rows.astype(dict(value=float)).to_parquet(files[0])
                answers.astype(dict(value=float)).to_parquet(files[1])
                shutil.rmtree(part)
            found.append([pd.read_parquet(f) for f in files])
            print(base.name, arm, "done", flush=True)
    for name, tables in zip(("edits", "answers"), zip(*found)):
        pd.concat(tables, ignore_index=True).to_parquet(args.tables / f"{name}.parquet")


if __name__ == "__main__":
    main()
