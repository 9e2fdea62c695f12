"""Checkpoints as trainers and libraries leave them: what one of two has more, names in wrappers, experts in two layouts,
packed weights, adapters, towers, donors that lack directions.

What is compared is checked against the comparison of the two as they would be without the oddity: bit for bit."""

import json
import warnings

import pytest
import torch
from made import changed, gaussian, trained, weights, write
from safetensors.torch import load_file, save_file

from gp_spectral import cli
from gp_spectral.angles import band_summary, compare_all, print_comparison
from gp_spectral.checkpoint import Checkpoint, is_buffer, number, preflight, same_name
from gp_spectral.folders import CheckpointError
from gp_spectral.recovery import METHODS, edit_matrix, recover, recovery_record
from gp_spectral.svd import sigma_change
from gp_spectral.sweep import sweep, sweep_matrix

torch.set_num_threads(1)
Q, LAST = "model.layers.0.self_attn.q_proj.weight", "model.layers.2."
VALUES = ["matrix", "side", "band", "mean", "floor", "verdict"]


def compared(a, b, **options):
    "The angles of a pair, without the names of the two."
    t = compare_all([a, b], progress=False, cache=False, **options).angles
    return t[VALUES].sort_values(VALUES[:3], ignore_index=True)


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def pair():
    w = weights()
    return w, changed(w)


# --- what only one of two has

