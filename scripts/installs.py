"""Installs the package as its users do, and uses it: python scripts/installs.py [PYTHON ...] [--keep FILE]

For each interpreter (default: this one), wheel and sdist are installed into empty environments of their own, with the
newest versions that pip finds; in the first also with the oldest that pyproject.toml allows. There, away from the
checkout, commands are run and what they write is looked for. An environment takes up to 6 GB, and is removed when it
has served.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = "import platform; print(platform.python_version())"
LITTLE = (
    "test_problems=12 retry_problems=4 forced_problems=4 sampled_problems=2 curve_problems=8 sft_steps=4 sft_points=1 "
    "sft_examples=32 ppo_starts=1.0 twins=constant ppo_iterations=2 ppo_samples=8 ppo_minibatch=8 tops=0.2 "
    "recovery_problems=4 test_attempts=2"
)
TUNED = """
import sys, torch
from gp_spectral.models import load_model
model, tokenizer = load_model("tiny")
for k, w in model.named_parameters():
    w.data += 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(len(k)))
model.save_pretrained("tuned"); tokenizer.save_pretrained("tuned")
"""
USES = [  # (words behind the interpreter, what they leave)
    (["-c", TUNED], "tuned/model.safetensors"),
    ("-m gp_spectral compare tiny tuned --out compared".split(), "compared/report.html"),
    ("-m gp_spectral updates tiny tuned".split(), None),
    ("-m gp_spectral recover tuned --donor tiny --out mended --top 20%".split(), "mended/recovery.json"),
    ("-m gp_spectral sft tiny sft --set sft_steps=2 --set sft_examples=32 --set curve_problems=8".split(), "sft"),
    (
        ["-m", "gp_spectral", "study", "--preset", "tiny", "--seeds", "1", "--workers", "1", "--out", "runs"]
        + [w for s in LITTLE.split() for w in ("--set", s)],
        "runs/tiny/report.html",
    ),
]


def oldest():
    "Constraints: of every package that pyproject.toml names, the oldest version that it allows."
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return "\n".join(re.sub(r"^([\w.-]+)>=([\w.]+)$", r"\1==\2", x) for x in wanted)


def built(folder):
    "{'wheel': path, 'sdist': path}"
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    return dict(wheel=next(folder.glob("*.whl")), sdist=next(folder.glob("*.tar.gz")))


def used(python, package, room, constraints=None):
    "'' where the package installs and its commands do what they say, else what went wrong."
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own["GP_SPECTRAL_CACHE"] = str(room / "cache")
    inside = room / "env/bin/python"
    more = ["-c", str(constraints)] if constraints else []
    install = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(package), *more]
    steps = [([python, "-m", "venv", room / "env"], None), (install, None), *(([inside, *w], x) for w, x in USES)]
    for words, left in steps:
        done = subprocess.run([str(w) for w in words], cwd=room, env=own, capture_output=True, text=True)
        if done.returncode or left and not (room / left).exists():
            return f"{' '.join(map(str, words[1:4]))}: {(done.stderr or done.stdout).strip()[-600:]}"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="interpreters; default: this one")
    parser.add_argument("--keep", type=Path, help="also write the rows to this .json file")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="installs-") as made:
        packages, low = built(Path(made)), Path(made) / "oldest.txt"
        low.write_text(oldest())
        plan = [(p, what, None) for p in args.pythons for what in packages] + [(args.pythons[0], "wheel", low)]
        for python, what, constraints in plan:
            version = subprocess.run([python, "-c", VERSION], capture_output=True, text=True, check=True)
            room = Path(made) / "room"
            room.mkdir()
            wrong = used(python, packages[what], room, constraints)
            versions = "oldest" if constraints else "newest"
            rows.append(dict(python=version.stdout.strip(), package=what, versions=versions, wrong=wrong))
            print(rows[-1], flush=True)
            shutil.rmtree(room)
            if args.keep:
                args.keep.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(r["wrong"] for r in rows))


if __name__ == "__main__":
    main()
