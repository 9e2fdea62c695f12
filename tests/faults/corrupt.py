"""Checkpoints as they are after an accident, or an attack, as data: what is done to a good one, and what is then said.

`KINDS` has a function for each kind, which damages a copy of a small model that can be loaded, or of an adapter over
it, and the words that an error must have: the file, the tensor or the key."""

import json
import os
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gp_spectral.folders import TINY

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
FILE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
KINDS = {}  # name: (function of a folder, words of the error, what is damaged: 'model', 'shards' or 'adapter')


def kind(*words, of="model"):
    "Registers a way to damage a folder, by the name of its function."

    def register(damage):
        KINDS[damage.__name__.replace("_", " ")] = damage, words, of
        return damage

    return register


def small(folder, layers=1, change=0.0):
    "The shipped model with fewer layers, as a folder that can be loaded; `change` makes another one of it."
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md", "training.json"))
    kept = {k: v for k, v in load_file(TINY / FILE).items() if ".layers." not in k or int(k.split(".")[2]) < layers}
    generator = torch.Generator().manual_seed(0)
    noise = lambda v: change * v.std().nan_to_num() * torch.randn(v.shape, generator=generator)
    save_file({k: v + noise(v) for k, v in kept.items()}, folder / FILE, metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text()) | dict(num_hidden_layers=layers)
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def in_shards(folder):
    "The same folder, with its weights in two files and an index."
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in where if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return folder


def adapter(folder, base):
    "A LoRA adapter for the query projection of a base."
    folder.mkdir()
    g, name = torch.Generator().manual_seed(1), f"base_model.model.{Q.removesuffix('.weight')}"
    both = dict(A=torch.randn(4, 128, generator=g), B=torch.randn(128, 4, generator=g))
    save_file({f"{name}.lora_{x}.weight": t for x, t in both.items()}, folder / ADAPTER)
    told = dict(peft_type="LORA", base_model_name_or_path=str(base), r=4, lora_alpha=8, target_modules=["q_proj"])
    (folder / "adapter_config.json").write_text(json.dumps(told | dict(task_type="CAUSAL_LM")))
    for file in [*TINY.glob("*token*"), *TINY.glob("*.jinja")]:
        shutil.copy(file, folder)
    return folder


def good(folder, of, base):
    "An undamaged folder of the sort that a kind damages."
    if of == "adapter":
        return adapter(folder, base)
    small(folder, change=0.1)
    return in_shards(folder) if of == "shards" else folder


def header_of(file):
    "(the entries of a safetensors file, the bytes of its tensors)."
    raw = Path(file).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(file, header, body):
    "Writes a safetensors file of any header, text or value, and any bytes."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(file).write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit(folder, change, file=FILE):
    "Changes the entries of a header."
    header, body = header_of(folder / file)
    put(folder / file, change(header) or header, body)


def entry(folder, name=Q, **told):
    "Changes what a header says of one tensor."
    edit(folder, lambda header: header[name].update(told))


def tensors(folder, change, file=FILE):
    "Changes the tensors of a file."
    found = load_file(folder / file)
    save_file(change(found) or found, folder / file, metadata={"format": "pt"})


def told(folder, file="config.json", **more):
    "Changes entries of a JSON file."
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | more))


# --- the file that holds the weights


@kind(FILE, "truncated or corrupt")
def empty_file(folder):
    (folder / FILE).write_bytes(b"")


@kind(FILE, "truncated or corrupt")
def cut_in_the_header(folder):
    os.truncate(folder / FILE, 100)


@kind(FILE, "truncated or corrupt")
def cut_in_the_tensors(folder):
    os.truncate(folder / FILE, (folder / FILE).stat().st_size - 7)


@kind(FILE, "truncated or corrupt")
def bytes_behind_the_end(folder):
    with open(folder / FILE, "ab") as f:
        f.write(b"more")


@kind(FILE, "the header they announce")
def header_longer_than_the_file(folder):
    raw = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(struct.pack("<Q", 2**63) + raw[8:])


@kind(FILE, "header is not JSON")
def header_that_is_no_json(folder):
    put(folder / FILE, b"{'weight': 1}", b"")


