"Writes constraints.txt: the version of everything that is installed here. Run it where the tests have passed."

# The environment is one of Python 3.11, the oldest that is supported: what it can install, newer ones can.
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"gp-spectral", "pip", "jupytext", "hypothesis", "uv", "mdit-py-plugins"}
HEADER = """\
# Every tested version. Made by `python scripts/constraints.py`: `pip freeze` of the Python 3.11 environment
# in which the tests passed.
"""


def name(package):
    return re.sub(r"[-_.]+", "-", package).lower()


def main():
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"this is Python {sys.version.split()[0]}: the tested versions are those of Python 3.11")
    freeze = [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable"]
    frozen = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    pins = dict(re.sub(r"\+\w+", "", line).split("==") for line in frozen.splitlines() if "==" in line)
    kept = {name(package): version for package, version in pins.items() if name(package) not in NOT_OURS}
    (ROOT / "constraints.txt").write_text(HEADER + "".join(f"{p}=={kept[p]}\n" for p in sorted(kept)))
    print(f"constraints.txt: {len(kept)} packages")


if __name__ == "__main__":
    main()
