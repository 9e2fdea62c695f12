"""Checkpoints as trainers and libraries leave them: what one of two has more, names in wrappers, experts in two
layouts, packed weights, adapters, towers, donors that lack directions.

What is compared is checked against the comparison of the two as they would be without the oddity: bit for bit."""

import json
import warnings

import pytest
import torch
from made import changed, gaussian, orthonormal, trained, weights, write
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
    assert any(n in notes[0] for n in more)
    assert len(sigma_change(a, b, progress=False, cache=False)) == 12
    out = recover(a, b, tmp_path / "out", layers=[0], certify="quick", progress=False)  # a is the target
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
    some = dict(layers=[0], certify="quick", progress=False)
    there, plain = (recover(x, a, tmp_path / f"out {x.name}", **some) for x in (c, b))
    made = tensors(there)
    assert {n: made[NAMES[names](n)] for n in v}.keys() == v.keys() and len(made) == len(v)
    assert all(torch.equal(t, made[NAMES[names](n)]) for n, t in tensors(plain).items())
    back = tensors(recover(a, c, tmp_path / "back", **some))
    assert all(torch.equal(t, back[n]) for n, t in tensors(recover(a, b, tmp_path / "b2", **some)).items())
    digests = [recovery_record(tmp_path / x)[0]["donor"]["sha256"] for x in ("back", "b2")]
    assert digests == [Checkpoint(x).digest() for x in (c, b)]


def test_the_language_model_of_a_larger_one(pair, tmp_path):
    "A vision-language model beside the language model that it was made from: the towers are left out."
    w, v = pair
    tower = {n.replace("model.layers", "vision_tower.encoder.layers"): t.clone() for n, t in w.items() if "layers" in n}
    inside = {f"language_model.{n}": t for n, t in v.items()} | tower
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", v)
    c = write(tmp_path / "c", inside, model_type="llava", text_config=dict(model_type="llama"))
    assert compared(a, c).equals(compared(a, b))
    left = [n for n in preflight(a, c) if "left out" in n]
    assert len(left) == 1 and "vision_tower" in left[0]


def test_names_that_may_mean_two_are_not_matched(pair, tmp_path):
    w, v = pair
    two = {f"{p}.{n}": t.clone() for p in ("actor", "critic") for n, t in v.items()}
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
        notes = str(preflight(x, y))
        assert "fused or stacked tensors of " in notes and "left out" not in notes
    for x, other, same in ((a, s2, a2), (s, a2, s2)):
        out, plain = (
            recover(x, d, tmp_path / f"o{x.name}{d.name}", certify="quick", progress=False) for d in (other, same)
        )
        assert all(torch.equal(t, tensors(plain)[n]) for n, t in tensors(out).items())
        records = [recovery_record(o)[0]["edit_norm_all"] for o in (out, plain)]
        assert records[0] == pytest.approx(records[1], rel=1e-9)
    words = dict(gate_proj="w1", up_proj="w3", down_proj="w2")
    mixtral = {n.replace("mlp", "block_sparse_moe"): t for n, t in single2.items()}
    for ours, theirs in words.items():
        mixtral = {n.replace(ours, theirs): t for n, t in mixtral.items()}
    m = write(tmp_path / "m", mixtral, **config | dict(model_type="mixtral"))
    assert compared(s, m).equals(compared(s, s2)) and compared(a, m).equals(compared(a, a2))


def fused(seed=0):
    "(apart, fused): the same weights of one layer of attention and MLP."
    at, q, k, v = "model.layers.0.", trained(24, 24, seed), trained(12, 24, seed + 3), trained(12, 24, seed + 6)
    gate, up, down = trained(40, 24, seed + 9), trained(40, 24, seed + 12), trained(24, 40, seed + 15)
    apart = dict(q_proj=q, k_proj=k, v_proj=v)
    apart = {f"{at}self_attn.{n}.weight": t for n, t in apart.items()}
    apart |= {f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up}
    both = {
        f"{at}self_attn.qkv_proj.weight": torch.cat([q, k, v]),
        f"{at}mlp.gate_up_proj.weight": torch.cat([gate, up]),
    }
    return [{n: t.float() for n, t in (x | {f"{at}mlp.down_proj.weight": down}).items()} for x in (apart, both)]


