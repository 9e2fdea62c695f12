"Comparing whole checkpoints: accuracy from end to end, floors and verdicts, killed and resumed, shared."

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from made import changed, gaussian, orthonormal, trained, weights, write

from safetensors.torch import load_file, save_file
from scipy.linalg import subspace_angles

from gp_spectral import angles as module, checkpoint, cli, jobs, svd
from gp_spectral.angles import (
    band_slices,
    compare,
    compare_all,
    floor_angles,
    principal_angles,
    read_comparison,
    rounding_std,
)
from gp_spectral.checkpoint import Checkpoint
from gp_spectral.folders import CheckpointError
from gp_spectral.jobs import share_out
from gp_spectral.recovery import recover
from gp_spectral.svd import DRIVERS, FactorCache, factorize, factors, singular_values, spectrum, time_drivers

NAME = "model.layers.0.mlp.up_proj.weight"


# --- decompositions


@pytest.mark.parametrize("m, n", [(80, 80), (200, 60), (60, 200)])
@pytest.mark.parametrize("orders", [1, 3, 5, 8])
def test_singular_values_equal_lapacks(m, n, orders):
    r = min(m, n)
    true = torch.logspace(0, -orders, r).double()
    W = 1e-3 * (orthonormal(m, r) * true) @ orthonormal(n, r, 1).T
    f = factorize(W)
    lapack = torch.linalg.svdvals(W)
    assert (f.s / lapack - 1).abs().max() < 1e-7
    assert (f.s / (1e-3 * true) - 1).abs().max() < max(1e-9, 5 * (lapack / (1e-3 * true) - 1).abs().max())
    for X in (f.U, f.Vh.T):
        assert (X.T @ X - torch.eye(r)).abs().max() < 1e-9
    assert ((f.U * f.s) @ f.Vh - W).abs().max() < 1e-12 and (singular_values(W) == f.s).all()
    exact = torch.linalg.svd(W, full_matrices=False)  # subspaces too, tail included
    assert principal_angles(f.U[:, -r // 5 :], exact.U[:, -r // 5 :]).max() < 1e-15 * 10**orders + 1e-8


def test_a_matrix_that_lost_ranks():
    W = gaussian(50, 20) @ gaussian(20, 40, seed=1)
    for X in (W, W.T, torch.zeros(6, 4).double(), 1e-300 * W, 1e300 * W):
        f = factorize(X)
        assert (f.U.T @ f.U - torch.eye(len(f.s))).abs().max() < 1e-9 and (
            f.Vh @ f.Vh.T - torch.eye(len(f.s))
        ).abs().max() < 1e-9
        assert ((f.U * f.s) @ f.Vh - X).abs().max() <= 1e-11 * X.abs().max()


def test_every_driver_of_this_machine():
    assert set(time_drivers((60, 30), "cpu", 1)) <= set(DRIVERS)
    for driver in ("gram", "gesdd"):
        assert (factorize(trained(60, 30), driver).s - factorize(trained(60, 30)).s).abs().max() < 1e-10


def test_cache(tmp_path, monkeypatch):
    c, cache = Checkpoint(write(tmp_path / "a", weights(dtype=torch.bfloat16))), FactorCache(tmp_path / "cache")
    first = factors(c, NAME, cache)
    assert len(cache.files()) == 1
    monkeypatch.setattr(svd, "_short_side", lambda *a: pytest.fail("decomposed twice"))
    again = factors(c, NAME, FactorCache(tmp_path / "cache"))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(first, factors(c, NAME, None)))  # kept or not, the same bits
    other = Checkpoint(write(tmp_path / "b", changed(weights(dtype=torch.bfloat16))))
    assert not torch.equal(factors(other, NAME, cache).s, first.s) and len(cache.files()) == 2
    for f in cache.files():
        f.write_bytes(f.read_bytes()[:100])
    assert torch.equal(factors(c, NAME, cache).U, first.U)  # damaged files are made again
    kept = cache.path(c.digest(NAME))
    whole = kept.read_bytes()
    for at in (len(whole) - 3, len(whole) // 2, whole.index(b"sha256") + 12):  # one bit of the factors, or of their sum
        kept.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.warns(UserWarning, match="is not what was written there"):
            again = factors(c, NAME, cache)
        assert all(torch.equal(a, b) for a, b in zip(first, again)) and kept.read_bytes() == whole
    save_file(load_file(kept), kept)  # as an earlier version wrote it, without a sum
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(a, b) for a, b in zip(first, factors(c, NAME, cache))) and kept.read_bytes() == whole
    folder = tmp_path / "file"
    folder.write_text("no folder")
    with pytest.warns(UserWarning, match="not kept"):
        factors(c, NAME, FactorCache(folder))
    assert len(spectrum(c, progress=False, cache=cache)) and len(cache.files()) == 13


# --- angles from end to end


def rotated(W, band, angle, side="U"):
    "W with a band's vectors of one side turned by one angle into directions that W does not use."
    U, s, Vh = factorize(W if side == "U" else W.T)
    ranks = band_slices(len(s))[band]
    k = ranks.stop - ranks.start
    free = torch.linalg.qr(torch.cat([U, gaussian(len(U), k)], 1))[0][:, len(s) : len(s) + k]
    turned = U.clone()
    turned[:, ranks] = U[:, ranks] * np.cos(angle) + free * np.sin(angle)
    W = (turned * s) @ Vh
    return W if side == "U" else W.T


@pytest.mark.parametrize("angle", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.785, 1.0, 1.5])
@pytest.mark.parametrize("band", ["head", "bulk", "tail"])
@pytest.mark.parametrize("side", ["U", "V"])
def test_planted_rotations(tmp_path, angle, band, side):
    W = trained(*(60, 30) if side == "U" else (30, 60))
    a, b = (
        write(tmp_path / "a", {NAME: W.contiguous()}),
        write(tmp_path / "b", {NAME: rotated(W, band, angle, side).contiguous()}),
    )
    t = compare(a, b, progress=False, cache=False).set_index(["side", "band"])
    found = t.loc[(side, band), ["mean", "median", "max"]].astype(float)
    np.testing.assert_allclose(found, angle, rtol=1e-6 if angle >= 1e-2 else 1e-3)
    others = t.drop((side, band))
    assert (others["max"] < 1e-7).all(), others


