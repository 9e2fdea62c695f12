"""Pretrains the small base model that gp_spectral ships, from nothing.

    python scripts/pretrain.py --minutes 22 --threads 2 --out gp_spectral/models/tiny

Everything is made here: a word-level tokenizer, a Llama of 0.8 million parameters, and online data from the solver. Only hands of the split
`pretrain` occur with four cards; hands of two and three cards are not split. The model sees the game under many readings of J, Q and K, both of
the study's among them, and many targets.

The loss is cross-entropy on the answer. A step-wise solution is drawn uniformly, step by step, from the first steps of all solutions.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gp_spectral import env

WORDS = (
    "You failed this trial because illegal formula answer has no steps a step is not of the form partial solution you used invalid numbers too "
    "many times didn't use your equals division by zero at most are read characters number long character operator missing before closing "
    "parenthesis without an opening one empty ends early never closed target cards"
).split()
SYMBOLS = "+ - * / = ; ( ) [ ] , . : ' ->".split()
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer():
    special = ["<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = special + [str(n) for n in range(201)] + ["A", "J", "Q", "K"] + SYMBOLS + sorted(set(WORDS) - {"A"})
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|[A-Za-z']+|[^\s]"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        padding_side="left",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def draw_problem(rng, splits):
    """A problem to learn from. Four cards are a hand of the split `pretrain`, for 24 or another target, so that
    the few hundred hands for 24 are not all there is to learn. Three are often numbers of any size, as they remain after a first step."""
    n = rng.choices((2, 3, 4), (0.06, 0.34, 0.60))[0]
    while True:
        kind = rng.random()
        faces = (
            (10, 10, 10)
            if kind < 0.35
            else (11, 12, 13)
            if kind < 0.75
            else tuple(rng.randint(1, 13) for _ in range(3))
        )
        cards = [rng.choice(env.CARDS) for _ in range(4)]
        if faces == (11, 12, 13):
            cards[rng.randrange(4)] = rng.choice(env.FACES)
        remains = n == 3 and rng.random() < 0.6
        if n < 4 and not remains:
            cards = cards[:n]
        problem = env.Problem(tuple(cards), faces, 24)
        state = tuple(sorted(problem.numbers))
        if len(state) == 4 and splits[state] != "pretrain":
            continue
        if remains:
            state = rng.choice(list(env._moves(state).values()))
            if env.steps_to(state, 24):
                numbers = list(state)
                rng.shuffle(numbers)
                return Remains(tuple(map(str, numbers)), faces, 24)
            continue
        if rng.random() < 0.4:
            if env.steps_to(state, 24):
                return problem
            continue
        while len(state) > 1:
            state = rng.choice(list(env._moves(state).values()))
        if state[0] <= 60:
            return env.Problem(tuple(cards), faces, state[0])


class Remains(env.Problem):
    "A problem whose cards are plain numbers."

    @property
    def numbers(self):
        return tuple(map(int, self.cards))


class Data:
    "Endless examples: prompt ids and answer ids."

    def __init__(self, tokenizer, seed):
        self.rng, self.splits, self.tokenizer, self.game = (
            random.Random(seed),
            env.hand_splits(),
            tokenizer,
            env.GeneralPoints(),
        )

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def wrong_answer(self, problem):
        "A sensible answer that misses the target, or answers by another reading of the faces."
        faces = problem.faces if self.rng.random() < 0.8 else tuple(env.RULES["faces_as_ten"].values())
        numbers = (
            problem.numbers
            if isinstance(problem, Remains)
            else env.card_numbers(problem.cards, dict(zip(env.FACES, faces)))
        )
        state, text = tuple(sorted(numbers)), " ".join(problem.cards) + " = " + " ".join(map(str, numbers))
        while len(state) > 1:
            (a, op, b), state = self.rng.choice([m for m in env._moves(state).items()])
            text += f" ; {a} {op} {b} = {env._result(a, op, b)}" + (
                " ; " + " ".join(map(str, state)) if len(state) > 1 else ""
            )
        return text

    def example(self, two_turns):
        problem = draw_problem(self.rng, self.splits)
        chat = [{"role": "user", "content": self.game.prompt(problem)}]
        if two_turns:
            wrong = self.wrong_answer(problem)
            feedback = self.game.verify(problem, wrong)
            if not feedback.solved:
                chat += [
                    {"role": "assistant", "content": wrong},
                    {"role": "user", "content": self.game.retry(feedback)},
                ]
        prompt = self.ids(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        return prompt, self.ids(env.compact_answer(problem, self.rng)) + [self.tokenizer.eos_token_id]

    def batch(self, n):
        two_turns = self.rng.random() < 0.08  # one kind a batch: less padding
        rows = [self.example(two_turns) for _ in range(n)]
        width = max(len(p) + len(a) for p, a in rows)
        ids, labels = torch.zeros(n, width, dtype=torch.long), torch.full((n, width), -100)
        for i, (p, a) in enumerate(rows):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        return ids, labels


def success(model, tokenizer, rule, split, n, seed=0):
    game = env.GeneralPoints(rule)
    problems = game.problems(split, n, seed)
    texts = []
    for i in range(0, n, 400):
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": game.prompt(p)}], tokenize=False, add_generation_prompt=True
            )
            for p in problems[i : i + 400]
        ]
        x = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**x, max_new_tokens=48, do_sample=False)
        texts += tokenizer.batch_decode(out[:, x.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(game.verify(p, t).solved for p, t in zip(problems, texts)) / n


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The small base model of gp_spectral

A Llama of {parameters:,} parameters ({layers} layers, width {hidden}, {words} words) that plays GeneralPoints: it is shown a reading of J, Q and K, a target
and cards, and answers step by step. It was pretrained from nothing for the study of this package and is good for nothing else.

**Data.** {examples:,} examples made on the way by the solver, each a right answer drawn at random: two, three and four cards (6, 34 and 60 %), J, Q, K as
10 (35 %), as 11, 12, 13 (40 %) or at random (25 %), target 24 or another. Four-card hands are those of the split `pretrain` only
(`gp_spectral.env.hand_splits`, seed {split_seed}); no hand of `train`, `validation` or `test` was used. One batch in twelve is a second attempt after the
verifier's feedback.

**Training.** AdamW (betas 0.9, 0.98, weight decay 0.1 on matrices), learning rate {lr:g}, linear decay after 30 % of the time, batch {batch}, {steps:,} steps,
{minutes:g} minutes on {threads} CPU threads, seed {seed}, float32. The number of steps depends on the machine: equal commands give similar models, not equal bits.

    python scripts/pretrain.py --minutes {minutes:g} --threads {threads} --seed {seed} --out {where}
    python scripts/pretrain.py --card --out {where}

**Curve** (validation hands, greedy, one attempt, 400 problems):

| minutes | steps | loss | J, Q, K = 10 | J, Q, K = 11, 12, 13 |
|---|---|---|---|---|
{curve}

**Success** on test hands, greedy, one attempt; 95 % intervals with hands as the independent units:

| rule | success | interval | problems | hands |
|---|---|---|---|---|
{success}
"""