def test_fused_and_apart(tmp_path):
    "Phi-3 as it is published, and as it is rewritten for Llama's code."
    config = dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
    (apart, one), (apart2, one2) = fused(), fused(50)
    a, a2 = (write(tmp_path / n, w, **config) for n, w in (("a", apart), ("a2", apart2)))
    f, f2 = (write(tmp_path / n, w, **config, model_type="phi3") for n, w in (("f", one), ("f2", one2)))
    assert compared(a, f2).equals(compared(a, a2)) and compared(f, a2).equals(compared(f, f2))
    assert len(compared(a, f2)) == 36 and set(compared(a, f).verdict) == set(compared(f, a).verdict) == {"unchanged"}
    for x, other, same in ((a, f2, a2), (f, a2, f2)):
        out, plain = (recover(x, d, tmp_path / f"o{x.name}{d.name}", progress=False) for d in (other, same))
        assert all(torch.equal(t, tensors(plain)[n]) for n, t in tensors(out).items())


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
    "bitsandbytes as bfloat16": {"weight": torch.rand(144, 1).bfloat16(), "weight.quant_state.bnb__nf4": u8(9)},
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


# --- adapters


def lora(base, folder, tensors=None, **config):
    "The folder of an adapter of `q_proj` in layer 0, as peft writes it."
    folder.mkdir()
    at = f"base_model.model.{AT}"
    own = {f"{at}.lora_A.weight": gaussian(2, 24).float(), f"{at}.lora_B.weight": gaussian(24, 2).float()}
    save_file(own if tensors is None else tensors(own), folder / "adapter_model.safetensors")
    told = dict(peft_type="LORA", r=2, lora_alpha=2, target_modules=["q_proj"], base_model_name_or_path=str(base))
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="PiSSA_niter_16"),
        dict(init_lora_weights="olora"),
        dict(init_lora_weights="corda"),
        dict(init_lora_weights="lora_ga"),
        dict(init_lora_weights="loftq", loftq_config=dict(loftq_bits=4)),
        dict(lora_ga_config=dict(direction="ArB2r")),
    ],
    ids=lambda c: str(next(iter(c.values()))),
)
def test_initialisations_that_move_the_base_are_refused(pair, tmp_path, config):
    a = write(tmp_path / "a", pair[0])
    with pytest.raises(CheckpointError, match="changes the base as well"):
        Checkpoint(lora(a, tmp_path / "ad", **config))
    for i, harmless in enumerate((True, False, "gaussian", "eva", "orthogonal")):
        Checkpoint(lora(a, tmp_path / f"ad{i}", init_lora_weights=harmless))


def test_adapters_that_say_nothing(pair, tmp_path):
    a = write(tmp_path / "a", pair[0])
    with pytest.raises(CheckpointError, match="holds no tensor of an adapter"):
        Checkpoint(lora(a, tmp_path / "x", lambda own: {}))
    zero = lambda own: {n: t * 0 if "lora_B" in n else t for n, t in own.items()}
    with pytest.warns(UserWarning, match="changes nothing, all of its lora_B are zero"):
        Checkpoint(lora(a, tmp_path / "y", zero))


def test_an_adapter_over_packed_weights(pair, tmp_path):
    packed = {n: t for n, t in pair[0].items() if n != Q} | {f"{AT}.{end}": t for end, t in PACKED["gptq"].items()}
    a = write(tmp_path / "a", packed)
    with pytest.raises(CheckpointError, match="adapter over packed weights.*give the base as it was before"):
        Checkpoint(lora(a, tmp_path / "ad"))
    assert Checkpoint(tmp_path / "ad", base=write(tmp_path / "b", pair[0])).overlay