def test_signs_order_and_ties_do_not_matter(tmp_path):
    "Equal singular values inside a band leave its vectors undetermined, and its subspace not."
    s = torch.linspace(3, 1, 30).double()
    s[0:6] = 3.0
    s[24:] = 1.0
    U, V = orthonormal(60, 30), orthonormal(30, 30, 1)
    mixed = U.clone(), V.clone()
    for ranks in (slice(0, 6), slice(24, 30)):
        Q = orthonormal(6, 6, 2)
        for X, Y in zip(mixed, (U, V)):
            X[:, ranks] = Y[:, ranks] @ Q
    flips = torch.where(gaussian(30, seed=3) > 0, 1.0, -1.0)
    a, b = (
        write(tmp_path / "a", {NAME: (U * s) @ V.T}),
        write(tmp_path / "b", {NAME: (mixed[0] * flips * s) @ (mixed[1] * flips).T}),
    )
    t = compare(a, b, progress=False)
    assert t[t.band != "bulk"]["max"].max() < 1e-7 and not t[t.band != "bulk"].degenerate.any()
    s[5:8] = 2.9  # a tie across the head's edge
    c = write(tmp_path / "c", {NAME: (U * s) @ V.T})
    t = compare(c, c, progress=False).set_index(["side", "band"])
    assert t.degenerate[("U", "head")] and not t.degenerate[("U", "tail")]


def test_an_unchanged_matrix_is_exactly_unchanged(tmp_path):
    w = weights(dtype=torch.bfloat16)
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", w | {NAME: changed(w)[NAME]}, shards=2)
    found = compare_all([a, b], progress=False)
    same = found.angles[found.angles.matrix != NAME]
    assert (
        same["max"].eq(0).all()
        and same.verdict.eq("unchanged").all()
        and found.changes[found.changes.matrix != NAME].weight_change.eq(0).all()
    )
    assert (found.angles[found.angles.matrix == NAME]["max"] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floor_predicts_rounding(tmp_path, dtype):
    "Over many bands the predicted angle of storage is that of measured rounding, and rounding alone is called noise."
    W = {f"model.layers.{i}.mlp.up_proj.weight": trained(120 + 40 * i, 100, seed=i).float() for i in range(6)}
    ratios = []
    for w in W.values():
        f, g = factorize(w), factorize(w.to(dtype))
        std = rounding_std(f.s, w.shape, dtype)
        error = (w - w.to(dtype).float()).double().square().mean().sqrt()
        assert 0.9 < std / error < 1.1
        for ranks in band_slices(len(f.s)).values():
            for X, Y, outside in ((f.U, g.U, len(f.U) - len(f.s)), (f.Vh.T, g.Vh.T, 0)):
                ratios.append(
                    floor_angles(f.s, ranks, std, outside).mean() / principal_angles(X[:, ranks], Y[:, ranks]).mean()
                )
    assert 0.85 < np.mean(ratios) < 1.15 and 0.5 < min(ratios) and max(ratios) < 2
    a, b = write(tmp_path / "a", W), write(tmp_path / "b", {k: v.to(dtype) for k, v in W.items()})
    t = compare(a, b, progress=False)
    assert (t.verdict == "noise").mean() > 0.95
    moved = write(tmp_path / "c", {k: v.to(dtype) for k, v in changed(W).items()})
    assert (compare(a, moved, progress=False).verdict == "rotated").mean() > 0.95


def test_unrelated_pair_warns(tmp_path):
    a, b = ({NAME: trained(120, 80, seed=seed)} for seed in (0, 20))
    a, b = write(tmp_path / "a", a), write(tmp_path / "b", b)
    with pytest.warns(UserWarning, match="unrelated"):
        t = compare(a, b, progress=False)
    assert (t.verdict == "chance").all()


def test_energy_and_intruders(tmp_path):
    W = trained(60, 40)
    U, s, Vh = factorize(W)
    new = W + 2 * s[0] * torch.outer(
        orthonormal(60, 1, 9)[:, 0], orthonormal(40, 1, 8)[:, 0]
    )  # a strong direction of its own
    for x, flip in ((W, False), (W.T, True)):
        y = new.T if flip else new
        a, b = (
            write(tmp_path / f"a{flip}", {NAME: x.contiguous()}),
            write(tmp_path / f"b{flip}", {NAME: y.contiguous()}),
        )
        row = compare_all([a, b], progress=False).changes.iloc[0]
        core = torch.linalg.svd(x).U[:, :40] if not flip else torch.linalg.svd(x, full_matrices=False).U
        V = torch.linalg.svd(x, full_matrices=False).Vh
        energy = (core.T @ (y - x) @ V.T).square() / (y - x).square().sum()
        np.testing.assert_allclose(row.dw_head_tail, energy[:8, 32:].sum(), rtol=1e-6)
        np.testing.assert_allclose(row.dw_tail_bulk, energy[32:, 8:32].sum(), rtol=1e-6)
        shares = row[[c for c in row.index if c.startswith("dw_") and c != "dw_diagonal"]].astype(float)
        np.testing.assert_allclose(shares.sum(), 1, rtol=1e-9)
        assert (row.intruders_U, row.intruders_V) == (1, 1)


def bases(n, angles, seed=0):
    "Two (n, k) orthonormal bases with known principal angles between them, mixed inside."
    k, theta = len(angles), torch.as_tensor(angles, dtype=torch.float64)
    Q = orthonormal(n, 2 * k, seed)
    return Q[:, :k] @ orthonormal(k, k, seed + 1), (Q[:, :k] * theta.cos() + Q[:, k:] * theta.sin()) @ orthonormal(
        k, k, seed + 2
    )


@pytest.mark.parametrize("n, k", [(200, 20), (300, 120), (1536, 115)])
@pytest.mark.parametrize("angle", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.75])
def test_angles_of_float32_factors(n, k, angle):
    "The columns of 16-bit weights are kept in float32; every angle between them is SciPy's in float64."
    A, B = (X.float() for X in bases(n, angle * np.linspace(1, 1.04, k)))
    true = np.sort(subspace_angles(A.double().numpy(), B.double().numpy()))
    if angle >= 1e-5:
        np.testing.assert_allclose(module._turn(A, B), true, rtol=1e-6 if angle >= 1e-2 else 1e-3)
    else:
        np.testing.assert_allclose(module._turn(A, B), true, atol=1e-8)
    np.testing.assert_allclose(module._turn(A, B).mean(), true.mean(), rtol=1e-6 if angle >= 1e-2 else 1e-3)


