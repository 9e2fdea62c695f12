"""SFT under constraints, and SFT compared at equal success: what is held, what is run, and what is refused."""

import pandas as pd
import pytest
import torch

from gp_spectral.angles import compare_all, energy_share
from gp_spectral.checkpoint import Checkpoint
from gp_spectral.constraint import CONSTRAINTS, Constraint
from gp_spectral.models import load_model
from gp_spectral.preset import load_preset
from gp_spectral.sft import train_sft
from gp_spectral.stages import Study, trained_in
from gp_spectral.tradeoff import at_equal, tradeoff

LITTLE = dict(
    cards="3",
    target="1-30",
    test_problems="12",
    curve_problems="4",
    sft_points="1",
    sft_at="2",
    sft_steps="4",
    sft_examples="64",
    ppo_starts="1.0",
)
ARMS = ("sft_constraint+sft_lr=none+1e-3,embeddings+1e-3,sigma+1e-2",)


@pytest.fixture(scope="module")
def made(tmp_path_factory, worker_id):
    "A little comparison of three arms; workers of pytest share its stages."
    own = tmp_path_factory.getbasetemp()
    out = (own if worker_id == "master" else own.parent) / "tradeoff"
    page = tradeoff("tiny", ARMS, (("sigma", "embeddings"),), 1, 5, out, LITTLE, progress=False, workers=1)
    return page.parent, {f.stem: pd.read_parquet(f) for f in (page.parent / "tables").glob("*.parquet")}


@pytest.fixture(scope="module")
def changes(made):
    "{arm: the changes of its last checkpoint}."
    root, _ = made
    last = {arm: root / arm / "5" / "sft" / "step-00004" for arm in ("embeddings", "sigma")}
    return {arm: compare_all(["tiny", path], cache=False, progress=False) for arm, path in last.items()}


def test_each_arm_changes_what_it_may(changes):
    parts = {arm: c.parts.set_index("part").change_norm for arm, c in changes.items()}
    assert parts["embeddings"]["embeddings"] > 0 == parts["embeddings"]["matrices"] == parts["embeddings"]["norms"]
    assert parts["sigma"]["matrices"] > 0 == parts["sigma"]["embeddings"] == parts["sigma"]["norms"]
    assert energy_share(changes["sigma"].changes, "dw_diagonal").item() == pytest.approx(1, abs=1e-5)
    assert changes["sigma"].changes.mean_abs_change.min() > 1e-4


def test_the_free_arm_is_sft_as_the_study_runs_it(made, tmp_path):
    root, _ = made
    study = Study(load_preset("tiny", LITTLE | dict(sft_lr="1e-3")), tmp_path, [5])
    study.sft(5)
    plain, free = (Checkpoint(f / "5" / "sft" / "step-00004").digest() for f in (tmp_path, root / "none"))
    assert plain == free


def test_curves_begin_at_the_base_and_end_at_the_last_step(made):
    _, tables = made
    assert {arm: sorted(t.step) for arm, t in tables["curves"].groupby("arm")} == dict.fromkeys(
        ("none", "embeddings", "sigma"), [0, 2, 4]
    )
    first = tables["curves"].query("step == 0")
    assert first.ID.nunique() == first.OOD.nunique() == 1  # the base is one
    asked = tables["evaluations"].query("arm == 'sigma' and checkpoint == '4' and rule == 'OOD'").solved_first
    assert tables["curves"].query("arm == 'sigma' and step == 4").OOD.item() == asked.mean()
    assert tables["beside"][["arm", "beside"]].values.tolist() == [["sigma", "embeddings"]]


def test_equal_success_by_hand():
    "Where a straight line crosses the level, and nowhere where it does not."
    points = dict(
        all=[(0, 0.2, 0.5), (4, 0.4, 0.3), (8, 0.6, 0.0)],
        other=[(0, 0.2, 0.5), (8, 0.5, 0.2)],
        none=[(0, 0.2, 0.5), (8, 0.3, 0.0)],
    )
    rows = [dict(arm=a, seed=1, base=0, step=s, ID=i, OOD=o, read=o) for a, p in points.items() for s, i, o in p]
    equal = at_equal(pd.DataFrame(rows), "all", 0.75).set_index("arm")
    assert equal.level.tolist() == pytest.approx([0.5] * 3) and equal.most["none"] == 0.3
    assert equal.loc["all", ["OOD", "step", "lost"]].tolist() == pytest.approx([0.15, 6, 0.35])
    assert equal.loc["other", ["OOD", "step"]].tolist() == pytest.approx([0.2, 8])
    assert equal.loc["none", ["OOD", "read", "step", "lost"]].isna().all()


