"""Commands that are killed, starved of disk, started twice: `python -m tests.faults.kills --kills 100`.

Each command runs undisturbed once. Then it is started again and again and killed with SIGKILL after a random part of
the time that it took, and started once more until it ends. What it has written then is what the undisturbed one wrote,
file by file: tables but for times, weights to the bit. The processes are forked from one that has imported everything,
so that a kill costs the command's own time."""

import argparse
import contextlib
import fcntl
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pandas as pd
import torch

from gp_spectral import cli

from .corrupt import small

STUDY = (
    "test_problems=12 retry_problems=4 forced_problems=4 sampled_problems=2 curve_problems=8 sft_steps=4 sft_points=1 "
    "sft_examples=32 ppo_starts=1.0 twins=constant ppo_iterations=2 ppo_samples=8 ppo_minibatch=8 tops=0.2 "
    "recovery_problems=4 test_attempts=2"
)
SFT = "sft_steps=12 sft_points=3 sft_examples=32 sft_batch=8 sft_save_every=3 curve_problems=8 ppo_starts=1.0"
PPO = "ppo_iterations=4 ppo_samples=12 ppo_minibatch=12 ppo_save_every=1 curve_problems=8"
SCORE = "import json, sys; print(min(json.load(open(sys.argv[1] + '/recovery.json'))['edit_norm'], 0.3))"


def settings(text):
    return [word for pair in text.split() for word in ("--set", pair)]


def pair(room):
    return [str(room / "tuned"), "--donor", str(room / "base")]


COMMANDS = {  # name: the words of a command that writes into `out`
    "study": lambda room, out: (
        ["study", "--preset", "tiny", "--seeds", "1", "--workers", "1", "--out", out] + settings(STUDY)
    ),
    "sft": lambda room, out: ["sft", "tiny", out, *settings(SFT)],
    "ppo": lambda room, out: ["ppo", "tiny", out, *settings(PPO)],
    "compare": lambda room, out: ["compare", str(room / "base"), str(room / "tuned"), "--out", out, "--workers", "1"],
    "recover": lambda room, out: ["recover", *pair(room), "--out", out],
    "sweep": lambda room, out: ["sweep", *pair(room), "--ks", "0.1", "0.2", "0.4", "--out", out],
    "search": lambda room, out: (
        ["search", *pair(room), "--out", out, "--goal", "0.25", "--budget", "8"]
        + ["--score", f'{sys.executable} -c "{SCORE}" {{folder}}']
    ),
}
GOES_ON = [name for name, command in cli.COMMANDS.items() if command.goes_on]
TIMES = {"seconds", "tokens_per_second"}  # columns and keys that are times
APART = {"times.parquet", "log.parquet", "record.json", "report.html", "search.jsonl"}  # files with times in them


def prepared(room):
    "The models that the commands work on."
    small(room / "base", layers=2)
    small(room / "tuned", layers=2, change=0.2)
    os.environ["GP_SPECTRAL_CACHE"] = str(room / "cache")
    return room


def start(words, log, limit=None):
    "A command in a child, which writes into `log`, a file or an open pipe; `limit`: bytes that a file of its may have."
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        to = log if isinstance(log, int) else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(to, 1)
        os.dup2(to, 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with "File too large"
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = cli.main([str(w) for w in words])
    except BaseException:
        with contextlib.suppress(Exception):
            import traceback

            traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 99)


def ended(pid):
    "How a child ended: its number, or minus the signal."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def live(pid, seconds):
    "Waits so long for a child's end: its number, or None where it lives on."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def hidden(room):
    "Bytes of what is hidden in a folder, or has a name of something half made."
    odd = lambda p: p.name[0] == "." or p.suffix in (".part", ".partial")
    inside = lambda p: [x for x in (p.rglob("*") if p.is_dir() else [p]) if x.is_file()]
    return sum(f.stat().st_size for p in room.rglob("*") if odd(p) for f in inside(p))


def same_table(a, b):
    a, b = (pd.read_parquet(x) if x.suffix == ".parquet" else pd.read_csv(x) for x in (a, b))
    keep = [c for c in a.columns if c not in TIMES]
    assert list(a.columns) == list(b.columns)
    pd.testing.assert_frame_equal(a[keep], b[keep], check_exact=True)


