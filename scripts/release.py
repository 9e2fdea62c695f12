"Checks a release before it is published: `python scripts/release.py v0.0.1 dist/*.whl`."

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "gp_spectral/settings.ini",
    "gp_spectral/models/tiny/model.safetensors",
    "gp_spectral/models/tiny/config.json",
)


def check(
    tag,  # v and a version
    names,  # what the wheel holds
    root=ROOT,  # of the repository
):  # what is wrong, a line each
    version = tag.removeprefix("v")
    stated = {
        "gp_spectral/__init__.py": re.search(r'__version__ = "(.+)"', (root / "gp_spectral/__init__.py").read_text()),
        "CITATION.cff": re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE),
    }
    wrong = [f"{file} says {m and m[1]}, the tag {version}" for file, m in stated.items() if not m or m[1] != version]
    heading = re.search(rf"^## {re.escape(version)}(.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if not heading:
        wrong.append(f"CHANGELOG.md has no entry {version}")
    elif "unreleased" in heading[1]:
        wrong.append(f"CHANGELOG.md calls {version} unreleased: give the date")
    return wrong + [f"missing from the wheel: {name}" for name in sorted(set(NEEDED) - set(names))]


if __name__ == "__main__":
    wheel = sys.argv[2]
    wrong = check(sys.argv[1], zipfile.ZipFile(wheel).namelist())
    if f"-{sys.argv[1].removeprefix('v')}-" not in Path(wheel).name:
        wrong.append(f"{wheel} is not of version {sys.argv[1]}")
    print("\n".join(wrong) or f"{wheel}: complete, and all agree")
    sys.exit(bool(wrong))
