"The explorer: what it opens, that its numbers are those of the long way, and its widgets in a real browser."

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from made import changed, weights, write
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from gp_spectral import app, dial, player
from gp_spectral.angles import angle_profile
from gp_spectral.cli import main
from gp_spectral.env import Feedback, GeneralPoints
from gp_spectral.explore import detail_rows, explore, live_profile, opened, opened_map
from gp_spectral.models import load_model
from gp_spectral.play import evaluate, play, success_rate
from gp_spectral.recovery import prepare, recover
from gp_spectral.stages import Study

ROOT = Path(__file__).resolve().parent.parent
SHIPPED, BASE = ROOT / "nbs" / "studies" / "rule" / "shipped", ROOT / "gp_spectral" / "models" / "tiny-rule"
MATRIX = "model.layers.1.self_attn.q_proj.weight"


def near(folder, size, seed):
    "The shipped base with a little noise: a checkpoint that still answers, made without training."
    shutil.copytree(BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(changed(tensors, size, seed), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder with the committed tables, and checkpoints where a study has them."
    root = tmp_path_factory.mktemp("runs") / "tiny-rule"
    shutil.copytree(SHIPPED, root / "tables")
    (root / "tables" / "preset.json").rename(root / "preset.json")
    study = Study.open(root)
    study.folder(0).joinpath("sft").mkdir(parents=True)
    pd.read_parquet(SHIPPED / "sft_curve.parquet").query("seed == 0").to_parquet(root / "0" / "sft" / "curve.parquet")
    named = study.checkpoints(0)
    for i, name in enumerate(("max_ood", "end", "rl")):
        named[name].parent.mkdir(parents=True, exist_ok=True)
        near(named[name], 0.03 * (i + 1), 7 * i)
    return root


@pytest.fixture(scope="module")
def study(run):
    return Study.open(run)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    "What `compare` writes."
    root, w = tmp_path_factory.mktemp("compared"), weights()
    folders = [write(root / name, x) for name, x in dict(base=w, sft=changed(w, 0.02)).items()]
    assert main(["compare", *map(str, folders), "--out", str(root / "out")]) in (0, None)
    return root / "out"


# --- what is opened


def test_whatever_is_opened_has_pairs_and_a_map(run, study, compared):
    one, two = (compared.parent / name for name in ("base", "sft"))
    for what in ([run], [study], [SHIPPED], [compared], [one, two]):
        found = opened(*what, **dict(progress=False, cache=False) if len(what) > 1 else {})
        rows = {r["pair"] for t in opened_map(found).to_dict()["datasets"].values() for r in t if "ratio" in r}
        assert rows == {f"{a} → {b}" for a, b in found.pairs} and len(found.tables.changes)
    assert "SFT_End → noise" in {f"{a} → {b}" for a, b in opened(study).pairs}  # not filtered out


def test_models_in_memory_are_compared():
    models = [load_model(BASE)[0] for _ in range(2)]
    with torch.no_grad():
        models[1].get_parameter(MATRIX).mul_(-1.1)
    found = opened(*models, progress=False, layers="1", kinds=["q_proj"], cache=False)
    assert len(found.pairs) == 1 and not live_profile(found, *found.pairs[0], MATRIX).empty


def test_what_is_nothing_is_told(tmp_path, run):
    with pytest.raises(ValueError, match="gp-spectral study"):
        explore(tmp_path)
    with pytest.raises(ValueError, match="has seeds .* not 9"):
        explore(run, seed=9)
    assert main(["explore", str(tmp_path), "--no-browser"]) == 2


def test_checkpoints_that_have_gone_or_changed_are_not_measured(compared, tmp_path):
    out = shutil.copytree(compared, tmp_path / "out")
    table = (out / "spectrum.parquet").rename(tmp_path / "spectrum.parquet")  # of before it was kept
    found = opened(out)
    rows = detail_rows(found, "base", "sft", MATRIX)
    assert list(found.checkpoints) == ["base", "sft"] and all(len(t) for t in rows.values())
    plan = json.loads((out / "plan.json").read_text())
    for broken in (dict(checkpoints=["nowhere", "nowhere"]), dict(files=[["other"], ["other"]])):
        (out / "plan.json").write_text(json.dumps(plan | broken))
        without = opened(out)
        rows = detail_rows(without, "base", "sft", MATRIX)
        assert without.checkpoints == {} and rows["profile"].empty and rows["sigma"].empty and len(rows["energy"])
        assert rows["change"].empty
    table.rename(out / "spectrum.parquet")
    rows = detail_rows(opened(out), "base", "sft", MATRIX)
    assert rows["profile"].empty and len(rows["sigma"]) == 2 and len(rows["change"]) == 1


def test_stacks_are_told_apart(study):
    one = opened(study)
    angles = one.tables.angles.assign(stack=np.where(one.tables.angles.layer < 2, "vision", ""))
    chart = opened_map(replace(one, tables=one.tables._replace(angles=angles))).to_dict()
    assert chart["concat"][0]["facet"]["row"]["sort"] == ["vision", "main"]
    stacks = {(row["matrix"], row["stack"]) for t in chart["datasets"].values() for row in t if "ratio" in row}
    assert stacks == set(zip(angles.matrix, angles["stack"]))


def test_the_noise_is_the_studys_own(study, tmp_path):
    named = study.checkpoints(0)
    told = dict(method="random", like="donor", seed=0, progress=False, certify="quick")
    noise = recover(named["end"], named["rl"], tmp_path / "noise", **told)
    rows, wanted = live_profile(opened(study), "SFT_End", "noise", MATRIX), angle_profile(named["end"], noise, MATRIX)
    rows = rows[rows.what == "noise as large"]
    assert "measured" not in set(rows.what)
    for side in "UV":
        mine, theirs = rows[rows.side == side].degrees, np.degrees(wanted[wanted.side == side].angle)
        assert mine.to_numpy() == pytest.approx(theirs[theirs > 0].to_numpy(), abs=1e-5)


# --- the dial


EDITS = [
    dict(method="anchored", top=0.2),
    dict(method="reset", layers="first 25%"),
    dict(method="random", top=0.4, layers="1-2", kinds=["q_proj", "up_proj"]),
]


@pytest.mark.parametrize("edit", EDITS, ids=[e["method"] for e in EDITS])
def test_a_dials_numbers_are_those_of_a_recovered_checkpoint(study, tmp_path, edit):
    named, one = study.checkpoints(0), dial.study_dial(study, 0, 12)
    told = dict(seed=0, progress=False)
    folder = recover(named["end"], named["max_ood"], tmp_path / "out", certify="quick", **told, **edit)
    edited = dial.edited_tensors(prepare(named["end"], named["max_ood"], **told, **edit))
    stored, before = (load_file(x / "model.safetensors") for x in (folder, named["end"]))
    assert all(torch.equal(stored[name], tensor) for name, tensor in edited.items())
    assert {name for name in stored if not torch.equal(stored[name], before[name])} <= set(edited)
    found = dial.ask(one, **edit)
    for rule, task in study.tasks.items():
        rate = success_rate(evaluate(folder, task, problems=study.problems(rule, 12), attempts=1))
        assert (found[rule], found[f"{rule}_low"]) == (rate["rate"], rate["low"])
    assert dial.ask(one, **edit) is found and found["ID"] + found["OOD"] > 0


@pytest.mark.parametrize(
    "config, kinds",
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64), ["q_proj", "c_fc"]),
        (
            Phi3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
            ["v_proj", "up_proj"],
        ),
    ],
    ids=["gpt2", "phi3"],
)
def test_a_part_of_a_fused_matrix_is_repaired_in_memory(tmp_path, config, kinds):
    "As `recover` stores it; what is fused with it stays as it is."
    config.vocab_size, config.pad_token_id = 128, 0
    _, tokenizer = load_model("tiny")
    for seed, name in enumerate(("target", "donor")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pair, told = (tmp_path / "target", tmp_path / "donor"), dict(method="anchored", top=0.5, kinds=kinds)
    stored = load_file(recover(*pair, tmp_path / "out", progress=False, **told) / "model.safetensors")
    before = load_file(tmp_path / "target/model.safetensors")
    model, _ = dial.Dial(*pair, {}, {}).repaired(**told)
    assert all(torch.equal(stored[name], model.state_dict()[name]) for name in stored)
    assert {".".join(name.split(".")[-3:-1]) for name in stored if not torch.equal(stored[name], before[name])} == {
        "gpt2": {"attn.c_attn", "mlp.c_fc"},
        "phi3": {"self_attn.qkv_proj", "mlp.gate_up_proj"},
    }[config.model_type]


def test_the_dials_neighbours_are_the_studys_answers(study):
    "The same hands, from its tables: as many as the dial asks."
    for n in (100, 7):
        known = dial.known_success(study.tables, 0, n).set_index("name")
        rows = study.tables["recovery_answers"].query("seed == 0 and edit == 'target' and problem < @n")
        for rule in ("ID", "OOD"):
            assert known.loc["SFT_End", rule] == rows[rows.rule == rule].solved_first.mean()
    assert {"base", "SFT_MaxOOD", "SFT_End", "RL", "anchored 20%"} <= set(known.index)


def test_a_wrong_setting_is_told_in_the_dial(study):
    one = dial.study_dial(study, 0, 2)
    left = dial.dial_widget(one, dial.known_success(study.tables, 0, 2)).children[0].children
    left[2].value = "<b>9</b>"
    left[4].click()
    assert "&lt;b&gt;9" in left[5].value and "<b>" not in left[5].value and not one.asked


# --- the player


def test_a_played_hand_is_plays_transcript(study):
    loaded = load_model(study.checkpoints(0)["end"])
    for rule, task in study.tasks.items():
        for problem in study.problems(rule, 1):
            (episode,), hand = play(*loaded, task, [problem], attempts=3), player.Hand(loaded, task, problem)
            for _ in range(3):
                hand.step()
            assert (hand.episode.ids == episode.ids) is True
            said = list(player.transcript(hand))
            assert [text for who, text in said if who == "model"] == [t.text for t in episode.turns]
            verdicts = [text for who, text in said if who == "verifier"]
            assert all(text.startswith(t.feedback.message) for text, t in zip(verdicts, episode.turns))


def test_what_a_model_writes_is_shown_and_not_run():
    evil = "<img src=x onerror=alert(1)> __import__('os')"
    turn = type("Turn", (), dict(text=evil, ended=True, feedback=Feedback(-1, evil, False, "format")))
    task = GeneralPoints("faces_as_ten")
    hand = player.Hand(None, task, player.typed_hand("A 2 3 4", task))
    hand.episode = type("Episode", (), dict(turns=[turn], solved=False))
    shown = player._conversation(hand)
    assert "<img" not in shown and "&lt;img" in shown


# --- the app


def test_the_extra_is_asked_for(run, monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: None if name == "voila" else True)
    assert main(["explore", str(run), "--no-browser"]) == 2
    assert "pip install 'gp_spectral[app]'" in capsys.readouterr().err


def test_a_taken_port_is_told(run, capsys):
    pytest.importorskip("voila")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert main(["explore", str(run), "--no-browser", "--port", str(s.getsockname()[1])]) == 2
    assert "is taken" in capsys.readouterr().err


# --- in a browser


def until(browser, script, seconds=90):
    "The value of a script, once it is true."
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, seconds, ignored_exceptions=(Exception,))
    return wait.until(lambda b: b.execute_script(script), script[-200:])


