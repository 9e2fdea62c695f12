"""Reading checkpoints of many families, adapters and fp8, and writing into copies.

Views are compared with what the running model computes, never with a second copy of the slicing: attention is replaced
by a spy that sees the queries, keys and values of one token (at position 0, where rotary embeddings turn nothing), and
MLPs are watched at their last layer."""

import json
import os
import struct
import time
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from made import weights, write
from safetensors.torch import load_file, save_file

from gp_spectral import checkpoint as module
from gp_spectral.checkpoint import Checkpoint, as_checkpoint, describe, part_of, preflight, with_base
from gp_spectral.folders import CheckpointError

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="peft")
SMALL = dict(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MHA = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
GPT = dict(vocab_size=40, n_embd=24, n_layer=2, n_head=3, n_positions=32, bos_token_id=1, eos_token_id=2)
MOE = dict(num_local_experts=3, num_experts_per_tok=2)
FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, head_dim=16)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "gpt_bigcode": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT)),
    "gpt_bigcode_mha": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT, multi_query=False)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**MHA)),
    "persimmon": lambda: tf.PersimmonForCausalLM(tf.PersimmonConfig(**MHA, qk_layernorm=False)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=40, hidden_size=24, n_layer=2, n_head=3)),
    "falcon_mq": lambda: tf.FalconForCausalLM(tf.FalconConfig(**MHA)),
    "falcon_mha": lambda: tf.FalconForCausalLM(tf.FalconConfig(**MHA, multi_query=False, alibi=True)),
    "falcon_grouped": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**MHA, num_kv_heads=2, new_decoder_architecture=True)
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL)),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**SMALL, head_dim=8)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=40, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**MHA)),
    "codegen": lambda: tf.CodeGenForCausalLM(
        tf.CodeGenConfig(**{**GPT, "n_embd": 64, "n_head": 8}, rotary_dim=4, n_ctx=32)
    ),
    "openai-gpt": lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(**GPT)),
    "imagegpt": lambda: tf.ImageGPTForCausalImageModeling(
        tf.ImageGPTConfig(**{k: v for k, v in GPT.items() if "token" not in k})
    ),
    "gpt_neox_japanese": lambda: tf.GPTNeoXJapaneseForCausalLM(
        tf.GPTNeoXJapaneseConfig(**{k: v for k, v in MHA.items() if k != "intermediate_size"})
    ),
    "glm": lambda: tf.GlmForCausalLM(tf.GlmConfig(**SMALL, head_dim=8)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, **MOE)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SMALL, head_dim=8, moe_intermediate_size=20, num_experts=3, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **SMALL,
            **MOE,
            head_dim=8,
            layer_types=["full_attention"] * 2,
            rope_parameters=dict(rope_type="default", rope_theta=1e4),
        )
    ),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **{**SMALL, "intermediate_size": 20},
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=3,
            use_qk_norm=False,
        )
    ),
    "granitemoe": lambda: tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**SMALL, **MOE)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=40,
            d_model=24,
            d_kv=4,
            d_ff=40,
            num_layers=2,
            num_decoder_layers=4,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=40,
            d_model=24,
            encoder_layers=2,
            decoder_layers=4,
            encoder_attention_heads=3,
            decoder_attention_heads=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=36,
            max_position_embeddings=32,
        )
    ),
}


def build(family, seed=0):
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.zero_()
    return model


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    "family -> (model, folder it was saved to), made when asked for"
    made, root = {}, tmp_path_factory.mktemp("families")

    def get(family):
        if family not in made:
            model = build(family)
            model.save_pretrained(root / family)
            made[family] = model, root / family
        return made[family]

    return get


def inputs(model, n=1):
    ids = torch.arange(3, 3 + n)[None]
    return dict(input_ids=ids, decoder_input_ids=ids) if model.config.is_encoder_decoder else dict(input_ids=ids)


def logits(model):
    with torch.no_grad():
        return model(**inputs(model, 7)).logits


# --- views against the running model

ATTENTION = {
    "llama": "self_attn",
    "qwen3": "self_attn",
    "gpt2": "attn",
    "gpt_bigcode": "attn",
    "gpt_bigcode_mha": "attn",
    "gpt_neox": "attention",
    "persimmon": "self_attn",
    "bloom": "self_attention",
    "falcon_mq": "self_attention",
    "falcon_mha": "self_attention",
    "falcon_grouped": "self_attention",
    "phi3": "self_attn",
    "glm4": "self_attn",
    "mpt": "attn",
    "modernbert": "attn",
    "codegen": "attn",
    "openai-gpt": "attn",
    "imagegpt": "attn",
    "gpt_neox_japanese": "attention",
    "mixtral": "self_attn",
    "gpt_oss": "self_attn",
    "llama4": "self_attn",
}


def spied(model, attention, monkeypatch):
    "Runs one token: the first attention block's input, and its queries, keys and values, (heads, head_dim) each."
    seen, block = {}, next(m for n, m in model.named_modules() if n.endswith(f".{attention}"))

    def entering(m, args, kwargs):
        seen.setdefault("x", (args[0] if args else kwargs["hidden_states"])[0, 0].detach().clone())

    block.register_forward_pre_hook(entering, with_kwargs=True)

    def keep(q, k, v):
        seen.setdefault("qkv", [t.detach().clone() for t in (q, k, v)])

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, *a, **kw: (keep(q, k, v), real(q, k, v, *a, **kw))[1]
    )
    if hasattr(block, "_reshape"):  # BLOOM splits here, and has its own attention
        split = block._reshape
        block._reshape = lambda fused: (found := split(fused), keep(*found))[0]
    elif type(block).__name__ == "MptAttention":
        chunk = torch.Tensor.chunk

        def chunked(t, *a, **kw):
            found = chunk(t, *a, **kw)
            if len(found) == 3:
                keep(*[p.reshape(1, 1, block.n_heads, block.head_dim).transpose(1, 2) for p in found])
            return found

        monkeypatch.setattr(torch.Tensor, "chunk", chunked)
    elif hasattr(block, "_attn"):  # CodeGen, OpenAI GPT (keys transposed), ImageGPT
        attend = block._attn
        block._attn = lambda q, k, v, *a, **kw: (
            keep(q, k if k.shape == q.shape else k.mT, v),
            attend(q, k, v, *a, **kw),
        )[1]
    else:

        def spy(m, q, k, v, *a, **kw):
            if m is block:
                keep(q, k, v)
            return q.transpose(1, 2).contiguous(), None

        tf.AttentionInterface.register("spy", spy)
        if not type(model).__name__.startswith("Falcon"):
            model.config._attn_implementation = "spy"
            block.config._attn_implementation = "spy"
    with torch.no_grad():
        model(**inputs(model))
    return seen["x"], [t.reshape(-1, t.shape[-1]) for t in seen["qkv"]]