def test_heads_of_other_tasks(pair, tmp_path):
    "A sequence classifier's adapter brings its score along; the base has none."
    a = write(tmp_path / "a", pair[0])
    score = {"base_model.model.score.weight": torch.ones(2, 24)}
    ad = lora(a, tmp_path / "ad", lambda own: own | score, task_type="SEQ_CLS", modules_to_save=["score"])
    plain = lora(a, tmp_path / "plain")
    assert compared(a, ad).equals(compared(a, plain))
    assert any("score.weight" in n and "left out" in n for n in preflight(a, ad))
    assert "score.weight" in tensors(Checkpoint(ad).copy_to(tmp_path / "merged"))


def test_the_original_of_a_saved_module(pair, tmp_path):
    "What peft writes after a vocabulary was resized: the module as it was, beside the one that was saved."
    a = write(tmp_path / "a", pair[0])
    words = "base_model.model.model.embed_tokens"
    new, old = torch.ones(33, 24), torch.zeros(33, 24)
    two = {f"{words}.modules_to_save.weight": new, f"{words}.original_module.weight": old}
    c = Checkpoint(lora(a, tmp_path / "ad", lambda own: own | two, modules_to_save=["embed_tokens"]))
    assert c.shape("model.embed_tokens.weight") == (33, 24) and c.tensor("model.embed_tokens.weight").min() == 1
    assert any("vocabulary was resized" in n for n in preflight(a, c))


def test_a_whole_model_with_an_adapter_inside_is_refused(pair, tmp_path):
    inside = {n.replace("q_proj.", "q_proj.base_layer."): t for n, t in pair[0].items()}
    own = {f"{AT}.lora_A.default.weight": torch.ones(2, 24), f"{AT}.lora_B.default.weight": torch.ones(24, 2)}
    with pytest.raises(CheckpointError, match="carries an adapter of peft.*merge_and_unload"):
        Checkpoint(write(tmp_path / "a", inside | own))


# --- files beside the weights

KEPT = (
    "bpe.codes source.spm video_preprocessor_config.json modules.json additional_chat_templates/tool_use.jinja "
    "tekken.json normalizer.json vocab.txt sentencepiece.bpe.model LICENSE 1_Pooling/config.json"
).split()
LEFT = "optimizer.pt pytorch_model.bin.index.json README.md trainer_state.json onnx/model.onnx onnx/config.json".split()
CODE = ["modeling_own.py", "custom/tokenizer.py"]


def test_files_beside_the_weights(pair, tmp_path):
    a, b = (write(tmp_path / x, w) for x, w in zip("ab", pair))
    for n in [*KEPT, *LEFT, *CODE]:
        (b / n).parent.mkdir(exist_ok=True)
        (b / n).write_text("{}")
    out = recover(b, a, tmp_path / "o", layers=[0], progress=False)
    found = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    assert found == {*KEPT, "config.json", "model.safetensors", "recovery.json"}
    notes = str(recovery_record(out)[0]["notes"])
    assert all(n in notes for n in CODE) and Checkpoint(b).code_beside() == sorted(CODE)


# --- what the report says


