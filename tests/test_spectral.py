"Property and fault tests of the spectral wing, on small random matrices; no model of the game is needed."

import json
import struct

import numpy as np
import pytest
import torch
import made
from made import changed, gaussian, orthonormal, trained, weights, write
from scipy.linalg import subspace_angles

from gp_spectral import svd
from gp_spectral.angles import band_slices, compare, compare_all, forced_zeros, principal_angles
from gp_spectral.recovery import recover
from gp_spectral.checkpoint import Checkpoint, preflight
from gp_spectral.folders import CheckpointError
from gp_spectral.svd import factorize, looks_untrained, sigma_change, singular_values, spectrum

torch.set_num_threads(1)
checkpoints = made.checkpoints  # a fixture


# --- angles


@pytest.mark.parametrize("angle", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.8, 1.0, np.pi / 2])
@pytest.mark.parametrize("n,k", [(60, 7), (200, 40)])
def test_planted_rotation(angle, n, k):
    Q, theta = orthonormal(n, n), angle * torch.linspace(0.5, 1, k).double()
    A, B = (
        Q[:, :k] @ orthonormal(k, k, 1),
        (Q[:, :k] * theta.cos() + Q[:, k : 2 * k] * theta.sin()) @ orthonormal(k, k, 2),
    )
    found = principal_angles(A, B)
    assert torch.all(found.diff() >= 0)
    limit = 1e-8 if angle <= 1e-5 else 1e-10
    torch.testing.assert_close(found, theta, rtol=limit, atol=1e-15)
    torch.testing.assert_close(
        found, torch.from_numpy(np.sort(subspace_angles(A.numpy(), B.numpy()))), rtol=max(limit, 1e-7), atol=1e-15
    )  # SciPy takes the sine at 90° here, which costs it 1.5e-8


def test_float32_bases_of_known_rotation():
    Q, theta = (
        orthonormal(100, 100),
        torch.tensor([1e-5, 1e-2, 0.3], dtype=torch.float64),
    )  # all small: SciPy mixes up its two formulas otherwise
    A, B = Q[:, :3].float(), (Q[:, :3] * theta.cos() + Q[:, 3:6] * theta.sin()).float()
    torch.testing.assert_close(
        principal_angles(A, B),
        torch.from_numpy(np.sort(subspace_angles(A.double().numpy(), B.double().numpy()))),
        rtol=1e-6,
        atol=0,
    )


def test_small_among_large_and_unequal_sizes():
    Q, theta = orthonormal(80, 80), torch.tensor([1e-6, 1e-3, 0.3, 1.2, 1.5], dtype=torch.float64)
    A, B = Q[:, :5], Q[:, :5] * theta.cos() + Q[:, 5:10] * theta.sin()
    torch.testing.assert_close(principal_angles(A, B), theta, rtol=1e-8, atol=0)
    more = torch.cat([A, Q[:, 20:24]], 1) @ orthonormal(9, 9)
    for found in (principal_angles(more, B), principal_angles(B, more)):
        torch.testing.assert_close(found, theta, rtol=1e-8, atol=0)


def test_null_and_same_space():
    A = orthonormal(50, 9)
    assert principal_angles(A, A.clone()).max() == 0
    assert principal_angles(A.float().numpy(), A.float().numpy()).max() == 0
    assert principal_angles(A, A @ orthonormal(9, 9, 3)).max() < 1e-14
    assert int((principal_angles(orthonormal(10, 7), orthonormal(10, 7, 5)) < 1e-12).sum()) == forced_zeros(10, 7) == 4


def test_sign_and_permutation_invariance():
    A, B = orthonormal(40, 8), orthonormal(40, 8, 1)
    flips, order = (
        torch.where(gaussian(8, seed=2) > 0, 1.0, -1.0),
        torch.randperm(8, generator=torch.Generator().manual_seed(0)),
    )
    torch.testing.assert_close(principal_angles(A * flips, B[:, order]), principal_angles(A, B), rtol=1e-12, atol=1e-14)


def test_bad_bases():
    for bad in (gaussian(5, 3), torch.full((5, 3), torch.nan), torch.eye(3)[:, :0], gaussian(3, 5), gaussian(3)):
        with pytest.raises(ValueError):
            principal_angles(bad, orthonormal(5, 3))
    with pytest.raises(ValueError, match="rows"):
        principal_angles(orthonormal(6, 3), orthonormal(5, 3))