LAYER = {n: t for n, t in weights().items() if n.startswith(LAST)}
EXTRAS = {
    "rotary frequencies": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "rotary tables": {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(16, 8)},
    "a mask": {"model.layers.0.attn.masked_bias": torch.tensor(-1e4)},
    "a causal mask": {"model.layers.0.attn.bias": torch.ones(1, 1, 8, 8)},
    "a mask in bytes": {"model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)},
    "positions": {"model.position_ids": torch.arange(8)[None]},
    "TRL's value head": {"v_head.summary.weight": torch.ones(1, 24), "v_head.summary.bias": torch.ones(1)},
    "a score": {"score.weight": torch.ones(2, 24)},
    "a reward head": {"reward_head.weight": torch.ones(1, 24)},
    "a head of its own": {"lm_head.weight": torch.ones(30, 24)},
    "a layer that predicts further": {n.replace("layers.2", "layers.3"): t for n, t in LAYER.items()},
    "a stack that predicts further": {n.replace("model.layers.2", "mtp.layers.0"): t for n, t in LAYER.items()},
    "biases": {"model.layers.0.self_attn.q_proj.bias": torch.ones(24)},
}


@pytest.mark.parametrize("side", ["base", "other"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_what_only_one_has_is_a_note(pair, tmp_path, extra, side):
    w, v = pair
    plain = compared(write(tmp_path / "a", w), write(tmp_path / "b", v))
    more, config = EXTRAS[extra], dict(tie_word_embeddings=False) if "own" in extra else {}
    a = write(tmp_path / "more a", w | more, **config) if side == "base" else tmp_path / "a"
    b = write(tmp_path / "more b", v | more, **config) if side == "other" else tmp_path / "b"
    assert compared(a, b).equals(plain)
    notes = [n for n in preflight(a, b) if "left out" in n]
    assert len(notes) == 1 and f"only in more {'a' if side == 'base' else 'b'}" in notes[0]
    assert next(iter(more)) in notes[0]
    assert len(sigma_change(a, b, progress=False, cache=False)) == 12
    out = recover(a, b, tmp_path / "out", progress=False)  # a is the target
    kept, before = tensors(out), tensors(a)
    assert all(torch.equal(kept[n], before[n]) for n in more if n in before) and not torch.equal(kept[Q], before[Q])


def test_buffers_are_told_by_their_names():
    for name in ("a.rotary_emb.inv_freq", "rotary_emb.cos_cached", "attn.masked_bias", "x.relative_position_index"):
        assert is_buffer(name, (4, 4))
    assert is_buffer("h.0.attn.bias", (1, 1, 8, 8)) and not is_buffer("h.0.attn.c_attn.bias", (8,))


def test_layers_that_were_cut_off(pair, tmp_path):
    w, v = pair
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", {n: t for n, t in v.items() if not n.startswith(LAST)})
    whole = compared(a, write(tmp_path / "c", v))
    kept = whole[~whole.matrix.str.startswith(LAST)].reset_index(drop=True)
    assert compared(a, b).equals(kept) and compared(b, a).matrix.nunique() == 8
    with pytest.raises(CheckpointError, match="only in a"):
        compare_all([a, b], layers="0-2", progress=False, cache=False)  # which were asked for
    assert len(compared(a, b, layers="0-1")) == len(kept)


def test_what_was_asked_for_is_missed(pair, tmp_path):
    w, v = pair
    a = write(tmp_path / "a", w | {"lm_head.weight": torch.ones(30, 24)}, tie_word_embeddings=False)
    less = {n: t for n, t in v.items() if "up_proj" not in n}
    b, c = write(tmp_path / "b", less), write(tmp_path / "c", {n: t for n, t in v.items() if n != Q})
    for x, options in (
        (b, dict()),
        (b, dict(kinds="up_proj")),
        (b, dict(kinds=["up_proj", "q_proj"])),
        (c, dict()),
        (c, dict(kinds="q_proj", layers=[0])),
        (b, dict(kinds="lm_head")),
        (b, dict(include="head")),
    ):
        with pytest.raises(CheckpointError, match="cannot be compared") as e:
            compare_all([a, x], progress=False, cache=False, **options)
        assert "one model" not in str(e.value)
    assert compared(a, b, kinds=["q_proj", "down_proj"]).matrix.nunique() == 6
    wider = v | {Q: gaussian(25, 24).float()}
    with pytest.raises(CheckpointError, match=r"\(24, 24\) in a, \(25, 24\) in d"):
        compare_all([a, write(tmp_path / "d", wider)], progress=False, cache=False)
    assert len(compared(a, tmp_path / "d", kinds="up_proj")) == 18


# --- names


def _prefixed(prefix):
    return lambda n: prefix + n


NAMES = {
    "compiled": _prefixed("_orig_mod."),
    "in a wrapper": _prefixed("module."),
    "sharded": lambda n: n.replace("model.layers", "model._fsdp_wrapped_module.layers"),
    "inside a larger model": lambda n: n.replace("model.", "model.language_model.", 1),
    "older": lambda n: f"language_model.{n}",
    "of peft": _prefixed("base_model.model."),
    "without model": lambda n: n.removeprefix("model."),
    "of another class": lambda n: n.replace("model.", "transformer.", 1),
    "of a policy": _prefixed("policy."),
    "of an actor": _prefixed("actor.network."),
}


@pytest.mark.parametrize("names", NAMES)
def test_outer_names_are_matched(pair, tmp_path, names):
    w, v = pair
    w, v = (x | {"lm_head.weight": torch.ones(30, 24) + i} for i, x in enumerate(pair))
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", v)
    c = write(tmp_path / "c", {NAMES[names](n): t for n, t in v.items()})
    assert compared(a, c).equals(compared(a, b))
    backwards = compared(c, a)
    assert backwards.drop(columns="matrix").equals(compared(b, a).drop(columns="matrix"))
    assert any("names of c were matched" in n for n in preflight(a, c)) and not preflight(a, b)
    there, plain = (recover(x, a, tmp_path / f"out {x.name}", progress=False) for x in (c, b))
    made = tensors(there)
    assert {n: made[NAMES[names](n)] for n in v}.keys() == v.keys() and len(made) == len(v)
    assert all(torch.equal(t, made[NAMES[names](n)]) for n, t in tensors(plain).items())
    back = tensors(recover(a, c, tmp_path / "back", progress=False))
    assert all(torch.equal(t, back[n]) for n, t in tensors(recover(a, b, tmp_path / "b2", progress=False)).items())
    digests = [recovery_record(tmp_path / x)[0]["donor"]["sha256"] for x in ("back", "b2")]
    assert digests == [Checkpoint(x).digest() for x in (c, b)]


def test_names_that_may_mean_two_are_not_matched(pair, tmp_path):
    w, v = pair
    two = {f"{p}.{n}": t for p in ("actor", "critic") for n, t in v.items()}
    with pytest.raises(CheckpointError, match="cannot be compared"):
        preflight(write(tmp_path / "a", w), write(tmp_path / "b", two))
    assert same_name("model.x", ["y"]) is None and same_name("model.x", ["module.x", "model.model.x"]) is None
    assert same_name("base_model.model.x", ["_orig_mod.x", "z"]) == "_orig_mod.x"


# --- experts


def experts(seed=0, n=3, hidden=24, inner=16):
    "(one by one, stacked): the same weights of one layer."
    up, gate = (torch.stack([trained(inner, hidden, seed + 9 * i + k).float() for i in range(n)]) for k in (0, 3))
    down = torch.stack([trained(hidden, inner, seed + 9 * i + 6).float() for i in range(n)])
    at = "model.layers.0.mlp.experts"
    single = {f"{at}.{i}.{k}_proj.weight": t[i] for k, t in dict(gate=gate, up=up, down=down).items() for i in range(n)}
    stacked = {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
    rest = {"model.layers.0.self_attn.q_proj.weight": trained(24, 24, seed + 50).float()}
    return [{n: t.contiguous() for n, t in (x | rest).items()} for x in (single, stacked)]


def test_experts_in_two_layouts(tmp_path):
    config = dict(model_type="qwen3_moe", hidden_size=24, num_attention_heads=4)
    (single, stacked), (single2, stacked2) = experts(), experts(5)
    a, s = write(tmp_path / "a", single, **config), write(tmp_path / "s", stacked, **config)
    a2, s2 = write(tmp_path / "a2", single2, **config), write(tmp_path / "s2", stacked2, **config)
    assert compared(a, s2).equals(compared(a, a2)) and compared(s, a2).equals(compared(s, s2))
    assert len(compared(a, s2)) == 60 and set(compared(a, s).verdict) == {"unchanged"}
    for x, y in ((a, s2), (s, a2)):
        assert any(n.startswith("experts: ") for n in preflight(x, y)) and "left out" not in str(preflight(x, y))
    for x, other, same in ((a, s2, a2), (s, a2, s2)):
        out, plain = (recover(x, d, tmp_path / f"o{x.name}{d.name}", progress=False) for d in (other, same))
        assert all(torch.equal(t, tensors(plain)[n]) for n, t in tensors(out).items())
        records = [recovery_record(o)[0]["edit_norm_all"] for o in (out, plain)]
        assert records[0] == pytest.approx(records[1], rel=1e-9)
    words = dict(gate_proj="w1", up_proj="w3", down_proj="w2")
    mixtral = {n.replace("mlp", "block_sparse_moe"): t for n, t in single2.items()}
    for ours, theirs in words.items():
        mixtral = {n.replace(ours, theirs): t for n, t in mixtral.items()}
    m = write(tmp_path / "m", mixtral, **config | dict(model_type="mixtral"))
    assert compared(s, m).equals(compared(s, s2)) and compared(a, m).equals(compared(a, a2))


def test_experts_that_were_pruned_are_a_note(tmp_path):
    single, _ = experts()
    fewer = {n: t for n, t in experts(5)[0].items() if ".2." not in n}
    a, b = write(tmp_path / "a", single), write(tmp_path / "b", fewer)
    assert compared(a, b).matrix.nunique() == 7 and "left out" in str(preflight(a, b))


# --- packed


def i32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


def u8(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


AT = Q.removesuffix(".weight")
PACKED = {
    "gptq": {"qweight": i32(3, 24), "qzeros": i32(2, 3), "scales": torch.rand(2, 24), "g_idx": i32(24)},
    "awq": {"qweight": i32(24, 3), "qzeros": i32(2, 3), "scales": torch.rand(2, 24).half()},
    "compressed-tensors": {"weight_packed": i32(24, 3), "weight_scale": torch.rand(24, 2), "weight_shape": i32(2)},
    "compressed-tensors int8": {"weight": torch.zeros(24, 24, dtype=torch.int8), "weight_scale": torch.rand(24, 1)},
    "bitsandbytes": {"weight": u8(288, 1), "weight.absmax": torch.rand(9), "weight.quant_map": torch.rand(16)},
    "bitsandbytes as bfloat16": {"weight": torch.rand(144, 1).bfloat16(), "weight.quant_state.bitsandbytes__nf4": u8(9)},
    "bitsandbytes int8": {"weight": torch.zeros(24, 24, dtype=torch.int8), "SCB": torch.rand(24)},
    "hqq": {"W_q": u8(12, 24), "scale": torch.rand(24, 1), "zero": torch.rand(24, 1)},
    "torchao": {"weight:qdata": torch.zeros(24, 24, dtype=torch.int8), "weight:scale": torch.rand(24, 1)},
    "quanto": {"weight._data": torch.zeros(24, 24, dtype=torch.int8), "weight._scale": torch.rand(24, 1)},
    "nvfp4": {"weight": u8(24, 12), "weight_scale": torch.rand(24, 2), "weight_scale_2": torch.rand(1)},
    "aqlm": {"codes": torch.zeros(3, 3, 1, dtype=torch.int8), "codebooks": torch.rand(1, 16, 1, 8)},
}


@pytest.mark.parametrize("told", [True, False], ids=["the config says so", "the tensors say so"])
@pytest.mark.parametrize("made", PACKED)
def test_packed_weights_are_refused(pair, tmp_path, made, told):
    w, v = pair
    config = dict(quantization_config=dict(quant_method=made.split()[0])) if told else {}
    packed = {n: t for n, t in v.items() if n != Q} | {f"{AT}.{end}": t for end, t in PACKED[made].items()}
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", packed, **config)
    for f in (
        lambda: compare_all([a, b], progress=False, cache=False),
        lambda: compare_all([b, a], progress=False, cache=False),
        lambda: recover(a, b, tmp_path / "o", progress=False),
        lambda: recover(b, a, tmp_path / "o", progress=False),
        lambda: recover(b, b, tmp_path / "o", kinds="q_proj", progress=False),
        lambda: sweep(b, a, [0.1], progress=False),
        lambda: sigma_change(a, b, progress=False, cache=False),
    ):
        with pytest.raises(CheckpointError, match="holds packed weights.*dequantise") as e:
            f()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "o").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(m.kind in ("q_proj", "k_proj", "up_proj", "down_proj") for m in Checkpoint(b).matrices())
        assert Q not in {m.name for m in Checkpoint(b).matrices()}
    assert compared(a, b, kinds=["k_proj", "up_proj"]).matrix.nunique() == 6  # which are not packed


def test_packed_experts_beside_plain_attention(tmp_path):
    "As gpt-oss is published: attention can be compared, experts cannot."
    at, config = "model.layers.0.mlp.experts.gate_up_proj", dict(quantization_config=dict(quant_method="mxfp4"))
    base = {Q: trained(24, 24).float(), f"{at}_blocks": u8(2, 8, 3, 16), f"{at}_scales": u8(2, 8, 3)}
    a = write(tmp_path / "a", base, **config)
    b = write(tmp_path / "b", base | {Q: trained(24, 24, 9).float()}, **config)
    with pytest.raises(CheckpointError, match="gate_up_proj_blocks"):
        compare_all([a, b], progress=False, cache=False)
    assert len(compared(a, b, kinds="q_proj")) == 6


def test_a_config_that_says_packed_is_believed(pair, tmp_path):
    w, v = pair
    for i, where in enumerate(({}, dict(text_config={}))):
        q = dict(quantization_config=dict(quant_method="bitsandbytes"))
        a, b = write(tmp_path / f"a{i}", w), write(tmp_path / f"b{i}", v, **(dict(text_config=q) if where else q))
        with pytest.raises(CheckpointError, match="quant_method 'bitsandbytes'.*config.json"):
            recover(b, a, tmp_path / "o", progress=False)


def test_gguf_is_named(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for given in (tmp_path, tmp_path / "m.gguf"):
        with pytest.raises(CheckpointError, match="holds GGUF weights"):
            Checkpoint(given)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds GGUF weights"):
        Checkpoint(tmp_path)
