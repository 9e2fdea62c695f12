"Writes constraints.txt: what is installed here, completed for Python 3.10. Run it in the environment that the tests have passed in."

# The list of tested versions is `pip freeze` of a Python 3.11 environment. Some of these versions need Python 3.11;
# `uv pip compile --universal` finds the newest that Python 3.10 can install beside the rest.
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"gp-spectral", "pip", "jupytext", "hypothesis", "uv", "mdit-py-plugins"}
HEADER = """\
# Every tested version. Made by `python scripts/constraints.py`: `pip freeze` of the Python 3.11 environment
# in which the tests passed; where a version needs a newer Python than 3.10.0, a second line with what
# `uv pip compile --universal --python-version 3.10` resolves to.
"""


def name(line):
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>!~; \[]", line.strip())[0]).lower()


def main():
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    frozen = {
        name(l): re.sub(r"\+\w+", "", l.split("==")[1])
        for l in frozen.splitlines()
        if "==" in l and name(l) not in NOT_OURS
    }
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "out.txt"  # what uv finds here it keeps wherever it can
        out.write_text("".join(f"{n}=={v}\n" for n, v in frozen.items()))
        subprocess.run(
            [
                sys.argv[1] if sys.argv[1:] else "uv",
                "pip",
                "compile",
                ROOT / "pyproject.toml",
                "--extra",
                "dev",
                "--universal",
                "--python-version",
                "3.10",
                "--no-header",
                "--no-annotate",
                "--no-emit-index-url",
                "--no-emit-find-links",
                "--quiet",
                "-o",
                out,
            ],
            check=True,
        )
        older = re.findall(r"^(\S+) ; python_full_version < ('3\.11[.\d]*')", out.read_text(), re.MULTILINE)
    lines = {n: [f"{n}=={v}"] for n, v in frozen.items()}
    for pin, before in older:
        if name(pin).startswith(("cuda-", "nvidia-", "triton")):
            continue  # torch itself pins these
        lines[name(pin)] = [f"{pin} ; python_full_version < {before}"] + [
            f"{l} ; python_full_version >= {before}" for l in lines.get(name(pin), [])
        ]
    text = HEADER + "".join(f"{l}\n" for n in sorted(lines) for l in lines[n])
    (ROOT / "constraints.txt").write_text(text)
    print(f"constraints.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