def test_small_and_large_angles_in_one_band():
    truth = np.concatenate([np.logspace(-5, -0.2, 20), [1.0, 1.3, 1.5]])
    A, B = (X.float() for X in bases(200, truth))
    found = module._turn(A, B).numpy()
    np.testing.assert_allclose(found[truth >= 1e-2], truth[truth >= 1e-2], rtol=2e-5)
    np.testing.assert_allclose(found, truth, atol=1e-7)
    assert (module._turn(A, A.clone()) == 0).all()


@pytest.mark.parametrize("m, n", [(300, 120), (120, 300), (100, 100)])
@pytest.mark.parametrize("last, direct", [(0.1, True), (1e-4, False)])
@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 2e-4), (torch.float64, 1e-9)])
def test_energy_equals_the_direct_formula(tmp_path, m, n, last, direct, dtype, tol):
    "Both ways to the change in the base's singular vectors, for well and for ill conditioned matrices."
    r = min(m, n)
    W = (
        ((orthonormal(m, r) * torch.logspace(0, np.log10(last), r).double()) @ orthonormal(n, r, 1).T)
        .to(dtype)
        .contiguous()
    )
    X = (W.double() + 0.01 * W.double().std() * gaussian(m, n, seed=5)).to(dtype)
    a, b = write(tmp_path / "a", {NAME: W}), write(tmp_path / "b", {NAME: X})
    row = compare_all([a, b], progress=False, cache=False).changes.iloc[0]
    true = module.delta_energy(X.double() - W.double(), factorize(W))
    for name, share in true.items():
        if name == "dw_outside" and m == n:
            assert abs(row[name]) < 1e-4
        else:
            np.testing.assert_allclose(row[name], share, rtol=tol, atol=1e-12, err_msg=name)
    f, g = factorize(W), factorize(X)
    assert row.intruders_U == module.intruder_dimensions(
        f.U, g.U[:, :10]
    ) and row.intruders_V == module.intruder_dimensions(f.Vh.T, g.Vh.T[:, :10])
    assert row.unchanged == pytest.approx(float((W == X).double().mean()), abs=1e-12)


def test_the_floor_comes_before_chance(tmp_path):
    "Rounding turns the empty directions of a matrix that lacks ranks at random, and no verdict calls that movement."
    for seed in range(3):
        W = (gaussian(400, 30, seed=seed) @ gaussian(30, 100, seed=seed + 9)).float()
        a, b = write(tmp_path / f"a{seed}", {NAME: W}), write(tmp_path / f"b{seed}", {NAME: W.bfloat16()})
        t = compare(a, b, progress=False, cache=False)
        verdicts = t.groupby("band").verdict.agg(set)
        assert verdicts["head"] == {"noise"} and verdicts["bulk"] | verdicts["tail"] == {"undefined"}, t[
            ["side", "band", "mean", "floor", "random_mean", "verdict"]
        ]
        assert (t[t.band == "tail"]["mean"] > 0.9 * t[t.band == "tail"].random_mean).any()  # chance would have had it


def test_directions_that_one_of_the_two_lacks(tmp_path):
    "Whichever is the base: a band that one has only as rounding has not turned, and its σ have no relative change."
    W = gaussian(96, 64).float()
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    low = (U[:, :40] * s[:40] @ Vh[:40]).float()
    whole, lacking, zero = (
        write(tmp_path / n, {NAME: X}) for n, X in (("whole", W), ("lacking", low), ("zero", torch.zeros_like(W)))
    )
    for pair in ((whole, lacking), (lacking, whole)):
        found = compare_all(pair, progress=False, cache=False, details=False)
        verdicts = found.angles.groupby("band").verdict.agg(set)
        assert (
            not verdicts["head"] & {"rotated", "chance"}
            and verdicts["tail"] == {"undefined"}
            and found.changes.mean_abs_change.item() <= 1
        )
    for pair in ((whole, zero), (zero, whole)):
        assert set(compare(*pair, progress=False, cache=False).verdict) == {"undefined"}


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
def test_the_floor_knows_weights_that_are_stored_wider_than_they_were_kept(tmp_path, kept):
    W = gaussian(96, 64).float()
    plain, rounded, narrow = (
        write(tmp_path / n, {NAME: X})
        for n, X in (("plain", W), ("rounded", W.to(kept).float()), ("narrow", W.to(kept)))
    )
    wide, short = (compare(plain, x, progress=False, cache=False) for x in (rounded, narrow))
    assert (
        set(wide.verdict) == {"noise"}
        and (wide.floor == short.floor).all()
        and module.effective_dtype(W) == torch.float32
    )