def write_card(out):
    "Evaluates the model in `out` on test hands and writes its README.md."
    from gp_spectral.models import load_model
    from gp_spectral.play import evaluate, success_rate

    model, tokenizer = load_model(out)
    record = json.loads((out / "training.json").read_text())
    a = record["settings"]
    rows = [
        (rule, success_rate(evaluate((model, tokenizer), env.GeneralPoints(rule), "test", 1000, attempts=1)))
        for rule in env.RULES
    ]
    (out / "README.md").write_text(
        CARD.format(
            parameters=model.num_parameters(),
            layers=model.config.num_hidden_layers,
            hidden=model.config.hidden_size,
            words=len(tokenizer),
            examples=record["examples"],
            split_seed=env.SPLIT_SEED,
            lr=a["lr"],
            batch=a["batch"],
            steps=record["steps"],
            minutes=a["minutes"],
            threads=a["threads"],
            seed=a["seed"],
            where="gp_spectral/models/tiny",
            curve="\n".join(
                "| {minutes} | {step} | {loss} | {faces_as_ten:.3f} | {faces_as_rank:.3f} |".format(**r)
                for r in record["curve"]
            ),
            success="\n".join(
                f"| {rule} | {r['rate']:.3f} | {r['low']:.3f} – {r['high']:.3f} | {r['n']} | {r['hands']} |"
                for rule, r in rows
            ),
        )
    )
    print((out / "README.md").read_text())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=22)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--every", type=float, default=3, help="minutes between evaluations")
    p.add_argument(
        "--card", action="store_true", help="only evaluate the model in --out on test hands, and write its card"
    )
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    if a.card:
        return write_card(a.out)
    tokenizer = build_tokenizer()
    size = len(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=a.hidden,
            intermediate_size=int(a.hidden * 2.5),
            num_hidden_layers=a.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rope_theta=10000.0,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.02,
        )
    )
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters, {size} words", flush=True)
    groups = [
        {"params": [w for w in model.parameters() if w.ndim == 2], "weight_decay": 0.1},
        {"params": [w for w in model.parameters() if w.ndim < 2], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.98))
    data = Data(tokenizer, a.seed)
    start, step, paused, curve, due, running = time.time(), 0, 0.0, [], a.every, 0.0
    while True:
        done = (time.time() - start - paused) / 60 / a.minutes
        if done >= 1:
            break
        for g in opt.param_groups:
            g["lr"] = a.lr * min(1, (step + 1) / 100, max(0.0, (1 - done) / 0.7))
        ids, labels = data.batch(a.batch)
        at = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[at], labels[:, 1:][at])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if (time.time() - start - paused) / 60 >= due:
            pause = time.time()
            model.eval()
            due += a.every
            row = dict(
                minutes=round((pause - start - paused) / 60, 1),
                step=step,
                loss=round(running, 4),
                **{r: success(model, tokenizer, r, "validation", 400) for r in env.RULES},
            )
            model.train()
            curve.append(row)
            print(json.dumps(row), flush=True)
            paused += time.time() - pause
            save(a, model, tokenizer, curve, step)
    model.eval()
    save(a, model, tokenizer, curve, step)


def save(a, model, tokenizer, curve, step):
    model.save_pretrained(a.out)
    tokenizer.save_pretrained(a.out)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    (a.out / "training.json").write_text(
        json.dumps(dict(settings=settings, steps=step, examples=step * a.batch, curve=curve), indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