# The pictures are `.vega-embed` in their order: the map, what stands behind a matrix.
DRAWN = "document.querySelectorAll('.vega-embed svg')[1].innerHTML"
TEXT = "document.body.innerText"
SQUARE = "[...document.querySelectorAll('.mark-rect path')].find(p => p.getAttribute('aria-label')?.includes('%s'))"
CHOOSE = """
const select = document.querySelectorAll('.vega-bindings select')[arguments[0]];
select.selectedIndex = arguments[1]; select.dispatchEvent(new Event('change')); return true;
"""


def moves_everything(browser):
    "Clicks on the map, moves its drop-downs and the slider, and waits for what each of them changes."
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    until(browser, f"return document.querySelectorAll('.mark-rect path').length > 20 && {DRAWN}.length > 5000")
    time.sleep(0.5)  # the map tells its first choice once it is drawn

    def changes(move, said=""):
        browser.execute_script(f"window.before = {DRAWN}")
        move()
        until(browser, f"return {DRAWN} != window.before && {TEXT}.includes({json.dumps(said)})")

    changes(browser.execute_script(f"return {SQUARE % MATRIX}").click, f"{MATRIX}, base → SFT_MaxOOD")
    changes(lambda: browser.execute_script(CHOOSE, 0, 6), f"{MATRIX}, SFT_End → noise")
    changes(lambda: browser.execute_script(CHOOSE, 2, 2))  # the tail
    changes(lambda: browser.find_element(By.CSS_SELECTOR, ".noUi-handle").send_keys(Keys.ARROW_RIGHT), "25%")