def test_towers_are_rows_of_their_own(pair, tmp_path, capsys):
    w, v = pair
    tower = {n.replace("model.layers", "vision_tower.layers"): t.clone() for n, t in w.items() if "layers" in n}
    a, b = write(tmp_path / "a", w | tower), write(tmp_path / "b", v | tower)
    found = compare_all([a, b], progress=False, cache=False)
    heads = band_summary(found.angles).query("band == 'head' and kind == 'q_proj'").set_index("stack")
    assert heads.rotated.to_dict() == {"": 1.0, "vision_tower": 0.0} and heads.matrices.to_dict() == {
        "": 3,
        "vision_tower": 3,
    }
    by_layer, by_matrix = (band_summary(found.angles, by=by) for by in ("layer", "matrix"))
    assert (len(by_layer), len(by_matrix)) == (2 * 3 * 3, 72)
    print_comparison(found)
    text = capsys.readouterr().out
    assert "stack by stack: main 12 of 12, vision_tower 0 of 12" in text
    assert "medians over the 12 that changed" in text and "swallowed" not in text
    lines = [x for x in text.splitlines() if "layer by layer" in x]
    assert len(lines) == 2 and all(x.count("°") == 6 for x in lines)  # a floor beside every angle
    assert cli.main(["compare", str(a), str(b), "--out", str(tmp_path / "o"), "--cache", "none"]) == 0
    names = {f"{x}-{stack}.png" for x in ("a-b", "angles") for stack in ("main", "vision_tower")}
    assert {p.name for p in (tmp_path / "o").glob("*.png")} == names
    assert '"sort": ["main", "vision_tower"]' in (tmp_path / "o" / "report.html").read_text()  # a map each


def test_other_maps_on_the_same_subspaces(pair, tmp_path, capsys):
    w, _ = pair
    turned = {n: -t if n == Q else t for n, t in w.items()}
    a, b = write(tmp_path / "a", w), write(tmp_path / "b", turned)
    print_comparison(compare_all([a, b], progress=False, cache=False))
    text = capsys.readouterr().out
    assert "1 matrices changed by 200% of their norm" in text and f"first: {Q}" in text
    c, d = write(tmp_path / "c", changed(w)), write(tmp_path / "d", {n: 2 * t for n, t in w.items()})
    print_comparison(compare_all([a, c, d], progress=False, cache=False))
    assert "other maps" not in capsys.readouterr().out  # which turned, or whose σ says it
    print_comparison(compare_all([a, a], [(0, 0)], progress=False, cache=False))
    assert "none of them changed" in capsys.readouterr().out


def test_unrelated_is_more_than_a_flat_spectrum(tmp_path):
    nearly = torch.linspace(1.001, 1, 48).double()
    flat = {Q: ((orthonormal(48, 48) * nearly) @ orthonormal(48, 48, 1).T).float().contiguous()}
    near = {Q: (flat[Q].double() + 1e-3 * gaussian(48, 48, seed=3)).float()}
    a, b = write(tmp_path / "a", flat), write(tmp_path / "b", near)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert "chance" in set(compared(a, b).verdict)
    assert not any("unrelated" in str(x.message) for x in seen)


def test_a_finished_comparison_warns_again(tmp_path):
    a, b = (write(tmp_path / x, {Q: trained(48, 48, seed).float()}) for x, seed in (("a", 0), ("b", 30)))
    for _ in range(2):
        with pytest.warns(UserWarning, match="unrelated"):
            compare_all([a, b], progress=False, cache=False, out=tmp_path / "o")


def test_the_command_compares_each_with_the_one_before(pair, tmp_path, capsys):
    w, v = pair
    a, b, c, d = (write(tmp_path / n, x) for n, x in (("base", w), ("sft", v), ("rl", changed(v)), ("end", changed(v))))
    run = ["compare", *map(str, (a, b, c, d)), "--out", str(tmp_path / "o"), "--cache", "none", "--kinds", "q_proj"]
    assert cli.main([*run, "--layers", "0", "--fraction", "20%"]) == 0
    text = capsys.readouterr().out
    assert [x for x in ("sft → rl", "rl → end", "base → end", "sft → end") if x in text] == [
        "sft → rl",
        "rl → end",
        "base → end",
    ]


# --- donors that lack directions

BY_RANKS = [m for m in METHODS.values() if m.ranks]


@pytest.mark.parametrize("method", [m.name for m in BY_RANKS])
def test_a_donor_of_zeros_leaves_the_target(method):
    W = trained(20, 12)
    assert torch.equal(edit_matrix(method, W, W * 0), W)
    assert all(torch.equal(X, W) for _, X in sweep_matrix(W, W * 0, [0.1, 0.5], method))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [m.name for m in BY_RANKS])