@kind(FILE, "header is not JSON")
def header_that_is_a_list(folder):
    put(folder / FILE, [1, 2], b"")


@kind(FILE, "header is not JSON")
def header_of_brackets(folder):
    put(folder / FILE, b'{"a":' + b"[" * 200_000, b"")


@kind(FILE, "header is not JSON")
def header_that_is_no_text(folder):
    put(folder / FILE, b'{"\xff\xfe": 1}', b"")


@kind(FILE, Q, "twice")
def a_tensor_twice(folder):
    header, body = header_of(folder / FILE)
    again = json.dumps({Q: header[Q]})[1:].encode()
    put(folder / FILE, json.dumps(header).encode()[:-1] + b", " + again, body)


@kind(FILE, Q, "malformed")
def entry_without_offsets(folder):
    edit(folder, lambda header: header[Q].pop("data_offsets") and None)


@kind(FILE, Q, "malformed")
def entry_that_is_a_number(folder):
    edit(folder, lambda header: header.update({Q: 7}))


@kind(FILE, Q, "malformed")
def shape_of_fractions(folder):
    entry(folder, shape=[128.5, 127.5])


@kind(FILE, Q, "malformed")
def shape_that_is_text(folder):
    entry(folder, shape="128")


@kind(FILE, Q, "wrong number of bytes")
def negative_shape(folder):
    entry(folder, shape=[-128, -128])


@kind(FILE, Q, "wrong number of bytes")
def huge_shape(folder):
    entry(folder, shape=[2**40, 2**40])


@kind(FILE, Q, "ends at byte")
def huge_shape_with_offsets_to_match(folder):
    entry(folder, shape=[2**20, 2**20], data_offsets=[0, 2**42])


@kind(FILE, Q, "wrong number of bytes")
def shape_that_is_too_small(folder):
    entry(folder, shape=[64, 128])


@kind(FILE, Q, "stored as F4")
def unknown_dtype(folder):
    entry(folder, dtype="F4")


@kind(FILE, Q, "wrong number of bytes")
def dtype_of_another_size(folder):
    entry(folder, dtype="F64")


@kind("packed weights", Q)
def integers_instead_of_weights(folder):
    entry(folder, dtype="I32")


@kind(FILE, "overlap")
def overlapping_offsets(folder):
    header, _ = header_of(folder / FILE)
    entry(folder, data_offsets=header[Q.replace("q_proj", "v_proj")]["data_offsets"])


@kind(FILE, Q, "wrong number of bytes")
def offsets_backwards(folder):
    header, _ = header_of(folder / FILE)
    entry(folder, data_offsets=header[Q]["data_offsets"][::-1])


@kind(FILE, Q, "NaN or infinite")
def nan_in_a_matrix(folder):
    tensors(folder, lambda t: t[Q].view(-1)[17:18].fill_(torch.nan) and None)


@kind(FILE, NORM, "NaN or infinite")
def infinity_in_a_norm(folder):
    tensors(folder, lambda t: t[NORM][3:4].fill_(torch.inf) and None)


@kind(Q)
def a_matrix_without_rows(folder):
    tensors(folder, lambda t: t | {Q: torch.zeros(0, 128)})


@kind(Q)
def a_matrix_that_is_a_vector(folder):
    tensors(folder, lambda t: t | {Q: t[Q].flatten()})


@kind(Q)
def a_matrix_is_missing(folder):
    tensors(folder, lambda t: t.pop(Q) is None or None)


@kind(FILE, "no tensor")
def a_file_without_tensors(folder):
    save_file({}, folder / FILE)


