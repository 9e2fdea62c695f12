"""What a hunt through four hundred architectures found: weights that were left out in silence, and sentences that were
not so. Each is one of a kind."""

import json
import shutil
import warnings

import pytest
import torch
import transformers as tf
from made import changed, gaussian, trained, weights, write
from safetensors.torch import load_file, save_file

from gp_spectral.angles import compare_all, read_comparison
from gp_spectral.checkpoint import Checkpoint, CheckpointError, describe, part_of
from gp_spectral.cli import main
from gp_spectral.drift import drift
from gp_spectral.models import load_model
from gp_spectral.recovery import recover, recovery_record
from gp_spectral.updates import updates


def listed(folder, **asked):
    "(matrices, what was said) of a checkpoint."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return Checkpoint(folder).matrices(**asked), " ".join(str(w.message) for w in said)


def test_stacked_experts_of_aria_are_matrices(tmp_path):
    "Stored as (expert, in, out), gate before up."
    w = {
        "model.layers.0.mlp.experts.fc1.weight": gaussian(4, 24, 64),
        "model.layers.0.mlp.experts.fc2.weight": gaussian(4, 32, 24),
    }
    found, said = listed(write(tmp_path / "a", w, model_type="aria_text", hidden_size=24))
    assert {(m.kind, m.shape) for m in found} == {("gate_proj", (32, 24)), ("up_proj", (32, 24)), ("fc2", (24, 32))}
    assert len(found) == 12 and not said
    gate = next(m for m in found if m.kind == "gate_proj" and m.expert == 1)
    torch.testing.assert_close(
        Checkpoint(tmp_path / "a").matrix(gate.name), w["model.layers.0.mlp.experts.fc1.weight"][1, :, :32].T
    )


def test_maps_with_three_axes_are_left_out_aloud(tmp_path):
    "Not so convolutions, and scales that only look like them."
    w = weights(layers=1) | {
        "model.layers.0.rel_attn.q": gaussian(24, 4, 6),
        "model.layers.0.mixer.conv1d.weight": gaussian(24, 1, 4),
        "model.layers.0.gamma": gaussian(1, 1, 24),
    }
    found, said = listed(write(tmp_path / "a", w))
    assert len(found) == 4 and "1 tensors inside the layers are left out" in said and "rel_attn.q" in said


