"Comparing whole checkpoints: accuracy from end to end, floors and verdicts, killed and resumed, one process or several."
import os, signal, subprocess, sys, time
import numpy as np, pandas as pd, pytest, torch
from made import changed, gaussian, orthonormal, trained, weights, write

from gp_spectral import angles as module, svd
from gp_spectral.angles import band_slices, compare, compare_all, floor_angles, principal_angles, read_comparison, rounding_std, share_out
from gp_spectral.checkpoint import Checkpoint, CheckpointError
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
    for X in (f.U, f.Vh.T): assert (X.T @ X - torch.eye(r)).abs().max() < 1e-9
    assert ((f.U * f.s) @ f.Vh - W).abs().max() < 1e-12 and (singular_values(W) == f.s).all()
    exact = torch.linalg.svd(W, full_matrices=False)                       # subspaces too, tail included
    assert principal_angles(f.U[:, -r // 5:], exact.U[:, -r // 5:]).max() < 1e-15 * 10 ** orders + 1e-8


def test_a_matrix_that_lost_ranks():
    W = gaussian(50, 20) @ gaussian(20, 40, seed=1)
    for X in (W, W.T, torch.zeros(6, 4).double(), 1e-300 * W, 1e300 * W):
        f = factorize(X)
        assert (f.U.T @ f.U - torch.eye(len(f.s))).abs().max() < 1e-9 and (f.Vh @ f.Vh.T - torch.eye(len(f.s))).abs().max() < 1e-9
        assert ((f.U * f.s) @ f.Vh - X).abs().max() <= 1e-11 * X.abs().max()


def test_every_driver_of_this_machine():
    assert set(time_drivers((60, 30), "cpu", 1)) <= set(DRIVERS)
    for driver in ("gram", "gesdd"): assert (factorize(trained(60, 30), driver).s - factorize(trained(60, 30)).s).abs().max() < 1e-10


def test_cache(tmp_path, monkeypatch):
    c, cache = Checkpoint(write(tmp_path / "a", weights(dtype=torch.bfloat16))), FactorCache(tmp_path / "cache")
    first = factors(c, NAME, cache)
    assert len(cache.files()) == 1
    monkeypatch.setattr(svd, "_short_side", lambda *a: pytest.fail("decomposed twice"))
    again = factors(c, NAME, FactorCache(tmp_path / "cache"))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(first, factors(c, NAME, None)))   # kept or not, the same bits
    other = Checkpoint(write(tmp_path / "b", changed(weights(dtype=torch.bfloat16))))
    assert not torch.equal(factors(other, NAME, cache).s, first.s) and len(cache.files()) == 2
    for f in cache.files(): f.write_bytes(f.read_bytes()[:100])
    assert torch.equal(factors(c, NAME, cache).U, first.U)                         # damaged files are made again
    folder = tmp_path / "file"; folder.write_text("no folder")
    with pytest.warns(UserWarning, match="not kept"): factors(c, NAME, FactorCache(folder))
    assert len(spectrum(c, progress=False, cache=cache)) and len(cache.files()) == 13


# --- angles from end to end

def rotated(W, band, angle, side="U"):
    "W with a band's vectors of one side turned by one angle into directions that W does not use."
    U, s, Vh = factorize(W if side == "U" else W.T)
    ranks = band_slices(len(s))[band]; k = ranks.stop - ranks.start
    free = torch.linalg.qr(torch.cat([U, gaussian(len(U), k)], 1))[0][:, len(s):len(s) + k]
    turned = U.clone(); turned[:, ranks] = U[:, ranks] * np.cos(angle) + free * np.sin(angle)
    W = (turned * s) @ Vh
    return W if side == "U" else W.T


@pytest.mark.parametrize("angle", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.785, 1.0, 1.5])
@pytest.mark.parametrize("band", ["head", "bulk", "tail"])
@pytest.mark.parametrize("side", ["U", "V"])
def test_planted_rotations(tmp_path, angle, band, side):
    W = trained(*(60, 30) if side == "U" else (30, 60))
    a, b = write(tmp_path / "a", {NAME: W.contiguous()}), write(tmp_path / "b", {NAME: rotated(W, band, angle, side).contiguous()})
    t = compare(a, b, progress=False, cache=False).set_index(["side", "band"])
    found = t.loc[(side, band), ["mean", "median", "max"]].astype(float)
    np.testing.assert_allclose(found, angle, rtol=1e-6 if angle >= 1e-2 else 1e-3)
    others = t.drop((side, band))
    assert (others["max"] < 1e-7).all(), others


