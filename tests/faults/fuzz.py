"""Inputs without end for everything that reads what somebody else wrote: `python -m tests.faults.fuzz --minutes 60`.

Each target (see `targets`) runs in a process of its own, which is watched: an input that takes a minute is a hang. Half
of the time the inputs are guided by coverage (atheris, where it is installed), half of it they are good inputs with
words of the format put elsewhere. What fails is kept in --failures, one file an input, with the error beside it."""

import argparse
import hashlib
import json
import mmap
import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

MOST = 1 << 16  # bytes of an input
HANGS = 60  # seconds without a step
JSON_WORDS = (
    '{} [] null true false NaN Infinity -1 0 1 1.5 1e999 9223372036854775808 "" "a" "../../x" "/etc" : , { } [ ] '
    '"F32" "BF16" "I64" "F8_E4M3" "shape" "dtype" "data_offsets" "__metadata__" [0,0] [1,1] [-1,-1] "\\u0000" "\\ud800"'
)
CONFIG_WORDS = (
    '"num_attention_heads" "num_key_value_heads" "head_dim" "hidden_size" "model_type" "llama" "gpt2" "falcon" "mpt" '
    '"text_config" "quantization_config" "quant_method" "weight_block_size" "rope_parameters" "attn_config" "bloom"'
)
ADAPTER_WORDS = (
    '"r" "lora_alpha" "rank_pattern" "alpha_pattern" "modules_to_save" "use_rslora" "bias" "peft_type" "LORA" "(.*)" '
    '"fan_in_fan_out" "base_model_name_or_path" "q_proj" ".*q_proj" "(a+)+" "lm_head" "embed_tokens" "use_dora" '
    '"revision" "modules_to_save" "task_type"'
)
WORDS = dict(
    formula="+ - * / ( ) 1 2 24 10 13 999999 1000000 × ÷ − · – [ ] 1/3 (1 \u0661 ² = . e x \u2003 \x1c",
    answer='; = + - * / 1 2 3 4 5 6 7 8 9 10 11 12 13 24 J Q K A "formula": "number": formula: [ ] { } " \' , ×',
    domain="; = + - * # #### @ max min dozen 0 1 2 3 7 10 12 20 199 200 1000000 a b c d e f g h ² \u0663 -1 ,",
    header=JSON_WORDS,
    index=JSON_WORDS + ' "weight_map" "model-00001-of-00002.safetensors" "config.json" ".." "." "metadata"',
    config=JSON_WORDS + " " + CONFIG_WORDS,
    adapter=JSON_WORDS + " " + ADAPTER_WORDS,
    settings="[mine] [DEFAULT] extends = mine other model sft_steps target 10-30 24 rl ppo grpo ppo_starts 0.5 nan "
    "inf 1e9 -1 yes no lora dtype float32 seeds tops 20% style paper compact % %( ${ # ; : \t",
)


class Ledger:
    "What a process has done so far, in memory that its parent sees: inputs, accepted, failed, the input at hand."

    def __init__(self, file):
        with open(file, "r+b") as f:
            self.memory = mmap.mmap(f.fileno(), 0)

    @classmethod
    def new(cls, file):
        Path(file).write_bytes(bytes(32 + MOST))
        return cls(file)

    def __getitem__(self, i):
        return struct.unpack_from("<Q", self.memory, 8 * i)[0]

    def add(self, i):
        struct.pack_into("<Q", self.memory, 8 * i, self[i] + 1)

    def begins(self, data):
        struct.pack_into("<Q", self.memory, 24, len(data))
        self.memory[32 : 32 + len(data)] = data

    @property
    def data(self):
        return bytes(self.memory[32 : 32 + self[3]])


INPUTS, ACCEPTED, FAILED = range(3)


def keep(folder, target, data, why):
    "Keeps an input that failed; inputs that fail at the same place once."
    at = hashlib.sha256("\n".join(line for line in why.splitlines() if line.strip().startswith("File")).encode())
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{target}-{at.hexdigest()[:10] if 'File' in why else hashlib.sha256(data).hexdigest()[:10]}"
    if not (folder / f"{stem}.txt").exists():
        (folder / f"{stem}.bin").write_bytes(data)
        (folder / f"{stem}.txt").write_text(why, errors="backslashreplace")


def one(target, ledger, failures):
    "(the function of an input that an engine calls, good inputs)."
    from .targets import seeds, tried

    good = seeds(target)

    def run(data):
        data = bytes(data[:MOST])
        ledger.begins(data)
        found = False
        try:
            found = tried(target, data)
        except BaseException as e:
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            ledger.add(FAILED)
            keep(failures, target, data, traceback.format_exc())
        if found:
            ledger.add(ACCEPTED)
        ledger.add(INPUTS)
        return found

    return run, good


def changed(rng, data, other, words):
    "An input with some of its words put elsewhere, doubled, taken away, or replaced."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice((0, 1, 1, 2, 4, 16)))
        way = rng.randrange(6)
        if way == 0:
            data[i:j] = rng.choice(words)
        elif way == 1:
            data[i:j] = b" " + rng.choice(words) + b" "
        elif way == 2:
            del data[i:j]
        elif way == 3:
            data[i:i] = data[i:j] * rng.choice((1, 2, 200))
        elif way == 4 and data:
            data[i % len(data)] ^= 1 << rng.randrange(8)
        else:
            at = rng.randrange(len(other) + 1)
            data[i:j] = other[at : at + rng.choice((4, 16, 64))]
    return bytes(data[:MOST])