def same(one, other):
    "Fails unless two folders hold the same: names, tables but for times, and the bytes of everything else."
    names = lambda root: sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix != ".png")
    assert names(one) == names(other), set(names(one)) ^ set(names(other))
    for name in names(one):
        a, b = one / name, other / name
        if a.is_dir() or name.name in APART - {"log.parquet", "search.jsonl"}:
            continue
        if a.suffix in (".parquet", ".csv"):
            same_table(a, b)
        elif name.name == "search.jsonl":
            told = [[{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in f.open()] for f in (a, b)]
            assert told[0] == told[1]
        else:
            text = [f.read_bytes().replace(str(root).encode(), b"") for f, root in ((a, one), (b, other))]
            assert text[0] == text[1], name


def leave_behind(out):
    "Removes what a killed `recover` or `sweep` has left, as it tells whoever starts it again."
    for left in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(left)


class Trial:
    "A command in a room of its own."

    def __init__(self, name, room):
        self.name, self.room, self.log = name, room, room / f"{name}.log"
        self.whole, self.out = room / name / "whole" / "x", room / name / "again" / "x"

    def words(self, out):
        return COMMANDS[self.name](self.room, str(out))

    def clean(self, out):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True)
        shutil.rmtree(self.room / "cache", ignore_errors=True)

    def complete(self, out):
        "Runs the command to its end: the seconds that it took."
        begun = time.monotonic()
        number = ended(start(self.words(out), self.log))
        assert number == 0, f"{self.name} ended with {number}: {self.log.read_text()[-2000:]}"
        return time.monotonic() - begun

    def undisturbed(self):
        self.clean(self.whole)
        self.seconds = self.complete(self.whole)

    def killed(self, rng, kills):
        "Killed so often, in lives of one run after the other; {kills, runs, went_on}."
        self.clean(self.out)
        done, runs, went_on = 0, 1, 0
        while done < kills:
            went_on += self.out.exists()
            pid = start(self.words(self.out), self.log)
            number = live(pid, rng.uniform(0, 0.9) * self.seconds)
            if number is None:
                os.kill(pid, signal.SIGKILL)
                number = ended(pid)  # 0 where it was quicker than the signal
            assert number in (0, -signal.SIGKILL), self.log.read_text()[-2000:]
            done += number != 0
            if number and self.name not in GOES_ON:
                leave_behind(self.out)
                number = 0 if self.out.exists() else number  # killed when all was there
            if number == 0 or rng.random() < 0.2:
                self.finish()
                self.clean(self.out)
                runs += 1
        self.finish()
        return dict(kills=done, runs=runs, went_on=went_on)

    def finish(self):
        if not (self.out.exists() and self.name not in GOES_ON):
            self.complete(self.out)
        same(self.whole, self.out)
        assert not hidden(self.out.parent)

    def limited(self, limit):
        "(how it ended, what it said): no file grows beyond a limit, so that it speaks into a pipe."
        into, out_of = os.pipe()
        fcntl.fcntl(out_of, fcntl.F_SETPIPE_SZ, 1 << 20)
        number = ended(start(self.words(self.out), out_of, limit))
        os.close(out_of)
        with os.fdopen(into, errors="replace") as f:
            return number, f.read()

    def full_disk(self, rng, times):
        "Started where a file may not grow beyond a size, then with room: told each time, and the same in the end."
        failed = 0
        for _ in range(times):
            self.clean(self.out)
            limit = int(10 ** rng.uniform(2, 6))
            number, said = self.limited(limit)
            assert number in (0, 2) and "Traceback" not in said, f"{self.name} ended with {number} at {limit}: {said}"
            if number:
                failed += 1
                assert "make room" in said, said[-1500:]
                if self.name not in GOES_ON:
                    assert not self.out.exists() and not hidden(self.out.parent)
            self.finish()
        return dict(full=failed, full_tried=times)

    def twice(self):
        "Two at once: each ends well, or is refused in one line; and what is there in the end is the same."
        self.clean(self.out)
        before = self.log.stat().st_size
        both = [start(self.words(self.out), self.log) for _ in "ab"]
        numbers, said = sorted(map(ended, both)), self.log.read_text()[before:]
        assert numbers in ([0, 0], [0, 2]) and "Traceback" not in said, f"{self.name} ended with {numbers}: {said}"
        self.finish()
        return dict(twice=str(numbers))

    def terminated(self, rng, times):
        "SIGTERM: an end with 143, at once, with nothing hidden left."
        left = 0
        for _ in range(times):
            self.clean(self.out)
            pid = start(self.words(self.out), self.log)
            number = live(pid, rng.uniform(0.2, 0.9) * self.seconds)
            if number is None:
                os.kill(pid, signal.SIGTERM)
                number = ended(pid)
                assert number in (143, 0), f"{self.name} ended with {number}: {self.log.read_text()[-1500:]}"
            left = max(left, hidden(self.out.parent))
            assert self.name in GOES_ON or not left
            self.finish()
        return dict(terminated=times, hidden_bytes=left)


def trials(room, names, kills, seed=0, others=1):
    "All that is done to each of some commands; a row for each."
    rng, rows = random.Random(seed), []
    for i, name in enumerate(names):
        share = kills // len(names) + (i < kills % len(names))
        trial, begun = Trial(name, room), time.monotonic()
        trial.undisturbed()
        row = dict(command=name, seconds_each=round(trial.seconds, 1)) | trial.killed(rng, share)
        if others:
            row |= trial.full_disk(rng, 3 * others) | trial.twice() | trial.terminated(rng, 2 * others)
        rows.append(row | dict(seconds=round(time.monotonic() - begun)))
        print(rows[-1], flush=True)
        for out in (trial.whole, trial.out):
            shutil.rmtree(out.parent, ignore_errors=True)
    return rows


def warm():
    "Imports what the commands need, without starting a thread."
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        for name in COMMANDS:
            cli.parser_of(name)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of all commands together")
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="also write the rows to this .json file")
    args = parser.parse_args(words)
    warm()
    begun = time.time()
    with tempfile.TemporaryDirectory(prefix="kills-") as room:
        rows = trials(prepared(Path(room)), args.commands, args.kills, args.seed)
    told = dict(minutes=round((time.time() - begun) / 60, 1), commands=rows)
    print(f"{sum(r['kills'] for r in rows)} kills in {told['minutes']} minutes, all ended with the same tables")
    if args.keep:
        Path(args.keep).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