def test_signs_order_and_ties_do_not_matter(tmp_path):
    "Equal singular values inside a band leave its vectors undetermined, and its subspace not."
    s = torch.linspace(3, 1, 30).double(); s[0:6] = 3.0; s[24:] = 1.0
    U, V = orthonormal(60, 30), orthonormal(30, 30, 1)
    mixed = U.clone(), V.clone()
    for ranks in (slice(0, 6), slice(24, 30)):
        Q = orthonormal(6, 6, 2)
        for X, Y in zip(mixed, (U, V)): X[:, ranks] = Y[:, ranks] @ Q
    flips = torch.where(gaussian(30, seed=3) > 0, 1.0, -1.0)
    a, b = write(tmp_path / "a", {NAME: (U * s) @ V.T}), write(tmp_path / "b", {NAME: (mixed[0] * flips * s) @ (mixed[1] * flips).T})
    t = compare(a, b, progress=False)
    assert t[t.band != "bulk"]["max"].max() < 1e-7 and not t[t.band != "bulk"].degenerate.any()
    s[5:8] = 2.9                                                                  # a tie across the head's edge
    c = write(tmp_path / "c", {NAME: (U * s) @ V.T})
    t = compare(c, c, progress=False).set_index(["side", "band"])
    assert t.degenerate[("U", "head")] and not t.degenerate[("U", "tail")]


def test_an_unchanged_matrix_is_exactly_unchanged(tmp_path):
    w = weights(dtype=torch.bfloat16)
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", w | {NAME: changed(w)[NAME]}, shards=2)
    found = compare_all([a, b], progress=False)
    same = found.angles[found.angles.matrix != NAME]
    assert same["max"].eq(0).all() and same.verdict.eq("unchanged").all() and found.changes[found.changes.matrix != NAME].weight_change.eq(0).all()
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
                ratios.append(floor_angles(f.s, ranks, std, outside).mean() / principal_angles(X[:, ranks], Y[:, ranks]).mean())
    assert 0.85 < np.mean(ratios) < 1.15 and 0.5 < min(ratios) and max(ratios) < 2
    a, b = write(tmp_path / "a", W), write(tmp_path / "b", {k: v.to(dtype) for k, v in W.items()})
    t = compare(a, b, progress=False)
    assert (t.verdict == "noise").mean() > 0.95
    moved = write(tmp_path / "c", {k: v.to(dtype) for k, v in changed(W).items()})
    assert (compare(a, moved, progress=False).verdict == "rotated").mean() > 0.95


def test_unrelated_pair_warns(tmp_path):
    a, b = ({NAME: trained(120, 80, seed=seed)} for seed in (0, 20))
    a, b = write(tmp_path / "a", a), write(tmp_path / "b", b)
    with pytest.warns(UserWarning, match="unrelated"): t = compare(a, b, progress=False)
    assert (t.verdict == "chance").all()


def test_energy_and_intruders(tmp_path):
    W = trained(60, 40)
    U, s, Vh = factorize(W)
    new = W + 2 * s[0] * torch.outer(orthonormal(60, 1, 9)[:, 0], orthonormal(40, 1, 8)[:, 0])     # a strong direction of its own
    for x, flip in ((W, False), (W.T, True)):
        y = new.T if flip else new
        a, b = write(tmp_path / f"a{flip}", {NAME: x.contiguous()}), write(tmp_path / f"b{flip}", {NAME: y.contiguous()})
        row = compare_all([a, b], progress=False).changes.iloc[0]
        core = (torch.linalg.svd(x).U[:, :40] if not flip else torch.linalg.svd(x, full_matrices=False).U)
        V = torch.linalg.svd(x, full_matrices=False).Vh
        energy = (core.T @ (y - x) @ V.T).square() / (y - x).square().sum()
        np.testing.assert_allclose(row.dw_head_tail, energy[:8, 32:].sum(), rtol=1e-6)
        np.testing.assert_allclose(row.dw_tail_bulk, energy[32:, 8:32].sum(), rtol=1e-6)
        shares = row[[c for c in row.index if c.startswith("dw_") and c != "dw_diagonal"]].astype(float)
        np.testing.assert_allclose(shares.sum(), 1, rtol=1e-9)
        assert (row.intruders_U, row.intruders_V) == (1, 1)


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


