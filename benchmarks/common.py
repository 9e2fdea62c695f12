"""What the benchmarks share: the spread of repeated measurements, tables, and the results they are written into.
Standard library only."""

import datetime
import json
import platform
import re
import statistics
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Results of the benchmarks\n"


def short(x):
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def spread(xs):
    return f"{short(statistics.median(xs))} [{short(min(xs))}–{short(max(xs))}]"


def ratios(xs, ys):
    return spread([x / y for x, y in zip(xs, ys)])


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in (head, ["---"] * len(head), *rows))


def processor():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next(
        (l.split(":")[1].strip() for l in info.splitlines() if l.startswith("model name")), platform.processor()
    )


def write(
    title,
    text,
    words,
    raw,
    packages=("torch", "numpy", "scipy"),  # whose versions are told
    keep=True,  # False: print only
):
    """Puts a result into results.md and the numbers behind it into results.json, in place of the last one of the
    same title."""
    script = Path(sys.argv[0]).name
    about = dict(
        command=" ".join([f"python benchmarks/{script}", *(Path(a).name for a in sys.argv[1:])]),
        date=str(datetime.date.today()),
        processor=processor(),
        python=platform.python_version(),
        **{p: metadata.version(p) for p in (*packages, "gp_spectral")},
    )
    head = f"`{about['command']}`, {about['date']}, {about['processor']}, " + ", ".join(
        f"{k} {about[k]}" for k in ("python", *packages)
    )
    text = f"{head}. {words}\n\n{text}\n"
    print(f"\n## {title}\n\n{text}")
    if not keep:
        return
    md, js = (ROOT / "benchmarks" / f"results.{e}" for e in ("md", "json"))
    old = re.split(r"^## ", md.read_text(), flags=re.M)[1:] if md.exists() else []
    sections = dict(s.split("\n", 1) for s in old) | {
        title: f"\n{text}"
    }  # an older one of the same title keeps its place
    md.write_text(HEAD + "".join(f"\n## {t}\n\n{s.strip()}\n" for t, s in sections.items()))
    known = json.loads(js.read_text()) if js.exists() else {}
    js.write_text(json.dumps(known | {title: about | raw}, indent=1) + "\n")
