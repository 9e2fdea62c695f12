"The command line: every command's help, errors of one line, and nothing left changed."

import json
import os
import subprocess
import sys
import warnings
from importlib import import_module

import pandas as pd
import pytest
import torch
from made import changed, weights, write

from gp_spectral import __version__, cli


def said(capsys, *words):
    "(number, standard output, standard error) of a command."
    try:
        code = cli.main(list(words))
    except SystemExit as e:
        code = e.code or 0
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root, w = tmp_path_factory.mktemp("pair"), weights(dtype=torch.bfloat16, layers=1)
    return [str(write(root / name, changed(w, size, seed=1))) for name, size in (("base", 0), ("sft", 1))]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    code, out, err = said(capsys, name, "--help")
    assert code == 0 and not err and out.startswith(f"usage: gp-spectral {name} ")
    examples = out.split("examples:\n")[1].splitlines()
    assert examples and all(line.startswith(f"  gp-spectral {name}") for line in examples)
    assert "(default: None)" not in out and "(default: [])" not in out and "%%" not in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_example_can_be_read(name):
    import shlex

    for line in cli.COMMANDS[name].examples:
        command, *words = shlex.split(line)
        assert command == name and cli.parser_of(name).parse_args(words)


def test_compares_words_are_explained(capsys):
    out = said(capsys, "compare", "--help")[1]
    assert all(f"\n  {word}" in out for word in ("head, bulk, tail", "floor", "random", "rotated"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_argument_is_explained(name):
    "Each argument of a command says what it is."
    silent = [a.dest for a in cli.parser_of(name)._actions if not a.help]
    assert not set(silent) - {"seed", "bands"}, silent


def test_the_help_of_all(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0 and all(f"\n    {name} " in out for name in cli.COMMANDS)
    assert "accelerate launch" in out and "-m gp_spectral ppo" in out


@pytest.mark.parametrize("how", [["-m", "gp_spectral"], ["-m", "gp_spectral.cli"]])
def test_by_its_module(how):
    run = lambda *words: subprocess.run([sys.executable, *how, *words], capture_output=True, text=True)
    assert run("--version").stdout == f"gp-spectral {__version__}\n"
    assert "examples:" in run("--help").stdout
    wrong = run("comapre", "a", "b")
    assert wrong.returncode == 2 and wrong.stderr == "gp-spectral: unknown command 'comapre': did you mean compare?\n"


def test_what_is_no_command(capsys):
    assert said(capsys, "angles", "a", "b")[0] == 2  # compare had a twin once
    code, out, err = said(capsys, "xyzzy")
    assert (code, out) == (2, "") and "the commands are study, map, tradeoff, sft" in err
    code, _, err = said(capsys)
    assert code == 2 and "usage: gp-spectral" in err and "--help lists them" in err
    assert said(capsys, "compare", "a", "b", "--no-cache")[0] == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["compare", "nowhere"], "compare needs at least two checkpoints"),
        (["compare", "nowhere", "either"], "nowhere is not a folder"),
        (["spectrum", "nowhere"], "nowhere is not a folder"),
        (["recover", "nowhere", "--donor", "nowhere", "--out", "x"], "nowhere is not a folder"),
        (["study", "--preset", "huge"], "unknown preset 'huge'"),
        (["evaluate", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_an_error_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, *words)
    assert code == 2 and err.startswith(f"gp-spectral {words[0]}: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def state():
    return warnings.formatwarning, warnings.showwarning, list(warnings.filters), sys.stdout, dict(os.environ)


def during(monkeypatch, run):
    "`spectrum` does `run` instead."
    monkeypatch.setattr(import_module("gp_spectral.svd"), "run_spectrum", run)


@pytest.mark.parametrize("end", [None, ValueError("bad"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_everything_is_as_it_was(end, monkeypatch, capsys):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    before, seen = state(), []

    def run(args):
        seen.append(state())
        warnings.warn("mind this")
        warnings.warn("and not this", FutureWarning)
        if end:
            raise end

    during(monkeypatch, run)
    if isinstance(end, RuntimeError):  # a bug is not hidden behind one line
        with pytest.raises(RuntimeError):
            cli.main(["spectrum", "x"])
    else:
        assert cli.main(["spectrum", "x"]) == {None: 0, ValueError: 2, KeyboardInterrupt: 130}[end and type(end)]
    assert state() == before
    assert seen[0][0] is not before[0] and seen[0][4]["MPLBACKEND"] == "Agg"


@pytest.mark.parametrize("name, said", [("recover", "stopped\n"), ("compare", "stopped; the same command goes on")])
def test_sigterm_is_taken_for_ctrl_c(name, said, tmp_path):
    "What a command has begun is put away, and the number is the one of the signal."
    code = (
        "import os, signal, sys, tempfile, time\nfrom importlib import import_module\nfrom gp_spectral import cli\n"
        "def run(args):\n"
        "    with tempfile.TemporaryDirectory(dir='.'):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        f"name = {name!r}\nsetattr(import_module('gp_spectral.' + cli.COMMANDS[name].module), 'run_' + name, run)\n"
        "words = [name, 'a', 'b'] if name == 'compare' else [name, 'a', '--donor', 'b', '--out', 'c']\n"
        "code = cli.main(words)\nassert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 143 and said in done.stderr and list(tmp_path.iterdir()) == [], done.stderr


def test_a_full_disk_is_told_with_the_remedy(monkeypatch, capsys):
    class Odd(Exception):
        "As of safetensors, which knows no errno."

    for e in (Odd("I/O error: No space left on device (os error 28)"), OSError(28, "No space left on device")):

        def run(args, e=e):
            raise e

        during(monkeypatch, run)
        code, _, err = said(capsys, "spectrum", "x")
        assert code == 2 and err.endswith("; make room, and start the same command again\n") and err.count("\n") == 1


def test_warnings_are_notes():
    code = (
        "import warnings\nfrom gp_spectral import cli, svd\n"
        "svd.run_spectrum = lambda a: warnings.warn('mind this')\ncli.main(['spectrum', 'x'])\nwarnings.warn('plainly')"
    )
    err = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert err.startswith("note: mind this\n") and "UserWarning: plainly" in err


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "svg")
    seen = []
    during(monkeypatch, lambda args: seen.append(os.environ["MPLBACKEND"]))
    assert cli.main(["spectrum", "x"]) == 0 and seen == ["svg"] and os.environ["MPLBACKEND"] == "svg"


def test_one_process_speaks(monkeypatch, capsys):
    during(monkeypatch, lambda args: print("here"))
    for rank, text in (("1", ""), ("0", "here\n")):
        monkeypatch.setenv("RANK", rank)
        assert said(capsys, "spectrum", "x")[:2] == (0, text)


def test_the_number_of_a_command_is_the_programs(monkeypatch):
    during(monkeypatch, lambda args: 1)
    assert cli.main(["spectrum", "x"]) == 1


@pytest.mark.parametrize("name", ["spectrum", "compare"])
def test_goes_on_is_said_where_it_is_true(name, monkeypatch, capsys):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"gp_spectral.{cli.COMMANDS[name].module}"), f"run_{name}", stopped)
    code, _, err = said(capsys, name, "x")
    assert code == 130 and ("goes on from here" in err) == cli.COMMANDS[name].goes_on == (name == "compare")


def test_spectrum_and_compare(pair, tmp_path, capsys):
    rows, picture, out = tmp_path / "s.csv", tmp_path / "s.png", tmp_path / "c"
    code, text, _ = said(capsys, "spectrum", *pair, "--table", str(rows), "--plot", str(picture))
    assert code == 0 and set(pd.read_csv(rows).checkpoint) == {"base", "sft"} and picture.stat().st_size > 5000
    assert "largest" in text and "rows written to" in text
    code, text, err = said(capsys, "compare", *pair, "--out", str(out), "--cache", "none")
    assert code == 0 and "base → sft: 4 of 4 matrices turned" in text and "tables and pictures" in text
    assert {f.name for f in out.iterdir()} >= {"angles.parquet", "changes.parquet", "angles.png", "plan.json"}
    (out / "plan.json").write_text(json.dumps(json.loads((out / "plan.json").read_text()) | dict(fraction=0.3)))
    assert said(capsys, "compare", *pair, "--out", str(out))[2].startswith("gp-spectral compare: ")
