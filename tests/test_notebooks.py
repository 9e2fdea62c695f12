"Every notebook runs, each in a process of its own, through nbdev's own runner."

import os
import subprocess
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p.relative_to(ROOT)
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)
)

RUN = """
import sys
from nbdev.config import get_config
from nbdev.test import test_nb
config = get_config()
flags = config.tst_flags.split()
forced = flags if sys.argv[2] == "slow" else []
passed, seconds = test_nb(sys.argv[1], skip_flags=flags, force_flags=forced, basepath=config.config_path,
                          cell_timeout=config.cell_timeout, verbose=True)
sys.exit(not passed)
"""


@pytest.mark.parametrize(
    "notebook", NOTEBOOKS, ids=[p.relative_to("nbs").with_suffix("").as_posix() for p in NOTEBOOKS]
)
def test_notebook(notebook, request):
    which = "slow" if request.config.getoption("--slow") else "quick"
    path = ROOT / notebook
    done = subprocess.run(
        [sys.executable, "-c", RUN, path, which],
        cwd=path.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    if done.returncode:  # nbdev writes the cell and its traceback to stderr
        pytest.fail(f"{notebook}\n{done.stdout[-3000:]}\n{done.stderr[-9000:]}", pytrace=False)


def test_there_are_notebooks():
    assert NOTEBOOKS