def q_norm(block, t, which):
    norm = getattr(block, f"{which}_norm", None)
    return norm(t) if norm is not None and isinstance(norm, torch.nn.Module) else t


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_views(family, families, monkeypatch):
    _, folder = families(family)
    model = build(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = Checkpoint(folder)
        whole, heads = (
            c.matrices(["q_proj", "k_proj", "v_proj"], layers=0),
            c.matrices(["q_proj", "k_proj", "v_proj"], layers=0, heads=True),
        )
    x, qkv = spied(model, ATTENTION[family], monkeypatch)
    block = next(m for n, m in model.named_modules() if n.endswith(f".{ATTENTION[family]}"))
    assert [m.kind for m in sorted(whole, key=lambda m: "qkv".index(m.kind[0]))] == ["q_proj", "k_proj", "v_proj"]
    for kind, seen in zip("qkv", qkv):
        m, each = next(m for m in whole if m.kind[0] == kind), [m for m in heads if m.kind[0] == kind]
        W = c.matrix(m)
        assert W.shape == m.shape and m.shape[1] == len(x) and [h.head for h in each] == list(range(len(each)))
        assert sum(h.shape[0] for h in each) == m.shape[0]
        by_head = torch.stack([c.matrix(h) @ x for h in each])
        torch.testing.assert_close((W @ x).reshape(by_head.shape), by_head)
        if len(seen) > len(each):
            seen = seen[:: len(seen) // len(each)]  # keys repeated for their queries
        torch.testing.assert_close(q_norm(block, by_head, kind), seen, rtol=1e-4, atol=1e-5)
    assert len({m.name for m in whole + heads}) == len(whole + heads)


@pytest.mark.parametrize(
    "family,out",
    [
        ("llama", "o_proj"),
        ("qwen3", "o_proj"),
        ("gpt2", "c_proj"),
        ("gpt_neox", "dense"),
        ("phi3", "o_proj"),
        ("modernbert", "Wo"),
    ],
)
def test_output_heads(family, out, families):
    "Only one head says anything: what the block then writes is that head's part of the output matrix."
    _, folder = families(family)
    model, c, said = build(family), Checkpoint(folder), {}
    attention = ATTENTION[family]
    block = next(m for n, m in model.named_modules() if n.endswith(f".{attention}"))

    def spy(m, q, k, v, *a, **kw):
        o = torch.zeros_like(q.transpose(1, 2))
        if m is block:
            said["a"] = torch.linspace(-1, 1, o.shape[-1])
            o[0, 0, said["head"]] = said["a"]
        return o, None

    tf.AttentionInterface.register("spy", spy)
    model.config._attn_implementation = block.config._attn_implementation = "spy"
    block.register_forward_hook(lambda m, x, y: said.update(y=(y[0] if isinstance(y, tuple) else y)[0, 0]))
    heads = [m for m in c.matrices(out, layers=0, heads=True) if m.head is not None]
    assert len(heads) == (3 if family == "gpt2" else 4)
    for m in heads:
        said["head"] = m.head
        with torch.no_grad():
            model(**inputs(model))
        torch.testing.assert_close(c.matrix(m) @ said["a"], said["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family,mlp,last",
    [
        ("phi3", "mlp", "down_proj"),
        ("glm4", "mlp", "down_proj"),
        ("glm", "mlp", "down_proj"),
        ("modernbert", "mlp", "Wo"),
        ("llama", "mlp", "down_proj"),
    ],
)
def test_gate_and_up(family, mlp, last, families):
    _, folder = families(family)
    model, c, seen = build(family), Checkpoint(folder), {}
    block = next(m for n, m in model.named_modules() if n.endswith(f".{mlp}"))
    block.register_forward_pre_hook(lambda m, x: seen.update(x=x[0][0, 0]))
    getattr(block, last).register_forward_pre_hook(lambda m, x: seen.update(h=x[0][0, 0]))
    with torch.no_grad():
        model(**inputs(model))
    gate, up = (c.matrix(c.matrices(k, layers=0)[0]) @ seen["x"] for k in ("gate_proj", "up_proj"))
    act = F.gelu if family == "modernbert" else F.silu
    torch.testing.assert_close(act(gate) * up, seen["h"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4", "granitemoe"])
def test_experts(family, families):
    "One expert at a time, as the model runs it, against the views of its matrices."
    model, folder = families(family)
    c = Checkpoint(folder)
    experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    matrices = c.matrices(layers=0)
    assert not any("bias" in m.name for m in matrices)
    for e in range(3):
        mine = {m.kind: c.matrix(m) for m in matrices if m.expert == e}
        assert all(m.layer == 0 for m in matrices)
        if family == "mixtral":
            mine = dict(gate_proj=mine["w1"], up_proj=mine["w3"], down_proj=mine["w2"])
        down = mine.get("down_proj", mine.get("output_linear"))
        gate, up = x @ mine["gate_proj"].T, x @ mine["up_proj"].T
        h = (up + 1) * gate * torch.sigmoid(1.702 * gate) if family == "gpt_oss" else F.silu(gate) * up
        with torch.no_grad():
            if family == "llama4":
                seen = experts(torch.cat([x * (i == e) for i in range(3)]))[e : e + 1]
            else:
                seen = experts(x, torch.tensor([[e]]), torch.ones(1, 1))
        assert gate.abs().max() < 7 and up.abs().max() < 7  # gpt-oss clamps from here on
        torch.testing.assert_close(h @ down.T, seen, rtol=1e-4, atol=1e-5)


def test_stacked_experts_of_unclear_orientation_are_left_out(tmp_path):
    w = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 16, 8),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
    }
    save_file(w, tmp_path / "model.safetensors")
    for config, shapes in (
        (dict(hidden_size=8, num_attention_heads=2), {(8, 8)}),
        (dict(hidden_size=16, num_attention_heads=2), {(4, 16), (8, 8)}),
        (dict(model_type="qwen3_moe"), {(8, 8)}),
        (dict(model_type="llama4_text"), {(4, 16), (8, 8)}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert {m.shape for m in Checkpoint(tmp_path).matrices()} == shapes
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="which axis"):
        assert len(Checkpoint(tmp_path).matrices()) == 1


@pytest.mark.parametrize(
    "family,selfs,cross", [("t5", "SelfAttention", "EncDecAttention"), ("bart", "self_attn", "encoder_attn")]
)
def test_encoder_decoder(family, selfs, cross, families):
    model, folder = families(family)
    c = Checkpoint(folder)
    q = "q" if family == "t5" else "q_proj"
    assert {m.stack for m in c.matrices()} == {"encoder", "decoder"}
    assert {(m.stack, m.layer) for m in c.matrices(layers="first 50%")} == {
        ("encoder", 0),
        ("decoder", 0),
        ("decoder", 1),
    }
    assert {(m.stack, m.layer) for m in c.matrices(layers="3")} == {("decoder", 3)}
    assert (
        [m.stack for m in c.matrices(f"{cross}.{q}")] == ["decoder"] * 4
        and len(c.matrices(f"{selfs}.{q}")) == 6
        and len(c.matrices(q)) == 10
    )
    assert not any("relative" in m.name or "embed" in m.name for m in c.matrices())
    seen = {}  # the decoder's cross attention reads the encoder with k and itself with q
    for n, m in model.named_modules():

        def leaving(m, x, y, n=n):
            seen.setdefault(n, (x[0][0, 0], y[0, 0]))

        if isinstance(m, torch.nn.Linear):
            m.register_forward_hook(leaving)
    with torch.no_grad():
        model(**inputs(model))
    for m in c.matrices(layers=0):
        torch.testing.assert_close(
            c.matrix(m) @ seen[m.name.removesuffix(".weight")][0],
            seen[m.name.removesuffix(".weight")][1],
            rtol=1e-4,
            atol=1e-5,
        )
    assert {m.name.removesuffix(".weight") for m in c.matrices()} == {n for n in seen if n != "lm_head"}
    per = c.matrices(f"{selfs}.{q}", layers=0, heads=True)
    assert [(m.stack, m.head) for m in per] == [("encoder", i) for i in range(3)] + [
        ("decoder", i) for i in range(3 if family == "t5" else 2)
    ]


def test_decoder_only_kinds_stay_plain(families):
    c = Checkpoint(families("llama")[1])
    assert {m.kind for m in c.matrices()} == set(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    ) and {m.stack for m in c.matrices()} == {""}


def test_vision_tower(tmp_path):
    torch.manual_seed(0)
    text = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 4})
    tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=text,
            vision_config=tf.CLIPVisionConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=16,
                patch_size=8,
            ),
        )
    ).save_pretrained(tmp_path)
    c = Checkpoint(tmp_path)
    assert {(m.stack, m.layer) for m in c.matrices(layers="first 50%")} == {("", 0), ("", 1), ("vision_tower", 0)}
    heads = c.matrices("q_proj", layers=0, heads=True)
    assert [(m.stack, m.shape) for m in heads] == [("", (8, 32))] * 4 + [("vision_tower", (8, 16))] * 2


