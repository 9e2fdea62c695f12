"The project as a whole: what is generated is up to date, imports are light, and nothing imports upward."

import ast
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "pandas",
    "scipy",
    "matplotlib",
    "seaborn",
    "datasets",
    "ipywidgets",
}


def notebooks(root):
    return sorted(
        p.relative_to(root)
        for p in root.rglob("*.ipynb")
        if not any(part[0] in "._" for part in p.relative_to(root).parts)
    )


def python(code, cwd=ROOT, **env):
    "Runs `code` in a fresh process; its output, or a failure that shows what it wrote."
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    "A copy of the project to write in. Processes that run there import the copy."
    ignored = shutil.ignore_patterns(
        ".git",
        "runs",
        "_proc",
        "_docs",
        "models",
        "*.egg-info",
        "__pycache__",
        ".ipynb_checkpoints",
        ".pytest_cache",
        "build",
        "dist",
        ".venv",
    )
    return Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored))


def contents(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


def changed(before, after):
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


@pytest.mark.parametrize(
    "code",
    ["from nbdev.doclinks import nbdev_export as run", "from nbdev.clean import nbdev_clean as run"],
    ids=["export", "clean"],
)
def test_nothing_left_to_do(copy, code):
    before = contents(copy)
    python(f"{code}; run.__wrapped__()", copy, PYTHONPATH=str(copy))
    assert changed(before, contents(copy)) == []


# what nbdev writes before it processes notebooks; tests/test_site.py is about what comes of them
SETTINGS = "import nbdev.quarto as q; q.refresh_quarto_yml(); q.nbdev_sidebar.__wrapped__()"


def test_settings_of_the_site_stay(copy):
    before = contents(copy)
    python(SETTINGS, copy, PYTHONPATH=str(copy))
    assert changed(before, contents(copy)) == []


def test_sidebar_names_every_notebook():
    yaml = pytest.importorskip("yaml")
    named, nbs = set(), ROOT / "nbs"

    def walk(entries):
        for entry in [entries] if isinstance(entries, str) else entries:
            if isinstance(entry, dict):
                walk(entry.get("contents", entry.get("href", [])))
            elif "*" in entry:
                named.update(p.relative_to(nbs) for p in nbs.glob(entry))
            else:
                named.add(Path(entry))

    walk(yaml.safe_load((nbs / "sidebar.yml").read_text())["website"]["sidebar"]["contents"])
    assert named == set(notebooks(nbs))


def test_readme_is_the_index_notebook():
    made = runpy.run_path(str(ROOT / "scripts" / "readme.py"))
    assert (ROOT / "README.md").read_text(encoding="utf-8") == made["readme"](ROOT), "run: python scripts/readme.py"
    assert all(file.read_bytes() == png for file, png in made["pictures"](ROOT).items()), (
        "run: python scripts/readme.py"
    )


def test_readme_renders_cells():
    def cell(kind, source, *outputs):
        return dict(cell_type=kind, metadata={}, source=source, outputs=list(outputs))

    nb = {
        "cells": [
            cell(
                "markdown",
                "# Title\n\nSee [angles](04_angles.ipynb#bands), `[this](04_angles.ipynb)` "
                "and ![bars](images/bars.png).",
            ),
            cell("code", "#| hide\nimport secret"),
            cell("code", "#| eval: false\n1 + 1", dict(output_type="execute_result", data={"text/plain": ["2"]})),
        ]
    }
    text = runpy.run_path(str(ROOT / "scripts" / "readme.py"))["render"](nb, "https://example.org/docs/")
    assert "[angles](https://example.org/docs/angles.html#bands), `[this](04_angles.ipynb)`" in text
    assert (
        "![bars](https://raw.githubusercontent.com/gp-spectral/gp_spectral/main/nbs/images/bars.png)" in text
        and "secret" not in text
    )
    assert text.endswith("```python\n1 + 1\n```\n\n```\n2\n```\n")


def loaded(code):
    return set(python(f"{code}\nimport sys; print('loaded:', *sys.modules)").split("loaded:")[-1].split())


@pytest.mark.parametrize("module", ["gp_spectral", "gp_spectral.env"])
def test_import_is_light(module):
    assert loaded(f"import {module}") & HEAVY == set()


def test_comparing_and_working_load_no_drawing_library():
    "Altair takes seconds where Jupyter is installed, and every worker of a study would wait for it."
    assert not {"altair.vegalite", "jsonschema"} & loaded("import gp_spectral.angles, gp_spectral.workers")


HELP = """
from gp_spectral.cli import main
try: main(["--help"])
except SystemExit as e: assert not e.code, e.code
"""


def test_help_is_light():
    assert loaded(HELP) & HEAVY == set()
    assert 'gp-spectral = "gp_spectral.cli:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# Two wings, each on a room of its own: what loads models, and what reads checkpoints. What is above stands on both.
# A new module is in no list: it is on the ground, in a wing by what it imports, or, if it is named here, above.
WINGS = {"models", "checkpoint"}
ABOVE = {
    "preset",
    "stages",
    "workers",
    "study",
    "report",
    "healing",
    "tradeoff",
    "dial",
    "player",
    "explore",
    "app",
    "cli",
}
MODULES = sorted(p.stem for p in (ROOT / "gp_spectral").glob("*.py") if p.stem[0] != "_")


def imported(module):
    "The modules of ours that a module imports anywhere, in functions too."
    tree, found = ast.parse((ROOT / "gp_spectral" / f"{module}.py").read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gp_spectral.")}
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == 0 and parts[0] != "gp_spectral":
                continue
            inner = [p for p in (parts if node.level else parts[1:]) if p]
            found |= {inner[0]} if inner else {a.name for a in node.names}
    return found & {*MODULES}


def below(module):
    "All that a module stands on, through whatever is between."
    found, left = set(), imported(module)
    while left - found:
        found |= left
        left = set().union(*map(imported, found))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module):
    found = below(module)
    assert module not in found, f"{module} stands on itself"
    if module not in ABOVE:
        assert not found & ABOVE
        assert len((found | {module}) & WINGS) < 2, f"{module} stands on both wings"


@pytest.mark.parametrize("module", ["config", "folders", "env"])
def test_the_ground_floor_stands_on_nothing_heavy(module):
    assert not below(module) & WINGS


@pytest.mark.parametrize("module", [m for m in MODULES if "models" in below(m) | {m} and m not in ABOVE])
def test_no_private_name_crosses_a_module(module):
    "What another module needs is public."
    tree = ast.parse((ROOT / "gp_spectral" / f"{module}.py").read_text(encoding="utf-8"))
    ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level or "gp_spectral" in n.module)]
    assert [a.name for n in ours for a in n.names if a.name[0] == "_" and a.name[1] != "_"] == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_launch_configurations_are_accelerates(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert (
        config.distributed_type.value
        == {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[
            file.stem
        ]
    )
    if file.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if "zero" in file.stem:
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])
