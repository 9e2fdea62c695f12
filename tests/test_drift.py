"Drift of hidden states: measures whose truth is known, states beside a padded run, and the command."

import numpy as np
import pandas as pd
import pytest
import torch
from gp_spectral.cli import main
from gp_spectral.drift import cka, drift, last_states, procrustes
from gp_spectral.models import load_model

TEXTS = [
    f"<|user|> J Q K = 11 12 13 ; target {t} ; cards {c} <|end|>" for t in (9, 12, 24) for c in ("3 9 K", "2 J 8 4")
]


def hsic_by_hand(K, L):
    "Song et al. (2012), equation 5 as the mean over quadruples of different indices, the slow way."
    n, total, count = len(K), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
                        count += 1
    return total / count


def test_cka_is_debiased_and_right():
    g = torch.Generator().manual_seed(1)
    X, Y = torch.randn(7, 5, generator=g).double(), torch.randn(7, 4, generator=g).double()
    K, L = (Z @ Z.T for Z in (X, Y))
    wanted = hsic_by_hand(K, L) / (hsic_by_hand(K, K) * hsic_by_hand(L, L)) ** 0.5
    assert cka(X, Y) == pytest.approx(float(wanted), rel=1e-9)
    many = [cka(torch.randn(12, 200, generator=g), torch.randn(12, 200, generator=g)) for _ in range(200)]
    assert abs(np.mean(many)) < 0.05  # without debiasing it would be near 0.9


def test_procrustes_leaves_what_no_rotation_takes():
    g = torch.Generator().manual_seed(2)
    X = torch.randn(30, 6, generator=g)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    assert procrustes(X, 2 * X @ Q + 1) == pytest.approx(0, abs=1e-6)
    Y = X + 0.1 * torch.randn(30, 6, generator=g)
    a, b = (Z.double() - Z.double().mean(0) for Z in (X, Y @ Q))
    a, b = a / a.norm(), b / b.norm()
    U, _, Vh = torch.linalg.svd(b.T @ a)
    assert procrustes(X, Y @ Q) == pytest.approx(float((a - b @ U @ Vh).square().sum()), rel=1e-6)


def test_states_are_those_of_the_last_token():
    "Prompts of several lengths, in their order, against one at a time."
    model, tokenizer = load_model("tiny", device="cpu")
    ids = [tokenizer(t).input_ids for t in TEXTS]
    states = last_states(model, ids, batch=2)
    for i, x in enumerate(ids):
        with torch.no_grad():
            one = model(input_ids=torch.tensor([x]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[:, i], torch.stack([h[0, -1] for h in one]), rtol=1e-4, atol=1e-5)


def test_drift_grows_with_the_change_and_noise_is_as_large(tmp_path):
    model, tokenizer = load_model("tiny", device="cpu")
    before = {n: p.clone() for n, p in model.named_parameters()}
    for name, size in (("little", 0.01), ("much", 0.2)):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(before[n] * (1 + size * torch.sign(torch.sin(torch.arange(p.numel()).reshape(p.shape) * 1.7))))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    t = drift("tiny", [tmp_path / "little", tmp_path / "much"], dict(a=TEXTS))
    by = t[t.layer > 0].groupby(["other", "noise"]).procrustes.mean().unstack()
    by.index = [i.split("/")[-1] for i in by.index]
    assert by.loc["little", False] < by.loc["much", False] / 10
    assert (by[True] > 0).all() and by.loc["little", True] < by.loc["much", True]
    assert set(t.layer) == set(range(5)) and len(t) == 2 * 2 * 5


def test_the_command(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("\n".join(TEXTS))
    out = [str(tmp_path / f) for f in ("t.csv", "p.png")]
    assert main(
        ["drift", "tiny", "tiny", "--prompts", str(tmp_path / "q.txt"), "--table", out[0], "--plot", out[1]]
    ) in (0, None)
    assert "procrustes" in capsys.readouterr().out and len(pd.read_csv(out[0])) == 10 and (tmp_path / "p.png").exists()
    (tmp_path / "few.txt").write_text("one\ntwo")
    for wrong, said in (("few.txt", "few: 2 prompts, at least 4"), ("none.txt", "none.txt")):
        assert main(["drift", "tiny", "tiny", "--prompts", str(tmp_path / wrong)]) == 2
        assert said in capsys.readouterr().err