def test_vision_tower_with_fused_attention(tmp_path):
    "Qwen2-VL's vision blocks, watched where they split queries, keys and values."
    torch.manual_seed(0)
    text, seen = (
        dict(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
        ),
        {},
    )
    model = tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config=text,
            vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2),
        )
    )
    model.save_pretrained(tmp_path)
    block = model.model.visual.blocks[0].attn

    def spy(m, q, k, v, *a, **kw):
        seen["v"] = v
        return q.transpose(1, 2), None

    tf.AttentionInterface.register("spy", spy)
    block.config._attn_implementation = "spy"
    torch.nn.init.zeros_(block.qkv.bias)
    x, turn = torch.randn(4, 16), (torch.ones(4, 8), torch.zeros(4, 8))  # cosines and sines that turn nothing
    with torch.no_grad():
        q = block(x, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), position_embeddings=turn)
    c = Checkpoint(tmp_path)
    v = [c.matrix(m) for m in c.matrices("v_proj", heads=True) if m.stack]
    assert len(v) == 2
    for W, part in zip(v, seen["v"][0]):
        torch.testing.assert_close(x @ W.T, part, rtol=1e-4, atol=1e-5)
    Wq = c.matrix(next(m for m in c.matrices("q_proj") if m.stack))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision_config"]["num_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))  # thirds need no number of heads
    assert torch.equal(Checkpoint(tmp_path).matrix(next(m for m in c.matrices("q_proj") if m.stack).name), Wq)
    torch.testing.assert_close(block.proj(x @ Wq.T), q, rtol=1e-4, atol=1e-5)


def test_whole_rather_than_wrong(tmp_path, families):
    _, folder = families("gpt_neox")
    w, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    save_file(w, tmp_path / "model.safetensors")
    for change, why in (
        (dict(num_attention_heads=None), "lacks the number of heads"),
        (dict(num_attention_heads=5), "do not make up"),
        (dict(model_type="newest"), "not known"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.warns(UserWarning, match=why):
            found = Checkpoint(tmp_path).matrices("query_key_value")
        assert [m.shape for m in found] == [(96, 32)] * 2 and all(why in m.note for m in found)
        assert torch.equal(Checkpoint(tmp_path).matrix(found[0]), w[found[0].name])


def test_kinds_that_share_a_name_are_told_apart(families, tmp_path):
    c = Checkpoint(families("gpt2")[1])
    assert {m.kind for m in c.matrices()} == {"q_proj", "k_proj", "v_proj", "attn.c_proj", "c_fc", "mlp.c_proj"}
    assert {m.kind for m in c.matrices("c_proj")} == {"attn.c_proj", "mlp.c_proj"} and {
        m.kind for m in c.matrices("mlp.c_proj")
    } == {"mlp.c_proj"}
    parts = ("attention.output", "intermediate", "output")
    save_file(
        {f"encoder.layer.{i}.{p}.dense.weight": torch.randn(8, 8) for i in (0, 1) for p in parts}
        | {f"encoder.layer.{i}.mixer.A_log": torch.randn(8, 4) for i in (0, 1)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="bert")))
    assert [m.kind for m in Checkpoint(tmp_path).matrices(layers=1)] == [
        f"{p}.dense" for p in parts
    ]  # and Mamba's A_log is no map


def test_names(families):
    c = Checkpoint(families("gpt2")[1])
    for heads in (False, True):
        for m in c.matrices(heads=heads):
            again = describe(m.name)
            assert (again.layer, again.kind, again.tensor, again.head, again.expert) == (
                m.layer,
                m.kind.split(".")[-1],
                m.tensor,
                m.head,
                m.expert,
            ) and c.find(m.name) == m
            assert hash(m) is not None and torch.equal(c.matrix(m.name), c.matrix(m))
    assert c.matrix("transformer.h.0.attn.c_attn.weight").shape == (72, 24) and c.matrix(
        "transformer.wte.weight"
    ).shape == (40, 24)
    assert [m.name for m in c.matrices("c_attn", layers=0)] == [
        f"transformer.h.0.attn.c_attn.weight[{p}]" for p in "qkv"
    ]
    for wrong in (
        "transformer.h.0.attn.c_attn.weight[z]",
        "transformer.h.0.ln_1.weight",
        "nothing",
        "transformer.h.0.attn.c_attn.weight[q][head 9]",
    ):
        with pytest.raises(CheckpointError, match="no matrix"):
            c.find(wrong)


def test_only_the_experts_bytes_are_read(tmp_path, monkeypatch):
    E, a, b = 16, 64, 96
    stack = torch.randn(E, a, b)
    save_file({"model.layers.0.mlp.experts.down_proj": stack}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(dict(model_type="qwen3_moe", hidden_size=a, num_attention_heads=4))
    )
    c, read, real = Checkpoint(tmp_path), [], module._read
    monkeypatch.setattr(module, "_read", lambda *args: (t := real(*args), read.append(t.nbytes))[0])
    assert torch.equal(c.matrix("model.layers.0.mlp.experts.down_proj[7]"), stack[7]) and sum(read) == stack[7].nbytes


def test_only_the_rows_of_a_part_are_read(families, monkeypatch):
    c, read, real = Checkpoint(families("phi3")[1]), [], module._read
    monkeypatch.setattr(module, "_read", lambda *args: (t := real(*args), read.append(t.nbytes))[0])
    W = c.matrix("model.layers.0.self_attn.qkv_proj.weight[k]")
    assert sum(read) == W.nbytes == 16 * 32 * 4


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_no_file_stays_mapped_or_open(families):
    folder = families("qwen3_moe")[1]
    c = Checkpoint(folder)
    kept = [c.matrix(m) for m in c.matrices()] + [c.digest()]
    assert kept and not any(str(folder) in line for line in open("/proc/self/maps"))
    assert not any(str(folder) in os.path.realpath(f"/proc/self/fd/{f}") for f in os.listdir("/proc/self/fd"))


# --- tied embeddings


def test_tied_embeddings_once(tmp_path, families):
    _, folder = families("llama")
    w, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    w["lm_head.weight"] = w["model.embed_tokens.weight"].clone()

    def make(name, tied, **change):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | dict(tie_word_embeddings=tied)))
        save_file({k: v for k, v in (w | change).items() if v is not None}, tmp_path / name / "model.safetensors")
        return Checkpoint(tmp_path / name)

    both, one = make("both", True), make("one", True, **{"lm_head.weight": None})
    kinds = ["embed_tokens", "lm_head"]
    assert (
        [m.kind for m in both.matrices(kinds)] == ["embed_tokens"]
        and len(both.matrices("lm_head")) == 1
        and [m.kind for m in one.matrices("embed_tokens")] == ["embed_tokens"]
    )
    assert len(make("untied", False).matrices(kinds)) == 2
    assert len(make("moved", True, **{"lm_head.weight": w["lm_head.weight"] + 1}).matrices(kinds)) == 2
    for a, b in ((both, one), (one, both)):
        assert preflight(a, b) == ["lm_head.weight: tied to the embeddings in one, stored in both"]
    untied = Checkpoint(tmp_path / "untied")
    assert "only in untied, and left out: 1 head (lm_head.weight)" in preflight(untied, one)
    with pytest.raises(CheckpointError, match="1 mismatches"):
        preflight(untied, one, kinds=["q_proj", "lm_head"])


# --- parts


def test_every_tensor_of_every_family_has_a_part(families):
    expected = dict(llama=dict(embeddings=1, head=1, norms=5), gpt2=dict(embeddings=2, norms=5))
    for family, parts in expected.items():
        c = Checkpoint(families(family)[1])
        found = {}
        for n in c.names:
            found.setdefault(part_of(n, c.shape(n)), []).append(n)
        assert {p: len(found[p]) for p in parts} == parts, family
        assert set(found.get("biases", [])) == {n for n in c.names if n.endswith("bias")}
        inside = {m.tensor for m in c.matrices()}
        assert set(found["rest"]) == inside  # nothing in these families is without a name
        assert [m for m in c.matrices(include="embeddings") if m.layer is not None] == c.matrices()