def test_a_donor_of_few_ranks_gives_those(method, dtype):
    W, D = trained(40, 24).to(dtype), (gaussian(40, 3, seed=1) @ gaussian(3, 24, seed=2)).to(dtype)
    few = edit_matrix(method, W, D, top="3r")
    assert not torch.equal(few, W)
    assert torch.equal(edit_matrix(method, W, D, top=0.5), few)
    assert torch.equal(edit_matrix(method, W, D, top="3r", tail=0.3), few)
    assert torch.equal(edit_matrix(method, W, D, top=0.0, tail=0.3), W)
    swept = dict(sweep_matrix(W, D, ["3r", "12r"], method))
    assert torch.equal(*swept.values())


def test_what_a_donor_lacks_is_told(pair, tmp_path, capsys):
    w, v = pair
    a = write(tmp_path / "a", w | {Q: torch.zeros_like(w[Q])})
    b = write(tmp_path / "b", v)
    with pytest.warns(UserWarning, match=f"5 in {Q}, 1 matrices in all.: the target's were kept"):
        out = recover(b, a, tmp_path / "o", progress=False)
    record, rows = recovery_record(out)
    row = rows.set_index("matrix").loc[Q]
    assert (row.restored, row.lacking, row.changed) == (0, 5, 0) and torch.equal(tensors(out)[Q], v[Q])
    run = ["recover", str(b), "--donor", str(a), "--out", str(tmp_path / "p"), "--cache", "none", "--top", "20%"]
    assert cli.main(run) == 0
    text = capsys.readouterr().out
    assert f"{record['restored']} directions restored in 11 matrices" in text
    before = float(torch.rad2deg(torch.tensor(rows[rows.restored > 0].head_angle_before.median())))
    assert f"{before:.3g}° before, " in text and "° after" in text


# --- the command line


@pytest.mark.parametrize(
    "words, said",
    [
        (["compare", "A", "B", "--layers", "9-12"], "--layers 9-12: the checkpoint has layers 0-2"),
        (["compare", "A", "B", "--layers", "few"], "--layers 'few'"),
        (["compare", "A", "B", "--fraction", "200%"], "--fraction 2.0: a band is a share"),
        (["compare", "A", "B", "--workers", "0"], "--workers is 0"),
        (["recover", "B", "--donor", "A", "--top", "1"], "--top '1' is ambiguous"),
        (["recover", "B", "--donor", "A", "--include", "all"], "--include: no part is called 'all'"),
        (["recover", "B", "--donor", "A", "--sigma", "donor", "--method", "direct"], "takes no --sigma 'donor'"),
        (["recover", "B", "--donor", "A", "--rank", "3"], "--rank belongs to --as-lora"),
        (["recover", "B", "--donor", "A", "--like", "all", "--method", "random"], "--like 'all': expected"),
        (["recover", "B", "--donor", "A", "--method", "interpolate", "--alpha", "x"], "--alpha 'x': expected"),
        (["recover", "B", "--donor", "P"], "leave the packed ones out (--kinds)"),
        (["sweep", "B", "--donor", "A", "--ks", "0.1", "3"], "--ks [0.1, 3r]"),
    ],
    ids=lambda x: " ".join(x[:1] + x[3:]) if isinstance(x, list) else "",
)
def test_errors_speak_of_options(pair, tmp_path, capsys, words, said):
    for name, w in zip("AB", pair):
        write(tmp_path / name, w)
    write(tmp_path / "P", {Q.replace("weight", "qweight"): i32(3, 24)} | {n: t for n, t in pair[0].items() if n != Q})
    out = [] if words[0] == "sweep" else ["--out", str(tmp_path / "o")]
    assert cli.main([str(tmp_path / x) if x in "ABP" else x for x in words] + out + ["--cache", "none"]) == 2
    text = capsys.readouterr().err
    assert said in text and not (tmp_path / "o").exists()


