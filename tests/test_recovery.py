"Property, fault and kill tests of gp_spectral.recovery. Small random matrices; no model of the game is needed."

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import made
from made import add_package, changed, gaussian, orthonormal, trained, weights, write
from safetensors.torch import load_file, save_file

from gp_spectral import checkpoint, cli, recovery
from gp_spectral.angles import principal_angles
from gp_spectral.recovery import (
    METHODS,
    Edit,
    Ranks,
    certificate,
    chosen_ranks,
    edit_factors,
    edit_matrix,
    interpolate,
    load_methods,
    lora_factors,
    plot_recovery,
    random_merge,
    recover,
    recovery_record,
    share_or_ranks,
    taken_ranks,
    whole_way,
)
from gp_spectral import sweep as sweeping
from gp_spectral.sweep import score_command, search, sweep, sweep_matrix
from gp_spectral.checkpoint import Checkpoint, CheckpointError
from gp_spectral.svd import Factors, factorize, singular_values

torch.set_num_threads(1)
checkpoints = made.checkpoints  # the fixture
ISOSPECTRAL = ("anchored", "symmetric", "direct")
SPECTRAL = ("uv", *ISOSPECTRAL)


def pair(m, n, size=0.3, seed=0):
    target = trained(m, n, seed)
    noise = gaussian(m, n, seed=seed + 7)
    return target, target + size * target.norm() * noise / noise.norm()


def swapped(m, n, order, nearly=0.0):
    "Factors of a target whose directions are the donor's in another order, and of the donor."
    d = factorize(trained(m, n))
    return factorize((d.U[:, order] * d.s) @ d.Vh[order] + nearly * gaussian(m, n)), d


def flipped(f, seed):
    e = torch.where(gaussian(len(f.s), seed=seed) > 0, 1.0, -1.0).double()
    return Factors(f.U * e, f.s, f.Vh * e[:, None])


def product(f):
    return (f.U * f.s) @ f.Vh


@pytest.fixture
def folders(tmp_path):
    donor = weights()
    return write(tmp_path / "target", changed(donor)), write(tmp_path / "donor", donor)


def same_bytes(a, b, name):
    return torch.equal(a.tensor(name).view(torch.uint8), b.tensor(name).view(torch.uint8))


# --- the merges against plain dense renderings of their definitions


def polar(X, toward=None, tol=1e-3):
    "The nearest matrix with orthonormal columns; the directions that X leaves open go `toward`."
    P, s, Qh = torch.linalg.svd(X, full_matrices=False)
    rank = int((s > tol).sum())
    if rank == len(s):
        return P @ Qh, 0
    P, _, Qh = torch.linalg.svd(X, full_matrices=True)
    N, Z = P[:, rank:], Qh[rank:]
    a, _, b = torch.linalg.svd(
        torch.eye(N.shape[1], len(Z)).to(X.dtype) if toward is None else N.T @ toward @ Z.T, full_matrices=False
    )
    return P[:, :rank] @ Qh[:rank] + N @ (a @ b) @ Z, len(Z)


def polar_pair(Xu, Xv, aim_u, aim_v, short_v):
    (U, open_u), (V, open_v) = polar(Xu), polar(Xv)
    if open_u and (short_v or not open_v):
        U, _ = polar(Xu, aim_u(V))
    elif open_v:
        V, _ = polar(Xv, aim_v(U))
    return U, V


def dense(method, t, d, c):
    "An isospectral merge the long way: polar factors of all columns, and a rebuild."
    U, V, Ud, Vd, W = t.U, t.Vh.T, d.U, d.Vh.T, product(t)
    span = lambda *columns: torch.linalg.qr(torch.cat(columns, 1))[0]
    short_v = len(U) >= len(V)
    if method == "symmetric":
        Cu, Cv = span(U, Ud[:, c]), span(V, Vd[:, c])
        core = Cu.T @ W @ Cv
        Hu, Hv = polar_pair(
            Cu.T @ torch.where(c, Ud, U),
            Cv.T @ torch.where(c, Vd, V),
            lambda H: (core @ H) * t.s,
            lambda H: (core.T @ H) * t.s,
            short_v,
        )
        return product(Factors(Cu @ Hu, t.s, (Cv @ Hv).T))
    k = int(c.sum())
    Cu, Cv = span(Ud[:, c], U)[:, k:], span(Vd[:, c], V)[:, k:]
    Nu, Nv = torch.where(c, Ud, U), torch.where(c, Vd, V)
    if not c.all():
        core, s = Cu.T @ W @ Cv, t.s[~c]
        Hu, Hv = polar_pair(Cu.T @ U[:, ~c], Cv.T @ V[:, ~c], lambda H: core @ H * s, lambda H: core.T @ H * s, short_v)
        Nu[:, ~c], Nv[:, ~c] = Cu @ Hu, Cv @ Hv
    return product(Factors(Nu, t.s, Nv.T))


def davis_kahan(A, B):
    "The direct rotation of the subspace of A to that of B, as a dense matrix (Davis and Kahan, 1970)."
    P, Q, I = A @ A.T, B @ B.T, torch.eye(len(A)).double()
    u, _, v = torch.linalg.svd(Q @ P + (I - Q) @ (I - P))
    return u @ v


def mask(r, *bands):
    c = torch.zeros(r, dtype=torch.bool)
    for b in bands:
        c[b] = True
    return c


@pytest.mark.parametrize("m,n", [(30, 30), (50, 20), (20, 50), (33, 30), (30, 33), (7, 1)])
@pytest.mark.parametrize("size", [1e-3, 0.05, 0.3, 1.5])
@pytest.mark.parametrize("method", ["anchored", "symmetric"])
def test_thin_edits_equal_the_dense_definition(method, m, n, size):
    target, donor = pair(m, n, size)
    f = factorize(target), factorize(donor)
    r = min(m, n)
    for top, tail, bulk in (
        (0.2, 0.0, 0.0),
        (0.0, 0.3, 0.0),
        (0.2, 0.2, 0.0),
        (0.1, 0.1, 0.3),
        (1.0, 0.0, 0.0),
        (0.7, 0.0, 0.0),
        ("1r", 0, 0),
    ):
        if r == 1 and (tail or bulk) and top:
            continue
        head, end, mid = chosen_ranks(r, top, tail, bulk)
        start = (r - mid) // 2
        e = edit_factors(method, target, donor, top, tail, bulk, factors=f)
        c = mask(r, slice(0, head), slice(r - end, r), slice(start, start + mid))
        assert float((target + e.L @ e.R - dense(method, *f, c)).norm()) < 1e-9 * float((donor - target).norm())
        meant = e.meant()
        torch.testing.assert_close(product(meant), target + e.L @ e.R, rtol=0, atol=1e-11)
        for X in (meant.U, meant.Vh.T):
            assert float((X.T @ X - torch.eye(r).double()).abs().max()) < 1e-10