def test_compare_finds_the_planted_band(tmp_path):
    "Turning only the head's left vectors shows in the head of U, and nowhere else."
    W, name = trained(60, 40), "model.layers.0.mlp.up_proj.weight"
    U, s, Vh = factorize(W)
    k = 8
    turned = U.clone()
    outside = torch.linalg.qr(torch.cat([U, gaussian(60, k)], 1))[0][:, 40 : 40 + k]
    turned[:, :k] = U[:, :k] * np.cos(0.01) + outside * np.sin(0.01)
    base, other = write(tmp_path / "a", {name: W}), write(tmp_path / "b", {name: ((turned * s) @ Vh).contiguous()})
    table = compare(base, other, progress=False).set_index(["side", "band"])
    assert table.k.eq(8).all() and table.forced_zeros.eq(0).all()
    np.testing.assert_allclose(table.loc[("U", "head"), ["mean", "median", "max"]].astype(float), 0.01, rtol=1e-6)
    assert table["max"].drop(("U", "head")).max() < 1e-10 and table.sigma_change.max() < 1e-10
    assert compare(base, base, progress=False)["max"].max() == 0


def test_compare_all_decomposes_once(tmp_path, monkeypatch):
    cs = [write(tmp_path / n, weights() if n == "a" else changed(weights(), seed=ord(n))) for n in "abc"]
    calls, short_side = [], svd._short_side
    monkeypatch.setattr(svd, "_short_side", lambda *a: calls.append(1) or short_side(*a))
    table = compare_all(cs, [(0, 1), (0, 2), (1, 2)], progress=False, cache=False).angles
    assert len(calls) == 3 * 12 and len(table) == 3 * 12 * 6
    alone = compare(cs[1], cs[2], progress=False)
    assert table[(table.base == "b") & (table.other == "c")]["mean"].tolist() == alone["mean"].tolist()


def test_bands():
    for r in (1, 2, 5, 128, 1000):
        sizes = {len(range(r)[s]) for s in band_slices(r, 0.2).values()}
        assert sizes == {max(1, int(r * 0.2 + 0.5))}
    with pytest.raises(ValueError):
        band_slices(10, 0.0)


# --- spectra


def test_spectrum_and_change(tmp_path):
    base = write(
        tmp_path / "base",
        {
            "model.layers.0.q.weight": torch.diag(torch.tensor([4.0, 2.0, 0.0])),
            "model.layers.1.q.weight": torch.zeros(2, 2),
        },
    )
    other = write(
        tmp_path / "other",
        {
            "model.layers.0.q.weight": torch.diag(torch.tensor([5.0, 2.0, 1.0])),
            "model.layers.1.q.weight": torch.zeros(2, 2),
        },
    )
    table = spectrum(base, progress=False)
    assert list(table.columns) == [
        "checkpoint",
        "matrix",
        "layer",
        "kind",
        "rank",
        "sigma",
    ] and table.sigma.tolist() == [4, 2, 0, 0, 0]
    row, zero = sigma_change(base, other, progress=False).to_dict("records")
    np.testing.assert_allclose(
        [row["mean_abs_change"], row["max_abs_change"], row["weight_change"]], [0.125, 0.25, np.sqrt(2 / 20)]
    )
    np.testing.assert_allclose(
        [row["stable_rank_base"], row["stable_rank_other"], row["zero_ranks"]], [20 / 16, 30 / 25, 1]
    )
    assert np.isnan(zero["mean_abs_change"]) and zero["effective_rank_base"] == 0


def test_untrained_is_recognised():
    for m, n in ((40, 40), (128, 128), (320, 128), (64, 600)):
        for seed in range(5):
            assert looks_untrained(0.02 * gaussian(m, n, seed=seed)), (m, n, seed)
        assert not looks_untrained(trained(m, n))
    W = 0.02 * gaussian(300, 200)
    assert looks_untrained(singular_values(W), (300, 200)) and not looks_untrained(W + 0.03 * trained(300, 200))
    assert not looks_untrained(torch.zeros(30, 30))


def test_untrained_pair_warns(tmp_path):
    w = {"model.layers.0.q.weight": gaussian(64, 64)}
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", changed(w))
    with pytest.warns(UserWarning, match="untrained"):
        compare(a, b, progress=False)


# --- reading checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sharded_equals_single(tmp_path, dtype):
    w = weights(dtype=dtype)
    single, sharded = Checkpoint(write(tmp_path / "single", w)), Checkpoint(write(tmp_path / "sharded", w, shards=3))
    assert set(single.names) == set(sharded.names) and preflight(single, sharded) == []
    for name in single.names:
        assert (
            single.dtype(name) == dtype
            and torch.equal(single.tensor(name), sharded.tensor(name))
            and torch.equal(single.tensor(name), w[name])
        )
    assert len(single.matrices()) == 12 and [m.layer for m in single.matrices("k_proj")] == [0, 1, 2]


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it first"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled"):
        Checkpoint(tmp_path)