def test_percent_is_a_number(pair, tmp_path):
    assert [number(x) for x in ("20%", "0.2", " 1e-3 ", "-5%")] == [0.2, 0.2, 1e-3, -0.05]
    with pytest.raises(ValueError):
        number("few")
    a, b = (write(tmp_path / x, w) for x, w in zip("ab", pair))
    run = ["recover", str(b), "--donor", str(a), "--method", "interpolate", "--cache", "none", "--alpha"]
    for text, name in (("50%", "o"), ("0.5", "p")):
        assert cli.main([*run, text, "--out", str(tmp_path / name)]) == 0
    assert all(torch.equal(t, tensors(tmp_path / "p")[n]) for n, t in tensors(tmp_path / "o").items())


@pytest.mark.parametrize("command", ["compare", "recover", "sweep", "search", "spectrum"])
def test_help_teaches_its_words(command):
    text = cli.parser_of(command).format_help()
    assert f"gp-spectral {command} " in text.split("examples:")[1]
    for word in ["head, bulk, tail", "U"] if command != "spectrum" else ["rank", "σ"]:
        assert word in text.split("words:")[1]


# --- adapters for every class


def _llama_like(**more):
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return sizes | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | more


def _llava(tf):
    vision = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    vision = tf.CLIPVisionConfig(**vision, image_size=8, patch_size=4)
    text = tf.LlamaConfig(**_llama_like())
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    )


def _mllama(tf):
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_global_layers=1, attention_heads=4)
    more = dict(image_size=8, patch_size=4, max_num_tiles=1, vision_output_dim=32, intermediate_layers_indices=[0])
    vision = tf.models.mllama.MllamaVisionConfig(**vision, **more, supported_aspect_ratios=[[1, 1]])
    text = dict(num_hidden_layers=2, num_key_value_heads=2, cross_attention_layers=[1])
    text = tf.models.mllama.MllamaTextConfig(**_llama_like(**text))
    return tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=39)
    )


def _whisper(tf):
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    sizes = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=40, num_mel_bins=8)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**layers, **sizes, **tokens, max_source_positions=16))


def _t5(tf):
    sizes = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes))


CLASSES = {
    "Llava": (_llava, ["down_proj", "q_proj"]),
    "Mllama": (_mllama, ["q_proj", "gate_proj"]),
    "Whisper": (_whisper, ["q_proj", "fc1"]),
    "T5": (_t5, ["q", "wo"]),
    "a masked LM": (lambda tf: tf.BertForMaskedLM(tf.BertConfig(**_llama_like())), ["query"]),
    "a classifier": (lambda tf: tf.LlamaForSequenceClassification(tf.LlamaConfig(**_llama_like())), ["up_proj"]),
    "a causal LM": (lambda tf: tf.LlamaForCausalLM(tf.LlamaConfig(**_llama_like())), ["up_proj"]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_loads_for_each_class(name, tmp_path):
    import peft
    import transformers as tf

    build, kinds = CLASSES[name]
    for i, folder in enumerate(("base", "tuned")):
        torch.manual_seed(i)
        build(tf).save_pretrained(tmp_path / folder)
    asked = dict(kinds=kinds, progress=False, certify="quick")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recover(tmp_path / "tuned", tmp_path / "base", tmp_path / "whole", **asked)
        recover(tmp_path / "tuned", tmp_path / "base", tmp_path / "lora", as_lora=True, **asked)
        model = type(build(tf)).from_pretrained(tmp_path / "tuned")
        merged = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
    whole, found = tensors(tmp_path / "whole"), tensors(tmp_path / "merged")
    assert all(torch.allclose(t, found[n], atol=1e-5) for n, t in whole.items())
    before = tensors(tmp_path / "tuned")
    assert sum(not torch.equal(t, before[n]) for n, t in whole.items()) >= len(kinds)
