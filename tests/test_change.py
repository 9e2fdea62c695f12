"Methods that keep a part of the change: on whole checkpoints, as adapters, on the command line, and where refused."

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import made
from made import changed, gaussian, trained, weights, write

from gp_spectral import change, cli, recovery
from gp_spectral.angles import count_intruders, intruders
from gp_spectral.checkpoint import Checkpoint, CheckpointError
from gp_spectral.recovery import METHODS, edit_matrix, load_methods, method, method_options, recover, recovery_record
from gp_spectral.sweep import search, sweep, sweep_matrix

torch.set_num_threads(1)
checkpoints = made.checkpoints  # the fixture
OURS = ("dghard", "delta_top", "lines", "ties", "dare", "scale_intruders")
WHOLE = [  # options that keep all of the change
    ("dghard", dict(noise=0)),
    ("delta_top", dict(share=1)),
    ("lines", dict(first=1, last=1)),
    ("ties", dict(density=1)),
    ("dare", dict(drop=0)),
    ("scale_intruders", dict(factor=1)),
]
NOTHING = [
    ("dghard", dict(noise=1e6)),
    ("delta_top", dict(share=0)),
    ("lines", dict(first=0, last=0)),
    ("ties", dict(density=0)),
    ("ties", dict(density=1, scale=0)),
]


def pair(m=40, n=24, dtype=torch.float64):
    W = trained(m, n)
    return (W + 0.05 * W.std() * gaussian(m, n, seed=9)).to(dtype), W.to(dtype)