@pytest.mark.parametrize("shape", [(7, 5), (11,), (1,), (), (3, 4, 5), (0, 5)])
@pytest.mark.parametrize("chunk", [1, 6, 2**22])
def test_blocks_are_the_tensor(tmp_path, monkeypatch, shape, chunk):
    w = dict(x=torch.randn(shape), y=torch.zeros(2))
    (tmp_path / "config.json").write_text("{}")
    save_file(w, tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "CHUNK", chunk)
    blocks = list(Checkpoint(tmp_path).blocks("x"))
    assert torch.equal(torch.cat([b.reshape(-1) for b in blocks]) if blocks else torch.zeros(0), w["x"].reshape(-1))
    width = shape[-1] if len(shape) > 1 else 1
    assert all(b.numel() <= max(chunk, width) and b.shape[1:] == shape[-1:] * (len(shape) > 1) for b in blocks)


def test_blocks_of_what_is_not_plain(families, tmp_path):
    "Of fp8 with its scale, and of a model in memory."
    W = torch.randn(40, 6)
    Q, scale = quantise(W)
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": Q, "a.weight_scale": scale.reshape(1)}, tmp_path / "model.safetensors")
    c = Checkpoint(tmp_path)
    assert torch.equal(torch.cat(list(c.blocks("a.weight"))), c.tensor("a.weight"))
    live = Checkpoint(families("llama")[0])
    assert all(torch.equal(torch.cat(list(live.blocks(n))), live.tensor(n)) for n in live.names)


# --- fp8


def quantise(W, blocks=None, rows=False, dtype=torch.float8_e4m3fn):
    "(fp8, scale) with one scale for all, for each row, or for each block."
    top = torch.finfo(dtype).max
    if blocks is None:
        s = W.abs().amax(1, keepdim=True) / top if rows else W.abs().max() / top
        return (W / s).to(dtype), s
    m, k = W.shape
    s = torch.stack(
        [
            torch.stack([W[i : i + blocks[0], j : j + blocks[1]].abs().max() / top for j in range(0, k, blocks[1])])
            for i in range(0, m, blocks[0])
        ]
    )
    full = torch.cat(
        [
            torch.cat(
                [
                    s[i // blocks[0], j // blocks[1]].expand(min(blocks[0], m - i), min(blocks[1], k - j))
                    for j in range(0, k, blocks[1])
                ],
                1,
            )
            for i in range(0, m, blocks[0])
        ]
    )
    return (W / full).to(dtype), s


STYLES = {
    "deepseek": (
        "weight_scale_inv",
        dict(blocks=(16, 20)),
        dict(quant_method="fp8", weight_block_size=[16, 20], activation_scheme="dynamic", fmt="e4m3"),
    ),
    "deepseek_default": ("weight_scale_inv", dict(blocks=(128, 128)), dict(quant_method="fp8")),
    "even": ("weight_scale_inv", dict(blocks=(16, 16)), dict(quant_method="fp8", weight_block_size=[16, 16])),
    "rows": ("weight_scale", dict(rows=True), dict(quant_method="fbgemm_fp8")),
    "tensor": ("weight_scale", {}, dict(quant_method="compressed-tensors")),
    "e5m2": ("weight_scale", dict(dtype=torch.float8_e5m2), dict(quant_method="compressed-tensors")),
}


def fp8_checkpoint(folder, to, style):
    end, how, config = STYLES[style]
    w = load_file(folder / "model.safetensors")
    for n in [n for n in w if "_proj" in n]:
        w[n], w[n.replace("weight", end)] = quantise(w[n], **how)
    if style == "rows":
        w = {
            k: v.squeeze(-1) if k.endswith("q_proj.weight_scale") else v for k, v in w.items()
        }  # (m,) and (m, 1) both occur
    to.mkdir()
    save_file(w, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | dict(quantization_config=config))
    )
    return w


@pytest.mark.parametrize("style", STYLES)
def test_fp8(style, families, tmp_path):
    _, folder = families("llama")
    original = Checkpoint(folder)
    fp8_checkpoint(folder, tmp_path / "q", style)
    c = Checkpoint(tmp_path / "q")
    assert [m.name for m in c.matrices()] == [m.name for m in original.matrices()] and c.matrices("embed_tokens")
    half = 2.0 ** (-3 if style == "e5m2" else -4)
    for m in c.matrices():
        W, exact = c.matrix(m), original.matrix(m)
        assert W.dtype == torch.float32 and c.dtype(m.tensor).itemsize == 1
        assert ((W - exact).abs() <= half * exact.abs() + exact.abs().max() * 2e-5).all() and not torch.equal(W, exact)
        assert torch.equal(c.as_stored(m, W), W)
    for m in c.matrices(heads=True):
        assert torch.equal(c.as_stored(m, c.matrix(m)), c.matrix(m))
    assert [n.split(":")[0] for n in preflight(original, c)] == [m.name for m in original.matrices()]
    target, out = c.find("model.layers.1.mlp.down_proj.weight"), c.copy_to(tmp_path / "copy")
    W = c.matrix(target) * 0.5
    c.write(out, target, W)
    after = Checkpoint(out)
    assert (
        torch.equal(after.matrix(target), c.as_stored(target, W))
        and (after.matrix(target) - W).abs().max() <= W.abs().max() * half
    )
    assert [n for n in c.names if module._piece_digest(c.entry(n), n) != module._piece_digest(after.entry(n), n)] == [
        target.tensor
    ]
    assert [m.name for m in c.matrices() if c.digest(m) != after.digest(m)] == [target.name]
    with pytest.raises(CheckpointError, match="overflow"):
        c.as_stored(target, c.matrix(target) * 2)
    with pytest.raises(CheckpointError, match="overflow"):
        c.write(out, target, c.matrix(target) * 2)
    assert torch.equal(Checkpoint(out).matrix(target), after.matrix(target))


def test_fp8_default_blocks_and_digest(tmp_path):
    W, name = torch.randn(200, 300), "model.layers.0.self_attn.q_proj.weight"
    (q, s), digests = quantise(W, blocks=(128, 128)), set()
    (tmp_path / "config.json").write_text(json.dumps(dict(quantization_config=dict(quant_method="fp8"))))
    for scale in (s, 2 * s):  # the same bytes under another scale are another matrix
        save_file({name: q, f"{name}_scale_inv": scale}, tmp_path / "model.safetensors")
        c = Checkpoint(tmp_path)
        digests |= {c.digest(name), c.digest()}
        exact = W * (scale / s)[0, 0]
        assert ((c.matrix(name) - exact).abs() <= exact.abs() / 16 + 1e-3).all()
    assert len(digests) == 4


def test_fp8_agrees_with_transformers(families, tmp_path):
    "For blocks that divide the matrix: at smaller blocks along the edges transformers on a CPU takes the wrong size."
    _, folder = families("llama")
    fp8_checkpoint(folder, tmp_path / "q", "even")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).state_dict()
    c = Checkpoint(tmp_path / "q")
    for m in c.matrices():
        torch.testing.assert_close(
            c.matrix(m),
            loaded[m.name].float(),
            rtol=1e-2 if loaded[m.name].dtype == torch.bfloat16 else 1e-6,
            atol=1e-6,
        )