@pytest.mark.parametrize("m,n", [(30, 30), (50, 20), (20, 50)])
def test_direct_rotation_equals_the_dense_definition(m, n):
    target, donor = pair(m, n)
    t, d = factorize(target), factorize(donor)
    r = min(m, n)
    for bands in (
        (slice(0, 6),),
        (slice(0, 4), slice(r - 3, r)),
        (slice(0, 4), slice((r - 4) // 2, (r - 4) // 2 + 4), slice(r - 3, r)),
    ):
        U, V, expected = t.U, t.Vh.T, target
        for b in bands:
            Ru, Rv = davis_kahan(U[:, b], d.U[:, b]), davis_kahan(V[:, b], d.Vh[b].T)
            U, V, expected = Ru @ U, Rv @ V, Ru @ expected @ Rv.T
        sizes = [b.stop - b.start for b in bands] + [0, 0]
        top, bulk, tail = (sizes[0], 0, sizes[1]) if len(bands) < 3 else sizes[:3]
        e = edit_factors("direct", target, donor, *map(Ranks, (top, tail, bulk)), factors=(t, d))
        torch.testing.assert_close(target + e.L @ e.R, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(product(e.meant()), expected, rtol=0, atol=1e-11)
    assert (METHODS["direct"](target, donor, 6) - target).norm() < (
        METHODS["anchored"](target, donor, 6) - target
    ).norm()


@pytest.mark.parametrize("m,n", [(30, 30), (50, 20), (20, 50)])
def test_uv_merge_is_the_published_formula(m, n):
    target, donor = pair(m, n)
    (U, s, V), (Ud, sd, Vd) = factorize(target), factorize(donor)
    for k in map(Ranks, (1, 4, min(m, n))):
        rebuilt = torch.cat([Ud[:, :k], U[:, k:]], 1) @ torch.diag(s) @ torch.cat([Vd[:k], V[k:]])
        torch.testing.assert_close(METHODS["uv"](target, donor, k), rebuilt, rtol=0, atol=1e-12)
        rebuilt += Ud[:, :k] @ torch.diag(sd[:k] - s[:k]) @ Vd[:k]
        torch.testing.assert_close(METHODS["uv"](target, donor, k, sigma="donor"), rebuilt, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m,n", [(30, 30), (50, 20), (20, 50), (7, 1)])
@pytest.mark.parametrize(
    "top,tail,bulk",
    [
        (0.2, 0.0, 0.0),
        (0.0, 0.3, 0.0),
        (0.2, 0.2, 0.0),
        (1.0, 0.0, 0.0),
        (Ranks(1), 0, 0),
        (0.2, 0.2, 0.2),
        (0.0, 0.0, 0.4),
        (0.5, 0.5, 0.0),
    ],
)
@pytest.mark.parametrize("method", ISOSPECTRAL)
def test_isospectral(method, m, n, top, tail, bulk):
    if (m, n) == (7, 1) and (top and (tail or bulk)):
        pytest.skip("one rank cannot be in two bands")
    target, donor = pair(m, n)
    after = METHODS[method](target, donor, top, tail, bulk=bulk)
    torch.testing.assert_close(singular_values(after), singular_values(target), rtol=1e-10, atol=1e-13)
    found = certificate(target, after, donor, top, tail, bulk=bulk)
    if method != "symmetric":
        assert found["head_angle"] < 1e-8 <= found["head_angle_before"] or top == 1 or n == 1
    assert found["sigma_change"] < 1e-10 and found["changed"] > 0


def test_how_thin_the_edits_are():
    target, donor = pair(60, 50)
    for method, columns, rank in (
        ("uv", 2, 2),
        ("anchored", 4, 3),
        ("symmetric", 4, 3),
        ("direct", 4, 2),
        ("sigma_only", 1, 1),
    ):
        for k in map(Ranks, (1, 5)):
            L, R, _ = edit_factors(method, target, donor, k)
            assert (
                L.shape == (60, columns * k)
                and R.shape == (columns * k, 50)
                and torch.linalg.matrix_rank(L @ R, rtol=1e-10) == rank * k
            )
        L, R, meant = edit_factors(method, target, donor, 0)
        assert L.shape == (60, 0) and R.shape == (0, 50) and torch.equal(meant().s, factorize(target).s)


@pytest.mark.parametrize("method", ["anchored", "direct"])
def test_every_band_is_the_donors(method):
    target, donor = pair(40, 30)
    a, d = factorize(METHODS[method](target, donor, 0.2, 0.2, bulk=0.2)), factorize(donor)
    for ranks in (slice(0, 6), slice(12, 18), slice(24, 30)):
        assert (
            principal_angles(a.U[:, ranks], d.U[:, ranks]).max() < 1e-8
            and principal_angles(a.Vh[ranks].T, d.Vh[ranks].T).max() < 1e-8
        )


def test_anchored_takes_the_donors_vectors_exactly():
    target, donor = pair(40, 30)
    a, d = factorize(METHODS["anchored"](target, donor, 5)), factorize(donor)
    torch.testing.assert_close(a.U[:, :5] @ a.Vh[:5], d.U[:, :5] @ d.Vh[:5], rtol=0, atol=1e-9)


def test_sigma_of_the_donor():
    target, donor = pair(40, 30)
    t, d = factorize(target), factorize(donor)
    expected = torch.cat([d.s[:6], t.s[6:]]).sort(descending=True)[0]
    for method in ("anchored", "symmetric"):
        torch.testing.assert_close(
            singular_values(METHODS[method](target, donor, 6, sigma="donor")), expected, rtol=1e-10, atol=1e-13
        )
    for method in ("uv", "anchored", "symmetric"):
        torch.testing.assert_close(METHODS[method](target, donor, 1.0, sigma="donor"), donor, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="no meaning"):
        edit_factors("direct", target, donor, sigma="donor")
    with pytest.raises(ValueError, match="'target' or 'donor'"):
        METHODS["uv"](target, donor, sigma="both")


@pytest.mark.parametrize("method", SPECTRAL)
def test_sign_invariance(method):
    target, donor = pair(40, 30)
    t, d = factorize(target), factorize(donor)
    plain = METHODS[method](target, donor, 0.2, 0.1, factors=(t, d))
    for seed in range(3):
        torch.testing.assert_close(
            METHODS[method](target, donor, 0.2, 0.1, factors=(flipped(t, seed), flipped(d, seed + 10))),
            plain,
            rtol=0,
            atol=1e-11,
        )


@pytest.mark.parametrize("method", SPECTRAL)
def test_permutation_inside_a_band(method):
    "Two directions that change places within the head leave the others alone; subspace methods do not notice."
    d = factorize(trained(40, 30))
    order = torch.arange(30)
    order[[1, 4]] = order[[4, 1]]
    target, donor = (d.U[:, order] * d.s) @ d.Vh[order], product(d)
    after = METHODS[method](target, donor, 6)
    torch.testing.assert_close(after, target if method == "direct" else donor, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", SPECTRAL)
def test_degenerate_singular_values(method):
    "Equal singular values of the target leave their vectors open; the result must not depend on the choice."
    t, d = factorize(trained(40, 30)), factorize(pair(40, 30)[1])
    s = t.s.clone()
    s[10:14] = s[10]
    s[1:4] = s[1]
    target = (t.U * s) @ t.Vh
    turned = [t.U.clone(), t.Vh.clone()]
    for block, seed in ((slice(10, 14), 3), (slice(1, 4), 4)):
        Q = orthonormal(block.stop - block.start, block.stop - block.start, seed)
        turned[0][:, block], turned[1][block] = t.U[:, block] @ Q, Q.T @ t.Vh[block]
    if method == "symmetric":
        turned[0][:, 1:4], turned[1][1:4] = t.U[:, 1:4], t.Vh[1:4]
    a, b = (
        METHODS[method](target, product(d), 0.2, factors=(f, d))
        for f in (Factors(t.U, s, t.Vh), Factors(turned[0], s, turned[1]))
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("m,n", [(12, 12), (20, 12), (12, 20)])
@pytest.mark.parametrize("method", ISOSPECTRAL)
@pytest.mark.parametrize("nearly", [0.0, 1e-9, 1e-5])
def test_lost_dimension(method, m, n, nearly):
    "Two directions change places across the cut: the joined basis loses a dimension, the merge must not."
    order = torch.arange(12)
    order[[3, 4]] = order[[4, 3]]
    t, d = swapped(m, n, order, nearly)
    target, donor = product(t), product(d)
    after = METHODS[method](target, donor, 4)
    torch.testing.assert_close(singular_values(after), singular_values(target), rtol=1e-9, atol=1e-12)
    if method != "symmetric":
        torch.testing.assert_close(after, donor, rtol=0, atol=1e-12 if not nearly else 100 * nearly)


@pytest.mark.parametrize("m,n", [(12, 12), (20, 12), (12, 20)])
@pytest.mark.parametrize("method", ISOSPECTRAL)
@pytest.mark.parametrize("nearly", [0.0, 1e-9, 1e-5])
def test_two_lost_dimensions(method, m, n, nearly):
    "Filled independently of signs, orthonormal, and no further from the target than filling one side at random."
    order = torch.arange(12)
    order[[3, 4, 1, 6]] = order[[4, 3, 6, 1]]
    t, d = swapped(m, n, order, nearly)
    target, donor = product(t), product(d)
    e = edit_factors(method, target, donor, 4, factors=(t, d))
    for X in (e.meant().U, e.meant().Vh.T):
        assert float((X.T @ X - torch.eye(12).double()).abs().max()) < 1e-9
    after = target + e.L @ e.R
    for seed in range(4):
        torch.testing.assert_close(
            METHODS[method](target, donor, 4, factors=(flipped(t, seed), flipped(d, seed + 9))),
            after,
            rtol=0,
            atol=1e-9,
        )
    if method == "direct":
        assert principal_angles(factorize(after).U[:, :4], d.U[:, :4]).max() < 1e-7
    else:
        assert (after - target).norm() <= (dense(method, t, d, mask(12, slice(0, 4))) - target).norm() + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [*SPECTRAL, "sigma_only"])
def test_nothing_to_restore_and_dtypes(method, dtype):
    target, donor = (x.to(dtype) for x in pair(24, 16))
    assert torch.equal(METHODS[method](target, donor, 0.0), target) and torch.equal(
        METHODS[method](target, donor, 0), target
    )
    after = METHODS[method](target, donor, 0.2)
    assert (
        after.dtype == dtype
        and after.shape == target.shape
        and torch.isfinite(after).all()
        and not torch.equal(after, target)
    )
    assert torch.equal(METHODS[method](target, target, 0.2), target)


def test_bands_that_do_not_fit():
    assert chosen_ranks(7, 0.5, 0.5) == (4, 3, 0) and chosen_ranks(9, "1r", "1r", 7) == (1, 1, 7)
    for bad, match in (
        (dict(top=1.5), "top"),
        (dict(top=-0.1), "top"),
        (dict(top=0.7, tail=0.7), "of 20"),
        (dict(top=40), "of 20"),
        (dict(top=float("nan")), "top"),
        (dict(top=0, bulk=True), "bulk"),
        (dict(top=0.5, bulk=0.2), "overlap"),
        (dict(top=0, tail=0.5, bulk=0.2), "overlap"),
        (dict(top=Ranks(1), bulk=20), "overlap"),
        (dict(top=1), "write 100% .*, 1r for one"),
    ):
        for method in SPECTRAL:
            with pytest.raises(ValueError, match=match):
                METHODS[method](*pair(20, 20), **bad)
    with pytest.raises(ValueError, match="shape"):
        METHODS["anchored"](gaussian(3, 4), gaussian(4, 3))
    with pytest.raises(ValueError, match="NaN"):
        METHODS["anchored"](torch.full((4, 4), torch.nan), gaussian(4, 4))
    with pytest.raises(ValueError, match="NaN"):
        METHODS["anchored"](torch.full((4, 4), torch.nan), gaussian(4, 4), 0)
    with pytest.raises(ValueError, match="two dimensions"):
        METHODS["uv"](gaussian(4), gaussian(4))
    with pytest.raises(ValueError, match="floating-point"):
        METHODS["uv"](torch.ones(4, 4, dtype=torch.int32), torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="no thin edit"):
        edit_factors("interpolate", *pair(4, 4), options=dict(alpha=0.5))


# --- controls and certificates


def test_controls():
    target, donor = pair(40, 30)
    way = (donor - target).norm()
    torch.testing.assert_close(interpolate(target, donor, 1.0), donor)
    assert torch.equal(interpolate(target, donor, 0.0), target)
    assert torch.equal(METHODS["interpolate"](target, donor, alpha=0.3), interpolate(target, donor, 0.3))
    size = (METHODS["uv"](target, donor, 0.2) - target).norm()
    for method in ("interpolate_to_norm", "random"):
        torch.testing.assert_close(
            (edit_matrix(method, target, donor, like="uv", top=0.2, seed=1) - target).norm(), size
        )
        torch.testing.assert_close((edit_matrix(method, target, donor, like="donor", seed=1) - target).norm(), way)
    torch.testing.assert_close(edit_matrix("interpolate_to_norm", target, donor, like="donor"), donor)
    assert not torch.equal(random_merge(target, donor, 1.0, seed=0), random_merge(target, donor, 1.0, seed=1))
    for seed in (0, 1):
        noise = random_merge(target, donor, 1.0, seed=seed)
        assert torch.equal(METHODS["random"](target, donor, norm=1.0, seed=seed), noise)
    torch.testing.assert_close(singular_values(METHODS["sigma_only"](target, donor)), singular_values(donor))
    assert certificate(target, interpolate(target, donor, 0.25), donor)["edit"] == pytest.approx(0.25 * float(way))
    with pytest.raises(ValueError, match="like"):
        edit_matrix("random", target, donor, like="interpolate")
    with pytest.raises(ValueError, match="alpha"):
        interpolate(target, donor, None)
    with pytest.raises(ValueError, match="alpha"):
        METHODS["interpolate"](target, donor)


def test_uv_merge_is_not_isospectral():
    target, donor = pair(40, 40, 0.5)
    e = edit_factors("uv", target, donor, 0.2)
    found = certificate(target, target + e.L @ e.R, donor, edit=e)
    assert found["sigma_change"] > 1e-3
    t, d = factorize(target), factorize(donor)
    worst = max(float((a[:, 8:].T @ b[:, :8]).abs().max()) for a, b in ((t.U, d.U), (t.Vh.T, d.Vh.T)))
    assert found["orthogonality"] == pytest.approx(worst, rel=1e-9) and worst > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [*SPECTRAL, "sigma_only"])
def test_the_quick_certificate_bounds_the_full_one(method, dtype):
    for size in (0.02, 0.3):
        target, donor = (x.to(dtype) for x in pair(40, 30, size))
        e = edit_factors(method, target, donor, 0.2)
        after = (target.double() + e.L @ e.R).to(dtype)
        full, quick = (certificate(target, after, donor, edit=e, certify=c) for c in ("full", "quick"))
        assert (
            full["sigma_change_of_norm"] <= quick["sigma_bound"] * (1 + 1e-9)
            and quick["sigma_bound"] == full["sigma_bound"]
        )
        assert quick["sigma_change"] is quick["sigma_change_of_norm"] is quick["head_angle"] is None
        assert {k: v for k, v in quick.items() if v is not None}.items() <= full.items()
        if method in ISOSPECTRAL:
            assert (
                full["orthogonality"] < 1e-9
                and full["sigma_bound"] < {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
            )
    assert certificate(target, after, donor)["orthogonality"] is None
    with pytest.raises(ValueError, match="certify"):
        certificate(target, after, donor, certify="no")


def test_factors_that_were_stored_in_float32():
    "A cache may round the vectors: the edit is then isospectral to that precision, and the certificate says so."
    target, donor = (x.bfloat16() for x in pair(60, 40))
    exact = factorize(target), factorize(donor)
    rounded = tuple(Factors(f.U.float().double(), f.s, f.Vh.float().double()) for f in exact)
    for method in SPECTRAL:
        a, b = (edit_factors(method, target, donor, factors=f) for f in (exact, rounded))
        assert float((a.L @ a.R - b.L @ b.R).abs().max()) < 1e-5
        found = certificate(target, (target.double() + b.L @ b.R).bfloat16(), donor, factors=rounded, edit=b)
        assert method == "uv" or 1e-9 < found["orthogonality"] < 1e-5


# --- folders


@pytest.mark.parametrize("method", load_methods())
def test_recover(checkpoints, tmp_path, method):
    target, donor = checkpoints
    own = dict(below=1.0) if method == "scale_intruders" else {}  # where nothing is new: all count as new
    told = dict(top=0.2, alpha=0.5, layers="first 2", options=own, progress=False)
    out = recover(target, donor, tmp_path / "out", method, **told)
    after, edited = Checkpoint(out), {m.name for m in target.matrices(layers=[0, 1])}
    settings, table = recovery_record(out)
    for name in target.names:
        assert after.dtype(name) == target.dtype(name)
        if method == "reset":
            assert same_bytes(after, donor if ".layers.0." in name or ".layers.1." in name else target, name)
        elif name not in edited:
            assert same_bytes(after, target, name)
        else:
            assert torch.equal(after.tensor(name), target.tensor(name)) == (
                table.set_index("matrix").changed[name] == 0
            )
    assert (
        settings["method"] == method
        and settings["layers"] == [0, 1]
        and 0 < settings["edit_norm"]
        and settings["changed"] == table.changed.sum() > 0
    )
    assert settings["target"]["sha256"] == target.digest() and settings["donor"]["sha256"] == donor.digest()
    if method in SPECTRAL:
        assert (settings["orthogonality"] < 1e-5) == (method != "uv") and table.orthogonality.notna().all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["donor", "out", "target"]


def test_equal_norm_controls_match_each_matrix(checkpoints, tmp_path):
    target, donor = checkpoints
    norms = [
        recovery_record(recover(target, donor, tmp_path / m, m, top=0.2, progress=False))[1].edit
        for m in ("anchored", "interpolate_to_norm", "random")
    ]
    tolerance = 1e-6 if target.dtype(target.names[0]) == torch.float32 else 2e-2
    for other in norms[1:]:
        np.testing.assert_allclose(other, norms[0], rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["interpolate_to_norm", "random"])
@pytest.mark.parametrize("top", [0.05, 0.2, 0.4])
def test_equal_norm_is_equal_as_stored(dtype, method, top):
    "Half a per cent apart, elements differ by about one unit: a rounded straight line misses the norm by a fifth."
    W = trained(160, 120)
    D = gaussian(160, 120, seed=3)
    target, donor = W.to(dtype), (W + 0.005 * W.norm() / D.norm() * D).to(dtype)
    size = lambda X: float((X.double() - target.double()).norm())
    wanted = size(edit_matrix("anchored", target, donor, top=top))
    after = edit_matrix(method, target, donor, top=top)
    assert abs(size(after) / wanted - 1) < 0.02
    if method == "random":
        return
    assert (
        (after.double() - target.double()) * (donor.double() - target.double()) >= 0
    ).all()  # every element goes its donor's way
    if dtype == torch.bfloat16 and top == 0.2:
        assert abs(size(recovery.interpolate(target, donor, wanted / size(donor))) / wanted - 1) > 0.02


def test_one_step_for_all_is_taken_by_some():
    "Every element differs by one unit: the stored norm is nothing or everything, but for the elements that cross."
    target = torch.full((20, 20), 1.0).bfloat16()
    donor = torch.full((20, 20), 1.0 + 2**-7).bfloat16()
    way = float((donor.double() - target.double()).norm())
    for share in (0.3, 0.5, 0.9):
        after = recovery.interpolate_to_norm(target, donor, share * way)
        assert abs(float((after.double() - target.double()).norm()) / way - share) < 0.01 and set(
            after.unique().tolist()
        ) == {1.0, 1.0 + 2**-7}
    assert torch.equal(recovery.interpolate_to_norm(target, donor, 0.0), target) and torch.equal(
        recovery.interpolate_to_norm(target, target, 1.0), target
    )


def test_the_record_says_what_norm_was_reached(tmp_path):
    w = weights(dtype=torch.bfloat16)
    folders = write(tmp_path / "t", changed(w, 0.005)), write(tmp_path / "d", w)
    record, rows = recovery_record(recover(*folders, tmp_path / "o", "interpolate_to_norm", progress=False))
    like, wanted = recovery_record(recover(*folders, tmp_path / "a", "anchored", progress=False))
    np.testing.assert_allclose(rows.norm_ratio, 1, atol=0.02)
    np.testing.assert_allclose(rows.edit, wanted.edit, rtol=0.02)
    assert (
        abs(record["norm_ratio"] - 1) < 0.02
        and abs(record["edit_norm"] / like["edit_norm"] - 1) < 0.02
        and "norm_ratio" not in like
    )
    assert (
        recovery_record(recover(*folders, tmp_path / "i", "interpolate", alpha=0.5, progress=False))[0]["restored"] == 0
    )


def test_certificate_of_head_and_tail_is_of_the_worse():
    t, d = pair(60, 40)
    after = edit_matrix("anchored", t, d, top=0.2)  # the head is the donor's, the tail is not
    both, head, tail = (
        certificate(t, after, d, **k) for k in (dict(top=0.2, tail=0.2), dict(top=0.2), dict(top=0.0, tail=0.2))
    )
    assert head["head_angle"] < 1e-7 < tail["head_angle"] == both["head_angle"]
    assert both["head_angle_before"] == max(head["head_angle_before"], tail["head_angle_before"])


def test_the_whole_way_goes_by_rows(tmp_path, monkeypatch):
    w = weights()
    target, donor = Checkpoint(write(tmp_path / "t", changed(w))), Checkpoint(write(tmp_path / "d", w))
    truth = float(
        torch.cat([(target.tensor(n).double() - donor.tensor(n).double()).flatten() for n in target.names]).norm()
    )
    seen, norm = [], torch.Tensor.norm
    monkeypatch.setattr(torch.Tensor, "norm", lambda x, *a, **k: seen.append(x.numel()) or norm(x, *a, **k))
    for chunk in (1, 50, 10**9):
        monkeypatch.setattr(checkpoint, "CHUNK", chunk)
        seen.clear()
        assert whole_way(target, donor) == pytest.approx(truth, rel=1e-12)
        assert chunk == 10**9 or max(seen) <= max(chunk, 40)  # never more than the chunk, or one row
    read, blocks = [], Checkpoint.blocks
    monkeypatch.setattr(Checkpoint, "blocks", lambda c, n, *a, **k: read.append(n) or blocks(c, n, *a, **k))
    known = {n: 0.0 for n in target.names[1:]}
    whole_way(target, donor, known)
    assert set(read) == {target.names[0]}


MEASURE = """
import sys, torch; torch.set_num_threads(1)
from pathlib import Path
from gp_spectral.checkpoint import Checkpoint
from gp_spectral.recovery import whole_way
def resident(what): return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1]) << 10
pair = [Checkpoint(f) for f in sys.argv[1:]]
whole_way(*pair, {n: 0.0 for n in pair[0].names if "embed" in n})          # first calls
Path("/proc/self/clear_refs").write_text("5"); start = resident("VmRSS")
whole_way(*pair); print(resident("VmHWM") - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux only")
def test_an_embedding_is_no_reason_for_three_copies_in_float64(tmp_path):
    n = 60000 * 256  # 31 MB in bfloat16; three copies in float64 are 369 MB
    w = {"model.layers.0.mlp.up_proj.weight": trained(8, 8).bfloat16().contiguous()}
    pair = [
        write(tmp_path / x, w | {"model.embed_tokens.weight": torch.full((60000, 256), v, dtype=torch.bfloat16)})
        for x, v in (("a", 1.0), ("b", 2.0))
    ]
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, pair)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * 2 * n + 3 * 8 * checkpoint.CHUNK + (16 << 20)


def test_embeddings_of_unequal_size_are_told_before_the_work(tmp_path):
    w = weights()
    big = w | {"model.embed_tokens.weight": torch.cat([w["model.embed_tokens.weight"]] * 2)}
    pair = write(tmp_path / "a", w), write(tmp_path / "b", big)
    for kinds in ("embed_tokens", ["embed_tokens", "up_proj"]):
        with pytest.raises(CheckpointError, match="embed_tokens.weight"):
            recover(*pair, tmp_path / "o", kinds=kinds, progress=False)
    assert not (tmp_path / "o").exists()
    recover(*pair, tmp_path / "o", progress=False)  # not named, they are left alone


def test_command_line_says_what_it_did(models, tmp_path, capsys):
    target, donor = map(str, models)
    run = lambda *a: cli.main(["recover", *a, "--cache", "none"])
    assert run(target, "--donor", donor, "--out", str(tmp_path / "l"), "--as-lora", "bfloat16", "--top", "0.1") == 0
    text, (record, rows) = capsys.readouterr().out, recovery_record(tmp_path / "l")
    assert (
        f"rank {rows.lora_rank.min()} to {rows.lora_rank.max()}" in text
        and f"error of {record['lora_error']:.1e}" in text
    )
    for given, top in (([], 1.0), (["--top", "0.2"], 0.2)):
        assert run(target, "--donor", donor, "--out", str(tmp_path / f"s{top}"), "--method", "sigma_only", *given) == 0
        assert recovery_record(tmp_path / f"s{top}")[0]["top"] == top


@pytest.mark.parametrize("shards", [1, 3])
def test_noise_as_large_as_the_whole_difference(tmp_path, shards):
    w = weights()
    donor, target = write(tmp_path / "d", w, shards), write(tmp_path / "t", changed(w), shards)
    settings, table = recovery_record(
        recover(target, donor, tmp_path / "out", "random", like="donor", certify="quick", progress=False)
    )
    np.testing.assert_allclose(table.edit, table.distance, rtol=1e-6)
    again = recover(target, donor, tmp_path / "again", "random", like="donor", certify="quick", progress=False)
    other = recover(target, donor, tmp_path / "other", "random", like="donor", seed=1, certify="quick", progress=False)
    assert Checkpoint(again).digest() == Checkpoint(tmp_path / "out").digest() != Checkpoint(other).digest()
    noise = [
        Checkpoint(again).matrix(m).double() - Checkpoint(target).matrix(m).double()
        for m in Checkpoint(again).matrices("up_proj")
    ]
    assert (
        abs(float(torch.corrcoef(torch.stack([x.flatten() for x in noise]))[0, 1])) < 0.2
    )  # 960 numbers: independent ones correlate by 0.03


def test_recover_nothing_is_byte_identical(tmp_path):
    for shards in (1, 3):
        w = weights(dtype=torch.bfloat16)
        donor, target = write(tmp_path / f"d{shards}", w, shards), write(tmp_path / f"t{shards}", changed(w), shards)
        (target / "tokenizer.json").write_text("{}")
        (target / "modeling_evil.py").write_text("boom")
        (target / "optimizer.pt").write_bytes(b"x")
        for method in SPECTRAL:
            out = recover(target, donor, tmp_path / f"{method}{shards}", method, top=0.0, progress=False)
            for f in target.glob("*.safetensors"):
                assert (out / f.name).read_bytes() == f.read_bytes()
            assert (
                (out / "tokenizer.json").exists()
                and not (out / "modeling_evil.py").exists()
                and not (out / "optimizer.pt").exists()
            )
        assert len(list(out.glob("*.safetensors"))) == shards


def test_sharded_recovery_equals_single(tmp_path):
    w = weights()
    found = []
    for shards in (1, 2):
        donor, target = write(tmp_path / f"d{shards}", w, shards), write(tmp_path / f"t{shards}", changed(w), shards)
        found.append(Checkpoint(recover(target, donor, tmp_path / f"out{shards}", progress=False)))
    for name in found[0].names:
        assert torch.equal(found[0].tensor(name), found[1].tensor(name))


@pytest.mark.parametrize("sigma", ["target", "donor"])
def test_cache_and_quick_certificates_change_no_byte(checkpoints, tmp_path, sigma):
    target, donor = checkpoints
    outs = [
        recover(target, donor, tmp_path / f"out{i}", tail=0.1, bulk=0.1, sigma=sigma, progress=False, **options)
        for i, options in enumerate(
            (dict(cache=tmp_path / "cache"), dict(cache=tmp_path / "cache", certify="quick"), dict(cache=None))
        )
    ]
    a, b, c = map(Checkpoint, outs)
    assert a.digest() == b.digest() and list((tmp_path / "cache").rglob("*.safetensors"))
    for m in a.matrices():
        torch.testing.assert_close(
            a.matrix(m), c.matrix(m), rtol=1e-2 if a.dtype(m.name) == torch.bfloat16 else 1e-5, atol=1e-5
        )
    settings, table = recovery_record(outs[1])
    assert (
        settings["options"] == dict(sigma=sigma)
        and settings["bulk"] == 0.1
        and table.head_angle.isna().all()
        and table.sigma_bound.notna().all()
    )


def test_recovered_checkpoint_loads(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    for i, name in enumerate(("target", "donor")):
        torch.manual_seed(i)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    load = lambda f: AutoModelForCausalLM.from_pretrained(f).eval()
    x = torch.arange(12)[None]
    with torch.no_grad():
        before = load(tmp_path / "target")(x).logits
        assert torch.equal(
            load(recover(tmp_path / "target", tmp_path / "donor", tmp_path / "same", top=0, progress=False))(x).logits,
            before,
        )
        assert not torch.equal(
            load(recover(tmp_path / "target", tmp_path / "donor", tmp_path / "other", progress=False))(x).logits, before
        )


@pytest.fixture
def gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    for i, name in enumerate(("target", "donor")):
        torch.manual_seed(i)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=3, n_positions=32, initializer_range=0.3)
        ).save_pretrained(tmp_path / name)
    return tmp_path / "target", tmp_path / "donor"


def test_parts_of_fused_tensors(gpt2, tmp_path):
    "Queries of GPT-2's c_attn alone: they become the edited ones, keys, values and all else keep their bytes."
    target, donor = map(Checkpoint, gpt2)
    after = Checkpoint(recover(target, donor, tmp_path / "out", kinds="q_proj", progress=False))
    for m in target.matrices():
        if m.kind == "q_proj":
            assert torch.equal(
                after.matrix(m), METHODS["anchored"](target.matrix(m), donor.matrix(m))
            ) and not torch.equal(after.matrix(m), target.matrix(m))
        else:
            assert torch.equal(after.matrix(m), target.matrix(m))
    assert len(recovery_record(after.path)[1]) == 2


@pytest.mark.parametrize("method", ["anchored", "reset"])
def test_stacked_experts_and_eight_bits(tmp_path, method):
    def eight(seed):
        w = changed(weights(layers=2), 0.2, seed)
        for name in [n for n in w if "up_proj" in n]:
            scale = w[name].abs().amax(1, keepdim=True) / 200
            w[name] = (w[name] / scale).to(torch.float8_e4m3fn)
            w[f"{name}_scale"] = scale
        w["model.layers.0.mlp.experts.down_proj"] = torch.stack([trained(24, 16, seed + i).float() for i in range(3)])
        return w

    a, b = (
        write(tmp_path / "a", eight(1), hidden_size=24, num_attention_heads=3),
        write(tmp_path / "b", eight(2), hidden_size=24, num_attention_heads=3),
    )
    target, donor = Checkpoint(a), Checkpoint(b)
    out = recover(target, donor, tmp_path / "out", method, certify="quick", layers=[0], progress=False)
    after = Checkpoint(out)
    names = [m.name for m in target.matrices()]
    assert sum("experts" in n for n in names) == 3 and sum("up_proj" in n for n in names) == 2
    for m in target.matrices():
        got = after.matrix(m)
        if m.layer != 0:
            assert torch.equal(got, target.matrix(m))
        elif method == "reset":
            assert torch.equal(got, donor.matrix(m))
        else:
            assert torch.equal(
                got, target.as_stored(m, METHODS["anchored"](target.matrix(m), donor.matrix(m)))
            ) and not torch.equal(got, target.matrix(m))


def test_an_adapter_is_a_target_and_a_donor(tmp_path):
    "A LoRA of a model is recovered towards the model: the result is a whole checkpoint, in the base's dtype."
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
        )
    )
    base.save_pretrained(tmp_path / "base")
    get_peft_model(
        base, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).save_pretrained(tmp_path / "lora")
    target = Checkpoint(tmp_path / "lora", base=tmp_path / "base")
    whole = Checkpoint(tmp_path / "base")
    out = Checkpoint(recover(target, whole, tmp_path / "out", "interpolate", alpha=1.0, progress=False))
    for m in out.matrices():
        torch.testing.assert_close(out.matrix(m), whole.matrix(m), rtol=0, atol=1e-6)
    back = Checkpoint(recover(whole, target, tmp_path / "back", "uv", top=1.0, sigma="donor", progress=False))
    for m in back.matrices():
        torch.testing.assert_close(back.matrix(m), target.matrix(m), rtol=0, atol=1e-5)
    reset = Checkpoint(recover(whole, target, tmp_path / "reset", "reset", progress=False))
    for m in reset.matrices():
        assert torch.equal(reset.matrix(m), target.as_stored(m, target.matrix(m)))
    same = Checkpoint(recover(target, whole, tmp_path / "same", top=0, progress=False))
    assert same.digest() == Checkpoint(target.copy_to(tmp_path / "copy")).digest()
    assert recovery_record(same.path)[0]["changed"] == 0
    with pytest.raises(CheckpointError, match="itself an adapter"):
        recover(target, whole, tmp_path / "x", as_lora=True, progress=False)


def test_reset_between_eight_bits_and_others_is_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    w = weights(layers=1)
    a, b = (
        write(tmp_path / "a", w | {name: w[name].to(torch.float8_e4m3fn)}, dtype="float8_e4m3fn"),
        write(tmp_path / "b", w),
    )
    with pytest.raises(CheckpointError, match="choose its scale"):
        recover(a, b, tmp_path / "out", "reset", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_recovery_leaves_nothing(checkpoints, tmp_path, monkeypatch, error):
    target, donor = checkpoints
    real, calls = recovery.certificate, []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise error("power cut")
        return real(*args, **options)

    monkeypatch.setattr(recovery, "certificate", dies)
    before = (target.path / "model.safetensors").read_bytes()
    for as_lora in (False, True):
        calls.clear()
        monkeypatch.setattr(
            recovery, "_modules", lambda c: ({n.removesuffix(".weight"): "Linear" for n in c.names}, "model")
        )
        with pytest.raises(error):
            recover(target, donor, tmp_path / "out", progress=False, as_lora=as_lora)
        assert (
            sorted(p.name for p in tmp_path.iterdir()) == ["donor", "target"]
            and (target.path / "model.safetensors").read_bytes() == before
        )
    monkeypatch.undo()
    recover(target, donor, tmp_path / "out", progress=False)


def child(tmp_path, code, ready, timeout=60):
    "Runs code in a child process and kills it, with no chance to clean up, as soon as `ready()`."
    p = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + timeout
    while not ready():
        assert p.poll() is None, p.stderr.read().decode()[-2000:]
        assert time.monotonic() < end, "the child never got there"
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert p.returncode == -signal.SIGKILL


def test_killed_recovery_is_no_result(folders, tmp_path):
    code = f"""
import time, torch; torch.set_num_threads(1)
from gp_spectral import checkpoint, cli, recovery
real, calls = recovery.certificate, []
def slow(*args, **options):
    calls.append(1)
    if len(calls) == 3: open('ready', 'w').close(); time.sleep(60)
    return real(*args, **options)
recovery.certificate = slow
recovery.recover({str(folders[0])!r}, {str(folders[1])!r}, 'out', progress=False)
"""
    child(tmp_path, code, (tmp_path / "ready").exists)
    left = [p for p in tmp_path.iterdir() if p.name not in ("target", "donor", "ready")]
    assert len(left) == 1 and left[0].name.startswith(".out.") and left[0].name.endswith(".partial")
    with pytest.raises(CheckpointError, match="no recovery.json"):
        recovery_record(left[0])
    with pytest.warns(UserWarning, match="was killed"):
        out = recover(*folders, tmp_path / "out", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = recover(*folders, tmp_path / "other", progress=False)
    assert Checkpoint(out).digest() == Checkpoint(other).digest() and left[0].exists()


def test_bad_requests(checkpoints, tmp_path):
    target, donor = checkpoints
    out = tmp_path / "out"
    for error, match, options in (
        (ValueError, "unknown method", dict(method="magic")),
        (ValueError, "needs alpha", dict(method="interpolate")),
        (ValueError, "top", dict(top=2.0)),
        (ValueError, "ranks", dict(top=9)),
        (ValueError, "layers", dict(layers="0-7")),
        (ValueError, "layers", dict(layers="9", method="reset")),
        (CheckpointError, "no matrix of kind", dict(kinds="query")),
        (ValueError, "like", dict(method="random", like="random")),
        (ValueError, "overlap", dict(bulk=0.9)),
        (ValueError, "sigma", dict(sigma="mine")),
        (ValueError, "takes no sigma", dict(sigma="donor", method="direct")),
        (ValueError, "certify", dict(certify="maybe")),
        (ValueError, "rank belongs", dict(rank=3)),
        (CheckpointError, "no whole tensor of the kinds", dict(method="reset", kinds="query")),
    ):
        with pytest.raises(error, match=match):
            recover(target, donor, out, progress=False, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["donor", "target"]
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        recover(target, donor, out)
    with pytest.raises(CheckpointError, match="no recovery.json"):
        recovery_record(out)


def test_overflow_is_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    big = torch.full((8, 8), 60000.0, dtype=torch.float16)
    other = big.clone()
    other[0] = -60000.0
    a, b = write(tmp_path / "a", {name: big}), write(tmp_path / "b", {name: other})
    with pytest.raises(CheckpointError, match=f"{name}: the edit overflows"):
        recover(a, b, tmp_path / "out", "interpolate", alpha=-1.0, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# --- parts besides the matrices inside the layers


WORDS = "model.embed_tokens.weight"


def moved_rows(w, rows=(3, 7, 11), dtype=None):
    "Weights in which only some rows of the embeddings differ, as SFT leaves them."
    new = w[WORDS].clone()
    new[list(rows)] += 2.0
    return w | {WORDS: new}


def same_but(a, b, *names):
    "Whether two checkpoints hold the same bytes, but for some tensors, all of which differ."
    a, b = Checkpoint(a), Checkpoint(b)
    return {n for n in a.names if not same_bytes(a, b, n)} == set(names)


@pytest.mark.parametrize(
    "method, options", [("anchored", dict(top=1.0, sigma="donor")), ("interpolate", dict(alpha=1.0))]
)
def test_rows_of_the_embeddings_come_back_when_they_are_included(tmp_path, method, options):
    w = weights()
    donor, target = write(tmp_path / "d", w), write(tmp_path / "t", moved_rows(w))
    told = dict(method=method, progress=False, **options)
    recover(target, donor, tmp_path / "without", **told)
    assert same_but(tmp_path / "without", target)
    record, _ = recovery_record(tmp_path / "without")
    assert record["include"] == [] and record["edit_norm_all"] == 0
    recover(target, donor, tmp_path / "with", include="embeddings", layers=[0], kinds="q_proj", **told)
    assert same_but(tmp_path / "with", target, WORDS)
    assert torch.allclose(Checkpoint(tmp_path / "with").tensor(WORDS), w[WORDS], atol=1e-5)
    record, rows = recovery_record(tmp_path / "with")
    assert record["include"] == ["embeddings"] and rows.matrix.tolist() == [
        "model.layers.0.self_attn.q_proj.weight",
        WORDS,
    ]
    assert record["edit_norm_all"] == pytest.approx(1, abs=1e-6)


def test_embeddings_are_edited_as_any_matrix(checkpoints, tmp_path):
    target, donor = checkpoints
    recover(target, donor, tmp_path / "o", "anchored", top=0.3, include=["embeddings"], progress=False)
    expected = edit_matrix("anchored", target.tensor(WORDS), donor.tensor(WORDS), top=0.3)
    assert torch.equal(Checkpoint(tmp_path / "o").tensor(WORDS), expected)
    recover(target, donor, tmp_path / "plain", "anchored", top=0.3, progress=False)
    assert same_but(tmp_path / "o", tmp_path / "plain", WORDS)  # the others are as they were without


def test_norms_and_biases_are_the_donors_whole(tmp_path):
    w = weights() | {f"model.layers.{i}.self_attn.q_proj.bias": gaussian(24, seed=i).float() for i in range(3)}
    donor, target = write(tmp_path / "d", w), write(tmp_path / "t", changed(w))
    norms, biases = ([n for n in w if part in n] for part in ("norm", "bias"))
    told = dict(top=0.0, progress=False)
    recover(target, donor, tmp_path / "n", include="norms", **told)
    assert same_but(tmp_path / "n", target, *norms)
    assert all(same_bytes(Checkpoint(tmp_path / "n"), Checkpoint(donor), n) for n in norms)
    recover(target, donor, tmp_path / "b", include=("biases", "norms"), layers=[1], **told)
    inside = ["model.norm.weight", *(n for n in [*norms, *biases] if ".layers.1." in n)]
    assert same_but(tmp_path / "b", target, *inside)
    record, rows = recovery_record(tmp_path / "b")
    assert record["include"] == ["norms", "biases"] and {*rows[rows.changed > 0].matrix} == {*inside}
    moved = [(Checkpoint(target).tensor(n).double() - w[n].double()).norm() for n in inside]
    way = whole_way(Checkpoint(target), Checkpoint(donor))
    assert record["edit_norm_all"] == pytest.approx(float(torch.stack(moved).norm()) / way, rel=1e-6)
    recover(target, donor, tmp_path / "noise", "random", like="donor", include="norms", progress=False)
    assert recovery_record(tmp_path / "noise")[0]["norm_ratio"] == pytest.approx(1, abs=1e-3)  # of the matrices alone


def test_a_reset_of_everything_is_the_donor(tmp_path):
    w = weights(dtype=torch.bfloat16) | {"lm_head.weight": gaussian(30, 24, seed=9).bfloat16()}
    donor, target = write(tmp_path / "d", w), write(tmp_path / "t", changed(w))
    recover(target, donor, tmp_path / "all", "reset", include=("embeddings", "head", "norms"), progress=False)
    assert same_but(tmp_path / "all", donor)
    assert recovery_record(tmp_path / "all")[0]["edit_norm_all"] == 1.0
    recover(target, donor, tmp_path / "some", "reset", layers=[0], include="head", progress=False)
    assert same_but(tmp_path / "some", target, "lm_head.weight", *(n for n in w if ".layers.0." in n))


@pytest.mark.parametrize("method", ["anchored", "reset"])
@pytest.mark.parametrize("stored", ["once", "twice"])
def test_tied_embeddings_stay_tied(tmp_path, stored, method):
    w = weights()
    twice = lambda x: x | ({"lm_head.weight": x[WORDS].clone()} if stored == "twice" else {})
    donor, target = write(tmp_path / "d", twice(w)), write(tmp_path / "t", twice(changed(w)))
    recover(target, donor, tmp_path / "o", method, include="embeddings", progress=False)
    found = Checkpoint(tmp_path / "o")
    assert not torch.equal(found.tensor(WORDS), Checkpoint(target).tensor(WORDS))
    assert stored == "once" or torch.equal(found.tensor("lm_head.weight"), found.tensor(WORDS))
    record, rows = recovery_record(tmp_path / "o")
    assert "lm_head.weight" not in set(rows.matrix)
    way = [(Checkpoint(target).tensor(n).double() - w[n].double()).norm() for n in w]
    edit = float(rows.edit.pow(2).sum() ** 0.5)
    assert record["edit_norm_all"] == pytest.approx(edit / float(torch.stack(way).norm()), rel=1e-6)


def test_what_include_refuses(folders, tmp_path):
    w = weights()
    big = w | {WORDS: torch.cat([w[WORDS]] * 2)}
    for include, match in (
        ("rows", "no part is called 'rows': expected some of embeddings, head, norms, biases"),
        ("head", "has no head of its own: it is tied to the embeddings"),
        (["norms", "biases"], "has no biases of its own .it has embeddings, norms"),
    ):
        with pytest.raises(ValueError, match=match):
            recover(*folders, tmp_path / "o", include=include, progress=False)
    with pytest.raises(CheckpointError, match=WORDS):
        recover(write(tmp_path / "a", w), write(tmp_path / "b", big), tmp_path / "o", include="embeddings")
    for include in ("embeddings", "norms"):
        with pytest.raises(ValueError, match=f"an adapter holds linear layers only, not {include}"):
            recover(*folders, tmp_path / "o", include=include, as_lora=True, progress=False)
    with pytest.raises(ValueError, match="norms and biases come whole"):
        sweep(*folders, [0.1], include="norms", progress=False)
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".o*"))


def test_a_head_of_its_own_is_included_in_an_adapter(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    told = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40, vocab_size=50)
    for i, name in enumerate(("t", "d")):
        torch.manual_seed(i)
        LlamaForCausalLM(LlamaConfig(**told, tie_word_embeddings=False)).save_pretrained(tmp_path / name)
    told = dict(top=0.3, include="head", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two models from two seeds are no relatives
        recover(tmp_path / "t", tmp_path / "d", tmp_path / "lora", as_lora=True, **told)
        recover(tmp_path / "t", tmp_path / "d", tmp_path / "whole", **told)
    laid, whole = Checkpoint(tmp_path / "lora"), Checkpoint(tmp_path / "whole")
    assert not torch.equal(whole.tensor("lm_head.weight"), Checkpoint(tmp_path / "t").tensor("lm_head.weight"))
    assert all(torch.allclose(laid.tensor(n), whole.tensor(n), atol=1e-5) for n in whole.names)


def test_a_sweep_includes_tables(folders, tmp_path):
    table = sweep(*folders, [0.1, 0.3], "anchored", include="embeddings", out=tmp_path / "s", progress=False)
    recover(*folders, tmp_path / "o", "anchored", top=0.3, include="embeddings", progress=False)
    one, two = Checkpoint(tmp_path / "s" / "head-0.3"), Checkpoint(tmp_path / "o")
    assert all(torch.allclose(one.tensor(n), two.tensor(n), atol=1e-5) for n in one.names)
    record = recovery_record(tmp_path / "o")[0]
    assert table.edit_norm_all.iloc[-1] == pytest.approx(record["edit_norm_all"], rel=1e-4)


def test_include_on_the_command_line(tmp_path, capsys):
    w = weights()
    donor, target = write(tmp_path / "d", w), write(tmp_path / "t", moved_rows(w))
    command = [str(target), "--donor", str(donor), "--out", str(tmp_path / "o"), "--cache", "none"]
    words = ["--method", "interpolate", "--alpha", "1", "--include", "embeddings", "norms"]
    assert cli.main(["recover", *command, *words]) == 0
    assert "size of the edit 1.000 of the distance" in capsys.readouterr().out
    assert same_but(tmp_path / "o", donor)
    assert cli.main(["recover", *command[:-3], str(tmp_path / "x"), "--include", "words"]) == 2
    assert "no part is called 'words'" in capsys.readouterr().err


# --- methods of one's own


@pytest.fixture
def methods():
    "The table, which a test may add to."
    before = dict(load_methods())
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def shrunk(t, d, taken, strength):
    "The chosen directions a part of their way to the donor's, made orthonormal again."
    sides = ((t.U[:, taken], d.U[:, taken]), (t.Vh[taken].T, d.Vh[taken].T))
    parts = [torch.linalg.qr(T + strength * (D * (T * D).sum(0).sign() - T)) for T, D in sides]
    return [Q * R.diagonal().sign() for Q, R in parts]


@pytest.fixture
def soft(methods):
    "Two methods with an option of their own: the same edit, thin and dense."

    @recovery.method("soft_thin", label="soft (thin)", color="#123456", marker="^", line="-.", top=0.3)
    def soft_thin(
        W,
        target,
        donor,
        taken,
        *,
        strength=0.5,  # 0: the target, 1: the donor's directions
        flip: bool = False,  # whether signs are turned
    ):
        "Turns directions a part of the way."
        U, V = shrunk(target, donor, taken, strength)
        s = target.s[taken] * (-1 if flip else 1)
        kept = target.U[:, taken] * -target.s[taken]
        return Edit(torch.cat([U * s, kept], 1), torch.cat([V.T, target.Vh[taken]]))

    @recovery.method("soft_dense", top="2r")
    def soft_dense(W, target, donor, taken, *, strength: float, seed=0):
        "Does it to the whole matrix."
        U, V = shrunk(target, donor, taken, strength)
        return W + (U * target.s[taken]) @ V.T - (target.U[:, taken] * target.s[taken]) @ target.Vh[taken]

    return methods


def test_a_method_of_ones_own_edits_a_matrix(soft):
    target, donor = pair(40, 30)
    thin = edit_matrix("soft_thin", target, donor, "20%", options=dict(strength=0.7))
    dense = soft["soft_dense"](target, donor, 0.2, options=dict(strength="0.7"))
    torch.testing.assert_close(thin, dense, rtol=0, atol=1e-12)
    assert edit_factors("soft_thin", target, donor).L.shape == (40, 18)  # its own default: 0.3 of 30, twice
    for name in ("soft_thin", "soft_dense"):
        own = dict(options=dict(strength=0.7))
        assert torch.equal(soft[name](target, donor, 0.0, **own), target)
        assert torch.equal(soft[name](target, target, 0.2, **own), target)
        half = soft[name](target.bfloat16(), donor.bfloat16(), **own)
        assert half.dtype == torch.bfloat16 and not torch.equal(half, target.bfloat16())
    with pytest.raises(ValueError, match="no thin edit"):
        edit_factors("soft_dense", target, donor, options=dict(strength=0.7))
    edit = edit_factors("soft_thin", target, donor)
    for certify in ("full", "quick"):
        found = certificate(target, target + edit.L @ edit.R, donor, edit=edit, certify=certify)
        assert found["sigma_bound"] is not None and found["orthogonality"] < 1e-9
        assert certify == "quick" or found["sigma_change_of_norm"] <= found["sigma_bound"] * (1 + 1e-9)


@pytest.mark.parametrize("name", ["soft_thin", "soft_dense"])
def test_a_method_of_ones_own_in_recover_and_sweep(checkpoints, tmp_path, soft, name):
    target, donor = checkpoints
    own = dict(options=dict(strength=0.1))
    record, rows = recovery_record(recover(target, donor, tmp_path / "o", name, progress=False, **own))
    assert record["top"] == (0.3 if name == "soft_thin" else "2r") and record["options"]["strength"] == 0.1
    more = recovery_record(recover(target, donor, tmp_path / "m", name, options=dict(strength=0.9), progress=False))[0]
    assert 0 < record["edit_norm"] < more["edit_norm"] and record["restored"] == rows.restored.sum() > 0
    assert rows.sigma_bound.notna().all() == rows.orthogonality.notna().all() == (name == "soft_thin")
    same = recover(target, donor, tmp_path / "s", name, top=record["top"], options=record["options"], progress=False)
    assert Checkpoint(same).digest() == Checkpoint(tmp_path / "o").digest()  # a record says how it is made again
    table = sweep(target, donor, (0.1, "30%"), name, out=tmp_path / "swept", progress=False, **own)
    one = recover(target, donor, tmp_path / "one", name, top=0.3, progress=False, **own)
    assert Checkpoint(one).digest() == Checkpoint(tmp_path / "swept" / "head-0.3").digest()
    assert table.edit_norm.tolist()[1] == pytest.approx(recovery_record(one)[0]["edit_norm"], rel=1e-3)
    size = recovery_record(recover(target, donor, tmp_path / "n", "random", like="soft_thin", progress=False))[0]
    assert size["options"] == dict(like="soft_thin", seed=0)


@pytest.mark.parametrize("name", ["soft_thin", "soft_dense"])
def test_a_method_of_ones_own_in_search(folders, tmp_path, soft, name):
    told = dict(method=name, bands="head", steps=8, progress=False, options=dict(strength=1.0))
    score = lambda folder: recovery_record(folder)[0]["edit_norm"]
    found = search(*folders, score, 0.05, tmp_path / "out", name="size", **told)
    assert found.reached and found.settings["method"] == name and found.settings["options"]["strength"] == 1.0
    again = recover(*folders, tmp_path / "again", **found.settings, progress=False)
    assert Checkpoint(again).digest() == Checkpoint(found.folder).digest()
    other = search(*folders, score, 0.05, tmp_path / "out", name="size", **told | dict(options=dict(strength=0.1)))
    assert other.history.score.iloc[1] < found.history.score.iloc[1]  # other options, other scores


@pytest.mark.parametrize("name", ["soft_thin", "soft_dense"])
def test_a_method_of_ones_own_as_an_adapter(models, tmp_path, soft, name):
    own = dict(options=dict(strength=0.4), top=0.1, progress=False)
    adapter = recover(*models, tmp_path / "adapter", name, as_lora=True, **own)
    whole = recover(*models, tmp_path / "whole", name, **own)
    assert recovery_record(adapter)[0]["lora_error_max"] < 1e-6
    read, other = Checkpoint(adapter), Checkpoint(whole)
    for m in other.matrices():
        torch.testing.assert_close(read.matrix(m), other.matrix(m), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["soft_thin", "soft_dense"])
def test_a_method_of_ones_own_on_the_command_line(folders, tmp_path, capsys, soft, name):
    target, donor = map(str, folders)
    run = lambda command, *a: cli.main([command, target, "--donor", donor, "--cache", "none", "--method", name, *a])
    out = str(tmp_path / "o")
    assert run("recover", "--out", out, "--option", "strength=0.1", "--top", "20%") == 0
    record = recovery_record(out)[0]
    assert record["options"]["strength"] == 0.1 and record["top"] == 0.2
    assert run("sweep", "--option", "strength=0.1", "--ks", "1r", "20%") == 2  # shares, or numbers?
    assert run("sweep", "--option", "strength=0.1", "--ks", "1r", "3") == 0
    count = "import json; print(json.load(open('{folder}/recovery.json'))['restored'])"
    words = ["--score", f'{sys.executable} -c "{count}"', "--goal", "12", "--budget", "8", "--bands", "head"]
    assert run("search", "--out", str(tmp_path / "s"), "--option", "strength=1", *words) == 0
    capsys.readouterr()
    for wrong, said in (
        (["strenght=0.1"], "did you mean strength?"),
        (["strength=soft"], "strength = 'soft': expected a finite number"),
        (["strength=0.1", "--top", "1"], "write 100% (or 1.0) for all ranks, 1r for one"),
        (["strength=0.1", "--alpha", "1"], "--alpha does nothing"),
    ):
        assert run("recover", "--out", str(tmp_path / "x"), "--option", *wrong) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["recover", "sweep", "search"])
def test_the_help_lists_methods_and_their_options(capsys, soft, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for line in (
        "soft_thin (top 30%)  Turns directions a part of the way.",
        "strength=0.5  0: the target, 1: the donor's directions",
        "flip=False  whether signs are turned",
        "soft_dense (top 2r)  Does it to the whole matrix.",
        "strength=...",
        "sigma=target (target or donor)  whose singular values the restored directions carry",
        "sigma_only (top 100%)",
    ):
        assert line in text
    assert ("interpolate (no ranks)" in text) == (command == "recover") and "random (top 20%)" in text


def test_a_method_of_ones_own_is_drawn(soft):
    import matplotlib.pyplot as plt

    table = pd.DataFrame(
        [dict(method=m, top=0.2, edit_norm=0.2, recovered=0.5) for m in ("soft_thin", "soft_dense", "uv", "unknown")]
    )
    axes = plot_recovery(table)
    drawn = {x.get_label(): x for x in axes.lines}
    assert {"soft (thin)", "soft dense", "unknown", METHODS["uv"].label} <= set(drawn)
    line = drawn["soft (thin)"]
    assert (line.get_color(), line.get_marker(), line.get_linestyle()) == ("#123456", "^", "-.")
    plt.close(axes.figure)


def test_options_are_read_strictly(soft):
    target, donor = pair(12, 10)
    for match, name, options in (
        (r"no option 'strenght' \(did you mean strength\?\): it has strength, flip", "soft_thin", dict(strenght=0.1)),
        ("no option 'alpha'", "soft_thin", dict(alpha=0.1)),
        ("it has none", "direct", dict(strength=0.1)),
        ("strength = 'much'", "soft_thin", dict(strength="much")),
        ("strength = True", "soft_thin", dict(strength=True)),
        ("strength = nan", "soft_thin", dict(strength=float("nan"))),
        ("flip = 3: expected true or false", "soft_thin", dict(flip=3)),
        ("seed = 1.5: expected a whole number", "soft_dense", dict(seed=1.5, strength=1)),
        ("needs strength", "soft_dense", {}),
        ("like = 3: expected text", "random", dict(like=3)),
        ("like = 'soft_dense': expected 'donor'", "random", dict(like="soft_dense")),  # it needs telling
        ("sigma = 'mine': expected 'target' or 'donor'", "uv", dict(sigma="mine")),
        ("takes no sigma='donor', which has no meaning", "soft_thin", None),
    ):
        with pytest.raises(ValueError, match=match):
            more = dict(sigma="donor") if options is None else {}
            edit_matrix(name, target, donor, options=options, **more)
    assert METHODS["soft_thin"].options["flip"].read("true") is True
    with pytest.raises(ValueError, match=r"unknown method 'soft_thinn' \(did you mean soft_thin\?\)"):
        edit_matrix("soft_thinn", target, donor)


def test_what_cannot_be_a_method(methods):
    def starred(W, t, d, taken, *, top=0.1):
        pass

    for match, name, function in (
        ("one word", "two words", lambda W, t, d, taken: W),
        ("a method takes", "x", lambda W, donor: W),
        ("a method takes", "x", lambda W, t, d, taken, strength=0.1: W),
        ("a method takes", "x", lambda W, t, d, taken, **own: W),
        ("top needs another name", "x", starred),
        ("strength needs another name, or a type", "x", lambda W, t, d, taken, *, strength: W),
    ):
        with pytest.raises(ValueError, match=match):
            recovery.method(name)(function)
    with pytest.raises(ValueError, match="ambiguous"):
        recovery.method("x", top=1)(lambda W, t, d, taken: W)
    assert "x" not in methods


def test_a_method_that_gives_something_else(checkpoints, tmp_path, methods):
    target, donor = checkpoints
    recovery.method("wrong")(lambda W, t, d, taken: W[:3])
    with pytest.raises(CheckpointError, match=r"q_proj.weight: method 'wrong' changed the shape"):
        recover(target, donor, tmp_path / "x", "wrong", kinds="q_proj", progress=False)
    recovery.method("wrong")(lambda W, t, d, taken: Edit(W[:3], W))
    with pytest.raises(CheckpointError, match="changed the shape"):
        recover(target, donor, tmp_path / "x", "wrong", kinds="q_proj", progress=False)
    recovery.method("wrong")(lambda W, t, d, taken: None)
    with pytest.raises(TypeError, match="gave NoneType: expected an Edit or a tensor"):
        edit_matrix("wrong", *pair(6, 5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["donor", "target"]


def test_a_method_may_take_the_place_of_ours(checkpoints, tmp_path, methods):
    "The table is asked, and no list of names."
    target, donor = checkpoints
    del METHODS["uv"]
    recovery.method("uv", ranks=False)(lambda W, t, d, taken, *, donor_matrix: donor_matrix)
    record = recovery_record(recover(target, donor, tmp_path / "own", "uv", progress=False))[0]
    assert record["edit_norm"] == pytest.approx(1.0, rel=1e-3) and record["options"] == {}
    with pytest.raises(ValueError, match="cannot be swept"):
        sweep(target, donor, method="uv", progress=False)
    recovery.method("uv")(lambda W, t, d, taken: 0 * W)
    table = sweep(target, donor, (0.1,), "uv", progress=False)
    assert table.energy_change[0] == 1.0 and table.edit_norm[0] > 2  # made anew, not from terms of the method that was


def test_methods_of_other_packages(tmp_path, monkeypatch, methods):
    "An entry point of the group gp_spectral.methods is imported when its method is asked for."
    source = (
        "from gp_spectral.recovery import method\n"
        '@method("of_others")\ndef edit(W, target, donor, taken, *, far=2): return W * far\n'
    )
    points = add_package(tmp_path, monkeypatch, "gp_spectral.methods", "of_others", source)
    W, D = pair(6, 5)
    torch.testing.assert_close(edit_matrix("of_others", W, D, options=dict(far=3)), 3 * W)
    assert "of_others (top 20%)" in sweeping.methods_text()
    points.write_text("[gp_spectral.methods]\nbroken = no_such_module\n")
    with pytest.raises(ValueError, match="unknown method 'nowhere'"):
        with pytest.warns(UserWarning, match="methods of no_such_module .broken. are left out"):
            edit_matrix("nowhere", W, D)


def test_every_method_has_its_own_default(checkpoints, tmp_path):
    "top=None is the method's own default, wherever it is said."
    target, donor = checkpoints
    for name, known in load_methods().items():
        more = dict(alpha=0.5) if name == "interpolate" else {}
        record = recovery_record(recover(target, donor, tmp_path / name, name, progress=False, **more))[0]
        assert record["top"] == known.top == (1.0 if name == "sigma_only" else 0.2)
        if known.ranks:
            W, D = pair(20, 10)
            assert torch.equal(edit_matrix(name, W, D), edit_matrix(name, W, D, top=known.top))
            assert torch.equal(edit_factors(name, W, D).L, edit_factors(name, W, D, known.top).L)


def test_two_spellings(checkpoints, tmp_path):
    assert [share_or_ranks(x) for x in ("20%", "0.2", 0.2, np.float32(0.5))] == [0.2, 0.2, 0.2, 0.5]
    assert [str(share_or_ranks(x)) for x in ("1r", Ranks(1), 7, "7", "7 r", np.int64(7))] == [*["1r"] * 2, *["7r"] * 4]
    assert share_or_ranks("100%") == 1.0 and not isinstance(share_or_ranks(1.0), Ranks)
    for unclear in (1, "1", np.int64(1)):
        with pytest.raises(ValueError, match="write 100% .or 1.0. for all ranks, 1r for one"):
            share_or_ranks(unclear)
    for wrong in (None, True, "", "r", "%", "1.5r", "-2", -2, 1.5, "101%", float("inf"), "two", [0.2], 1j):
        with pytest.raises(ValueError, match="tail = .*: give a share"):
            share_or_ranks(wrong, "tail")
    target, donor = checkpoints
    for top, written in (("20%", 0.2), ("1r", "1r"), (3, "3r"), (1.0, 1.0), (0, 0.0)):
        folder = recover(target, donor, tmp_path / f"{written}", top=top, certify="quick", progress=False)
        found = json.loads((folder / "recovery.json").read_text())["top"]
        assert found == written and type(found) is type(written)
    table, rows = sweep(target, donor, ("2r", 0, "1r"), "uv", out=tmp_path / "s", matrices=True, progress=False)
    assert table.k.tolist() == [0, 1, 2] and rows.groupby("k").restored.sum().tolist() == [0, 12, 24]
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"head-0r", "head-1r", "head-2r", "sweep.csv"}
    assert recovery_record(tmp_path / "s" / "head-1r")[0]["top"] == "1r"


def test_files_keep_their_header(tmp_path):
    w = weights()
    donor, target = write(tmp_path / "d", w), write(tmp_path / "t", changed(w))
    out = recover(target, donor, tmp_path / "o", progress=False)
    assert set(load_file(out / "model.safetensors")) == set(w)
    assert (out / "model.safetensors").stat().st_size == (target / "model.safetensors").stat().st_size


def test_plot_recovery_takes_the_table():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        dict(
            method=m,
            top=top,
            tail=tail,
            layers=layers,
            edit_norm=0.1 + top,
            rule=rule,
            success=0.2,
            seed=seed,
            recovered=r,
        )
        for m, top, tail, layers, r in (
            ("uv", 0.05, 0.0, None, -1.3),
            ("uv", 0.2, 0.0, None, 0.4),
            ("anchored", 0.2, 0.0, None, 0.5),
            ("anchored", 0.0, 0.2, None, 0.1),
            ("reset", 0.3, 0.0, "first 25%", 0.3),
            ("mine", 0.2, 0.0, None, 0.3),
        )
        for rule in ("ID", "OOD")
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows)
    for draw in (
        lambda: plot_recovery(table),
        lambda: plot_recovery(table, x="top"),
        lambda: plot_recovery(table, y="success", rule="ID"),
    ):
        axes = draw()
        assert axes.get_xlabel() and axes.get_ylabel() and axes.lines
        axes.figure.canvas.draw()
        plt.close(axes.figure)
    with pytest.raises(ValueError, match="no rows"):
        plot_recovery(table, rule="VQA")


# --- adapters


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x).logits


@pytest.fixture(params=["llama", "gpt2"])
def models(request, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    make = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=3,
                num_key_value_heads=1,
                initializer_range=0.2,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=3, n_positions=32, initializer_range=0.2)
        ),
    }[request.param]
    for i, name in enumerate(("target", "donor")):
        torch.manual_seed(i)
        make().save_pretrained(tmp_path / name)
    return tmp_path / "target", tmp_path / "donor"


@pytest.mark.parametrize(
    "method,options",
    [
        ("anchored", {}),
        ("uv", {}),
        ("uv", dict(tail=0.1, layers=[1])),
        ("interpolate", dict(alpha=0.3)),
        ("direct", dict(kinds=["q_proj", "v_proj"])),
    ],
)
def test_lora_round_trip(models, tmp_path, method, options):
    "peft on the target, our own reader, and the recovered checkpoint say the same."
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = recover(*models, tmp_path / "adapter", method, top=0.1, as_lora=True, progress=False, **options)
    whole = recover(*models, tmp_path / "whole", method, top=0.1, progress=False, **options)
    settings, table = recovery_record(adapter)
    assert {p.name for p in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "recovery.json"}
    assert 0 <= settings["lora_error"] <= settings["lora_error_max"] < 1e-6
    if method == "uv" and not options:
        assert (table.lora_rank == 2 * table.restored).all()
    if method == "anchored":
        assert (table.lora_rank <= 3 * table.restored).all()
    x = torch.arange(16)[None]
    plain, expected = (logits(AutoModelForCausalLM.from_pretrained(f), x) for f in (models[0], whole))
    model = AutoModelForCausalLM.from_pretrained(models[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(model, adapter)  # a missing or misplaced key is a warning in peft
    config = loaded.peft_config["default"]
    assert config.rank_pattern == config.alpha_pattern and config.base_model_name_or_path == str(models[0].resolve())
    assert all(s == 1.0 for layer in loaded.modules() if hasattr(layer, "lora_A") for s in layer.scaling.values())
    assert float((expected - plain).abs().max()) > 100 * float((logits(loaded, x) - expected).abs().max())
    torch.testing.assert_close(logits(loaded, x), expected, rtol=1e-4, atol=1e-4)
    read, target = Checkpoint(adapter), Checkpoint(whole)
    for m in target.matrices():
        torch.testing.assert_close(read.matrix(m), target.matrix(m), rtol=0, atol=2e-6)
    back = recover(read, models[1], tmp_path / "back", top=0, progress=False)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(back), x), expected, rtol=1e-4, atol=1e-4)


def test_lora_rank_and_dtype_cost_what_the_record_says(models, tmp_path):
    full, cut, coarse = (
        recover(*models, tmp_path / n, top=0.2, as_lora=d, rank=r, certify="quick", progress=False)
        for n, d, r in (("a", True, None), ("b", "float32", 3), ("c", "bfloat16", None))
    )
    (a, ta), (b, tb), (c, tc) = map(recovery_record, (full, cut, coarse))
    assert (
        tb.lora_rank.max() == 3 < ta.lora_rank.min()
        and a["lora_error"] < 1e-6 < 1e-4 < c["lora_error"] < 2**-6
        and b["lora_error"] > 0.01
    )
    target, donor = map(Checkpoint, models)
    m = target.matrices()[0]
    L, R, _ = edit_factors("anchored", target.matrix(m), donor.matrix(m), 0.2)
    s = torch.linalg.svdvals(L @ R)
    assert tb.set_index("matrix").lora_error[m.name] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-5)
    assert (
        load_file(coarse / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
        and c["as_lora"] == "bfloat16"
    )


def test_lora_of_a_bfloat16_model(models, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for f in models:
        model = AutoModelForCausalLM.from_pretrained(f).bfloat16()
        model.save_pretrained(f)
    adapter, whole = (
        recover(*models, tmp_path / n, top=0.1, as_lora=l, progress=False)
        for n, l in (("adapter", True), ("whole", False))
    )
    merged = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32), adapter)
        .merge_and_unload()
        .state_dict()
    )
    target, certified = Checkpoint(whole), recovery_record(adapter)[1].set_index("matrix")
    for m in target.matrices():
        if m.view is None:
            torch.testing.assert_close(
                (merged[m.tensor].T if m.transposed else merged[m.tensor]).bfloat16().float(),
                target.matrix(m).float(),
                rtol=2**-7,
                atol=1e-6,
            )
        assert certified.changed[m.name] == pytest.approx(
            int((Checkpoint(models[0]).matrix(m) != target.matrix(m)).sum()), abs=3
        )


def test_lora_factors_are_balanced_and_of_the_edits_rank():
    L, R = gaussian(30, 8), gaussian(8, 20, seed=1)
    L = torch.cat([L, L[:, :3]], 1)
    R = torch.cat([R, R[:3]])  # 11 columns, rank 8
    B, A = lora_factors(L, R, dtype=torch.float64)
    assert B.shape == (30, 8) and A.shape == (8, 20)
    torch.testing.assert_close(B @ A, L @ R)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-9)
    assert lora_factors(L[:, :0], R[:0])[0].shape == (30, 0) and lora_factors(0 * L, R)[0].shape == (30, 0)
    wide = lora_factors(gaussian(5, 40), gaussian(40, 7))
    assert wide[0].shape == (5, 5)


def test_what_lora_refuses(models, tmp_path):
    names = sorted(p.name for p in tmp_path.iterdir())
    embedding = "wte" if "transformer" in Checkpoint(models[0]).names[0] else "embed_tokens"
    for error, match, options in (
        (ValueError, "norms and biases", dict(method="reset")),
        (ValueError, "changes nothing", dict(top=0)),
        (ValueError, "rank = 0", dict(rank=0)),
        (ValueError, "rank = True", dict(rank=True)),
        (ValueError, "expected True", dict(as_lora="int8")),
        (CheckpointError, "class Embedding", dict(kinds=embedding)),
    ):
        with pytest.raises(error, match=match):
            recover(*models, tmp_path / "out", **dict(as_lora=True, progress=False) | options)
        assert sorted(p.name for p in tmp_path.iterdir()) == names
    config = json.loads((models[0] / "config.json").read_text())
    for architectures, match in (
        (["NoSuchModel"], "knows"),
        (None, "knows"),
        (["os"], "knows"),
        (["AutoConfig"], "knows"),
    ):
        (models[0] / "config.json").write_text(json.dumps(config | dict(architectures=architectures)))
        with pytest.raises(CheckpointError, match=match):
            recover(*models, tmp_path / "out", as_lora=True, progress=False)


def test_lora_of_experts_is_refused_by_name(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i)
        MixtralForCausalLM(
            MixtralConfig(
                vocab_size=40,
                hidden_size=24,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=3,
                num_key_value_heads=3,
                num_local_experts=2,
            )
        ).save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError, match="experts.*kinds="):
        recover(tmp_path / "a", tmp_path / "b", tmp_path / "out", as_lora=True, progress=False)
    adapter = recover(
        tmp_path / "a",
        tmp_path / "b",
        tmp_path / "out",
        kinds=["q_proj", "o_proj"],
        as_lora=True,
        certify="quick",
        progress=False,
    )
    assert len(recovery_record(adapter)[1]) == 2


def test_lora_of_names_without_the_prefix(gpt2, tmp_path):
    "GPT-2's own checkpoints leave out 'transformer.'; the adapter has to name the module all the same."
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for f in gpt2:
        w = load_file(f / "model.safetensors")
        save_file(
            {k.removeprefix("transformer."): v for k, v in w.items()},
            f / "model.safetensors",
            metadata={"format": "pt"},
        )
    adapter, whole = (
        recover(*gpt2, tmp_path / n, top=0.2, as_lora=l, certify="quick", progress=False)
        for n, l in (("adapter", True), ("whole", False))
    )
    assert all("model.transformer.h." in k for k in load_file(adapter / "adapter_model.safetensors"))
    x = torch.arange(12)[None]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2[0]), adapter)
    torch.testing.assert_close(
        logits(loaded, x), logits(AutoModelForCausalLM.from_pretrained(whole), x), rtol=1e-4, atol=1e-4
    )


# --- sweeps


@pytest.mark.parametrize("method", [*SPECTRAL, "sigma_only"])
@pytest.mark.parametrize("band", ["head", "tail", "both", "bulk"])
@pytest.mark.parametrize("m,n", [(40, 40), (60, 31), (31, 60)])
def test_sweep_equals_one_by_one(method, band, m, n):
    target, donor = pair(m, n)
    f = factorize(target), factorize(donor)
    for ks in ([0, Ranks(1), 4, 9], [0.3, 0.05, 0.5, 0.3]):
        if band == "both":
            ks = ks[:3] if isinstance(ks[0], int) else [0.05, 0.3]
        found = list(sweep_matrix(target, donor, ks, method, f, band))
        assert [k for k, _ in found] == sorted(set(ks))
        for k, W in found:
            asked = dict(top=0) | {name: k for name in sweeping.SWEEP_BANDS[band]}
            torch.testing.assert_close(W, METHODS[method](target, donor, **asked, factors=f), rtol=0, atol=1e-11)
    assert not torch.equal(found[0][1], found[-1][1])


@pytest.mark.parametrize("dtype,flips", [(torch.float32, 1e-3), (torch.float16, 0.02), (torch.bfloat16, 0.005)])
@pytest.mark.parametrize("method", SPECTRAL)
def test_sweep_in_stored_dtypes(method, dtype, flips):
    "At most one unit in the last place of the largest weights, in few of the numbers; k = 0 is the target to the byte."
    for size in (0.01, 0.3):
        target, donor = (x.to(dtype) for x in pair(90, 70, size))
        for k, W in sweep_matrix(target, donor, [0, 0.05, 0.2, 0.5], method):
            one = METHODS[method](target, donor, k)
            assert W.dtype == dtype
            if k == 0:
                assert torch.equal(W, target)
            assert float((W != one).float().mean()) < flips
            assert float((W.double() - one.double()).abs().max()) <= torch.finfo(dtype).eps * float(one.abs().max())


@pytest.mark.parametrize("method", ["anchored", "symmetric"])
def test_sweep_where_directions_coincide(method):
    "Small sines take the exact route, and the sweep says the same as the single edit."
    order = torch.arange(30)
    order[[4, 5]] = order[[5, 4]]
    for nearly in (0.0, 1e-4, 1e-2):
        t, d = swapped(40, 30, order, nearly)
        target, donor = product(t), product(d)
        for k, W in sweep_matrix(target, donor, [3, 5, 8], method, (t, d)):
            torch.testing.assert_close(W, METHODS[method](target, donor, k, factors=(t, d)), rtol=0, atol=1e-10)


def test_sweep_with_the_donors_sigma():
    target, donor = pair(40, 30)
    for method in ("uv", "anchored", "symmetric"):
        for k, W in sweep_matrix(target, donor, [2, 7, 30], method, sigma="donor"):
            torch.testing.assert_close(W, METHODS[method](target, donor, k, sigma="donor"), rtol=0, atol=1e-10)
        torch.testing.assert_close(W, donor, rtol=0, atol=1e-10)


def test_sweep_decomposes_once(folders, monkeypatch):
    calls = []
    real = recovery.factors_of
    monkeypatch.setattr(recovery, "factors_of", lambda *args, **options: calls.append(1) or real(*args, **options))
    monkeypatch.setattr(recovery, "factorize", lambda W: pytest.fail("a sweep decomposes nothing else"))
    table = sweep(*folders, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5), "anchored", progress=False)
    assert len(calls) == 2 * 12 and table.k.tolist() == [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("method", ["uv", "anchored"])
def test_sweep_of_a_checkpoint(checkpoints, tmp_path, method):
    target, donor = checkpoints
    ks, seen = (0.2, 0.0, 0.5), []
    score = lambda folder: seen.append(Checkpoint(folder).digest()) or len(seen)
    table, rows = sweep(
        target, donor, ks, method, score=score, out=tmp_path / "out", certify="full", matrices=True, progress=False
    )
    assert table.k.tolist() == [0.0, 0.2, 0.5] and table.score.tolist() == [1, 2, 3] and len(rows) == 36
    exact = target.dtype("model.norm.weight") == torch.float32
    for i, k in enumerate(table.k):
        kept, one = (
            Checkpoint(tmp_path / "out" / f"head-{k}"),
            recover(target, donor, tmp_path / f"one{k}", method, top=k, progress=False),
        )
        settings, certified = recovery_record(one)
        other = recovery_record(kept.path)[0]
        assert (
            kept.digest() == seen[i]
            and settings["top"] == other["top"] == k
            and settings["restored"] == other["restored"] == table.restored[i]
        )
        for m in kept.matrices():
            a, b = kept.matrix(m).double(), Checkpoint(one).matrix(m).double()
            assert float((a - b).abs().max()) <= torch.finfo(target.dtype(m.name)).eps * float(b.abs().max()) and float(
                (a != b).double().mean()
            ) < (0.002 if exact else 0.02)
        for column in ("edit_norm", "edit_norm_all", "changed"):
            assert table[column][i] == pytest.approx(settings[column], rel=1e-3)
        assert table.sigma_change_of_norm[i] == pytest.approx(certified.sigma_change_of_norm.max(), rel=1e-2, abs=1e-6)
    assert (table.energy_change.max() > 1e-3) == (method == "uv") and (
        table.loc[0, ["edit_norm", "changed", "energy_change"]] == 0
    ).all()
    assert pd.read_csv(tmp_path / "out" / "sweep.csv").k.tolist() == table.k.tolist()
    names = sorted(p.name for p in tmp_path.iterdir())
    quick = sweep(target, donor, ks, method, score=score, progress=False)
    assert (
        len(seen) == 6
        and seen[:3] == seen[3:]
        and quick.edit_norm.tolist() == table.edit_norm.tolist()
        and sorted(p.name for p in tmp_path.iterdir()) == names
    )


def test_what_a_sweep_refuses(folders, tmp_path, monkeypatch):
    names = sorted(p.name for p in tmp_path.iterdir())
    for error, match, options in (
        (ValueError, "cannot be swept", dict(method="interpolate")),
        (ValueError, "cannot be swept", dict(method="reset")),
        (ValueError, "band", dict(band="middle")),
        (ValueError, "empty", dict(ks=())),
        (ValueError, "not both", dict(ks=(0.1, 3))),
        (ValueError, "ks = 1.5", dict(ks=(1.5,))),
        (ValueError, "ks = 1 is ambiguous", dict(ks=(1, 2))),
        (ValueError, "of 8", dict(ks=(9,))),
        (ValueError, "takes no sigma", dict(method="direct", sigma="donor")),
        (ValueError, "finite number", dict(score=lambda f: "good", out=tmp_path / "out", ks=(0.1,))),
        (ValueError, "finite number", dict(score=lambda f: float("nan"), ks=(0.1,))),
        (CheckpointError, "exists already", dict(out=folders[0])),
    ):
        with pytest.raises(error, match=match):
            sweep(*folders, progress=False, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == names
    monkeypatch.setattr(sweeping.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=1000))())
    with pytest.raises(CheckpointError, match="GB free"):
        sweep(*folders, out=tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == names


# --- search


class Needs:
    "A score in [0, 1]: how far the heads of the needed matrices have turned to the donor's; it counts its calls."

    def __init__(self, target, donor, layers, kinds, share=0.2):
        self.donor, self.calls = Checkpoint(donor), []
        self.needed = [m for m in self.donor.matrices() if m.layer in layers and m.kind in kinds]
        self.heads = {
            m.name: (f := factorize(self.donor.matrix(m)), max(1, int(len(f.s) * share + 0.5))) for m in self.needed
        }
        start = Checkpoint(target)
        self.before = {m.name: self.angle(start, m) for m in self.needed}

    def angle(self, c, m):
        d, k = self.heads[m.name]
        return float(principal_angles(factorize(c.matrix(m)).U[:, :k], d.U[:, :k]).max())

    def __call__(self, folder):
        self.calls.append(str(folder))
        c = Checkpoint(folder)
        return float(np.mean([1 - self.angle(c, m) / self.before[m.name] for m in self.needed]))


def test_search_finds_what_is_needed(folders, tmp_path):
    score = Needs(*folders, layers=[1], kinds=["up_proj", "q_proj"])
    found = search(*folders, score, 0.999, tmp_path / "out", budget=80, progress=False, steps=20)
    assert (
        found.reached and found.settings["layers"] == [1] and sorted(found.settings["kinds"]) == ["q_proj", "up_proj"]
    )
    assert (
        found.settings["tail"] == 0.0
        and found.settings["top"] == pytest.approx(0.2, abs=0.03)
        and "budget" not in found.message
    )
    assert (
        score(found.folder) == found.score >= 0.999
        and found.restored
        == recovery_record(found.folder)[0]["restored"]
        == found.history[found.history.reached].restored.min()
    )
    assert len(score.calls) - 1 == len(found.history) <= 80 and sorted(
        p.name for p in (tmp_path / "out").iterdir()
    ) == ["best", "search.jsonl"]
    again = recover(*folders, tmp_path / "again", **found.settings, progress=False)
    torch.testing.assert_close(torch.tensor(score(again)), torch.tensor(found.score), rtol=1e-4, atol=0)


def test_search_keeps_to_its_budget_and_says_so(folders, tmp_path):
    score = Needs(*folders, layers=[0, 2], kinds=["up_proj", "down_proj"])
    for budget in (2, 5, 9):
        found = search(*folders, score, 0.999, tmp_path / f"out{budget}", budget=budget, name="needs", progress=False)
        assert (
            len(score.calls) == budget == len(found.history) and found.reached and "budget was used up" in found.message
        )
        score.calls.clear()
    more = search(*folders, score, 0.999, tmp_path / "out9", budget=14, name="needs", progress=False)
    assert len(score.calls) == 5 and len(more.history) == 14 and more.restored <= found.restored


def test_search_that_cannot_reach_its_goal(folders, tmp_path):
    score = Needs(*folders, layers=[1], kinds=["up_proj"])
    found = search(*folders, score, 2.0, tmp_path / "out", budget=30, steps=8, progress=False)
    assert (
        not found.reached
        and "was not reached, and not by restoring everything" in found.message
        and found.score == found.history.score.max()
    )
    assert (
        Checkpoint(found.folder).digest()
        == json.loads((tmp_path / "out" / "search.jsonl").read_text().splitlines()[int(found.history.score.argmax())])[
            "sha256"
        ]
    )


def test_search_with_nothing_to_do(folders, tmp_path):
    found = search(*folders, lambda folder: 1.0, 0.5, tmp_path / "out", progress=False)
    assert found.reached and found.restored == 0 and "by itself" in found.message and len(found.history) == 1
    assert (found.folder / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()


def test_search_does_not_trust_monotony(folders, tmp_path):
    "The full restoration fails here, and some smaller ones do not."

    def score(folder):
        share = recovery_record(folder)[0]["edit_norm"]
        return 1.0 if 0.2 < share < 0.7 else 0.0

    found = search(*folders, score, 1.0, tmp_path / "out", budget=60, progress=False)
    assert found.reached and found.score == 1.0 == score(found.folder) and not found.history.score.iloc[1]
    assert found.restored == found.history[found.history.reached].restored.min()


@pytest.mark.parametrize("method", ["uv", "random", "sigma_only"])
def test_search_with_other_methods(folders, tmp_path, method):
    found = search(
        *folders,
        lambda f: recovery_record(f)[0]["edit_norm"],
        0.05,
        tmp_path / "out",
        budget=12,
        bands="head",
        method=method,
        seed=3,
        progress=False,
    )
    assert (
        found.settings["method"] == method
        and found.history["tail"].eq(0).all()
        and found.reached == (found.score >= 0.05)
    )


def test_killed_search_goes_on_without_scoring_twice(folders, tmp_path):
    code = f"""
import sys, time, torch; torch.set_num_threads(1)
sys.path[:0] = [{os.path.dirname(__file__)!r}]
from test_recovery import Needs
from gp_spectral.sweep import search
class Slow(Needs):
    def __call__(self, folder): value = super().__call__(folder); time.sleep(0.15); return value
pair = {str(folders[0])!r}, {str(folders[1])!r}
score = Slow(*pair, [1], ['up_proj', 'q_proj'])
search(*pair, score, 0.999, 'killed', budget=60, steps=16, name='needs', progress=False)
"""
    log = tmp_path / "killed" / "search.jsonl"
    child(tmp_path, code, lambda: log.exists() and log.read_bytes().count(b"\n") >= 5)
    done = log.read_bytes().count(b"\n")
    with open(log, "ab") as f:
        f.write(b'{"key": "cut o')  # as if the kill had hit the writing
    score = Needs(*folders, [1], ["up_proj", "q_proj"])
    resumed = search(*folders, score, 0.999, tmp_path / "killed", budget=60, steps=16, name="needs", progress=False)
    calls = len(score.calls)
    quiet = search(*folders, score, 0.999, tmp_path / "quiet", budget=60, steps=16, name="needs", progress=False)
    assert calls == len(quiet.history) - done and len(score.calls) - calls == len(quiet.history)
    drop, ended = ["seconds"], log.read_bytes()
    search(
        *folders, score, 0.999, tmp_path / "killed", budget=60, steps=16, name="needs", progress=False
    )  # the record is whole again
    assert len(score.calls) - calls == len(quiet.history) and log.read_bytes() == ended
    pd.testing.assert_frame_equal(resumed.history.drop(columns=drop), quiet.history.drop(columns=drop))
    assert (
        resumed._replace(folder=None, history=None) == quiet._replace(folder=None, history=None)
        and Checkpoint(resumed.folder).digest() == Checkpoint(quiet.folder).digest()
    )
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["best", "search.jsonl"]


def test_search_records_belong_to_their_inputs(folders, tmp_path):
    "Another donor, goal or method is not answered from old scores, unless the candidate is the same."
    score = Needs(*folders, [1], ["up_proj"])
    search(*folders, score, 0.9, tmp_path / "out", budget=6, name="needs", progress=False)
    n = len(score.calls)
    search(*folders, score, 0.95, tmp_path / "out", budget=2, name="needs", progress=False)
    assert len(score.calls) == n
    search(*folders, score, 0.9, tmp_path / "out", budget=2, method="uv", name="needs", progress=False)
    assert len(score.calls) == n + 2
    other = write(tmp_path / "other", changed(weights(), seed=9))
    search(folders[0], other, score, 0.9, tmp_path / "out", budget=2, name="needs", progress=False)
    assert len(score.calls) == n + 4


@pytest.mark.parametrize("kind", ["lambda", "inner", "partial", "object"])
def test_two_scores_without_a_name_are_not_taken_for_one(folders, tmp_path, kind):
    import functools

    class Constant:
        def __init__(self, x):
            self.x = x

        def __call__(self, folder):
            return self.x

    def inner(x):
        def score(folder):
            return x

        return score

    make = {
        "inner": inner,
        "object": Constant,
        "partial": lambda x: functools.partial(_constant, x),
        "lambda": lambda x: lambda folder: x,
    }[kind]
    first = search(*folders, make(1.0), 0.5, tmp_path / "out", budget=4, progress=False)
    assert first.score == 1.0
    with pytest.raises(ValueError, match="name="):
        search(*folders, make(0.0), 0.5, tmp_path / "out", budget=4, progress=False)
    second = search(*folders, make(0.0), 0.5, tmp_path / "out", budget=4, name="nothing", progress=False)
    assert second.score == 0.0 and not second.reached
    again = search(
        *folders, lambda f: 1 / 0, 0.5, tmp_path / "out", budget=4, name="nothing", progress=False
    )  # on record under that name
    assert again.score == 0.0


def _constant(x, folder):
    return x


def test_score_command(folders, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import sys, os\nprint('step 3: loading', len(os.listdir(sys.argv[1]))); print('score:', -1.5e-1)"
    )
    assert score_command(f"{sys.executable} {script} {{folder}}")(folders[0]) == -0.15
    (tmp_path / "a b").mkdir()
    assert score_command(f"{sys.executable} -c 'import sys; print(len(sys.argv[1]))' '{{folder}}/x; echo 7'")(
        tmp_path / "a b"
    ) == len(str(tmp_path / "a b")) + len("/x; echo 7")
    table = sweep(*folders, (0.1,), score=f"{sys.executable} {script} {{folder}}", progress=False)
    assert table.score.tolist() == [-0.15]
    for match, command in (
        ("no {folder}", "true"),
        ("ended with 3", f"{sys.executable} -c 'import sys; print(5); sys.exit(3)' {{folder}}"),
        ("cannot be run", "no-such-program-at-all {folder}"),
    ):
        with pytest.raises(ValueError, match=match):
            score_command(command)(folders[0])


@pytest.mark.parametrize(
    "said, number",
    [
        ("accuracy 1,319", 1319),
        ("0.5\nresult: 2e-3\n", 0.002),
        ("-.5", -0.5),
        ("hello", None),
        ("", None),
        ("0.51 (1,319 problems)", None),
        ("7\nstep 3 loss nan", None),
        ("loss: nan", "nan"),
        ("inf", "inf"),
        ("info: 4", 4),
    ],
)
def test_the_number_of_a_score(tmp_path, said, number):
    (tmp_path / "score.py").write_text(f"print({said!r})")
    score = score_command(f"{sys.executable} {tmp_path / 'score.py'} {{folder}}")
    if number is None:
        with pytest.raises(ValueError, match="the only number of its last line"):
            score(tmp_path)
    elif isinstance(number, str):
        with pytest.raises(ValueError, match="expected a finite number"):
            sweeping._scored(score, tmp_path)
    else:
        assert score(tmp_path) == number


def test_a_sweep_keeps_what_it_has_when_one_score_fails(folders, tmp_path):
    (tmp_path / "score.py").write_text("import sys; sys.exit('no memory') if '0.3' in sys.argv[1] else print(1)")
    command = [
        "sweep",
        str(folders[0]),
        "--donor",
        str(folders[1]),
        "--ks",
        "0.1",
        "0.3",
        "--out",
        str(tmp_path / "out"),
        "--score",
        f"{sys.executable} {tmp_path / 'score.py'} {{folder}}",
    ]
    with pytest.warns(UserWarning, match="no score for k = 0.3: .*no memory"):
        assert cli.main(command) == 1
    assert (
        pd.read_csv(tmp_path / "out/sweep.csv").score.isna().tolist() == [False, True]
        and (tmp_path / "out/head-0.3/model.safetensors").exists()
    )


@pytest.mark.parametrize("r", [128, 320, 512, 896, 1280, 2048, 3584, 4096, 5120, 8192, 10, 9, 3])
def test_three_bands_fill_the_ranks(r):
    head, end, mid = chosen_ranks(r, 1 / 3, 1 / 3, 1 / 3)
    assert r - 2 <= head + end + mid <= r and taken_ranks(r, 1 / 3, 1 / 3, 1 / 3).sum() == head + end + mid


def test_a_search_looks_at_the_bands_one_by_one(folders, tmp_path):
    "Where the head alone reaches the goal, half of what head and tail take together is found, within few scores."

    def score(folder):
        record = recovery_record(folder)[0]
        return min(record["top"], 0.2)

    found = search(*folders, score, 0.2, tmp_path / "out", budget=20, progress=False, name="head")
    assert found.settings["tail"] == 0 and 0.2 <= found.settings["top"] <= 0.2 + 1 / 64


def test_a_donor_that_cannot_be_meant(tmp_path):
    base = weights()
    other = {
        n: torch.randn(w.shape, generator=torch.Generator().manual_seed(i)) for i, (n, w) in enumerate(base.items())
    }
    name = next(n for n, w in base.items() if w.ndim == 2 and "q_proj" in n)
    lacks = base | {name: torch.zeros_like(base[name])}
    a, b, c = (write(tmp_path / n, w) for n, w in (("a", base), ("b", other), ("c", lacks)))
    with pytest.warns(UserWarning, match="look unrelated"):
        recover(a, b, tmp_path / "x", progress=False)
    with pytest.warns(UserWarning, match="directions that are no more than rounding"):
        recover(a, c, tmp_path / "y", progress=False)


def test_an_adapter_is_warned_of_too(models, tmp_path):
    with pytest.warns(UserWarning, match="look unrelated"):
        recover(*models, tmp_path / "x", as_lora=True, progress=False)


def test_what_cannot_be_read_is_told_before_the_work(tmp_path, monkeypatch):
    w = weights()
    name = "model.norm.weight"
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", w | {name: torch.full_like(w[name], float("nan"))})
    monkeypatch.setattr(recovery, "_edited", None)
    with pytest.raises(CheckpointError, match=f"{name} .* NaN"):
        recover(a, b, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_what_a_search_refuses(folders, tmp_path):
    names = sorted(p.name for p in tmp_path.iterdir())
    for match, options in (
        ("cannot be searched", dict(method="interpolate")),
        ("bands", dict(bands="middle")),
        ("bands", dict(bands=("head", "head"))),
        ("goal", dict(goal=float("nan"))),
        ("budget", dict(budget=1)),
        ("steps", dict(steps=1)),
        ("slack", dict(slack=(0.5,))),
        ("in none", dict(kinds="embed_tokens")),
        ("no {folder}", dict(score="true")),
        ("takes no sigma", dict(method="direct", sigma="donor")),
    ):
        with pytest.raises(ValueError, match=match):
            search(*folders, **dict(score=len, goal=1.0, out=tmp_path / "out", progress=False) | options)
        assert sorted(p.name for p in tmp_path.iterdir()) == names
    with pytest.raises(CheckpointError, match="holds no search"):
        search(*folders, len, 1.0, folders[0])
    with pytest.raises(ValueError, match="finite number"):
        search(*folders, lambda f: None, 1.0, tmp_path / "out", progress=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["factors", "search.jsonl"]
    (tmp_path / "out" / "search.jsonl").write_text("nonsense\n")
    with pytest.raises(CheckpointError, match="damaged"):
        search(*folders, lambda f: 1.0, 1.0, tmp_path / "out", progress=False)


@pytest.mark.parametrize("method", ["anchored", "interpolate_to_norm"])
def test_the_number_of_workers_changes_no_bit(checkpoints, tmp_path, method):
    target, donor = checkpoints
    written = [recover(target, donor, tmp_path / str(n), method=method, workers=n, progress=False) for n in (1, 4)]
    assert (
        written[0].joinpath("model.safetensors").read_bytes() == written[1].joinpath("model.safetensors").read_bytes()
    )
    one, four = (recovery_record(w) for w in written)
    pd.testing.assert_frame_equal(one[1], four[1], check_exact=True)  # the rows in the order of the matrices
    assert one[0]["edit_norm_all"] == four[0]["edit_norm_all"]


def test_own_methods_are_given_what_they_ask_and_take_nothing(methods):
    A, B = torch.randn(2, 8, 6, dtype=torch.float64)
    kept = A.clone()

    @recovery.method("spoils")
    def _spoils(W, t, d, taken):
        W += 1
        return W

    @recovery.method("normed")
    def _normed(W, t, d, taken, *, norm):
        return W + norm / W.numel() ** 0.5

    assert torch.equal(edit_matrix("spoils", A, B), kept + 1) and torch.equal(A, kept)
    assert edit_matrix("interpolate", A, B, alpha=0.0).data_ptr() != A.data_ptr()
    size = (edit_matrix("anchored", A, B) - A).norm()
    assert abs((edit_matrix("normed", A, B) - A).norm() - size) < 1e-9 * size
    with pytest.raises(ValueError, match="like = 'normed'"):
        edit_matrix("random", A, B, like="normed")  # it would ask itself
    for name in ("uv", "target"):
        with pytest.raises(ValueError, match=f"a method '{name}' already"):
            recovery.method(name)(lambda W, t, d, taken: W)


def test_a_sweep_hears_the_options_of_a_method_that_grows(methods):
    from gp_spectral.sweep import sweep_matrix

    @recovery.method("grow", steps=recovery.METHODS["uv"].steps)
    def _grow(W, t, d, taken, *, strength=1.0):
        return W + strength * (d.U[:, taken] * t.s[taken]) @ d.Vh[taken]

    A, B = torch.randn(2, 8, 6, dtype=torch.float64)
    [(_, swept)] = sweep_matrix(A, B, [0.5], "grow", options=dict(strength=0.1))
    assert torch.allclose(swept, edit_matrix("grow", A, B, 0.5, options=dict(strength=0.1)))


def test_a_study_tries_methods_of_ones_own_as_they_can_be_tried(methods):
    from gp_spectral.stages import recovery_plan

    recovery.method("full", top=1.0)(lambda W, t, d, taken: W)
    recovery.method("plain")(lambda W, t, d, taken: W)

    @recovery.method("asks")
    def _asks(W, t, d, taken, *, strength: float):
        return W

    assert recovery_plan((0.2,), 0.3)[-2:] == [dict(method="full", top=1.0), dict(method="plain", top=0.3)]