def test_nobody_has_to_import_them():
    "In a fresh process; and asking for help loads nothing."
    code = (
        "from gp_spectral.recovery import METHODS, edit_matrix, load_methods\n"
        "import sys, torch\n"
        "assert 'gp_spectral.change' not in sys.modules\n"
        f"assert METHODS['dare'].label and set({OURS!r}) <= set(METHODS) == set(load_methods())\n"
        "try: METHODS['dares']\n"
        "except KeyError: print('missing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "missing\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", WHOLE, ids=lambda x: x if isinstance(x, str) else "")
def test_all_of_the_change_is_the_target(name, options, dtype):
    target, donor = pair(dtype=dtype)
    assert torch.equal(edit_matrix(name, target, donor, depth=0.3, options=options), target)
    assert torch.equal(edit_matrix(name, target, target, depth=0.3), target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", NOTHING, ids=lambda x: x if isinstance(x, str) else "")
def test_nothing_of_the_change_is_the_donor(name, options, dtype):
    target, donor = pair(dtype=dtype)
    after = edit_matrix(name, target, donor, depth=0.3, options=options)
    torch.testing.assert_close(after, donor, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("shape", [(200, 200), (100, 400), (300, 60)])
def test_the_threshold_is_where_noise_ends(shape):
    "All singular values of noise lie below it, near it; the estimate of the noise is right, whichever side is long."
    m, n = shape
    donor, noise = trained(m, n), 0.02 * gaussian(m, n, seed=3)
    s = torch.linalg.svdvals(noise)
    known = change.noise_threshold(shape, 0.02)
    assert s[0] < known < 1.35 * s[0]
    assert change.noise_threshold(shape) * s.median() == pytest.approx(known, rel=0.03)
    assert change.noise_threshold(shape) == change.noise_threshold(shape[::-1])
    strong = 3 * known * torch.outer(gaussian(m, seed=4), gaussian(n, seed=5))
    strong = strong / torch.linalg.matrix_norm(strong, 2) * 3 * known
    for options in ({}, dict(noise=0.02)):
        after = edit_matrix("dghard", donor + noise, donor, options=options)
        torch.testing.assert_close(after, donor, rtol=0, atol=1e-12)
        kept = edit_matrix("dghard", donor + strong + noise, donor, options=options) - donor
        assert torch.linalg.matrix_rank(kept, rtol=1e-9) == 1


def test_the_median_of_noise_against_the_law_integrated_otherwise():
    from scipy.integrate import quad

    for beta in (0.05, 0.5, 1.0):
        a, b, median = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2, change.noise_median(beta)
        density = lambda x: math.sqrt(max(0, (b - x) * (x - a))) / (2 * math.pi * beta * x)
        assert quad(density, a, median, limit=200)[0] == pytest.approx(0.5, abs=1e-4)


def test_the_top_of_a_change_is_its_best_approximation():
    target, donor = pair()
    U, s, Vh = torch.linalg.svd(target - donor, full_matrices=False)
    after = edit_matrix("delta_top", target, donor, options=dict(share=0.25))
    torch.testing.assert_close(after, donor + U[:, :6] * s[:6] @ Vh[:6], rtol=0, atol=1e-12)


def test_as_many_entries_as_were_asked_for_also_of_equal_ones():
    donor = torch.zeros(10, 10, dtype=torch.float64)
    kept = edit_matrix("ties", donor + 1, donor, options=dict(density=0.37, scale=2))
    assert (kept == 2).sum() == 37 and (kept == 0).sum() == 63


def test_the_mask_of_intruders_is_the_one_that_is_counted():
    cosines = torch.tensor([[0.9, 0.1, -0.6], [0.2, 0.4, 0.1]])
    assert intruders(cosines).tolist() == [False, True, False] and count_intruders(cosines) == 1
    assert intruders(cosines, 0.7).tolist() == [False, True, True]


def test_only_intruders_shrink():
    "Two planted, of which one is not among the leading ones; on the side that a matrix writes to."
    n = 30
    donor, spread = torch.diag(torch.linspace(3, 1, n).double()), torch.linalg.qr(gaussian(n, n))[0]
    for side in (lambda X: X, lambda X: X.T):
        target = side((spread * torch.linspace(3.05, 0.95, n).double()) @ torch.eye(n).double())
        after = edit_matrix("scale_intruders", target, donor, options=dict(factor=0.1, among=5))
        if side(spread) is not spread:
            assert torch.equal(after, target)  # the left directions are the donor's
            continue
        found = torch.linalg.svdvals(after)
        expected = torch.cat([target.norm(dim=0)[5:], 0.1 * target.norm(dim=0)[:5]]).sort(descending=True)[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OURS)
def test_a_record_says_how_an_edit_is_made_again(checkpoints, tmp_path, name):
    target, donor = checkpoints
    own = dict(below=1.0) if name == "scale_intruders" else {}  # where nothing is new: all count as new
    out = recover(target, donor, tmp_path / "a", name, include="embeddings", options=own, progress=False)
    record = recovery_record(out)[0]
    assert record["method"] == name and record["restored"] == 0 and record["edit_norm"] > 0
    told = dict(options=record["options"], include=record["include"], progress=False)
    again = recover(target, donor, tmp_path / "b", name, **told)
    assert Checkpoint(again).digest() == Checkpoint(out).digest()


def test_lines_knows_where_a_matrix_lies(checkpoints, tmp_path):
    target, donor = checkpoints
    told = dict(options=dict(first=0.2, last=1.0), include="embeddings", layers=[0, 1], progress=False)
    after = Checkpoint(recover(target, donor, tmp_path / "out", "lines", **told))
    rows = recovery_record(after.path)[1].set_index("matrix")
    assert {rows.edit_norm[m.name].round(2) for m in after.matrices(layers=[0])} == {0.8}
    assert {rows.edit_norm[m.name].round(2) for m in after.matrices(layers=[1])} == {0.4}  # of layers 0 to 2
    assert rows.edit_norm["model.embed_tokens.weight"].round(2) == 0.8
    with pytest.raises(ValueError, match="'lines' needs depth, which a matrix by itself does not show: 0 in the first"):
        METHODS["lines"](*pair())


def test_depth_in_two_stacks_in_one_layer_and_outside(tmp_path):
    name = "{}.block.{}.layer.0.SelfAttention.q.weight".format
    stacks = {name("encoder", i): gaussian(4, 4) for i in range(3)} | {
        name("decoder", i): gaussian(4, 4) for i in (0, 1)
    }
    tables = {"shared.weight": gaussian(9, 4), "lm_head.weight": gaussian(9, 4, seed=1)}
    c = Checkpoint(write(tmp_path / "t5", stacks | tables, model_type="t5"))
    found = {(m.stack, m.layer): c.depth(m) for m in c.matrices()}
    assert found == {("encoder", i): i / 2 for i in range(3)} | {("decoder", i): float(i) for i in range(2)}
    assert {m.kind: c.depth(m) for m in c.matrices(["shared", "lm_head"])} == dict(shared=0.0, lm_head=1.0)
    one = Checkpoint(write(tmp_path / "one", weights(layers=1)))
    assert {one.depth(m) for m in one.matrices()} == {1.0}


def test_a_method_of_ones_own_may_ask_for_depth_and_factors(checkpoints, tmp_path):
    target, donor = checkpoints

    @recovery.method("deep")
    def _deep(W, t, d, taken, *, depth, factors):
        assert (factors[1].s == d.s).all()
        return W + depth * (d.U[:, taken] * t.s[taken]) @ d.Vh[taken]

    try:
        deep = dict(method="deep", progress=False)
        table, rows = sweep(target, donor, (0.5,), matrices=True, **deep)
        assert (rows.groupby("layer").edit.sum() > 0).tolist() == [False, True, True]
        one = recovery_record(recover(target, donor, tmp_path / "one", top=0.5, **deep))[0]
        assert one["edit_norm"] == pytest.approx(table.edit_norm[0], rel=1e-3)
        sized = recovery_record(recover(target, donor, tmp_path / "n", "random", like="deep", top=0.5, progress=False))
        assert sized[0]["edit_norm"] == pytest.approx(one["edit_norm"], rel=1e-2)
        [(_, swept)] = sweep_matrix(*pair(), [0.5], "deep", depth=0.5)
        assert torch.equal(swept, edit_matrix("deep", *pair(), 0.5, depth=0.5))
    finally:
        del METHODS["deep"]


def test_dare_draws_anew_for_each_matrix(tmp_path):
    donor = weights()
    target = {k: v + 0.1 for k, v in donor.items()}
    a, b = write(tmp_path / "target", target), write(tmp_path / "donor", donor)
    masks = {}
    for seed in (0, 0, 1):
        out = Checkpoint(recover(a, b, tmp_path / f"{len(masks)}", "dare", seed=seed, progress=False))
        kept = {m.name: out.matrix(m) != Checkpoint(b).matrix(m) for m in out.matrices("q_proj")}
        masks[len(masks)] = torch.stack(list(kept.values()))
        assert 0.05 < masks[len(masks) - 1].float().mean() < 0.15
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_what_is_dropped_makes_a_small_adapter(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2))
    model.save_pretrained(tmp_path / "donor")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape))
    model.save_pretrained(tmp_path / "target")
    told = dict(method="delta_top", options=dict(share=0.75), progress=False)
    adapter = recover(tmp_path / "target", tmp_path / "donor", tmp_path / "adapter", as_lora=True, **told)
    whole = Checkpoint(recover(tmp_path / "target", tmp_path / "donor", tmp_path / "whole", **told))
    assert recovery_record(adapter)[1].lora_rank.max() == 6
    for m in whole.matrices():
        torch.testing.assert_close(Checkpoint(adapter).matrix(m), whole.matrix(m), rtol=0, atol=2e-6)