@kind("pickled weights")
def a_pickle_instead(folder):
    (folder / FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/gp_spectral_was_here'\ntR.")


@kind(FILE)
def a_link_to_itself(folder):
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(FILE)


@kind(FILE)
def a_folder_instead_of_a_file(folder):
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


@kind(FILE)
def a_pipe_instead_of_a_file(folder):
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


# --- several files


@kind("model-00002-of-00002.safetensors", "missing", of="shards")
def a_shard_is_missing(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


@kind("model-00002-of-00002.safetensors", "truncated or corrupt", of="shards")
def a_shard_is_cut(folder):
    os.truncate(folder / "model-00002-of-00002.safetensors", 500)


@kind(INDEX, "not a file of its own folder", of="shards")
def an_index_that_leads_out_of_the_folder(folder):
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    told(folder, INDEX, weight_map=where | {Q: "../../secret.safetensors"})


@kind(INDEX, "not a file of its own folder", of="shards")
def an_index_of_an_absolute_path(folder):
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    told(folder, INDEX, weight_map=where | {Q: "/etc/passwd"})


@kind(INDEX, "JSON", of="shards")
def an_index_that_is_cut(folder):
    os.truncate(folder / INDEX, 60)


@kind(INDEX, "weight_map", of="shards")
def an_index_that_is_a_list(folder):
    (folder / INDEX).write_text("[]")


@kind(INDEX, Q, of="shards")
def an_index_of_nulls(folder):
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    told(folder, INDEX, weight_map=where | {Q: None})


@kind("lacks extra.weight", INDEX, of="shards")
def an_index_of_what_is_not_there(folder):
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    told(folder, INDEX, weight_map=where | {"extra.weight": where[Q]})


@kind(INDEX, "twice", of="shards")
def an_index_that_says_it_twice(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{Q}": "other.safetensors", '))


# --- the config


@kind("config.json", "JSON")
def a_config_that_is_cut(folder):
    os.truncate(folder / "config.json", 40)


@kind("config.json", "JSON")
def a_config_of_brackets(folder):
    (folder / "config.json").write_text("[" * 200_000)


@kind("config.json", "JSON")
def a_config_that_is_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")


@kind("config.json", "JSON object")
def a_config_that_is_a_list(folder):
    (folder / "config.json").write_text("[1]")


@kind("config.json")
def no_config(folder):
    (folder / "config.json").unlink()


# --- an adapter


@kind("adapter_config.json", "JSON", of="adapter")
def an_adapter_config_that_is_cut(folder):
    os.truncate(folder / "adapter_config.json", 30)


@kind("adapter_config.json", "JSON object", of="adapter")
def an_adapter_config_that_is_a_list(folder):
    (folder / "adapter_config.json").write_text("[]")


@kind("adapter_config.json", "peft_type", of="adapter")
def an_adapter_of_another_kind(folder):
    told(folder, "adapter_config.json", peft_type="IA3")


@kind("adapter_config.json", "r = 0", of="adapter")
def an_adapter_of_rank_nought(folder):
    told(folder, "adapter_config.json", r=0)


@kind("adapter_config.json", "lora_alpha = 'much'", of="adapter")
def an_adapter_with_a_word_for_a_number(folder):
    told(folder, "adapter_config.json", lora_alpha="much")


@kind("adapter_config.json", "rank_pattern", of="adapter")
def an_adapter_with_a_pattern_that_never_ends(folder):
    told(folder, "adapter_config.json", rank_pattern={"(.*.*)*(a+)+!": 4})


@kind("../../../etc", of="adapter")
def an_adapter_whose_base_leads_elsewhere(folder):
    told(folder, "adapter_config.json", base_model_name_or_path="../../../etc")


@kind("adapter itself", of="adapter")
def an_adapter_over_itself(folder):
    told(folder, "adapter_config.json", base_model_name_or_path=str(folder))


@kind(ADAPTER, "truncated or corrupt", of="adapter")
def an_adapter_that_is_cut(folder):
    os.truncate(folder / ADAPTER, 300)


@kind(ADAPTER, "lora_A and lora_B", of="adapter")
def half_an_adapter(folder):
    tensors(folder, lambda t: {k: v for k, v in t.items() if "lora_A" in k}, ADAPTER)


@kind(ADAPTER, "../../x", of="adapter")
def an_adapter_for_a_path(folder):
    tensors(folder, lambda t: {f"base_model.model.../../x.lora_{k[-8]}.weight": v for k, v in t.items()}, ADAPTER)


@kind(ADAPTER, "NaN or infinite", of="adapter")
def an_adapter_that_diverged(folder):
    tensors(folder, lambda t: {k: v * torch.nan for k, v in t.items()}, ADAPTER)


@kind(ADAPTER, "no tensor", of="adapter")
def an_adapter_without_tensors(folder):
    save_file({}, folder / ADAPTER)