def test_unchanged_elements_are_counted_and_told(tmp_path, capsys):
    w = weights(dtype=torch.bfloat16)
    new = w | {NAME: (w[NAME].double() * (1 + 1e-3 * gaussian(40, 24))).bfloat16()}
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", new)
    found = compare_all([a, b], progress=False, cache=False)
    row = found.changes.set_index("matrix").unchanged
    assert (
        row[NAME] == float((w[NAME] == new[NAME]).double().mean())
        and 0.4 < row[NAME] < 1
        and (row.drop(NAME) == 1).all()
    )
    module.print_comparison(found)
    text = capsys.readouterr().out
    assert f"{row[NAME]:.1%} of the numbers are equal (medians over the 1 that changed" in text
    assert ("swallowed" in text) == (row[NAME] > 0.5)


# --- what lies outside the matrices

WORDS = "model.embed_tokens.weight"


def three_rows(w, rows=(3, 7, 11)):
    "Weights in which only some rows of the embeddings have moved, the first the furthest."
    new = w[WORDS].clone()
    for i, row in enumerate(rows):
        new[row] += 3 - i
    return w | {WORDS: new}


def test_a_change_of_three_rows_lies_outside(tmp_path, capsys):
    w = weights()
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", three_rows(w))
    words = [f"w{i}" for i in range(30)]
    vocabulary = dict(type="WordLevel", vocab={x: i for i, x in enumerate(words)}, unk_token="w0")
    (b / "tokenizer.json").write_text(json.dumps(dict(version="1.0", added_tokens=[], model=vocabulary)))
    found = compare_all([a, b], progress=False, cache=False)
    parts = found.parts.set_index("part")
    assert parts.share.to_dict() == parts.outside.to_dict() == dict(matrices=0.0, embeddings=1.0, norms=0.0)
    size = (24 * (9 + 4 + 1)) ** 0.5
    assert parts.change_norm["embeddings"] == pytest.approx(size, rel=1e-6)
    assert parts.weight_change["embeddings"] == pytest.approx(size / float(w[WORDS].double().norm()), rel=1e-6)
    assert found.rows.row.tolist() == [3, 7, 11] and found.rows.token.tolist() == ["w3", "w7", "w11"]
    assert found.rows.share.tolist() == pytest.approx([9 / 14, 4 / 14, 1 / 14], rel=1e-6)
    assert cli.main(["compare", str(a), str(b), "--out", str(tmp_path / "o"), "--cache", "none"]) == 0
    said = capsys.readouterr().out
    assert "100% of ‖ΔW‖² lies outside the 12 matrices that were decomposed: embeddings 100%" in said
    assert "--include embeddings" in said and "3 'w3' 64%, 7 'w7' 29%, 11 'w11' 7%" in said
    same(read_comparison(tmp_path / "o"), found)
    assert cli.main(f"compare {a} {b} --out {tmp_path / 'p'} --cache none --include embeddings".split()) == 0
    said, tables = capsys.readouterr().out, read_comparison(tmp_path / "p")
    assert "lies outside" not in said and WORDS in set(tables.angles.matrix)
    parts = tables.parts.set_index("part")
    assert parts.share["embeddings"] == 1 and parts.outside.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_are_all_of_the_change(tmp_path, monkeypatch, dtype):
    w = weights(dtype=dtype) | {"model.layers.0.self_attn.q_proj.bias": gaussian(24).to(dtype)}
    new = changed(w)
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", new)
    delta = {n: new[n].double() - w[n].double() for n in w}
    whole = sum(D.square().sum() for D in delta.values())
    for chunk in (1, 50, 2**22):
        monkeypatch.setattr(checkpoint, "CHUNK", chunk)
        parts = compare_all([a, b], progress=False).parts.set_index("part")
        assert list(parts.index) == ["matrices", "embeddings", "norms", "biases"]
        assert parts.tensors.tolist() == [12, 1, 4, 1] and parts.weights.sum() == sum(D.numel() for D in delta.values())
        assert parts.share.sum() == pytest.approx(1, abs=1e-12)
        assert parts.change_norm.pow(2).sum() == pytest.approx(float(whole), rel=1e-12)
        norms = sum(D.square().sum() for n, D in delta.items() if "norm" in n)
        assert parts.share["norms"] == pytest.approx(float(norms / whole), rel=1e-12)
    some = compare_all([a, b], progress=False, layers=[0]).parts.set_index("part")  # what was not chosen is the rest
    assert some.tensors.to_dict() == dict(matrices=4, embeddings=1, norms=4, biases=1, rest=8)
    assert some.share["rest"] + some.share["matrices"] == pytest.approx(parts.share["matrices"], rel=1e-12)