def test_the_page_needs_no_network(made):
    root, _ = made
    page = (root / "report.html").read_text()
    assert "Which SFT keeps more?" in page and "<script src" not in page and "sigma" in page
    command = page.partition("<code>")[2].partition("</code>")[0]
    assert "--seeds 1 --first 5 --vary" in command and "--beside sigma embeddings --set cards=3" in command
    assert "50% of what the first way gains" in page


def test_the_same_command_has_nothing_left_to_do(made):
    root, _ = made
    before = {f: f.stat().st_mtime_ns for f in root.rglob("record.json")}
    tradeoff("tiny", ARMS, (), 1, 5, root.parent, LITTLE, progress=False, workers=1)
    assert {f: f.stat().st_mtime_ns for f in root.rglob("record.json")} == before


def test_a_killed_training_goes_on_under_its_constraint(tmp_path, monkeypatch):
    task = load_preset("tiny", LITTLE).tasks()["ID"]
    said = dict(steps=6, at=(3,), points=1, examples=64, n_eval=4, lr=1e-2, progress=False)
    kept = Constraint.on_step_end
    train_sft("tiny", tmp_path / "whole", task, callbacks=(Constraint("sigma", "tiny"),), **said)

    def dies(self, args, state, control, **kwargs):
        kept(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Constraint, "on_step_end", dies)
    with pytest.raises(KeyboardInterrupt):
        train_sft("tiny", tmp_path / "killed", task, callbacks=(Constraint("sigma", "tiny"),), **said)
    monkeypatch.setattr(Constraint, "on_step_end", kept)
    with pytest.raises(ValueError, match="callbacks"):  # without its constraint it is another training
        train_sft("tiny", tmp_path / "killed", task, **said)
    train_sft("tiny", tmp_path / "killed", task, callbacks=(Constraint("sigma", "tiny"),), **said)
    whole, killed = (Checkpoint(tmp_path / name / "step-00006").digest() for name in ("whole", "killed"))
    assert whole == killed


def test_sft_that_goes_on_beside_rl_is_held_as_sft_is(tmp_path):
    little = LITTLE | dict(sft_constraint="embeddings", ppo_iterations="1", ppo_samples="12", ppo_minibatch="12")
    study = Study(load_preset("tiny", little), tmp_path, [5])
    study.sft(5)
    twin = trained_in(study.twin(5, "worked"))
    changes = compare_all(["tiny", twin], cache=False, progress=False).parts.set_index("part").change_norm
    assert changes["embeddings"] > 0 == changes["matrices"] == changes["norms"]


def test_a_matrix_that_cannot_be_decomposed_is_named():
    model = load_model("tiny", device="cpu")[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight.*NaN"):
        Constraint("head").on_train_begin(None, None, None, model=model)


def test_what_cannot_be_constrained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sft_constraint = 'sigma': expected none beside lora"):
        load_preset("tiny", dict(lora="4", sft_constraint="sigma"))
    with pytest.raises(ValueError, match="sft_constraint = 'turns': expected one of"):
        load_preset("tiny", dict(sft_constraint="turns"))
    with pytest.raises(ValueError, match="no arm 'sigma' to compare"):
        tradeoff("tiny", ("sft_lr=1,2",), (("sigma", "1"),), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_no_matrix_of_the_model():
    from peft import get_peft_model

    from gp_spectral.models import lora_config

    model = get_peft_model(load_model("tiny", device="cpu")[0], lora_config(2))
    with pytest.raises(ValueError, match="adapter"):
        Constraint("sigma").on_train_begin(None, None, None, model=model)


@pytest.mark.parametrize("what", [k for k in CONSTRAINTS if k not in ("none", "rpsft", "l2")])
def test_gradients_lie_along_what_is_free(what):
    "Rotations are a curved set: there a step of this length leaves it by a twentieth of itself at most."
    model, rule = load_model("tiny", device="cpu")[0], Constraint(what, seed=3)
    rule.on_train_begin(None, None, None, model=model)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    rule.on_pre_optimizer_step(None, None, None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.grad, alpha=1e-3)
    there = [p.detach().clone() for p in model.parameters()]
    rule.on_step_end(None, None, None)
    assert any(p.grad.any() for p in model.parameters())
    assert not all(torch.equal(p.grad, g) for p, (_, g) in zip(model.parameters(), before))
    for p, at, (start, _) in zip(model.parameters(), there, before):  # a step along the set stays in it
        off, step = (p - at).norm().item(), (at - start).norm().item()
        assert off <= (0.05 if what == "rotations" else 1e-3) * step, (off, step)