def same(a, b):
    for x, y in zip(a, b): pd.testing.assert_frame_equal(x, y, check_exact=True)


def test_killed_it_goes_on(trio, tmp_path):
    out, rest = tmp_path / "out", [0]
    finished = lambda: len(list((out / "parts").glob("*.json")))
    for seconds in (0.0, 0.1, 0.3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(out), *trio])
        while child.poll() is None and finished() == rest[-1]: time.sleep(0.02)
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL); child.wait()
        rest.append(finished())
    assert 0 < rest[1] < rest[2] < rest[3] < 24                                  # each went further, none was finished
    with pytest.raises(CheckpointError, match="no finished comparison"): read_comparison(out)
    found = compare_all(trio, progress=False, out=out, cache=False)
    same(found, compare_all(trio, progress=False, cache=False, workers=1)); same(found, read_comparison(out))
    assert sorted(p.name for p in out.iterdir()) == ["angles.parquet", "changes.parquet", "plan.json"]
    with pytest.raises(CheckpointError, match="other details"): compare_all(trio, progress=False, out=out, details=False)
    with pytest.raises(CheckpointError, match="is no comparison"): compare_all(trio, progress=False, out=trio[0])


LAGGING = """
import os, sys, time
from accelerate import PartialState
from gp_spectral import angles
wait = PartialState.wait_for_everyone
def late(state): wait(state); time.sleep(float(os.environ["LATE"]) * (state.process_index > 0))
PartialState.wait_for_everyone = late
sys.exit(angles.main())
"""

@pytest.mark.parametrize("processes, late", [(2, 0), (4, 0), (2, 1)])
def test_several_processes_give_the_same_bits(trio, tmp_path, processes, late):
    "Also when every process but the first is late after each meeting point."
    (tmp_path / "lagging.py").write_text(LAGGING)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
                           str(tmp_path / "lagging.py"), *trio, "--out", str(tmp_path / "out"), "--no-cache"],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"LATE": str(late)})
    assert done.returncode == 0, "\n".join(l for l in done.stderr.splitlines() if "elastic" not in l)[:3000]
    assert done.stdout.count("base → sft") == 1                                   # one process speaks
    same(read_comparison(tmp_path / "out"), compare_all(trio, progress=False, cache=False))


def test_every_process_works():
    costs = np.random.default_rng(0).integers(1, 100, 200).tolist()
    for ranks in (1, 2, 7, 64):
        hands = share_out(costs, ranks)
        assert sorted(sum(hands, [])) == list(range(200)) and all(hands)
        loads = [sum(costs[i] for i in h) for h in hands]
        assert max(loads) <= max(max(costs), 4 / 3 * sum(costs) / ranks)           # Graham's bound


def test_bad_requests(trio, tmp_path, capsys):
    with pytest.raises(ValueError, match="at least two"): compare_all(trio[:1])
    with pytest.raises(ValueError, match="fraction"): compare_all(trio, fraction=0, progress=False)
    with pytest.raises(CheckpointError, match="no matrix of kind"): compare_all(trio, kinds="gate_proj", progress=False, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert module.main([trio[0], str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "o").exists()
    same_name = write(tmp_path / "x" / "base", weights(dtype=torch.bfloat16, layers=6))
    t = compare(trio[0], same_name, progress=False)
    assert len(set(t.base) | set(t.other)) == 2                                   # two folders of one name stay apart
