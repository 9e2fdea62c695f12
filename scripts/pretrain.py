"""Pretrains the small base model that gp_spectral ships, from nothing.

    python scripts/pretrain.py --minutes 22 --threads 2 --out gp_spectral/models/tiny
    python scripts/pretrain.py --steps 1000 --mix rank=.99,random=.01 --cards 3:1 --target 1-30 --out DIR
    python scripts/pretrain.py --steps 1000 --task countdown --mix ood=.99,random=.01 --out DIR

Everything is made here: a word-level tokenizer, a Llama of 0.8 million parameters, and online data from the solver.
Only hands of the split `pretrain` occur with the largest number of cards; smaller hands are not split. By default the
model sees the game under many readings of J, Q and K, both of the study's among them, and many targets; `--mix` says
how often which reading is stated, `--cards` how many cards are dealt how often. With `--steps` on one thread the same
command gives the same bits; `--keep-every` keeps the model on the way, so that one run gives a family of bases.
`--task` is another domain in the place of the game (`gp_spectral.domains`), whose rules `--mix` calls id and ood.

The loss is cross-entropy on the answer. A step-wise solution is drawn uniformly, step by step, from the first steps
of all solutions.
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
from gp_spectral.domains import DOMAINS, LETTERS, PEOPLE, THINGS, VERBS

WORDS = (
    "You failed this trial because illegal formula answer has no steps a step is not of the form partial solution "
    "you used invalid numbers too "
    "many times didn't use your equals division by zero at most are read characters number long character operator "
    "missing before closing "
    "parenthesis without an opening one empty ends early never closed target cards"
).split()
SYMBOLS = "+ - * / = ; ( ) [ ] , . : ' ->".split()
DOMAIN_WORDS = [*"# #### @ ? max min numbers sort wrong dozen how has".split(), *LETTERS, *PEOPLE, *THINGS]
DOMAIN_WORDS += [verb for verbs in VERBS.values() for verb in verbs]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(more=()):
    special = ["<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = special + [str(n) for n in range(201)] + ["A", "J", "Q", "K"] + SYMBOLS + sorted(set(WORDS) - {"A"})
    words += more
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    pattern = "####|" * bool(more) + r"\d+|[A-Za-z']+|[^\s]"
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
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


READINGS = {"ten": (10, 10, 10), "rank": (11, 12, 13), "random": None, "free": None}  # free: cards without faces


class Mixture:
    "What is dealt how often: readings of the faces, numbers of cards, targets; only hands of one split at full size."

    def __init__(
        self,
        mix=dict(ten=0.35, rank=0.40, random=0.25),  # shares of the stated readings, see `READINGS`
        cards={2: 0.06, 3: 0.34, 4: 0.60},  # shares of the numbers of cards
        target=(24, 24),  # (low, high): one that the hand reaches; 24 alone: 24 in 40 % of the examples, else up to 60
        split="pretrain",
    ):
        self.mix, self.cards, self.target, self.split = mix, cards, target, split
        self.largest, self.reach = max(cards), {}
        self.splits = env.hand_splits(self.largest)

    def reading(self, rng):
        "(kind, faces), drawn by the shares."
        at, sum_ = rng.random() * sum(self.mix.values()), 0.0
        for kind, share in self.mix.items():
            sum_ += share
            if at < sum_:
                break
        return kind, READINGS[kind] or tuple(rng.randint(1, 13) for _ in range(3))

    def reachable(self, state):
        "Targets in the range that a hand reaches in integer steps."
        if state not in self.reach:
            low, high = self.target
            self.reach[state] = [t for t in range(low, high + 1) if env.steps_to(state, t)]
        return self.reach[state]

    def draw(self, rng):
        "A problem to learn from."
        n = rng.choices(list(self.cards), list(self.cards.values()))[0]
        while True:
            kind, faces = self.reading(rng)
            cards = [rng.choice(env.CARDS if kind != "free" else env.CARDS[:10]) for _ in range(self.largest)]
            if faces == READINGS["rank"]:
                cards[rng.randrange(n if self.largest < 4 else 4)] = rng.choice(env.FACES)
            remains = n == 3 and self.largest == 4 and rng.random() < 0.6
            problem = env.Problem(tuple(cards if remains else cards[:n]), faces, 24)
            state = tuple(sorted(problem.numbers))
            if len(state) == self.largest and self.splits[state] != self.split:
                continue
            found = self.remains(rng, state, faces) if remains else self.aimed(rng, state, problem)
            if found:
                return found

    def remains(self, rng, state, faces):
        """Three numbers of any size, as they remain after a first step: the few hundred hands for 24 are not all
        there is to learn."""
        state = rng.choice(list(env._moves(state).values()))
        if env.steps_to(state, 24):
            numbers = list(state)
            rng.shuffle(numbers)
            return Remains(tuple(map(str, numbers)), faces, 24)

    def aimed(self, rng, state, problem):
        "The problem with a target that its hand reaches; None when the target that was drawn is out of reach."
        if self.target != (24, 24):
            reach = self.reachable(state)
            return env.Problem(problem.cards, problem.faces, rng.choice(reach)) if reach else None
        if rng.random() < 0.4:
            return problem if env.steps_to(state, 24) else None
        while len(state) > 1:
            state = rng.choice(list(env._moves(state).values()))
        return env.Problem(problem.cards, problem.faces, state[0]) if state[0] <= 60 else None


class Remains(env.Problem):
    "A problem whose cards are plain numbers."

    @property
    def numbers(self):
        return tuple(map(int, self.cards))


class Data:
    "Endless examples: prompt ids and answer ids."

    def __init__(self, tokenizer, seed, mixture):
        self.rng, self.tokenizer, self.mixture, self.game = random.Random(seed), tokenizer, mixture, env.GeneralPoints()

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

    def dealt(self):
        "A problem, and what draws a right answer to it."
        problem = self.mixture.draw(self.rng)
        return problem, lambda: env.compact_answer(problem, self.rng)

    def example(self, two_turns):
        problem, answer = self.dealt()
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
        return prompt, self.ids(answer()) + [self.tokenizer.eos_token_id]

    def batch(self, n):
        two_turns = self.rng.random() < 0.08  # one kind a batch: less padding
        rows = [self.example(two_turns) for _ in range(n)]
        width = max(len(p) + len(a) for p, a in rows)
        ids, labels = torch.zeros(n, width, dtype=torch.long), torch.full((n, width), -100)
        for i, (p, a) in enumerate(rows):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        return ids, labels

    def measured(self, model, split="validation", n=400):
        "Success under each rule, and the share of face cards read as told."
        row, target = {}, 24 if self.mixture.target == (24, 24) else self.mixture.target
        for rule in env.RULES:
            game = env.GeneralPoints(rule, target, self.mixture.largest)
            problems = game.problems(split, n, 0)
            texts = played(model, self.tokenizer, game, problems)
            row[rule] = sum(game.verify(p, t).solved for p, t in zip(problems, texts)) / n
            right, faces = map(sum, zip(*map(read_as_told, problems, texts)))
            row[f"read_{rule}"] = round(right / faces, 4)
        return row


class DomainData(Data):
    "The same of another domain, of the problems of its split for pretraining."

    def __init__(self, tokenizer, seed, domain, size, mix):
        self.rng, self.tokenizer, self.mix = random.Random(seed), tokenizer, mix
        self.tasks = dict(zip(("id", "ood"), (domain(rule, size) for rule in domain.RULES)))
        self.game = self.tasks["id"]
        self.hands = self.game.dealt("pretrain")

    def meaning(self):
        "What the sign means, by the shares."
        kind = self.rng.choices(list(self.mix), list(self.mix.values()))[0]
        return self.tasks[kind].meaning if kind in self.tasks else self.game.any_meaning(self.rng)

    def dealt(self):
        while True:
            problem = self.game.problem(self.rng.choice(self.hands), self.rng, self.meaning())
            if problem:
                return problem, lambda: self.game.drawn_answer(problem, self.rng)

    def wrong_answer(self, problem):
        "A right answer to the same hand under any meaning."
        while True:
            other = self.game.problem(problem.items, self.rng, self.game.any_meaning(self.rng))
            if other:
                return self.game.drawn_answer(other, self.rng)

    def measured(self, model, split="validation", n=400):
        "Success under each rule, and the share of the answers that read it as told."
        row = {}
        for name, task in self.tasks.items():
            problems = task.problems(split, n, 0)
            texts = played(model, self.tokenizer, task, problems)
            row[name] = sum(task.verify(p, t).solved for p, t in zip(problems, texts)) / n
            row[f"read_{name}"] = sum(map(task.read_as_told, problems, texts)) / n
        return row


def played(model, tokenizer, game, problems):
    "The texts of greedy answers."
    texts = []
    for i in range(0, len(problems), 400):
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": game.prompt(p)}], tokenize=False, add_generation_prompt=True
            )
            for p in problems[i : i + 400]
        ]
        x = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**x, max_new_tokens=48, do_sample=False)
        texts += tokenizer.batch_decode(out[:, x.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def read_as_told(problem, text):
    "(face cards whose number stands in the number line of an answer, face cards)."
    line = text.split(";")[0].partition("=")[2].split()
    faces = [i for i, card in enumerate(problem.cards) if card in env.FACES]
    return sum(i < len(line) and line[i] == str(problem.numbers[i]) for i in faces), len(faces)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The small base model of gp_spectral

A Llama of {parameters:,} parameters ({layers} layers, width {hidden}, {words} words) that plays GeneralPoints: it is
shown a reading of J, Q and K, a target and cards, and answers step by step. It was pretrained from nothing for the
study of this package and is good for nothing else.

**Data.** {examples:,} examples made on the way by the solver, each a right answer drawn at random: two, three and
four cards (6, 34 and 60 %), J, Q, K as 10 (35 %), as 11, 12, 13 (40 %) or at random (25 %), target 24 or another.
Four-card hands are those of the split `pretrain` only (`gp_spectral.env.hand_splits`, seed {split_seed}); no hand of
`train`, `validation` or `test` was used. One batch in twelve is a second attempt after the verifier's feedback.

**Training.** AdamW (betas 0.9, 0.98, weight decay 0.1 on matrices), learning rate {lr:g}, linear decay after 30 % of
the time, batch {batch}, {steps:,} steps, {minutes:g} minutes on {threads} CPU threads, seed {seed}, float32. The
number of steps depends on the machine: equal commands give similar models, not equal bits.

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


def shares(text, key=str):
    "A dictionary from 'name=share,name=share' or 'name:share,…'."
    pairs = [part.replace(":", "=").split("=") for part in text.split(",")]
    return {key(name): float(share) for name, share in pairs}


def span(text):
    "(low, high) from '24' or '1-30'."
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=22)
    p.add_argument("--steps", type=int, help="instead of minutes: equal bits on one thread")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--task", choices=DOMAINS, help="another domain in the place of the card game")
    p.add_argument("--size", type=int, default=3, help="numbers or letters of a problem of that domain")
    told = "shares of stated readings: ten=.35,rank=.40,random=.25; also free; with --task: id=.35,ood=.40,random=.25"
    p.add_argument("--mix", type=shares, help=told)
    p.add_argument("--cards", type=lambda t: shares(t, int), help="shares of hands: 2:.06,3:.34,4:.60")
    p.add_argument("--target", type=span, default=(24, 24), help="24 (and others beside it), or a range such as 1-30")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--every", type=float, default=3, help="minutes between evaluations; steps, with --steps")
    p.add_argument("--keep-every", type=int, help="steps between models that are kept, in OUT/step-00050 and so on")
    p.add_argument("--keep-from", type=int, default=0, help="the first step at which a model is kept")
    p.add_argument("--half", action="store_true", help="write the last model in bfloat16: half the size, rounded")
    p.add_argument("--card", action="store_true", help="only test the model in --out and write its card")
    a = p.parse_args()
    known = ("id", "ood", "random") if a.task else READINGS
    if unknown := set(a.mix or {}) - set(known):
        p.error(f"--mix knows no {', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    return a


def new_model(tokenizer, hidden, layers):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.5),
        num_hidden_layers=layers,
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
    return LlamaForCausalLM(config)


def optimiser(model, lr):
    matrices, others = ([w for w in model.parameters() if (w.ndim == 2) == two] for two in (True, False))
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


class Clock:
    "How much of the training is done: steps of so many, or minutes of so many without the evaluations."

    def __init__(self, a):
        self.a, self.start, self.paused, self.due = a, time.time(), 0.0, a.every

    def minutes(self):
        return (time.time() - self.start - self.paused) / 60

    def done(self, step):
        return step / self.a.steps if self.a.steps else self.minutes() / self.a.minutes

    def evaluates(self, step):
        "Whether it is time for an evaluation."
        if (step if self.a.steps else self.minutes()) < self.due:
            return False
        self.due += self.a.every
        return True


def train_step(model, opt, data, batch):
    ids, labels = data.batch(batch)
    at = labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[at], labels[:, 1:][at])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    return loss.item()


def new_data(a, tokenizer):
    if a.task:
        mix = a.mix or dict(id=0.35, ood=0.40, random=0.25)
        return DomainData(tokenizer, a.seed, DOMAINS[a.task], a.size, mix)
    given = {k: v for k, v in dict(mix=a.mix, cards=a.cards).items() if v}
    return Data(tokenizer, a.seed, Mixture(target=a.target, **given))


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    if a.card:
        return write_card(a.out)
    tokenizer = build_tokenizer(DOMAIN_WORDS if a.task else [])
    model = new_model(tokenizer, a.hidden, a.layers)
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters, {len(tokenizer)} words", flush=True)
    opt, data, clock = optimiser(model, a.lr), new_data(a, tokenizer), Clock(a)
    step, curve, running = 0, [], 0.0
    while (done := clock.done(step)) < 1:
        for g in opt.param_groups:
            g["lr"] = a.lr * min(1, (step + 1) / 100, max(0.0, (1 - done) / 0.7))
        loss = train_step(model, opt, data, a.batch)
        step += 1
        running = loss if step == 1 else 0.98 * running + 0.02 * loss
        kept = a.keep_every and step >= a.keep_from and step % a.keep_every == 0
        if clock.evaluates(step) or kept:
            pause, minutes = time.time(), round(clock.minutes(), 1)
            model.eval()
            curve.append(dict(minutes=minutes, step=step, loss=round(running, 4), **data.measured(model)))
            model.train()
            print(json.dumps(curve[-1]), flush=True)
            clock.paused += time.time() - pause
            save(a, a.out / f"step-{step:05d}" if kept else a.out, model, tokenizer, curve, step)
    model.eval()
    if a.half:
        model.to(torch.bfloat16)
    save(a, a.out, model, tokenizer, curve, step)


def save(a, folder, model, tokenizer, curve, step):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    record = dict(settings=settings, steps=step, examples=step * a.batch, curve=curve)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
