"""The map of healing: what it runs, what its numbers mean, and that what is committed says what the page says."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from gp_spectral.checkpoint import Checkpoint
from gp_spectral.healing import HealingMap, findings, healing_map, map_page, point_class, points
from gp_spectral.models import load_model
from gp_spectral.play import evaluate, prompt_ids
from gp_spectral.preset import load_preset, read_preset
from gp_spectral.stages import answer_divergence, answered

HERE = Path(__file__).parent.parent / "nbs" / "studies" / "healing"
LITTLE = dict(
    cards="3",
    target="1-30",
    test_problems="12",
    forced_problems="8",
    curve_problems="4",
    sft_points="1",
    sft_steps="4",
    sft_examples="64",
    ppo_starts="0.5 1.0",
    ppo_iterations="2",
    ppo_samples="12",
    ppo_minibatch="12",
    twins="constant",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, worker_id):
    "A little map, run by two workers; those of pytest share its stages."
    own = tmp_path_factory.getbasetemp()
    out = (own if worker_id == "master" else own.parent) / "map"
    page = healing_map("tiny", 1, 7, out, LITTLE, progress=False, workers=2)[0]
    return page.parent, {f.stem: pd.read_parquet(f) for f in (page.parent / "tables").glob("*.parquet")}


@pytest.fixture(scope="module")
def committed():
    return {f.stem: pd.read_parquet(f) for f in HERE.glob("*.parquet")}


def test_every_training_starts_where_it_says(made):
    root, tables = made
    for step in (2, 4):
        start = Checkpoint(root / "7" / "sft" / f"step-{step:05d}").digest()
        for training in (f"ppo-{step:05d}", f"twin-constant-{step:05d}"):
            record = json.loads((root / "7" / training / "record.json").read_text())
            assert record["inputs"] == [start] and record["settings"]["step"] == step, training
    assert set(tables["points"].seed) == {7} and tables["points"].start.tolist() == [2, 2, 4, 4]


def test_answers_are_those_of_the_checkpoints(made):
    root, tables = made
    whole = HealingMap(read_preset(root), root, [7])
    task, asked = whole.tasks["OOD"], whole.problems("OOD", 12)
    for name, path in (("start", whole.sft_step(7, 2)), ("rl", whole.rl_folder(7, 2) / "checkpoint")):
        again = evaluate(load_model(path), task, problems=asked, attempts=1)
        rows = tables["evaluations"].query("start == 2 and checkpoint == @name and rule == 'OOD'")
        assert rows.solved_first.tolist() == again.solved_first.tolist(), name


def test_the_same_command_has_nothing_left_to_do(made, capsys):
    root, tables = made
    before = {f: f.stat().st_mtime_ns for f in root.glob("*/*/record.json")}
    healing_map("tiny", 1, 7, root.parent, LITTLE, workers=1)
    assert {f: f.stat().st_mtime_ns for f in root.glob("*/*/record.json")} == before
    with pytest.raises(ValueError, match="other settings"):
        healing_map("tiny", 1, 7, root.parent, LITTLE | dict(ppo_lr="1e-3"), progress=False, workers=1)


def test_divergence_is_that_of_the_next_token():
    model, tokenizer = load_model("tiny")
    other = load_model("tiny-rule")[0]
    task = load_preset("tiny").tasks()["ID"]
    asked = answered(task, 3)
    assert answer_divergence(model, model, tokenizer, task, asked) == 0
    total, n = 0.0, 0
    for problem, answer in asked:  # one at a time, by hand
        prompt = prompt_ids(tokenizer, task, problem)
        ids = prompt + tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double().softmax(-1) for m in (model, other))
        total, n = total + (p * (p / q).log()).sum().item(), n + len(p)
    assert answer_divergence(model, other, tokenizer, task, asked, batch=2) == pytest.approx(total / n, rel=1e-4)


def altered(tables, change):
    "The tables with other OOD answers of RL; `change` is given its rows of a table, and the start's."
    new = dict(tables)
    for name in ("evaluations", "forced"):
        rows = tables[name].copy()
        of = lambda checkpoint: (rows.checkpoint == checkpoint) & (rows.rule == "OOD")
        rows.loc[of("rl"), ["read", "solved_first"]] = change(rows[of("rl")], rows[of("start")])
        new[name] = rows
    new["points"] = points(new)
    return new


def test_an_rl_that_does_nothing_heals_nowhere(committed):
    tables = altered(committed, lambda rl, start: start[["read", "solved_first"]].to_numpy())
    rl = tables["points"].query("training == 'rl'")
    assert (rl.gain == 0).all() and set(rl["class"]) <= {"no signal", "nothing lost", "leaves it"}
    asked = findings(tables).set_index("question")
    assert asked.loc["RL gives back reading (its term, where something was lost)", "answer"] == "no, within 3 points"


def test_an_rl_that_brings_all_back_heals_everywhere(committed):
    tables = altered(committed, lambda rl, start: np.ones((len(rl), 2), bool))
    rl = tables["points"].query("training == 'rl'")
    lost_reading = rl[(rl.read_start < 0.9) & ~rl["class"].isin(["no signal", "nothing lost"])]
    assert len(lost_reading) > 5 and set(lost_reading["class"]) == {"heals"}
    assert findings(tables).iloc[0].answer == "yes"


def test_the_gate_and_the_loss_come_first():
    sure = (0.2, 0.1, 0.3)
    assert point_class(0.7, sure, sure, sure) == "no signal"
    assert point_class(0.3, (0.02, -0.01, 0.05), sure, sure) == "nothing lost"
    assert point_class(0.3, sure, (-0.2, -0.3, -0.1), sure) == "specialises on"


def test_the_page_is_one_file(committed):
    page = map_page(committed)
    assert "RL gives back reading" in page and 'src="http' not in page and len(page) < 3e6


def test_a_grid_is_a_map_for_each_value(tmp_path):
    with pytest.raises(ValueError, match="--vary sft_lr: expected KEY=VALUE"):
        healing_map(vary=("sft_lr",), out=tmp_path)
    with pytest.raises(ValueError, match="no_such"):
        healing_map(vary=("no_such=1,2",), out=tmp_path)
    assert not list(tmp_path.iterdir())
