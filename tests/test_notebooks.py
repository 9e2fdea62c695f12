"Every notebook runs, each in a process of its own, through nbdev's own runner."

import gc
import multiprocessing
import os
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p.relative_to(ROOT)
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)
)

# What nearly every notebook imports takes longer than most notebooks: one process imports it, and is forked for each.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["nbdev.test", "altair", "gp_spectral.study", "gp_spectral.drift"])


def run(notebook, force, log):
    "Runs a notebook in this process, which ends with 1 if it fails; what it says goes into a file."
    gc.freeze()  # what was imported before the fork is never garbage
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["NO_COLOR"] = "1"
    os.chdir(notebook.parent)
    from nbdev.config import get_config
    from nbdev.test import test_nb

    config = get_config()
    flags = config.tst_flags.split()
    sys.argv = [str(notebook)]
    passed, _ = test_nb(
        str(notebook),
        skip_flags=flags,
        force_flags=flags if force else [],
        basepath=config.config_path,
        cell_timeout=config.cell_timeout,
        verbose=True,
    )
    sys.exit(not passed)


@pytest.mark.parametrize(
    "notebook", NOTEBOOKS, ids=[p.relative_to("nbs").with_suffix("").as_posix() for p in NOTEBOOKS]
)
def test_notebook(notebook, request, tmp_path):
    log = tmp_path / "log.txt"
    process = PROCESSES.Process(target=run, args=(ROOT / notebook, request.config.getoption("--slow"), log))
    process.start()
    process.join()
    if process.exitcode:  # nbdev writes the cell and its traceback
        pytest.fail(f"{notebook} ended with {process.exitcode}\n{log.read_text()[-12000:]}", pytrace=False)


def test_there_are_notebooks():
    assert NOTEBOOKS