def test_on_the_command_line(tmp_path, capsys):
    donor = weights()
    target, donor = map(str, (write(tmp_path / "target", changed(donor)), write(tmp_path / "donor", donor)))
    run = lambda command, *a: cli.main([command, target, "--donor", donor, "--cache", "none", *a])
    out = str(tmp_path / "out")
    assert run("recover", "--out", out, "--method", "delta_top", "--option", "share=25%") == 0
    assert recovery_record(out)[0]["options"] == dict(share=0.25)
    for name, option, said in (
        ("delta_top", "share=2", "share = 2.0: expected a share, from 0 to 1"),
        ("ties", "density=-1", "density = -1.0: expected a share"),
        ("dare", "drop=1", "drop = 1 leaves nothing to rescale"),
        ("dghard", "noise=-1", "noise = -1.0: a standard deviation is not negative"),
        ("delta_top", "shares=1", "did you mean share?"),
    ):
        assert run("recover", "--out", str(tmp_path / "x"), "--method", name, "--option", option) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert run("recover", "--out", str(tmp_path / "x"), "--method", "ties", "--top", "0.5") == 2
    assert "--top does nothing with --method ties" in capsys.readouterr().err
    assert run("sweep", "--method", "lines") == 2
    assert "'lines' cannot be swept, as it restores no ranks" in capsys.readouterr().err


def test_the_help_tells_their_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["recover", "--help"])
    text = capsys.readouterr().out
    for line in (
        "delta_top (no ranks)  Keeps the leading singular directions of target − donor.",
        "drop=0.9  probability that an entry of the change is dropped; the others grow by 1 / (1 - drop)",
        "noise=None  standard deviation of the noise in an entry of the change; none: by the median σ",
        "among=10  so many leading directions of the target are looked at",
    ):
        assert line in text


def test_a_search_refuses_them_and_a_study_keeps_its_plan(tmp_path):
    from gp_spectral.stages import recovery_plan

    with pytest.raises(ValueError, match="'ties' cannot be searched"):
        search("a", "b", len, 0.5, tmp_path / "s", method="ties")
    assert not {e["method"] for e in recovery_plan((0.2,), 0.2)} & {*OURS}


def test_they_are_told_apart_in_a_picture():
    drawn = [(m.color, m.marker) for m in load_methods().values() if m.function.__module__.startswith("gp_spectral.")]
    known = [x for x in drawn if x != ("#000000", "x")]  # the two interpolations share theirs
    assert len(set(known)) == len(known)
    assert all(METHODS[name].doc and all(o.help for o in METHODS[name].options.values()) for name in OURS)
    assert method_options("dghard") == dict(noise=None)


def test_an_edit_of_nan_is_refused(tmp_path):
    donor = weights()
    target = changed(donor)
    target["model.layers.0.self_attn.q_proj.weight"][0, 0] = np.nan
    for name in OURS:
        with pytest.raises(CheckpointError, match="NaN"):
            recover(write(tmp_path / name, target), write(tmp_path / f"{name}-d", donor), tmp_path / "o", name)


def test_a_notebook_may_register_what_it_exports(monkeypatch):
    "The docs run notebooks in a process that has the package: the same function comes twice, from __main__."
    known = load_methods()["ties"]

    def again(name):
        function = lambda W, t, d, taken: W
        function.__module__, function.__qualname__ = "__main__", name
        return function

    monkeypatch.setitem(METHODS, "ties", known)
    with pytest.raises(ValueError, match="there is a method 'ties' already"):
        method("ties", ranks=False)(again("mine"))
    assert method("ties", ranks=False)(again("_ties")) is METHODS["ties"].function