LAYERS = {  # a tensor: its layer, and the stack in a model that has `model.layers` too
    "audio_tower.encoders.3.self_attn.linear_q.weight": (3, "audio_tower"),
    "model.gated_cross_attn_layers.2.cross_attn.q_proj.weight": (2, "gated_cross_attn_layers"),
    "model.visual.resblocks.1.attn.c_fc.weight": (1, "visual"),
    "bert.x_layers.0.visual_attention.att.query.weight": (0, "x_layers"),
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": (0, "albert_layers"),
    "transformer.attentions.5.q_lin.weight": (5, "attentions"),
    "conformer.4.attention.attn.q_proj.weight": (4, "conformer"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_under_other_words(name, tmp_path):
    layer, stack = LAYERS[name]
    assert describe(name).layer == layer
    found, _ = listed(write(tmp_path / "a", weights() | {name: trained(24, 24)}))
    assert [m.stack for m in found if m.tensor == name] == [stack]
    alone, _ = listed(write(tmp_path / "b", {name: trained(24, 24)}))
    assert [m.stack for m in alone] in ([""], [stack])


def test_no_layers_at_all_is_said_with_a_name(tmp_path):
    folder = write(tmp_path / "a", {"net.first.weight": gaussian(8, 8)})
    with pytest.raises(CheckpointError, match="inside the layers; its tensors are named like net.first.weight"):
        listed(folder)


WORDS = "backbone.embeddings text_model.embeddings.token_embedding transformer.word_embedding rwkv.embeddings".split()
HEADS = "head cls.predictions.decoder lm_head.decoder output".split()


def test_words_and_heads_by_other_names():
    assert {part_of(f"{name}.weight", (100, 32)) for name in WORDS} == {"embeddings"}
    assert {part_of(f"{name}.weight", (100, 32)) for name in HEADS} == {"head"}
    assert part_of("model.layers.0.attention.output.weight", (32, 32)) == "rest"
    assert part_of("decoder.block.weight", (32, 32)) == "rest"


def test_equal_numbers_are_those_that_are_stored(tmp_path):
    "Whichever of the two has more digits; rounding the finer one would make all of them equal."
    coarse = weights(dtype=torch.bfloat16)
    fine = {k: v.float() * (1 + 1e-4 * gaussian(*v.shape, seed=9).sign().float()) for k, v in coarse.items()}
    a, b = write(tmp_path / "coarse", coarse), write(tmp_path / "fine", fine)
    for first, second in ((a, b), (b, a)):
        rows = updates(first, [second], progress=False, cache=None).rows
        assert rows[~rows.noise].equal.max() == 0 and rows[~rows.noise].equal_bf16.min() > 0.9


def test_a_folder_that_is_named_twice_is_compared_once(tmp_path, capsys):
    base = write(tmp_path / "base", weights())
    tuned = write(tmp_path / "tuned", changed(weights(), 0.02))
    assert main(["compare", str(base), str(tuned), f"{tuned}/", "--out", str(tmp_path / "out")]) in (0, None)
    assert "is named twice, and compared once" in capsys.readouterr().out
    assert set(zip(*(read_comparison(tmp_path / "out").angles[c] for c in ("base", "other")))) == {("base", "tuned")}


@pytest.fixture(scope="module")
def two_stacks(tmp_path_factory):
    "An encoder of four layers and a decoder of two, and the same with other weights."
    root = tmp_path_factory.mktemp("t5")
    size = dict(vocab_size=100, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4, num_decoder_layers=2)
    tf.T5ForConditionalGeneration(tf.T5Config(**size)).save_pretrained(root / "base")
    shutil.copytree(root / "base", root / "tuned")
    stored = load_file(root / "base/model.safetensors")
    other = {k: v + 0.1 * gaussian(*v.shape, seed=i).to(v.dtype) for i, (k, v) in enumerate(stored.items())}
    save_file(other, root / "tuned/model.safetensors", metadata={"format": "pt"})
    return root / "tuned", root / "base"


@pytest.mark.parametrize(
    "how", [dict(method="reset"), dict(method="interpolate", options=dict(alpha=1), include="norms")]
)
def test_the_last_layer_of_each_stack(two_stacks, tmp_path, how):
    "Whole layers and norms as well as matrices; the record says which."
    out = recover(*two_stacks, tmp_path / "out", layers="last 1", progress=False, certify="quick", **how)
    before, after = (load_file(f / "model.safetensors") for f in (two_stacks[0], out))
    moved = {".".join(n.split(".")[:3]) for n in before if "block" in n and not torch.equal(before[n], after[n])}
    assert moved == {"encoder.block.3", "decoder.block.1"}
    norms = [n for n in before if "layer_norm" in n and "block" in n and not torch.equal(before[n], after[n])]
    assert {".".join(n.split(".")[:3]) for n in norms} == moved
    assert recovery_record(out)[0]["layers"] == [1, 3]


def test_directions_are_restored_where_they_are(tmp_path):
    "Not by noise, a straight line or singular values alone, and not in a matrix of zeros."
    base = weights(layers=1)
    donor = write(tmp_path / "base", base)
    target = write(tmp_path / "tuned", changed(base, 0.1))
    zero = write(tmp_path / "zero", {k: v if "norm" in k else 0 * v for k, v in base.items()})
    count = lambda t, method: recovery_record(
        recover(t, donor, tmp_path / f"{method}-{t.name}", method, progress=False)
    )[0]["restored"]
    assert count(target, "anchored") > 0
    assert [count(target, m) for m in ("random", "interpolate_to_norm", "sigma_only")] == [0, 0, 0]
    assert count(zero, "anchored") == 0


def test_drift_needs_no_template(tmp_path):
    "A training does, and says so."
    folder = tmp_path / "plain"
    model, tokenizer = load_model("tiny")
    tokenizer.chat_template = None
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    texts = [f"{a} 3 7" for a in (1, 2, 4, 5)]
    assert drift(folder, [folder], {"p": texts}, noise=False).cosine.min() > 0.999
    with pytest.raises(ValueError, match="has no chat template"):
        load_model(folder)


def test_prompts_of_one_name_are_two_sets(tmp_path, capsys):
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.txt").write_text("".join(f"{i} {x} 7\n" for x in (1, 2, 4, 5)))
    files = [str(tmp_path / name / "test.txt") for name in "ab"]
    assert main(["drift", "tiny", "tiny-rule", "--no-noise", "--prompts", *files]) in (0, None)
    told = capsys.readouterr().out
    assert all(file in told for file in files)


def test_a_head_that_is_named_is_not_lost_to_layers(tmp_path):
    folder = write(tmp_path / "a", weights() | {"lm_head.weight": gaussian(30, 24)})
    found, _ = listed(folder, kinds=["q_proj", "lm_head"], layers="last 1")
    assert [m.name for m in found] == ["model.layers.2.self_attn.q_proj.weight", "lm_head.weight"]


def test_reset_knows_the_kinds_that_compare_prints(tmp_path):
    "Both of GPT-2's c_proj, or one; a third of a fused matrix is no whole tensor, and the kinds are listed."
    w = {
        f"h.0.{k}.weight": gaussian(*s)
        for k, s in (("attn.c_attn", (24, 72)), ("attn.c_proj", (24, 24)), ("mlp.c_proj", (96, 24)))
    }
    about = dict(model_type="gpt2", n_head=4, n_embd=24)
    donor, target = write(tmp_path / "base", w, **about), write(tmp_path / "tuned", changed(w), **about)
    out = recover(target, donor, tmp_path / "out", "reset", kinds=["attn.c_proj"], progress=False)
    after, before = load_file(out / "model.safetensors"), load_file(target / "model.safetensors")
    assert [n for n in w if not torch.equal(after[n], before[n])] == ["h.0.attn.c_proj.weight"]
    with pytest.raises(
        CheckpointError, match="no whole tensor of the kinds .'q_proj'.*it has attn.c_proj, c_proj, mlp.c_proj"
    ):
        recover(target, donor, tmp_path / "none", "reset", kinds=["q_proj"], progress=False)
    assert not (tmp_path / "none").exists()


def test_saved_whole_as_peft_matches_names(tmp_path):
    "modules_to_save = norm is every norm; another kind of adapter is told by its kind."
    base = write(tmp_path / "base", weights(layers=1))
    norm = "base_model.model.model.layers.0.input_layernorm.weight"
    tensors = {norm: torch.full((24,), 2.0)}
    for a, shape in (("A", (4, 24)), ("B", (24, 4))):
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{a}.weight"] = gaussian(*shape).float()
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(peft_type="LORA", r=4, lora_alpha=8, base_model_name_or_path=str(base), modules_to_save=["norm"])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).tensor("model.layers.0.input_layernorm.weight").tolist() == [2.0] * 24
    (folder / "adapter_config.json").write_text(json.dumps(config | dict(peft_type="OFT", r=0)))
    with pytest.raises(CheckpointError, match="peft_type 'OFT'"):
        Checkpoint(folder)


def test_a_comparison_in_memory_may_name_a_model_twice(tmp_path):
    "As before: whoever asks in Python gets what was asked for."
    folder = write(tmp_path / "a", weights(layers=1))
    assert len(compare_all([folder, folder], progress=False).angles)
