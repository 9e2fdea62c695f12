"Which single weights changed: planted changes are found, as large as they are, and noise is only noise."

import math
import pandas as pd
import pytest
import torch
from made import weights, write
from gp_spectral.cli import main
from gp_spectral.folders import CheckpointError
from gp_spectral.svd import factorize
from gp_spectral.updates import overlap_summary, principal_weights, update_summary, updates

NAME = "model.layers.0.self_attn.q_proj.weight"


def planted(tensors, where, size=0.5):
    "The same tensors, some weights of one matrix increased."
    W = tensors[NAME].clone()
    W[where] += size
    return tensors | {NAME: W}


@pytest.fixture
def folders(tmp_path):
    "A base, and two trainings that touch the same and other weights of one matrix."
    base, (m, n) = weights(), weights()[NAME].shape
    count = round(0.05 * m * n)
    order = torch.randperm(m * n, generator=torch.Generator().manual_seed(3))
    mask = lambda some: torch.isin(torch.arange(m * n), some).view(m, n)
    half = count // 2
    one, two = mask(order[:count]), mask(torch.cat([order[:half], order[count : 2 * count - half]]))
    made = dict(base=base, one=planted(base, one), two=planted(base, two), back=planted(base, one, -0.25))
    return [write(tmp_path / name, tensors) for name, tensors in made.items()], count / (m * n), half / count


def test_planted_changes_are_found(folders):
    (base, one, two, back), touched, shared = folders
    found = updates(base, [one, two, back], progress=False, cache=None)
    rows = found.rows[found.rows.matrix == NAME].set_index(["other", "noise"])
    assert rows.loc[("one", False), "equal"] == pytest.approx(1 - touched, abs=1e-12)
    assert rows.loc[("one", True), "equal"] == 0  # noise of that size leaves no float32 weight as it is
    assert rows.loc[("one", True), "change"] == pytest.approx(rows.loc[("one", False), "change"], rel=1e-12)
    others = found.rows[found.rows.matrix != NAME]
    assert (others.equal == 1).all() and (others.change == 0).all() and others.principal.isna().all()
    pairs = overlap_summary(found).set_index(["other", "beside"])
    assert pairs.loc[("one", "two"), "shared"] == pytest.approx(shared, abs=1e-12)
    assert pairs.loc[("one", "two"), "cosine"] == pytest.approx(shared, abs=1e-6)
    assert pairs.loc[("one", "back"), "cosine"] == pytest.approx(-1, abs=1e-6)
    assert pairs.loc[("one", "back"), "shared"] == 1


def test_principal_weights_are_those_of_the_leading_ranks(tmp_path):
    "Written out, and found in a checkpoint whose training touches them or keeps off them."
    base = weights()
    W = base[NAME].double()
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    k, n = max(1, round(0.1 * len(s))), round(0.05 * W.numel())
    leading = sum(s[i] * torch.outer(U[:, i], Vh[i]) for i in range(k))
    edge = leading.abs().flatten().sort(descending=True).values[n - 1]
    expected = leading.abs() >= edge
    assert torch.equal(principal_weights(factorize(W)), expected)
    off = torch.zeros_like(expected).flatten()
    off[(~expected).flatten().nonzero()[:n, 0]] = True
    folders = [write(tmp_path / name, t) for name, t in (("base", base), ("on", planted(base, expected)))]
    folders.append(write(tmp_path / "off", planted(base, off.view(W.shape))))
    rows = updates(folders[0], folders[1:], progress=False, cache=None).rows
    rows = rows[(rows.matrix == NAME) & ~rows.noise].set_index("other")
    assert rows.principal["on"] == 1 and rows.principal["off"] == 0


def test_sizes_add_up_over_matrices(folders):
    (base, one, *_), _, _ = folders
    found = updates(base, [one], progress=False, cache=None)
    row, whole = update_summary(found).iloc[0], found.rows[~found.rows.noise]
    assert row.change == pytest.approx(math.sqrt((whole.change**2).sum() / (whole["size"] ** 2).sum()), rel=1e-12)
    assert row.equal == pytest.approx((whole.equal * whole.weights).sum() / whole.weights.sum(), rel=1e-12)


def test_sixteen_bits_swallow_small_steps(tmp_path):
    "Equal as stored, and equal once rounded, of a step of a quarter of a bit."
    base = weights(dtype=torch.bfloat16)
    wide = {k: t.float() for k, t in base.items()}
    small = wide | {NAME: wide[NAME] * (1 + 2.0**-11)}
    folders = [write(tmp_path / name, t) for name, t in (("wide", wide), ("small", small))]
    row = update_summary(updates(folders[0], folders[1:], kinds="q_proj", layers="0", progress=False, cache=None)).iloc[
        0
    ]
    assert row.equal == 0 and row.equal_bf16 == 1


def test_the_command(folders, tmp_path, capsys):
    (base, one, two, _), _, _ = folders
    main(["updates", str(base), str(one), str(two), "--kinds", "q_proj", "--table", str(tmp_path / "t.csv")])
    out = capsys.readouterr().out
    assert "one, noise" in out and "shared" in out and "by chance 5%" in out
    table = pd.read_csv(tmp_path / "t.csv")
    assert set(table.kind) == {"q_proj"} and set(table.other) == {"one", "two"}
    main(["updates", str(base), str(one), "--share", "10%"])
    assert "by chance 10%" in (told := capsys.readouterr().out) and "shared  " not in told


def test_what_cannot_be_asked(folders, tmp_path):
    (base, one, *_), _, _ = folders
    for wrong in (dict(rank=0), dict(share=1.5)):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            updates(base, [one], progress=False, **wrong)
    other = write(tmp_path / "other", weights(layers=3) | {NAME: torch.ones(3, 5)})
    with pytest.raises(CheckpointError, match=NAME):
        updates(base, [other], progress=False, cache=None)