def at_random(target, seconds, seed, *kept):
    "Good inputs, changed; what is accepted is changed further."
    run, pool = one(target, *kept)
    rng, words = random.Random(seed), [w.encode() for w in WORDS[target].split(" ")]
    fixed, end = len(pool), time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(50):
            data = changed(rng, rng.choice(pool), rng.choice(pool), words)
            if run(data) and len(data) < 4096:
                if len(pool) < 2000:
                    pool.append(data)
                else:
                    pool[rng.randrange(fixed, 2000)] = data


def guided(target, seconds, seed, *kept):
    "Inputs that atheris makes, guided by the lines that the ones before have reached."
    import atheris

    with atheris.instrument_imports(include=["gp_spectral"]):
        run, pool = one(target, *kept)  # the readers are imported here for the first time
    found = tempfile.mkdtemp(prefix="corpus-")
    for i, data in enumerate(pool):
        (Path(found) / str(i)).write_bytes(data)
    words = [w for w in WORDS[target].split(" ") if w]
    escaped = ["".join(f"\\x{b:02x}" for b in w.encode()) for w in words]
    (Path(found) / "words.dict").write_text("\n".join(f'"{w}"' for w in escaped))
    told = [f"-max_total_time={int(seconds)}", f"-max_len={MOST // 8}", f"-seed={seed + 1}", "-timeout=1000"]
    told += [f"-dict={found}/words.dict", "-verbosity=0", "-rss_limit_mb=6000"]
    atheris.Setup([sys.argv[0], *told, found], lambda data: run(data) and None)
    atheris.Fuzz()


def child(told):
    "What a process does that was started for a target and an engine."
    engine = guided if told["engine"] == "guided" else at_random
    engine(told["target"], told["seconds"], told["seed"], Ledger(told["ledger"]), Path(told["failures"]))


STARTS = 600  # seconds that a child may take to import what it needs, on a busy machine


def live(told, seconds, ledger):
    "One life of a child, of so many seconds from its first input: (seconds that it lived, what ended it early or '')."
    code = f"from tests.faults import fuzz; fuzz.child({told | dict(seconds=seconds)!r})"
    with open(told["log"], "ab") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    first, seen, since, begun = ledger[INPUTS], ledger[INPUTS], time.monotonic(), None
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if begun is None and ledger[INPUTS] > first:
            begun = now
        if ledger[INPUTS] != seen:
            seen, since = ledger[INPUTS], now
        if now - since > (HANGS if begun else STARTS) or begun and now - begun > seconds + HANGS:
            process.kill()
            process.wait()
            return now - (begun or now), "hangs"
    lived = time.monotonic() - begun if begun else 0
    return lived, "" if lived > seconds - 5 else f"the process ended with {process.returncode}"


def watched(told, seconds):
    "Children for so long altogether: (ledger, how many of them hung or died)."
    lost, left, ledger = 0, seconds, Ledger.new(told["ledger"])
    while left > 2 and lost < 20:
        lived, why = live(told, left, ledger)
        left -= max(lived, 1)
        if why:
            lost += 1
            told = told | dict(seed=told["seed"] + 1)
            keep(Path(told["failures"]), told["target"], ledger.data, why)
    return ledger, lost


def fuzz(minutes, names, failures, seed=0):
    "Fuzzes all targets for so long altogether; a row for each target and engine."
    engines = ["guided", "random"] if find_spec("atheris") else ["random"]
    share, rows = 60 * minutes / len(names) / len(engines), []
    failures = Path(failures).resolve()
    with tempfile.TemporaryDirectory() as room:
        for name in names:
            for engine in engines:
                told = dict(target=name, engine=engine, seed=seed, failures=str(failures), log=f"{room}/{name}.log")
                begun = time.monotonic()
                ledger, lost = watched(told | dict(ledger=f"{room}/{name}-{engine}"), share)
                took = time.monotonic() - begun
                row = dict(target=name, engine=engine, inputs=ledger[INPUTS], accepted=ledger[ACCEPTED])
                rows.append(row | dict(failed=ledger[FAILED], lost=lost, seconds=round(took)))
                print(row | dict(failed=ledger[FAILED], lost=lost, seconds=round(took)), flush=True)
                if lost or not ledger[INPUTS]:
                    print(Path(told["log"]).read_text(errors="replace")[-1500:], file=sys.stderr)
    return rows


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="of all targets together")
    parser.add_argument("--targets", nargs="+", default=list(WORDS), choices=list(WORDS))
    parser.add_argument("--failures", default="failures", help="folder for inputs that fail")
    parser.add_argument("--keep", help="also write the rows to this .json file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    begun = time.time()
    rows = fuzz(args.minutes, args.targets, args.failures, args.seed)
    total = {k: sum(r[k] for r in rows) for k in ("inputs", "accepted", "failed", "lost")}
    print(f"{total['inputs']:,} inputs in {(time.time() - begun) / 60:.1f} minutes: {total}")
    if args.keep:
        told = dict(minutes=round((time.time() - begun) / 60, 1), targets=rows)
        Path(args.keep).write_text(json.dumps(told, indent=1) + "\n")
    return int(total["failed"] + total["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
