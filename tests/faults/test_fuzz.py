"""A little of the fuzzing in each run: what failed once, good inputs that are damaged, and what Hypothesis makes.

Much more of it: `python -m tests.faults.fuzz --minutes 60`."""

import json
import struct

import pytest

from . import evaluator, fuzz
from .targets import TARGETS, leave, seeds, tried

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@pytest.fixture(scope="module", autouse=True)
def put_away():
    yield
    leave()


def in_a_file(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


FAILED_ONCE = [  # (target, input): found by fuzzing
    ("formula", b"(" * 200),
    ("header", in_a_file(dict(__metadata__=False))),
    ("header", in_a_file(dict(x=dict(dtype="F32", shape=[1.5], data_offsets=[0, 0])))),
    ("header", in_a_file(dict(x=dict(dtype=["F32"], shape=[], data_offsets=[0, 0])))),
    ("header", struct.pack("<Q", 100_005) + b'{"a":' + b"[" * 100_000),
    ("index", b"[]"),
    ("index", json.dumps(dict(weight_map={"x": None})).encode()),
    ("index", json.dumps(dict(weight_map={"x": "m" * 300})).encode()),
    ("adapter", json.dumps(dict(peft_type="LORA", base_model_name_or_path="a" * 5000, r=4)).encode()),
    ("adapter", json.dumps(dict(peft_type="LORA", base_model_name_or_path={}, r=0)).encode()),
    ("config", b"[" * 100_000),
]


@pytest.mark.parametrize("target, data", FAILED_ONCE, ids=lambda x: x if isinstance(x, str) else "")
def test_what_failed_once(target, data):
    assert not tried(target, data)


def test_the_independent_evaluator_knows_the_game():
    assert evaluator.value("5 * (5 - 1/5)")[0] == 24 and evaluator.solves("(1+2)*8", [8, 2, 1], 24)
    for text in ("", "1 +", "(1", "1)", "1/0", "-1", "1 2", "1234567", "a"):
        with pytest.raises(evaluator.NoFormula):
            evaluator.value(text)
    assert evaluator.played("J 4 A A = 10 4 1 1 ; 10 + 4 = 0 ; 14 + 1 = 1 ; 15 + 1 = 2", (10, 4, 1, 1), 16)
    assert not evaluator.played("; 10 + 4 = 24", (10, 4, 1, 1), 24)


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_accepted_and_damaged_ones_are_judged(name, tmp_path):
    "Some inputs stay good after a few words were moved: the fuzzer does not stand at the door only."
    ledger = fuzz.Ledger.new(tmp_path / "ledger")
    assert any(tried(name, data) for data in seeds(name))
    fuzz.at_random(name, 0.7, 0, ledger, tmp_path / "failures")
    assert ledger[fuzz.INPUTS] and not ledger[fuzz.FAILED], [
        f.read_text() for f in (tmp_path / "failures").glob("*.txt")
    ]
    assert ledger[fuzz.ACCEPTED] > 0


@pytest.mark.parametrize("name", ["formula", "answer", "domain"])
def test_a_reader_that_lies_is_caught(name, tmp_path, monkeypatch):
    "With a bug planted, the fuzzer fails within a second."
    from gp_spectral import domains, env

    if name == "domain":
        monkeypatch.setattr(domains.Units, "result", lambda self, problem, parts: self.right(problem))
    elif name == "formula":
        good = env._apply
        monkeypatch.setattr(
            env, "_apply", lambda op, values: good("+" if op == "-" and len(values) > 2 else op, values)
        )
    else:
        monkeypatch.setattr(env, "_number_errors", lambda used, numbers: [])
    ledger = fuzz.Ledger.new(tmp_path / "ledger")
    fuzz.at_random(name, 2, 0, ledger, tmp_path / "failures")
    assert ledger[fuzz.FAILED] and list((tmp_path / "failures").glob("*.bin"))


WORDS = {name: st.sampled_from(words.split(" ")) for name, words in fuzz.WORDS.items()}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 2**65) | st.floats() | st.text(max_size=8) | WORDS["config"],
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | WORDS["config"], inner, max_size=4)
    ),
    max_leaves=12,
)


def of_json(name):
    "Good JSON of a target, with some keys given other values."
    good = json.loads(seeds(name)[0])
    keys = st.sampled_from(sorted(good)) | WORDS[name].map(lambda w: w.strip('"'))
    return st.dictionaries(keys, VALUES, max_size=4).map(lambda more: json.dumps(good | more).encode())


def of_words(name):
    "Two bytes that choose task and problem, and words of answers."
    parts = st.tuples(st.binary(min_size=2, max_size=2), st.lists(WORDS[name], max_size=30))
    return parts.map(lambda x: x[0] + " ".join(x[1]).encode())


ENTRY = st.fixed_dictionaries(
    dict(dtype=st.sampled_from(["F32", "F16", "I8", "BOOL", "F8_E4M3", "F4", ""]) | VALUES),
    optional=dict(
        shape=st.lists(st.integers(-1, 3), max_size=3) | VALUES,
        data_offsets=st.lists(st.integers(-1, 12), min_size=2, max_size=2) | VALUES,
    ),
)
MADE = dict(
    formula=lambda: st.text("0123456789+-*/() ×÷−[]", max_size=40).map(str.encode),
    answer=lambda: of_words("answer"),
    domain=lambda: of_words("domain"),
    header=lambda: st.tuples(
        st.dictionaries(st.text(max_size=6), ENTRY | VALUES, max_size=3), st.binary(max_size=12)
    ).map(lambda x: in_a_file(x[0]) + x[1]),
    index=lambda: of_json("index"),
    config=lambda: of_json("config"),
    adapter=lambda: of_json("adapter"),
    settings=lambda: st.lists(WORDS["settings"] | st.sampled_from(["\n", "\n"]), max_size=30).map(
        lambda x: b"[mine]\n" + " ".join(x).encode()
    ),
)


@pytest.mark.parametrize("name", MADE)
def test_what_hypothesis_makes(name):
    few = hypothesis.settings(
        max_examples=60,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @few
    @hypothesis.given(MADE[name]())
    def judged(data):
        tried(name, data)

    judged()