def test_fp8_without_scale(families, tmp_path):
    _, folder = families("llama")
    w, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    config = json.loads((folder / "config.json").read_text())
    w[name] = w[name].to(torch.float8_e4m3fn)
    save_file(w, tmp_path / "model.safetensors")

    def opened(**change):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        return Checkpoint(tmp_path)

    for c in (opened(), opened(dtype="float8_e4m3fn", quantization_config=dict(quant_method="fp8"))):
        with pytest.raises(CheckpointError, match=f"{name}_scale_inv"):
            c.matrix(name)
        assert c.matrix("model.layers.1.self_attn.q_proj.weight").dtype == torch.float32
    assert torch.equal(opened(dtype="float8_e4m3fn").matrix(name), w[name].float())
    save_file(w | {name + "_scale": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"scale has shape \(3,\)"):
        opened().matrix(name)


def test_stacked_fp8_experts(tmp_path):
    "A stack of experts with one scale for each block of each expert, and one for each row."
    g = torch.randn(3, 40, 32)
    parts = [quantise(W, blocks=(16, 16)) for W in g]
    rows = [quantise(W, rows=True) for W in g]
    for (q, s), end in ((map(torch.stack, zip(*parts)), "_scale_inv"), (map(torch.stack, zip(*rows)), "_scale")):
        name = "model.layers.0.mlp.experts.gate_up_proj"
        save_file({name: q, name + end: s}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(
            json.dumps(
                dict(
                    model_type="qwen3_moe",
                    hidden_size=32,
                    num_attention_heads=4,
                    quantization_config=dict(weight_block_size=[16, 16]),
                )
            )
        )
        c = Checkpoint(tmp_path)
        assert [m.name for m in c.matrices()] == [f"{name}[{e}][{p}]" for e in range(3) for p in ("gate", "up")]
        for m in c.matrices():
            exact = g[m.expert, :20] if m.kind == "gate_proj" else g[m.expert, 20:]
            assert ((c.matrix(m) - exact).abs() <= exact.abs() / 16 + 1e-3).all() and torch.equal(
                c.as_stored(m, c.matrix(m)), c.matrix(m)
            )


# --- adapters


def adapter(folder, to, targets, seed=1, model=None, **options):
    "Trains nothing, but has peft make, fill and save an adapter; returns the adapted model."
    model = model or type(build_cached(folder)).from_pretrained(folder)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(**{**dict(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False), **options}),
    ).eval()
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_" in n:
                p.normal_(0, 0.2)
            if "modules_to_save" in n:
                p.add_(0.1 * torch.randn_like(p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(to)
    return adapted


def build_cached(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(tf, json.loads((folder / "config.json").read_text())["architectures"][0]).from_pretrained(folder)


LORA = {
    "plain": ("llama", ["q_proj", "down_proj"], {}),
    "rslora": ("llama", ["q_proj", "v_proj"], dict(use_rslora=True)),
    "patterns": (
        "llama",
        ["q_proj", "k_proj", "up_proj"],
        dict(
            rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 3},
            alpha_pattern={r"layers\.0\..*q_proj": 11, "up_proj": 1},
        ),
    ),
    "modules_to_save": ("llama", ["q_proj"], dict(modules_to_save=["lm_head", "embed_tokens"])),
    "embedding": ("llama", ["embed_tokens", "o_proj"], {}),
    "regex": ("llama", r".*layers\.1\..*_proj", {}),
    "gpt2": ("gpt2", ["c_attn", "c_proj"], dict(fan_in_fan_out=True)),
    "gpt2_flag_missing": ("gpt2", ["c_attn", "c_fc"], {}),
    "fused": ("phi3", ["qkv_proj", "gate_up_proj"], {}),
    "bias": ("gpt_neox", ["query_key_value"], dict(bias="all")),
    "t5": ("t5", ["q", "wo"], {}),
}


@pytest.mark.parametrize("case", LORA)
def test_lora_is_what_peft_merges(case, families, tmp_path):
    family, targets, options = LORA[case]
    _, folder = families(family)
    adapted = adapter(folder, tmp_path / "adapter", targets, **options)
    if case == "bias":
        with torch.no_grad():
            for n, p in adapted.named_parameters():
                if n.endswith("bias"):
                    p.add_(0.3)
        adapted.save_pretrained(tmp_path / "adapter")
    base, c = Checkpoint(folder), Checkpoint(tmp_path / "adapter", base=folder)
    out = logits(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected = Checkpoint(tmp_path / "merged")
    assert c.names == base.names and len(c.overlay) + sum(c.entries[n] != base.entries[n] for n in c.names) > 0
    for n in c.names:
        changed = not torch.equal(expected.tensor(n), base.tensor(n))
        assert (n in c.overlay or c.entries[n] != base.entries[n]) >= changed
        torch.testing.assert_close(c.tensor(n), expected.tensor(n), rtol=1e-5, atol=1e-6)
        assert torch.equal(c.tensor(n), base.tensor(n)) != changed
    for m, n in zip(c.matrices(), expected.matrices()):
        assert m == n
        torch.testing.assert_close(c.matrix(m), expected.matrix(n), rtol=1e-5, atol=1e-6)
    for m in base.matrices():
        assert (c.digest(m) == base.digest(m)) == (
            m.tensor not in c.overlay and c.entries[m.tensor] == base.entries[m.tensor]
        )
    assert c.digest() != base.digest() and preflight(base, c) == []
    again = build_cached(c.copy_to(tmp_path / "copy"))
    torch.testing.assert_close(logits(again), out, rtol=1e-4, atol=1e-4)
    assert sorted(os.listdir(tmp_path / "copy")) == sorted(os.listdir(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_lora_precision(dtype, families, tmp_path):
    "Nothing is rounded to the base's bfloat16 but a copy; a float64 base stays float64."
    _, folder = families("llama")
    (tmp_path / "base").mkdir()
    save_file(
        {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()},
        tmp_path / "base" / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "base" / "config.json").write_text((folder / "config.json").read_text())
    adapter(tmp_path / "base", tmp_path / "adapter", ["q_proj"])
    c, parts = (
        Checkpoint(tmp_path / "adapter", base=tmp_path / "base"),
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
    )
    name, key = (
        "model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight",
    )
    exact = c.base.tensor(name).double() + 6 / 4 * parts[key.format("B")].double() @ parts[key.format("A")].double()
    assert c.matrix(name).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        c.matrix(name), exact.to(c.matrix(name).dtype), rtol=1e-14, atol=1e-15
    )  # the same float32
    assert c.matrix("model.layers.0.self_attn.k_proj.weight").dtype == dtype and c.dtype(name) == dtype
    copy = Checkpoint(c.copy_to(tmp_path / "copy"))
    assert (
        torch.equal(copy.tensor(name), c.matrix(name).to(dtype))
        and copy.dtype(name) == dtype
        and torch.equal(copy.tensor(name), c.as_stored(name, c.matrix(name)))
    )


TIED = {
    "embed": dict(target_modules=["embed_tokens"]),
    "head": dict(target_modules=["lm_head"]),
    "both": dict(target_modules=["embed_tokens", "lm_head"]),
    "both_tied": dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "save_embed": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "save_head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "save_both": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "save_both_tied": dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "neither": dict(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("case", TIED)
def test_lora_on_tied_embeddings(case, tmp_path):
    "What is read is what ran, whether the adapter changed one use of the embeddings or both."
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "base")
    options = dict(TIED[case])
    adapted = adapter(tmp_path / "base", tmp_path / "adapter", options.pop("target_modules"), **options)
    ran = peft.PeftModel.from_pretrained(build_cached(tmp_path / "base"), tmp_path / "adapter").eval()
    c = Checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    apart = case not in ("both_tied", "save_both_tied", "neither")
    assert c.config["tie_word_embeddings"] == (not apart) and ("lm_head.weight" in c.names) == apart
    assert len(c.matrices(["embed_tokens", "lm_head"] if apart else "embed_tokens")) == 1 + apart
    copy = c.copy_to(tmp_path / "copy")
    torch.testing.assert_close(logits(build_cached(copy)), logits(ran), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(ran), logits(adapted))


@pytest.mark.parametrize("config_beside", [False, True])
def test_the_base_of_the_command_line_is_for_whatever_is_an_adapter(tmp_path, config_beside):
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).save_pretrained(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter", ["q_proj"])
    (tmp_path / "base").rename(tmp_path / "moved")
    if config_beside:
        (tmp_path / "adapter/config.json").write_text((tmp_path / "moved/config.json").read_text())
    with pytest.raises(CheckpointError, match="--base on the command line"):
        with_base(tmp_path / "adapter")
    assert (
        with_base(tmp_path / "adapter", tmp_path / "moved").base.path == tmp_path / "moved"
        and with_base(tmp_path / "moved", tmp_path / "moved").base is None
    )


def test_lora_with_a_larger_vocabulary(tmp_path):
    torch.manual_seed(0)
    for tied in (True, False):
        base, to = tmp_path / f"base{tied}", tmp_path / f"adapter{tied}"
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=tied)).eval()
        model.save_pretrained(base, max_shard_size="10KB")
        model.resize_token_embeddings(43, mean_resizing=False)
        model.config._name_or_path = str(base)
        adapted = adapter(base, to, ["q_proj"], model=model)
        adapted.save_pretrained(to, save_embedding_layers=True)
        c = Checkpoint(to, base=base)
        assert (
            c.config["vocab_size"] == 43
            and c.shape("model.embed_tokens.weight") == (43, 32)
            and ("lm_head.weight" in c.names) != tied
        )
        assert "vocabulary was resized" in " ".join(preflight(Checkpoint(base), c))
        torch.testing.assert_close(
            logits(build_cached(c.copy_to(tmp_path / f"copy{tied}"))), logits(adapted), rtol=1e-4, atol=1e-4
        )


def test_adapter_of_a_multimodal_base(tmp_path):
    "The running model's names differ from the stored ones in their outer wrappers."
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**SMALL),
            vision_config=tf.CLIPVisionConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=8,
            ),
        )
    ).eval()
    model.save_pretrained(tmp_path / "base")
    adapter(
        tmp_path / "base", tmp_path / "adapter", r".*language_model.*q_proj", model=model
    ).merge_and_unload().save_pretrained(tmp_path / "merged")
    c, merged = Checkpoint(tmp_path / "adapter", base=tmp_path / "base"), Checkpoint(tmp_path / "merged")
    assert c.overlay and all("vision" not in n for n in c.overlay)
    for n in c.names:
        torch.testing.assert_close(c.tensor(n), merged.tensor(n), rtol=1e-5, atol=1e-6)