def test_what_cannot_be_subtracted_is_counted(tmp_path, capsys):
    w = weights()
    longer = changed(w) | {WORDS: torch.cat([w[WORDS], w[WORDS][:2]])}
    sick = changed(w) | {"model.norm.weight": torch.full((24,), torch.nan)}
    a, b, c = (write(tmp_path / x, t) for x, t in zip("abc", (w, longer, sick)))
    found = compare_all([a, b, c], progress=False)
    parts = found.parts.set_index(["other", "part"])
    assert parts.left_out.loc["b"].to_dict() == dict(matrices=0, embeddings=1, norms=0)
    assert parts.tensors.loc["b", "embeddings"] == 0 and parts.share.loc["b"].sum() == pytest.approx(1)
    assert parts.left_out.loc["c"].to_dict() == dict(matrices=0, embeddings=0, norms=1)
    assert set(found.rows.other) == {"c"} and len(found.rows) == module.MOST_ROWS and set(found.rows.token) == {""}
    module.print_comparison(found)
    assert "not counted, being resized, held by one only or not finite: 1 of the embeddings" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight: \(30, 24\)"):
        compare_all([a, b], include="embeddings", progress=False)
    nothing = compare_all([a, a], [(0, 0)], progress=False)
    assert nothing.parts.share.isna().all() and nothing.rows.empty
    with pytest.raises(ValueError, match="include: norms are no matrices"):
        compare_all([a, c], include=["embeddings", "norms"], progress=False)


def test_tied_embeddings_count_once(tmp_path):
    w = weights()
    new, twice = changed(w), lambda x: x | {"lm_head.weight": x[WORDS].clone()}
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", new)
    both = write(tmp_path / "a2", twice(w)), write(tmp_path / "b2", twice(new))
    plain = compare_all([a, b], progress=False).parts.drop(columns=["base", "other"])
    for x, y in ((both[0], both[1]), (a, both[1]), (both[0], b)):
        pd.testing.assert_frame_equal(compare_all([x, y], progress=False).parts.drop(columns=["base", "other"]), plain)
    head = write(tmp_path / "h", twice(w) | {"lm_head.weight": new[WORDS]})  # untied by training: against the table
    parts = compare_all([a, head], progress=False).parts.set_index("part")
    assert parts.share.to_dict() == dict(matrices=0, embeddings=0, head=1, norms=0)
    assert parts.change_norm["head"] == pytest.approx(float((new[WORDS].double() - w[WORDS].double()).norm()))


# --- which library, which precision


def test_the_blas_is_chosen_by_the_vendor(monkeypatch):
    A, B = gaussian(40, 30), gaussian(30, 20, seed=1)
    for vendor, mkl, numpy in (
        ("vendor_id : GenuineIntel", True, False),
        ("vendor_id : GenuineIntel", False, True),
        ("vendor_id : AuthenticAMD", True, True),
    ):
        monkeypatch.setattr(svd, "_vendor", lambda: vendor)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        svd._prefers_mkl.cache_clear()
        assert svd._by_numpy(A) == numpy
        torch.testing.assert_close(svd.matmul(A, B), A @ B)
        torch.testing.assert_close(svd.gram(A), A.T @ A)
        assert (svd._eigh(A.T @ A)[0] - torch.linalg.eigvalsh(A.T @ A).flip(0)).abs().max() < 1e-9
    monkeypatch.undo()
    svd._prefers_mkl.cache_clear()


def test_one_thread_holds_in_workers_and_keeps_float32(monkeypatch):
    "Products that somebody has allowed to be coarser are not, inside; afterwards everything is as it was."
    from concurrent.futures import ThreadPoolExecutor

    X = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    true, before, threads = X.double() @ X.double(), torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        torch.set_float32_matmul_precision("medium")
        with svd.one_thread(), ThreadPoolExecutor(2) as pool:
            here, there = (
                X @ X,
                list(
                    pool.map(lambda _: (torch.get_num_threads(), X @ X, svd._eigh(svd.gram(X.double()))[1]), range(2))
                ),
            )
            assert torch.backends.cuda.matmul.fp32_precision == "ieee" == torch.backends.mkldnn.matmul.fp32_precision
            alone = svd._eigh(svd.gram(X.double()))[1]
        assert (here.double() - true).abs().max() < 1e-3
        for n, Y, V in there:
            assert n == 1 and torch.equal(Y, here) and torch.equal(V, alone)
        assert torch.get_float32_matmul_precision() == "medium" and torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_plan_says_the_drivers(trio, tmp_path, monkeypatch):
    "Measured by the first process, followed by the others and by a run that goes on."
    times = dict(gram=2.0, gesvd=1.0)
    monkeypatch.setattr(svd, "time_drivers", lambda shape, device: times)
    monkeypatch.setattr(svd, "_CHOSEN", {})
    cs = [Checkpoint(c) for c in trio]
    found = cs[0].matrices()
    begin = lambda: module._begin(cs, [(0, 1)], found, dict(fraction=0.2), "cuda:0", tmp_path / "out", jobs.Group())
    begin()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert set(plan["drivers"].values()) == {"gesvd"} and set(plan["drivers"]) == {svd._sides(m.shape) for m in found}
    svd._CHOSEN.clear()
    times["gram"] = 0.5  # another process, another measurement
    begin()
    assert (
        svd.choose_driver(tuple(found[0].shape), "cuda:1") == "gesvd"
        and json.loads((tmp_path / "out" / "plan.json").read_text()) == plan
    )


# --- killed, resumed, shared

CHILD = """
import sys, time
from gp_spectral import angles
measure = angles._measure
def slow(*a): time.sleep(0.15); return measure(*a)
angles._measure = slow
angles.compare_all(sys.argv[2:], progress=False, out=sys.argv[1], cache=False, workers=2)
"""


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    d = tmp_path_factory.mktemp("trio")
    w = weights(dtype=torch.bfloat16, layers=6)
    return [str(write(d / n, changed(w, size, seed=size))) for n, size in (("base", 0), ("sft", 1), ("rl", 2))]