@pytest.mark.slow  # the app shows the same widget in a browser, in each run
def test_the_widget_in_jupyterlab(lab, tmp_path):
    cell = f"from gp_spectral.explore import explore\nexplore({str(SHIPPED)!r})"
    kernel = dict(name="python3", display_name="python3", language="python")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=dict(kernelspec=kernel))
    (tmp_path / "here").mkdir()
    nbformat.write(nb, tmp_path / "here" / "explorer.ipynb")
    moves_everything(lab(tmp_path / "here" / "explorer.ipynb"))


@pytest.fixture
def served(run):
    "`gp-spectral explore`, as somebody starts it, and its address."
    pytest.importorskip("voila")
    words = [sys.executable, "-m", "gp_spectral", "explore", str(run), "--no-browser"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as command:
        try:
            yield re.search(r"http://127\.0\.0\.1:(\d+)/", command.stdout.readline())
            command.send_signal(signal.SIGTERM)
            assert command.wait(30) == 0
        finally:
            command.kill()


def test_the_app_in_a_browser(browser, served):
    "All three tabs work; no request goes elsewhere."
    from selenium.webdriver.common.by import By

    def press(text):
        until(browser, f"return {TEXT}.includes({json.dumps(text)})")
        next(b for b in browser.find_elements(By.TAG_NAME, "button") if b.text == text).click()

    browser.get_log("browser")
    browser.get(served[0])
    moves_everything(browser)
    tabs = browser.find_elements(By.CSS_SELECTOR, ".lm-TabBar-tab")
    tabs[1].click()
    press("Repair and ask")
    until(browser, f"return /anchored 20%: \\d+% ID, \\d+% OOD of 100/.test({TEXT})")
    tabs[2].click()
    press("Next attempt")
    until(browser, f"return {TEXT}.split('verifier').length >= 3")
    elsewhere = "performance.getEntriesByType('resource').filter(e => !e.name.includes('127.0.0.1')).map(e => e.name)"
    assert browser.execute_script(f"return {elsewhere}") == []
    assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []
    browser.get("about:blank")