def test_truncated_everywhere(tmp_path):
    folder = write(tmp_path / "c", weights())
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for n in (0, 7, 8, 100, header, header + 8, header + 9, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            Checkpoint(folder)
    entry = json.loads(whole[8 : 8 + header])
    for broken in (
        {**entry, "model.norm.weight": {"dtype": "F32", "shape": [24]}},
        {**entry, "model.norm.weight": {"dtype": "F32", "shape": [25], "data_offsets": [0, 96]}},
        [1],
    ):
        text = json.dumps(broken).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + header :])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            Checkpoint(folder)


def test_bad_index(tmp_path):
    folder = write(tmp_path / "c", weights(), shards=3)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    (folder / "model-00002-of-00003.safetensors").rename(folder / "away")
    with pytest.raises(CheckpointError, match="model-00002"):
        Checkpoint(folder)
    (folder / "away").rename(folder / "model-00002-of-00003.safetensors")
    index.write_text(text.replace("model.norm.weight", "model.other.weight"))
    with pytest.raises(CheckpointError, match="lacks model.other.weight"):
        Checkpoint(folder)
    index.write_text(text.replace("model-00001", "../model-00001"))
    with pytest.raises(CheckpointError, match="not a file of its own folder"):
        Checkpoint(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match="no index"):
        Checkpoint(folder)


def test_preflight_lists_everything(tmp_path):
    w = weights()
    other = {k: v for k, v in w.items() if "norm" not in k}
    other["model.layers.0.mlp.up_proj.weight"] = torch.zeros(41, 24)
    other["extra"] = torch.zeros(2)
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", other)
    with pytest.raises(CheckpointError, match="6 mismatches") as e:
        preflight(a, b)
    for text in ("model.norm.weight: only in a", "extra: only in b", "(40, 24) in a, (41, 24) in b"):
        assert text in str(e.value)
    for f in (compare, sigma_change):
        pytest.raises(CheckpointError, f, a, b)
    with pytest.raises(CheckpointError):
        recover(a, b, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(preflight(a, write(tmp_path / "c", weights(dtype=torch.bfloat16)))) == len(w)


def test_nan_weights(tmp_path):
    w = weights()
    bad = {k: v.clone() for k, v in w.items()}
    bad["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", bad)
    for f in (
        lambda: compare(a, b, progress=False),
        lambda: spectrum(b, progress=False),
        lambda: recover(a, b, tmp_path / "out", progress=False),
    ):
        with pytest.raises(CheckpointError, match="model.layers.1.mlp.up_proj.weight.* NaN"):
            f()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert torch.isnan(Checkpoint(b).tensor("model.layers.1.mlp.up_proj.weight", check=False)).any()


# --- pictures


def test_plots_take_the_tables(checkpoints):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from gp_spectral.angles import angle_profile, plot_angles, plot_profile
    from gp_spectral.svd import plot_sigma_change, plot_spectrum

    target, donor = checkpoints
    for draw in (
        lambda: plot_spectrum(spectrum(target, progress=False)),
        lambda: plot_sigma_change(sigma_change(donor, target, progress=False)),
        lambda: plot_sigma_change(sigma_change(donor, donor, progress=False)),
        lambda: plot_angles(compare_all([donor, target, donor], progress=False).angles),
        lambda: plot_profile(angle_profile(donor, target, "model.layers.0.mlp.up_proj.weight")),
    ):
        axes = draw()
        assert isinstance(axes, plt.Axes) and axes.get_xlabel() + axes.get_ylabel()
        axes.figure.canvas.draw()
        plt.close(axes.figure)


def test_hopeless_drivers_are_not_tried_in_full_size(monkeypatch):
    "On a GPU: the first look is at a smaller matrix of the same form, the second at those that were near."
    from gp_spectral import svd

    asked = []

    def timed(shape, device, repeats=2, names=None):
        asked.append((tuple(shape), names))
        return {
            n: dict(gram=1.0, gesvd=9.0, gesvdj=1.5)[n] * (3 if n == "gram" and names else 1)
            for n in names or ("gram", "gesvd", "gesvdj")
        }

    monkeypatch.setattr(svd, "time_drivers", timed)
    monkeypatch.setattr(svd, "_CHOSEN", {})
    assert svd.choose_driver((11008, 4096), "cuda") == svd.choose_driver((4096, 11008), "cuda") == "gesvdj"
    assert asked == [
        ((1376, 512), None),
        ((11008, 4096), ["gram", "gesvdj"]),
    ]  # once for a shape, whichever way it lies
    assert svd.choose_driver((576, 300), "cuda") == "gram" and asked[2:] == [((576, 300), None)]