WRITTEN = (
    "angles.parquet changes.parquet parts.parquet plan.json profiles.parquet rows.parquet spectrum.parquet".split()
)


def same(a, b):
    for x, y in zip(a, b):
        pd.testing.assert_frame_equal(x, y, check_exact=True)


def test_killed_it_goes_on(trio, tmp_path):
    out, rest = tmp_path / "out", [0]
    finished = lambda: len(list((out / "parts").glob("*.json")))
    for seconds in (0.0, 0.1, 0.3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(out), *trio])
        while child.poll() is None and finished() == rest[-1]:
            time.sleep(0.02)
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        child.wait()
        rest.append(finished())
    assert 0 < rest[1] < rest[2] < rest[3] < 24  # each went further, none was finished
    with pytest.raises(CheckpointError, match="no finished comparison"):
        read_comparison(out)
    found = compare_all(trio, progress=False, out=out, cache=False)
    same(found, compare_all(trio, progress=False, cache=False, workers=1))
    same(found, read_comparison(out))
    assert sorted(p.name for p in out.iterdir()) == WRITTEN
    with pytest.raises(CheckpointError, match="other details"):
        compare_all(trio, progress=False, out=out, details=False)
    with pytest.raises(CheckpointError, match="is no comparison"):
        compare_all(trio, progress=False, out=trio[0])


LAGGING = """
import os, sys, time
from accelerate import PartialState
from gp_spectral import cli
wait = PartialState.wait_for_everyone
def late(state): wait(state); time.sleep(float(os.environ["LATE"]) * (state.process_index > 0))
PartialState.wait_for_everyone = late
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    "processes, late", [(2, 0), pytest.param(4, 0, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)]
)
def test_several_processes_give_the_same_bits(trio, tmp_path, processes, late):
    "Also when every process but the first is late after each meeting point."
    (tmp_path / "lagging.py").write_text(LAGGING)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--master_port=0",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
            str(tmp_path / "lagging.py"),
            "compare",
            *trio,
            "--out",
            str(tmp_path / "out"),
            "--cache",
            "none",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"LATE": str(late)},
    )
    assert done.returncode == 0, "\n".join(l for l in done.stderr.splitlines() if "elastic" not in l)[:3000]
    assert done.stdout.count("base → sft") == 1  # one process speaks
    same(read_comparison(tmp_path / "out"), compare_all(trio, [(0, 1), (0, 2), (1, 2)], progress=False, cache=False))


def adapter(folder, base, seed, alpha=2):
    folder.mkdir(parents=True, exist_ok=True)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    save_file(
        {
            f"{name}.lora_A.weight": gaussian(2, 24, seed=seed).float(),
            f"{name}.lora_B.weight": gaussian(40, 2, seed=seed + 1).float(),
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps(dict(peft_type="LORA", base_model_name_or_path=str(base), r=2, lora_alpha=alpha))
    )
    return folder


@pytest.mark.parametrize("change", ["weights", "scale"])
def test_an_adapter_that_was_trained_on_is_another_question(tmp_path, change):
    base = write(tmp_path / "base", weights())
    lora = adapter(tmp_path / "lora", base, 1)
    compare_all([base, lora], progress=False, out=tmp_path / "out", cache=False)
    compare_all([base, lora], progress=False, out=tmp_path / "out", cache=False)  # nothing has changed
    time.sleep(0.02)
    adapter(lora, base, *((50, 2) if change == "weights" else (1, 4)))
    with pytest.raises(CheckpointError, match="other files"):
        compare_all([base, lora], progress=False, out=tmp_path / "out", cache=False)


def test_adapters_of_one_name_keep_their_base(tmp_path):
    base = write(tmp_path / "base", weights())
    pair = [
        Checkpoint(adapter(tmp_path / x / "lora", "nowhere/nothing", seed), base=base)
        for x, seed in (("x", 3), ("y", 5))
    ]
    t = compare_all([base, *pair], progress=False, cache=False).changes.set_index(["other", "matrix"]).weight_change
    assert set(t.index.get_level_values(0)) == {"x/lora", "y/lora"} and t["x/lora", NAME] != t["y/lora", NAME] > 0
    assert [c.label for c in pair] == ["lora", "lora"]  # the caller's own stay as they are


def test_labels_are_told_apart(tmp_path):
    w = weights()
    folders = [write(tmp_path / p / "run" / "ck", changed(w, seed=i)) for i, p in enumerate("pqr")]
    base = write(tmp_path / "base", w)
    labels = lambda cs, **k: set(
        compare_all(cs, progress=False, cache=False, layers=[0], details=False, **k).angles.other
    )
    assert labels([base, *folders]) == {f"{p}/run/ck" for p in "pqr"}
    assert labels([base, folders[0], Checkpoint(folders[1], "mine")]) == {"ck", "mine"}
    assert labels([base, base]) == {"base"}
    assert labels([base, folders[0], folders[1], folders[0]]) == {"p/run/ck", "q/run/ck"}
    with pytest.raises(ValueError, match="'mine'.*label of its own"):
        labels([base, *(Checkpoint(f, "mine") for f in folders)])
    with pytest.raises(ValueError, match="'ck'.*label of its own"):
        labels([base, folders[0], Checkpoint(folders[1], "ck"), Checkpoint(base, "ck")])


@pytest.mark.parametrize("left", ["part", "empty", "part and parts"])
def test_killed_while_the_plan_was_written(trio, tmp_path, left):
    out = tmp_path / "out"
    out.mkdir()
    if left == "empty":
        (out / "plan.json").touch()
    else:
        (out / "plan.json.123.part").write_text('{"version"')
    if left == "part and parts":
        (out / "parts").mkdir()
    same(
        compare_all(trio, progress=False, out=out, cache=False, layers=[0]),
        compare_all(trio, progress=False, cache=False, layers=[0]),
    )
    assert sorted(p.name for p in out.iterdir()) == WRITTEN


def test_a_damaged_plan_is_named(trio, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text('{"version"')
    with pytest.raises(CheckpointError, match="plan.json cannot be read"):
        compare_all(trio, progress=False, out=out)


def test_what_is_written_is_on_disk_first(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: order.append("sync") or sync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    job = jobs.JobFolder(tmp_path)
    job.parts.mkdir()
    job.put(1, [1])
    assert order == ["sync", "rename"]


# --- memory


def test_workers_keep_to_a_part_of_the_checkpoint():
    small, big = [(1536, 576)], [(4096, 1024), (1024, 1024)]
    assert jobs.workers(big, 100, False, 768 << 20) == 1  # two would need more than 300 MiB
    assert jobs.workers([(14336, 4096)], 100, False, 16 << 30) <= 2 and jobs.workers([(14336, 4096)], 1, False, 0) == 1
    assert (
        jobs.workers(small, 100, False, 256 << 20) == min(len(os.sched_getaffinity(0)), 4)
        if hasattr(os, "sched_getaffinity")
        else True
    )
    for size in (0, 1 << 28, 1 << 30, 1 << 34):
        for shape in ((64, 64), (4096, 1024), (14336, 4096)):
            n = jobs.workers([shape], 1000, True, size)
            assert n == 1 or n * 8 * 6 * shape[0] * shape[1] + jobs.SETUP <= max(jobs.ROOM, size / 3)


WATCHED = """
import sys
from pathlib import Path
from gp_spectral.angles import compare_all
def resident(what): return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1]) << 10
if __name__ == "__main__":
    Path("/proc/self/clear_refs").write_text("5"); start = resident("VmRSS")
    compare_all(sys.argv[2:], cache=False, progress=False)
    print((resident("VmHWM") - start) >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux only")
def test_memory_of_a_768_mib_pair_with_the_default_workers(tmp_path):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    from random_checkpoint import perturb, write as make

    make(tmp_path / "a", "768mib")
    perturb(tmp_path / "b", tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "x", str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) <= 300


# --- models in memory


def llama(tied=False):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=tied))


SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)
MODELS = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=3, n_positions=32)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)),
}


@pytest.fixture(params=MODELS)
def live(request, tmp_path):
    "((base, other) in memory, (base, other) as folders)"
    torch.manual_seed(0)
    base = MODELS[request.param]()
    other = MODELS[request.param]()
    other.load_state_dict(base.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01 * torch.randn_like(p)
    for name, model in (("base", base), ("other", other)):
        model.save_pretrained(tmp_path / name)
    return (Checkpoint(base, "base"), Checkpoint(other, "other")), (tmp_path / "base", tmp_path / "other")


def test_models_in_memory_compare_like_their_folders(live):
    "To the bit, and mixed with folders."
    models, folders = live
    expected = compare_all(folders, progress=False, cache=False)
    for pair in (models, (models[0], folders[1]), (folders[0], models[1])):
        same(compare_all(pair, progress=False, cache=False), expected)
    for kinds in (None, "embed_tokens" if "embed" in " ".join(models[0].names) else "wte"):
        a, b = (spectrum(c, kinds, progress=False, cache=False) for c in (models[0], folders[0]))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    name = models[0].matrices()[0].name
    tables = [
        (svd.sigma_change(*pair, progress=False, cache=False), module.angle_profile(*pair, models[0].find(name).tensor))
        for pair in (models, folders)
        if "[" not in name
    ]
    for a, b in zip(*tables):
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_models_are_given_as_they_are(tmp_path, monkeypatch):
    "No `Checkpoint` is needed; two models of one class are told apart, and the factors of one are found again."
    torch.manual_seed(0)
    a, b = llama(), llama()
    t = compare(a, b, layers=[0], progress=False, cache=tmp_path / "kept")
    assert set(t.base) == {"LlamaForCausalLM 1"} and set(t.other) == {"LlamaForCausalLM 2"}
    assert set(compare(a, a, layers=[0], progress=False).other) == {"LlamaForCausalLM"}
    assert set(spectrum(a, layers=0, progress=False, cache=False).checkpoint) == {"LlamaForCausalLM"}
    a.save_pretrained(tmp_path / "a")
    monkeypatch.setattr(svd, "_short_side", lambda *x: pytest.fail("decomposed twice"))
    spectrum(tmp_path / "a", layers=0, progress=False, cache=tmp_path / "kept")


def test_a_comparison_of_models_goes_on_where_it_stopped(tmp_path):
    torch.manual_seed(0)
    a, b, out = llama(), llama(), tmp_path / "out"
    compare_all([a, b], layers=[0], progress=False, cache=False, out=out)
    same(compare_all([a, b], layers=[0], progress=False, cache=False, out=out), read_comparison(out))
    with torch.no_grad():
        b.model.layers[0].self_attn.q_proj.weight += 1
    with pytest.raises(CheckpointError, match="other files"):
        compare_all([a, b], layers=[0], progress=False, cache=False, out=out)


def test_what_is_no_checkpoint_is_told(tmp_path):
    for ask in (
        lambda: compare(3, 4),
        lambda: spectrum(torch.zeros(3)),
        lambda: svd.sigma_change(None, None),
        lambda: module.angle_profile([], [], "x"),
    ):
        with pytest.raises(TypeError, match="is not a checkpoint: expected a folder, a hub name"):
            ask()
    folder = write(tmp_path / "a", weights())
    for pair in ((llama(), folder), (folder, llama())):
        with pytest.raises(TypeError, match="LlamaForCausalLM in memory is no folder: expected one, save it first"):
            recover(*pair, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# --- requests


def test_a_comparison_that_cannot_be_leaves_no_folder(tmp_path, capsys):
    w = weights()
    bad = w | {NAME: torch.full_like(w[NAME], torch.nan)}
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", bad)
    c = write(tmp_path / "c", {k: v for k, v in w.items() if k != NAME})
    for other, words in ((b, "NaN"), (c, "up_proj")):
        assert cli.main(["compare", str(a), str(other), "--out", str(tmp_path / "o"), "--cache", "none"]) == 2
        assert (
            words in (text := capsys.readouterr().err)
            and text.splitlines()[-1 if words == "NaN" else 0].startswith("gp-spectral compare: ")
            and not (tmp_path / "o").exists()
        )
    (tmp_path / "o").mkdir()  # one that was there stays
    with pytest.raises(CheckpointError, match="NaN"):
        compare_all([a, b], progress=False, out=tmp_path / "o", cache=False)
    assert (tmp_path / "o").is_dir()


@pytest.mark.parametrize("given, kept", [(["--cache", "none"], 0), (["--cache", "FOLDER"], 2)])
def test_cache_none_is_no_cache(trio, tmp_path, monkeypatch, given, kept):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(
            [
                "compare",
                *trio[:2],
                "--out",
                "o",
                "--layers",
                "0",
                "--kinds",
                "up_proj",
                *[g.replace("FOLDER", "kept") for g in given],
            ]
        )
        == 0
    )
    assert not (tmp_path / "none").exists() and len(list(tmp_path.glob("*/??/*.safetensors"))) == kept


def test_embeddings_of_unequal_size_are_named(tmp_path):
    w = weights()
    big = w | {"model.embed_tokens.weight": torch.cat([w["model.embed_tokens.weight"]] * 2)}
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", big)
    for ask in (
        lambda: compare_all([a, b], kinds="embed_tokens", progress=False),
        lambda: svd.sigma_change(a, b, ["embed_tokens"], progress=False),
    ):
        with pytest.raises(CheckpointError, match=r"embed_tokens.weight: \(30, 24\)"):
            ask()
    assert cli.main(["compare", str(a), str(b), "--kinds", "embed_tokens", "--out", str(tmp_path / "o")]) == 2
    assert len(compare(a, b, progress=False))  # not named, they are no obstacle


def test_every_process_works():
    costs = np.random.default_rng(0).integers(1, 100, 200).tolist()
    for ranks in (1, 2, 7, 64):
        hands = share_out(costs, ranks)
        assert sorted(sum(hands, [])) == list(range(200)) and all(hands)
        loads = [sum(costs[i] for i in h) for h in hands]
        assert max(loads) <= max(max(costs), 4 / 3 * sum(costs) / ranks)  # Graham's bound


def test_bad_requests(trio, tmp_path, capsys):
    with pytest.raises(ValueError, match="at least two"):
        compare_all(trio[:1])
    with pytest.raises(ValueError, match="fraction"):
        compare_all(trio, fraction=0, progress=False)
    with pytest.raises(CheckpointError, match="no matrix of kind"):
        compare_all(trio, kinds="gate_proj", progress=False, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert cli.main(["compare", trio[0], str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "o").exists()
    same_name = write(tmp_path / "x" / "base", weights(dtype=torch.bfloat16, layers=6))
    t = compare(trio[0], same_name, progress=False)
    assert len(set(t.base) | set(t.other)) == 2  # two folders of one name stay apart


def test_isotropic_is_the_angle_of_noise_of_the_same_size(tmp_path):
    "For Gaussian noise it is what is measured; for as large a change within the head it is far less."
    torch.manual_seed(0)
    base, noise, head = {}, {}, {}
    for i in range(6):
        U, V = (torch.linalg.qr(torch.randn(n, 64, dtype=torch.float64))[0] for n in (96, 64))
        s = torch.logspace(0, -1.5, 64, dtype=torch.float64)
        W, name = U * s @ V.T, f"model.layers.{i}.mlp.up_proj.weight"
        G = torch.randn(96, 64, dtype=torch.float64)
        C = torch.zeros(64, 64, dtype=torch.float64)
        C[:13, 13:] = torch.randn(13, 51, dtype=torch.float64)  # turns the head out of itself
        base[name] = W
        for moved, D in ((noise, G), (head, U @ C @ V.T)):
            moved[name] = W + 0.01 * W.norm() / D.norm() * D
    a, b, c = (write(tmp_path / n, w) for n, w in dict(a=base, b=noise, c=head).items())
    t = compare_all([a, b, c], progress=False, cache=None).angles.assign(ratio=lambda t: t["mean"] / t.isotropic)
    ratio = t.groupby(["other", "band"]).ratio.mean()
    assert ratio["b"].between(0.85, 1.15).all(), ratio
    assert ratio["c", "head"] > 1.5 and t.isotropic[t.other == "b"].mean() == pytest.approx(
        t.isotropic[t.other == "c"].mean(), rel=1e-6
    )
    still = compare_all([a, a], progress=False, cache=None).angles
    assert (still.isotropic == 0).all()