def test_adapters_that_are_refused(families, tmp_path):
    _, folder = families("llama")
    adapter(folder, tmp_path / "a", ["q_proj"])
    at, file = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / "adapter_model.safetensors"
    config, w = json.loads(at.read_text()), load_file(file)

    def refused(match, tensors=w, base=folder, **change):
        at.write_text(json.dumps(config | change))
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=match):
            Checkpoint(tmp_path / "a", base=base)

    for key in (
        "use_dora",
        "use_qalora",
        "lora_bias",
        "trainable_token_indices",
        "layer_replication",
        "target_parameters",
    ):
        refused(key, **{key: [1]})
    refused("IA3", peft_type="IA3")
    refused("pissa_niter_4", init_lora_weights="pissa_niter_4")
    refused("base cannot be opened.*not a folder", base=tmp_path / "gone")
    refused("does not name its base", base=None, base_model_name_or_path=None)
    refused("base cannot be opened", base=None, base_model_name_or_path=str(tmp_path / "moved away"))
    refused("rank 5", r=5)
    key = next(k for k in w if "lora_A" in k)
    refused("only one of", {k: v for k, v in w.items() if k != key})
    refused("lora_magnitude_vector", w | {key.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)})
    refused("something.strange, which is no part of a LoRA", w | {"base_model.model.something.strange": torch.ones(3)})
    refused("layers.9.*does not hold", {k.replace("layers.0", "layers.9"): v for k, v in w.items()})
    at.write_text(json.dumps(config))
    save_file({k: v * torch.nan for k, v in w.items()}, file)
    with pytest.raises(CheckpointError, match="the adapter's part of .* NaN"):
        Checkpoint(tmp_path / "a", base=folder).matrix("model.layers.0.self_attn.q_proj.weight")
    file.unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickles are not read"):
        Checkpoint(tmp_path / "a", base=folder)
    with pytest.raises(CheckpointError, match="not an adapter"):
        Checkpoint(folder, base=folder)


def test_adapter_finds_its_base(families, tmp_path, monkeypatch):
    _, folder = families("llama")
    adapter(folder, tmp_path / "a", ["q_proj"])
    assert Checkpoint(tmp_path / "a").base.path == folder  # the absolute path that peft noted
    at = tmp_path / "a" / "adapter_config.json"
    config = json.loads(at.read_text())
    (tmp_path / "a" / "base").symlink_to(folder)
    at.write_text(json.dumps(config | dict(base_model_name_or_path="base")))
    assert Checkpoint(tmp_path / "a").base.path.resolve() == folder.resolve()  # beside the adapter
    assert Checkpoint(tmp_path / "a", base=Checkpoint(folder)).base.path == folder


# --- writing

WRITES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "bloom",
    "falcon_grouped",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "granitemoe",
    "t5",
    "bart",
    "codegen",
]


@pytest.mark.parametrize("family", WRITES)
def test_write_and_reload(family, families, tmp_path):
    "Written as it was: the same bytes. One part doubled: transformers loads it, and nothing else has changed."
    model, folder = families(family)
    c, out = Checkpoint(folder), tmp_path / "copy"
    c.copy_to(out)
    for heads in (False, True):
        for m in c.matrices(layers=0, heads=heads):
            c.write(out, m, c.matrix(m).double())
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert torch.equal(logits(build_cached(out)), logits(build_cached(folder)))
    for i, m in enumerate((c.matrices()[0], c.matrices(heads=True)[1], c.matrices()[-1])):
        before, W = {n: t.clone() for n, t in load_file(out / "model.safetensors").items()}, 3 * c.matrix(m) + 1 + i
        c.write(out, m, W)
        after = load_file(out / "model.safetensors")
        assert torch.equal(Checkpoint(out).matrix(m), W)
        assert int((before[m.tensor] != after[m.tensor]).sum()) == m.shape[0] * m.shape[1] and all(
            torch.equal(before[n], after[n]) for n in c.names if n != m.tensor
        )
    assert not torch.equal(logits(build_cached(out)), logits(model))


def test_parts_of_one_tensor_one_after_the_other(families, tmp_path):
    "Queries, keys and values of GPT-2 exchanged for another model's, part by part: the same as exchanging the tensor."
    _, folder = families("gpt2")
    other = build("gpt2", seed=5)
    other.save_pretrained(tmp_path / "other")
    c, d, out = Checkpoint(folder), Checkpoint(tmp_path / "other"), tmp_path / "copy"
    c.copy_to(out)
    for m in c.matrices():
        c.write(out, m, d.matrix(m))
    mixed = Checkpoint(out)
    for n in c.names:
        assert torch.equal(
            mixed.tensor(n), (d if ".h." in n and c.shape(n)[1:] and "attn.bias" not in n else c).tensor(n)
        )


def test_copy_keeps_only_what_is_safe(families, tmp_path):
    _, folder = families("llama")
    src = tmp_path / "src"
    src.mkdir()
    model, keep = (
        build("llama"),
        {
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "spiece.model",
            "preprocessor_config.json",
        },
    )
    model.save_pretrained(src, max_shard_size="20KB")
    for f in keep | {
        "modeling_evil.py",
        "pytorch_model.bin",
        "optimizer.pt",
        "trainer_state.json",
        "tokenizer_code.py",
        "README.md",
        "training_args.bin",
    }:
        (src / f).write_text("{}")
    os.utime(src / "config.json")
    c = Checkpoint(src)
    assert len({e.file for e in c.entries.values()}) > 2
    out = c.copy_to(tmp_path / "deep" / "out")
    assert {p.name for p in out.iterdir()} == keep | {"config.json", "model.safetensors.index.json"} | {
        e.file.name for e in c.entries.values()
    }
    assert (
        all((out / p.name).read_bytes() == p.read_bytes() for p in src.iterdir() if (out / p.name).exists())
        and Checkpoint(out).digest() == c.digest() == Checkpoint(folder).digest()
    )
    for bad in (out, src, src / "config.json"):
        with pytest.raises(CheckpointError, match="not empty"):
            c.copy_to(bad)
    (tmp_path / "empty").mkdir()
    c.copy_to(tmp_path / "empty")
    assert Checkpoint(tmp_path / "empty").digest() == c.digest()


