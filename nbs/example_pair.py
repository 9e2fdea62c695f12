"""The checkpoints that 03a_checkpoint to 05_recovery look at: the shipped base model, the same model after a few
seconds of fine-tuning, and real weights.

Not part of the package: the spectral wing itself knows nothing of any game.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import gp_spectral
from gp_spectral.env import GeneralPoints

logging.disable_progress_bar()
BASE = Path(os.environ.get("GP_SPECTRAL_BASE") or Path(gp_spectral.__file__).parent / "models" / "tiny")
STEPS, BATCH, LR = 40, 32, 1e-3


def texts(tokenizer, rule, split, n, seed=0):
    "Prompts and right answers under one rule, as chats."
    game, found = GeneralPoints(rule), []
    for i, p in enumerate(game.problems(split, 2 * n, seed)):
        try:
            answer = game.answer(p, seed=i)
        except ValueError:
            continue  # a hand that needs fractions
        chat = [{"role": "user", "content": game.prompt(p)}, {"role": "assistant", "content": answer}]
        found.append(tokenizer.apply_chat_template(chat, tokenize=False))
    return found[:n]


def batch(tokenizer, some):
    "Padded token ids; only the answer counts as a label."
    x = tokenizer(some, return_tensors="pt", padding=True, add_special_tokens=False)
    answer = x.input_ids == tokenizer.convert_tokens_to_ids("<|assistant|>")
    answer = (answer.cumsum(1) > 0) & ~answer & (x.attention_mask > 0)
    return dict(input_ids=x.input_ids, attention_mask=x.attention_mask, labels=x.input_ids.masked_fill(~answer, -100))


def make_pair(folder=None, steps=STEPS):
    "`(base, tuned)`: two checkpoint folders; the second is made in some seconds, and kept for the other notebooks."
    torch.set_num_threads(1)
    stamp = f"{BASE.resolve()}:{(BASE / 'model.safetensors').stat().st_mtime_ns}:{steps}:answers:{torch.__version__}"
    folder = Path(folder or Path(tempfile.gettempdir()) / f"gp_spectral_example_{os.getuid()}")
    base, tuned, note = folder / "base", folder / "tuned", folder / "made_from.txt"
    if note.exists() and note.read_text() == stamp and (tuned / "model.safetensors").exists():
        return base, tuned
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    rng = random.Random(0)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        AutoTokenizer.from_pretrained(BASE),
    )
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    data, opt = (
        texts(tokenizer, "faces_as_ten", "train", 200),
        torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0),
    )
    for _ in range(steps):
        model(**batch(tokenizer, rng.sample(data, BATCH))).loss.backward()
        opt.step()
        opt.zero_grad()
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    note.write_text(stamp)
    return base, tuned


def real_weights():
    "The folder that `scripts/smollm2.py` makes (base_fp32, base, perturbed, sft); made here when it is not there."
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("GP_SPECTRAL_SMOLLM2") or root / "runs" / "smollm2")
    if not (folder / "record.json").exists():
        subprocess.run([sys.executable, root / "scripts" / "smollm2.py", folder], check=True)
    return folder


@lru_cache
def _held_out(rule, n):
    return texts(AutoTokenizer.from_pretrained(BASE), rule, "validation", n)


@torch.no_grad()
def loss(folder, rule="faces_as_rank", n=150):
    "Mean cross-entropy of right answers to held-out hands under a rule (nats per token)."
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(**batch(tokenizer, _held_out(rule, n))).loss.item()
