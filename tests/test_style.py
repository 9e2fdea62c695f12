"How the sources are written: ruff's rules, and what it does not know of notebooks."

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
LONGEST = 30  # lines of an exported cell
LONGER = {}  # notebook -> names that a longer cell may begin with, and why


def cells(notebook):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        yield cell["cell_type"], "".join(cell["source"]).strip()


def exported(kind, source):
    return kind == "code" and re.search(r"^#\|\s*exports?\b", source, re.MULTILINE) is not None


def code_lines(source):
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def only_imports(source):
    return all(re.match(r"(from|import) |[\s)]|\w+,? *(as \w+)?,?$|#", line) for line in code_lines(source))


@pytest.mark.parametrize("what", [["check", "--quiet"], ["format", "--check", "--quiet"]], ids=["lint", "format"])
def test_ruff(what):
    done = subprocess.run([sys.executable, "-m", "ruff", *what, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_first_cell_is_title_and_promise(notebook):
    kind, source = next(cells(notebook))
    lines = [line for line in source.splitlines() if line.strip()]
    assert kind == "markdown" and len(lines) == 2, f"{notebook.name} begins with more than a title and a promise"
    assert lines[0].startswith("# ") and lines[1].startswith("> "), lines


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_exported_cells_are_short(notebook):
    long = {}
    for kind, source in cells(notebook):
        lines = code_lines(source)
        if (
            exported(kind, source)
            and len(lines) > LONGEST
            and not lines[0].startswith(LONGER.get(notebook.stem, ("?",)))
        ):
            long[lines[0][:60]] = len(lines)
    assert not long, f"cells of {notebook.name} with more than {LONGEST} lines: {long}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_prose_stands_before_what_is_exported(notebook):
    "A run of exported cells begins after a sentence, not after a heading alone; imports need none."
    prose, bare = False, []
    for kind, source in cells(notebook):
        if kind == "markdown":
            prose = any(line.strip() and not line.startswith("#") for line in source.splitlines())
        elif exported(kind, source):
            if not prose and not only_imports(source):
                bare.append(code_lines(source)[0][:70])
        elif not source.startswith(("#| hide", "#| default_exp")):
            prose = False
    assert not bare, f"cells of {notebook.name} without a sentence before them: {bare}"