def test_a_failed_copy_leaves_nothing(families, tmp_path, monkeypatch):
    c = Checkpoint(families("llama")[1])

    def fail(*a):
        raise OSError("disk full")

    monkeypatch.setattr(module.shutil, "copyfile", fail)
    with pytest.raises(OSError):
        c.copy_to(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_write_refuses(families, tmp_path):
    _, folder = families("llama")
    half = tmp_path / "half"
    half.mkdir()
    save_file({k: v.half() for k, v in load_file(folder / "model.safetensors").items()}, half / "model.safetensors")
    (half / "config.json").write_text((folder / "config.json").read_text())
    c, m = Checkpoint(half), "model.layers.0.mlp.up_proj.weight"
    out, W = c.copy_to(tmp_path / "out"), c.matrix(m)
    before = (out / "model.safetensors").read_bytes()
    for bad, why in ((W.float() * 1e6, "overflow"), (W * torch.inf, "NaN or infinite"), (W.T, "has shape")):
        with pytest.raises(CheckpointError, match=why):
            c.write(out, m, bad)
        with pytest.raises(CheckpointError, match=why):
            c.as_stored(m, bad)
    with pytest.raises(CheckpointError, match="itself"):
        c.write(half, m, W)
    with pytest.raises(CheckpointError, match="write into a copy of it"):
        Checkpoint(families("llama")[1]).write(
            families("qwen3")[1], "model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 32)
        )
    assert (out / "model.safetensors").read_bytes() == before
    x = torch.randn(48, 32, dtype=torch.float64)
    assert torch.equal(c.as_stored(m, x), x.half())


def test_digest(families, tmp_path):
    _, folder = families("gpt2")
    c = Checkpoint(folder)
    digests = [c.digest(m) for m in c.matrices() + c.matrices(heads=True)]
    assert all(len(d) == 64 and int(d, 16) for d in digests)
    out = c.copy_to(tmp_path / "copy")
    d = Checkpoint(out)
    assert [d.digest(m) for m in d.matrices() + d.matrices(heads=True)] == digests and d.digest() == c.digest()
    when = (out / "model.safetensors").stat().st_mtime_ns
    c.write(out, "transformer.h.0.attn.c_attn.weight[k]", 2 * c.matrix("transformer.h.0.attn.c_attn.weight[k]"))
    os.utime(out / "model.safetensors", ns=(when, when))  # written within one tick of the clock
    changed = [m.name for m in c.matrices() + c.matrices(heads=True) if d.digest(m) != c.digest(m)]
    assert (
        changed == [f"transformer.h.0.attn.c_attn.weight[k]{h}" for h in ("", "[head 0]", "[head 1]", "[head 2]")]
        and d.digest() != c.digest()
    )
    build("gpt2").save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert Checkpoint(tmp_path / "sharded").digest() == c.digest()
    wide = {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}
    (tmp_path / "f64").mkdir()
    save_file(wide, tmp_path / "f64" / "model.safetensors")
    (tmp_path / "f64" / "config.json").write_text((folder / "config.json").read_text())
    assert Checkpoint(tmp_path / "f64").digest() != c.digest()


def test_digest_is_remembered_until_the_file_changes(families, tmp_path, monkeypatch):
    w, folder = {"model.layers.0.x.weight": torch.randn(64, 64)}, tmp_path
    (folder / "config.json").write_text("{}")
    save_file(w, folder / "model.safetensors")
    c, reads, real = Checkpoint(folder), [], module._read
    monkeypatch.setattr(module, "_read", lambda *a: (reads.append(1), real(*a))[1])
    first = c.digest()
    n = len(reads)
    assert Checkpoint(folder).digest() == first and len(reads) == n
    save_file({k: v + 1 for k, v in w.items()}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert Checkpoint(folder).digest() != first and len(reads) > n


# --- models in memory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_what_it_is_saved_as(family, families):
    "The same matrices in the same order, with the same bytes: transposed, fused, tied, stacked or split."
    model, folder = families(family)
    live, saved = Checkpoint(model), Checkpoint(folder)
    assert live.matrices() == saved.matrices() and live.digest() == saved.digest()
    assert list(live.entries) == list(saved.entries) and live.nbytes() == saved.nbytes()
    for m in live.matrices(heads=True):
        assert torch.equal(live.matrix(m), saved.matrix(m)) and live.digest(m) == saved.digest(m)
    assert preflight(live, folder) == preflight(folder, model) == []
    assert live.label == type(model).__name__ and live.path is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_a_model_of_another_dtype(dtype, tmp_path):
    model = build("llama").to(dtype)
    model.save_pretrained(tmp_path)
    live, saved = Checkpoint(model), Checkpoint(tmp_path)
    assert live.digest() == saved.digest()
    m = live.matrices("q_proj")[0]
    assert torch.equal(live.matrix(m), saved.matrix(m)) and live.matrix(m).dtype == saved.matrix(m).dtype


def test_tied_embeddings_in_memory_are_one_table(tmp_path):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    for c in (Checkpoint(model), Checkpoint(tmp_path)):
        assert [m.name for m in c.matrices(["embed_tokens"])] == ["model.embed_tokens.weight"]
        assert "lm_head.weight" not in c.names


def test_what_is_read_from_memory_is_a_copy_of_what_is_there():
    model = build("llama")
    c = Checkpoint(model, "mine")
    m, weight = c.matrices("q_proj")[0], model.model.layers[0].self_attn.q_proj.weight
    before, digest = weight.detach().clone(), c.digest(m)
    c.matrix(m).zero_(), c.tensor(m.tensor).zero_()
    assert torch.equal(weight, before) and c.label == "mine"
    with torch.no_grad():
        weight += 1  # it trains on
    assert torch.equal(c.matrix(m), weight) and c.digest(m) != digest


def test_an_adapter_over_a_model_in_memory(families, tmp_path):
    model, folder = families("llama")
    adapter(folder, tmp_path / "a", ["q_proj"])
    live, saved = Checkpoint(tmp_path / "a", base=model), Checkpoint(tmp_path / "a", base=folder)
    assert live.digest() == saved.digest()
    assert all(torch.equal(live.matrix(m), saved.matrix(m)) for m in saved.matrices())
    with pytest.raises(TypeError, match="LlamaForCausalLM in memory is no folder"):
        live.copy_to(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_read_are_refused(tmp_path):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = dict(model_type="mine")
            self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 4) for _ in range(2))
            self.layers[1].weight = self.layers[0].weight

    assert [m.name for m in Checkpoint(Small()).matrices()] == ["layers.0.weight"]  # shared, so one
    model = build("llama")
    lora = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for wrong, error, words in (
        (3, TypeError, "int is not a checkpoint: expected a folder, a hub name"),
        (None, TypeError, "NoneType is not a checkpoint"),
        (torch.nn.Linear(2, 3), TypeError, "Linear has no config"),
        (lora, CheckpointError, "carries an adapter of peft.*merge_and_unload"),
        (build("llama").to("meta"), CheckpointError, "embed_tokens.weight is offloaded"),
    ):
        with pytest.raises(error, match=words):
            Checkpoint(wrong)
    assert Checkpoint(lora.merge_and_unload()).digest() == Checkpoint(model).digest()  # B is zero at first
    for ask in (
        lambda c: c.copy_to(tmp_path / "copy"),
        lambda c: c.write(tmp_path, c.names[0], torch.zeros(1)),
        lambda c: as_checkpoint(c, on_disk=True),
    ):
        with pytest.raises(TypeError, match="in memory is no folder: expected one, save it first"):
            ask(Checkpoint(model))


# --- hub names


def hub(root, name, folder, revision="0" * 40, ref="main"):
    at = root / f"models--{name.replace('/', '--')}"
    (at / "refs").mkdir(parents=True, exist_ok=True)
    (at / "refs" / ref).write_text(revision)
    (at / "snapshots" / revision).mkdir(parents=True)
    (at / "blobs").mkdir(exist_ok=True)
    for i, f in enumerate(sorted(folder.iterdir())):
        blob = at / "blobs" / f"{revision[:4]}{i}"
        blob.write_bytes(f.read_bytes())
        (at / "snapshots" / revision / f.name).symlink_to(f"../../blobs/{blob.name}")


def test_hub_name(families, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    _, folder = families("llama")
    _, second = families("qwen3")
    hub(tmp_path, "someone/tiny", folder)
    hub(tmp_path, "someone/tiny", second, "1" * 40, "v2")
    c = Checkpoint("someone/tiny")
    assert c.label == "someone/tiny" and c.digest() == Checkpoint(folder).digest()
    assert Checkpoint("someone/tiny@v2").digest() == Checkpoint(second).digest() != c.digest()
    out = c.copy_to(tmp_path / "out")
    assert not any(p.is_symlink() for p in out.iterdir()) and Checkpoint(out).digest() == c.digest()
    for missing in ("someone/else", "someone/tiny@v3"):
        with pytest.raises(CheckpointError, match="not a folder, and the hub"):
            Checkpoint(missing)
    adapter(folder, tmp_path / "a", ["q_proj"])
    at = tmp_path / "a" / "adapter_config.json"
    at.write_text(json.dumps(json.loads(at.read_text()) | dict(base_model_name_or_path="someone/tiny")))
    assert Checkpoint(tmp_path / "a").base.label == "someone/tiny"


# --- preflight


def test_preflight_lists_every_kind_of_mismatch(families, tmp_path):
    _, folder = families("llama")
    w, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())

    def make(name, tensors=w, **change):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(
            json.dumps({k: v for k, v in (config | change).items() if v is not None})
        )
        return Checkpoint(tmp_path / name)

    a = make("a")
    assert (
        preflight(
            a,
            make(
                "same",
                _name_or_path="elsewhere",
                use_cache=False,
                transformers_version="1",
                eos_token_id=7,
                attention_dropout=0.3,
            ),
        )
        == []
    )
    for key, value, shown in (
        ("model_type", "mistral", "model_type"),
        ("num_attention_heads", 8, "num_attention_heads"),
        ("num_key_value_heads", 4, "num_key_value_heads"),
        ("head_dim", 4, "head_dim"),
        ("hidden_size", 64, "hidden_size"),
        ("num_hidden_layers", 3, "num_hidden_layers"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("rms_norm_eps", 1e-3, "rms_norm_eps"),
        ("rope_parameters", dict(rope_theta=5e5, rope_type="default"), "rope_theta"),
        ("rope_parameters", dict(rope_theta=1e4, rope_type="linear", factor=2.0), "rope_scaling"),
        ("hidden_act", "gelu", "hidden_act"),
        ("sliding_window", 5, None),
    ):
        notes = preflight(a, make(f"{key}{value}"[:60].replace("/", ""), **{key: value}))
        assert [n for n in notes if n.startswith(f"{shown}: ")] if shown else notes == []
    old = make("old", rope_parameters=None, rope_theta=config["rope_parameters"]["rope_theta"], rope_scaling=None)
    assert preflight(a, old) == []  # the same rotary embeddings, written by transformers 4
    name, other = "model.layers.0.mlp.up_proj.weight", {k: v for k, v in w.items() if "layernorm" not in k}
    with pytest.raises(CheckpointError, match="7 mismatches") as e:
        preflight(
            a,
            make(
                "b",
                other
                | {
                    name: torch.zeros(49, 32),
                    "extra": torch.zeros(2),
                    "model.embed_tokens.weight": torch.zeros(40, 31),
                },
                num_attention_heads=8,
            ),
        )
    for text in (
        "input_layernorm.weight: only in a",
        "extra: only in b",
        "(48, 32) in a, (49, 32) in b",
        "(40, 32) in a, (40, 31) in b",
        "config: num_attention_heads: 4 in a, 8 in b",
    ):
        assert text in str(e.value)
    grown = make(
        "grown",
        w | {n: torch.cat([w[n], w[n][:3]]) for n in ("model.embed_tokens.weight", "lm_head.weight")},
        vocab_size=43,
    )
    notes = preflight(a, grown)
    assert len(notes) == 3 and sum("vocabulary was resized" in n for n in notes) == 2
    with pytest.raises(CheckpointError, match="1 mismatches"):
        preflight(a, grown, kinds=["lm_head", "q_proj"])
    assert len(preflight(a, make("bf16", {k: v.bfloat16() for k, v in w.items()}))) == len(w)


def sparse(path, shapes, dtype="BF16", size=2):
    "A safetensors file of zeros that takes no room on disk."
    header, at = {}, 0
    for n, s in shapes.items():
        k = size * s[0] * (s[1] if len(s) > 1 else 1)
        header[n], at = dict(dtype=dtype, shape=s, data_offsets=[at, at + k]), at + k
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)


def test_preflight_of_8b_takes_less_than_a_second(tmp_path):
    h, kv, i, v = 4096, 1024, 14336, 128256
    kinds = {
        "self_attn.q_proj": [h, h],
        "self_attn.k_proj": [kv, h],
        "self_attn.v_proj": [kv, h],
        "self_attn.o_proj": [h, h],
        "mlp.gate_proj": [i, h],
        "mlp.up_proj": [i, h],
        "mlp.down_proj": [h, i],
        "input_layernorm": [h],
        "post_attention_layernorm": [h],
    }
    shapes = {f"model.layers.{n}.{k}.weight": s for n in range(32) for k, s in kinds.items()} | {
        "model.embed_tokens.weight": [v, h],
        "lm_head.weight": [v, h],
        "model.norm.weight": [h],
    }
    for name in "ab":
        at = tmp_path / name
        at.mkdir()
        for shard in range(4):
            sparse(at / f"model-{shard}.safetensors", dict(list(shapes.items())[shard::4]))
        (at / "model.safetensors.index.json").write_text(
            json.dumps(dict(weight_map={n: f"model-{j % 4}.safetensors" for j, n in enumerate(shapes)}))
        )
        (at / "config.json").write_text(
            json.dumps(
                dict(
                    model_type="llama",
                    hidden_size=h,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                    num_hidden_layers=32,
                )
            )
        )
    start = time.perf_counter()
    assert preflight(tmp_path / "a", tmp_path / "b") == []
    assert time.perf_counter() - start < 1
    c = Checkpoint(tmp_path / "a")
    assert len(c.matrices()) == 224 and len(c.matrices(heads=True)) == 32 * (2 * 32 + 2 * 8 + 3)


# --- damaged folders


def test_damaged(families, tmp_path):
    src = tmp_path / "c"
    build("llama").save_pretrained(src, max_shard_size="20KB")
    index = src / "model.safetensors.index.json"
    text, shard = index.read_text(), sorted(src.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated or corrupt"):
        Checkpoint(src)
    shard.unlink()
    with pytest.raises(CheckpointError, match="does not hold it: download the missing shard"):
        Checkpoint(src)
    shard.write_bytes(whole)
    index.write_text(text.replace(shard.name, f"../{src.name}/{shard.name}"))
    with pytest.raises(CheckpointError, match="not a file of its own folder"):
        Checkpoint(src)
    index.write_text(text)
    assert Checkpoint(src).matrices()
    c = Checkpoint(src)
    shard.write_bytes(whole[:-7])  # cut off after it was opened
    with pytest.raises(CheckpointError, match="ends too early"):
        [c.tensor(n) for n in c.names]
    pickled = tmp_path / "p"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04boom")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        Checkpoint(pickled)
    (pickled / "config.json").write_text("[1]")
    save_file({"x": torch.ones(2)}, pickled / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        Checkpoint(pickled)


def test_packed_integers_are_named(tmp_path):
    w = {
        "model.layers.0.self_attn.q_proj.qweight": torch.zeros(4, 8, dtype=torch.int32),
        "model.layers.0.mlp.gate.weight": torch.randn(3, 8),
    }
    save_file(w, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(quantization_config=dict(quant_method="gptq"))))
    with pytest.warns(UserWarning, match="quant_method 'gptq'"):
        assert len(Checkpoint(tmp_path).matrices()) == 1
    save_file({k: v for k, v in w.items() if "q_proj" in k}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quant_method 'gptq'"):
        Checkpoint(tmp_path).matrices()


def test_the_shipped_model_by_its_name(tmp_path, monkeypatch):
    "`tiny`, wherever one stands; a folder of that name is `./tiny`, and whoever has one is told."
    monkeypatch.chdir(tmp_path)
    assert Checkpoint("tiny").label == "tiny" and (Checkpoint("tiny").path / "model.safetensors").is_file()
    shipped, _ = Checkpoint("tiny").path, write(tmp_path / "tiny", weights())
    with pytest.warns(UserWarning, match="the folder here is ./tiny"):
        assert Checkpoint("tiny").path == shipped
    assert Checkpoint("./tiny").path.resolve() == tmp_path / "tiny"
