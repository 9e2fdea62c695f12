"""How quick is the training wing? Ratios within one run, on the CPU, the alternatives taking turns.

    python benchmarks/training.py sft [MODEL]  # seconds per optimizer step: train_sft, a bare loop in torch
    python benchmarks/training.py rollout [MODEL]  # tokens per second: ours, model.generate
    python benchmarks/training.py kept [MODEL]  # tokens per second: keys and values kept between attempts, or not
    python benchmarks/training.py ppo [MODEL] --peer-python PEER  # seconds per iteration: train_ppo, TRL's
    python benchmarks/training.py study [MODEL]  # a whole study: one worker, several

MODEL is a checkpoint folder; the default is the small model of the package. Each prints a table and puts it into
benchmarks/results.md, and the numbers behind it into results.json; `--smoke` runs everything once, in the smallest
size, and only prints. On one thread (the default) processor time is counted, on several (`--threads`) what the clock
says. `study` tells both: what the clock says, which other work on the machine changes, and processor time of all
processes, which it hardly does.

TRL dropped `PPOTrainer` after 1.12, so it runs in an environment of its own. PEER is that environment's python;
these versions fit together:

    python3.11 -m venv peer
    peer/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0

and without a GPU torch==2.13.0+cpu, with --extra-index-url https://download.pytorch.org/whl/cpu;
without `--peer-python` its rows are left out.

What is equal in `ppo`: weights, prompts, episodes per iteration, all sampled in one batch at temperature 1; the
tokens of an answer (the end token is put beyond the vocabulary, so every answer has as many); epochs, minibatches,
optimizer steps, no more than one forward and backward pass for each; float32, AdamW, no gradient checkpointing. An
iteration is measured from outside, from its beginning to the beginning of the next; ours writes its log and the
state from which a killed run goes on in that time, the others save nothing. What necessarily differs:

  * PPOTrainer wants a reward model. It gets one that costs nothing; ours asks the verifier.
  * PPOTrainer wants a separate value model. It gets one of the policy's architecture, as in TRL's examples, and in a
    second row one that costs nothing. Ours has a head on the policy by default, and in another row a separate value
    model too.
  * PPOTrainer always asks a reference model. Ours does so in the rows that say so.
  * PPOTrainer takes old log-probabilities from sampling, where ours scores the episodes once more; it does not clip
    gradients; it pads on the left.
  * GRPO has no values and here no reference; eight answers to a prompt; it scores the old log-probabilities too. Its
    rewards are our verifier's.
"""

import argparse
import inspect
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from common import ratios, spread, table, write

PACKAGES = ("torch", "transformers", "trl", "accelerate")


# --- measuring


def clock(threads):
    return time.process_time if threads == 1 else time.perf_counter


def unit(a):
    return "CPU seconds" if a.threads == 1 else "seconds"


def conditions(a):
    return (
        f"{a.repeats} repeats, the ways in turn, {'one thread' if a.threads == 1 else f'{a.threads} threads'}, "
        "CPU, float32."
    )


def per_second(tokens, seconds):
    return [n / s for n, s in zip(tokens, seconds)]


def in_turn(
    ways,  # {name: function that returns a number of tokens}
    repeats,
    now,  # the clock
):  # {name: seconds of each repeat}, {name: tokens of each repeat}
    "Runs the ways one after the other, again and again; the first time does not count."
    seconds, tokens = {name: [] for name in ways}, {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            begun = now()
            n = way()
            took = now() - begun
            if repeat:
                seconds[name].append(took)
                tokens[name].append(n)
        if repeat:
            print(f"repeat {repeat}: " + "; ".join(f"{name} {s[-1]:.3g} s" for name, s in seconds.items()), flush=True)
    return seconds, tokens


def opened(a):
    "(model, tokenizer, task, what to call the checkpoint)."
    from gp_spectral.env import GeneralPoints
    from gp_spectral.models import load_model, resolve

    return (
        *load_model(a.model, dtype="float32"),
        GeneralPoints(style=a.style),
        a.model if a.model == "tiny" else "/".join(resolve(a.model).resolve().parts[-2:]),
    )


# --- SFT


@contextmanager
def optimizer_steps(now):
    "Gathers the time at the end of each optimizer step, whoever makes it."
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    try:
        yield ends
    finally:
        hook.remove()


@contextmanager
def recorded_batches():
    "Gathers the tokenised and padded batches that a Trainer is given."
    from transformers import Trainer

    batches, original = [], Trainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        batches.append({k: inputs[k].clone() for k in ("input_ids", "attention_mask", "labels")})
        return original(self, model, inputs, *args, **kwargs)

    Trainer.training_step = step
    try:
        yield batches
    finally:
        Trainer.training_step = original


def bare_sft(model, batches, lr, warmup, answers_only):
    """The same optimizer steps as TRL's, and nothing else. `answers_only`: logits for the tokens that count, as TRL
    does it."""
    import torch
    from torch.nn import functional as F

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / max(1, warmup)))
    for b in batches:
        if answers_only:
            hidden = model.base_model(
                input_ids=b["input_ids"], attention_mask=b["attention_mask"], use_cache=False
            ).last_hidden_state[:, :-1]
            labels = b["labels"][:, 1:]
            counts = labels != -100
            loss = F.cross_entropy(model.get_output_embeddings()(hidden[counts]).float(), labels[counts])
        else:
            loss = model(**b, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def sft(a):
    from gp_spectral.models import load_model
    from gp_spectral.sft import train_sft

    model, _, task, label = opened(a)
    del model
    now, steps, skipped, warmup = clock(a.threads), 4 if a.smoke else a.steps, 1 if a.smoke else 5, 5
    options = dict(
        steps=skipped + steps,
        batch_size=4 if a.smoke else a.batch,
        lr=1e-5,
        warmup=warmup,
        examples=8 if a.smoke else 200,
        points=1,
        n_eval=2,
        progress=False,
    )
    OURS, BARE, HALF = (
        "ours: `train_sft`",
        "bare loop, `model(labels=…).loss`",
        "bare loop, logits for the answers only",
    )
    with tempfile.TemporaryDirectory() as tmp:

        def ours(folder):
            train_sft(a.model, f"{tmp}/{folder}", task, **options)

        with recorded_batches() as batches:
            ours("recorded")
        if len(batches) != skipped + steps:
            raise SystemExit(
                f"{len(batches)} batches seen in {skipped + steps} steps: train_sft no longer steps through a "
                "Trainer, or gathers gradients"
            )

        def bare(answers_only):
            return lambda _: bare_sft(load_model(a.model, dtype="float32")[0], batches, 1e-5, warmup, answers_only)

        seconds = {OURS: [], BARE: [], HALF: []}
        for repeat in range(a.repeats):
            for name, way in ((OURS, ours), (BARE, bare(False)), (HALF, bare(True))):
                with optimizer_steps(now) as ends:
                    way(f"{repeat}")
                seconds[name].append(
                    (ends[-1] - ends[skipped - 1]) / steps
                )  # from the end of a step to the end of the last: no start, no evaluation
            shutil.rmtree(f"{tmp}/{repeat}")
            print(
                f"repeat {repeat + 1}: " + "; ".join(f"{name} {s[-1]:.3g} s" for name, s in seconds.items()), flush=True
            )
    tokens = statistics.mean(int(b["attention_mask"].sum()) for b in batches)
    text = table(
        ("what", f"{unit(a)} per step, median [range]", "speed, × bare loop", "speed, × bare loop on answers only"),
        [(name, spread(s), ratios(seconds[BARE], s), ratios(seconds[HALF], s)) for name, s in seconds.items()],
    )
    write(
        f"SFT, an optimizer step ({label})",
        text,
        f"{options['batch_size']} examples a step, {tokens:.0f} tokens, the same tokenised and padded batches for "
        f"all; {steps} steps a repeat. {conditions(a)}",
        dict(seconds=seconds, tokens_per_step=tokens),
        PACKAGES,
        not a.smoke,
    )


# --- rolling out


def endless(model, folder):
    "A copy of a checkpoint whose end token lies beyond its vocabulary: every answer goes on to the token limit."
    from gp_spectral.models import resolve
    from transformers import AutoConfig, AutoTokenizer

    source, folder = resolve(model).resolve(), Path(folder)
    folder.mkdir(parents=True)
    for f in source.iterdir():
        if f.suffix == ".safetensors":
            (folder / f.name).symlink_to(f)
        elif f.is_file():
            shutil.copy(f, folder)
    tokenizer, size = (
        AutoTokenizer.from_pretrained(source),
        AutoConfig.from_pretrained(source).get_text_config().vocab_size,
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "eos_token", json.dumps(tokenizer.eos_token)
        )  # prompts keep the old one
    tokenizer.add_tokens([f"<|never-{i}|>" for i in range(len(tokenizer), size + 1)])
    tokenizer.eos_token = f"<|never-{max(size, len(tokenizer) - 1)}|>"
    if tokenizer.eos_token_id < size:
        raise SystemExit(f"the vocabulary of {source} leaves no room for an end token that never comes")
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | dict(eos_token_id=None)))
    return folder


def plain(model, tokenizer, prompts, max_new_tokens, temperature=1.0, **more):
    "`model.generate`, as anyone would call it; the number of new tokens, up to each end token."
    import torch

    width, found = max(map(len, prompts)), model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(found if isinstance(found, list) else [] if found is None else [found])]
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    rows = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    end = torch.isin(rows[:, width:], torch.tensor(ends)).int()
    return int((end.cumsum(1) - end == 0).sum())


def written(episodes):
    return sum(t.end - t.start for e in episodes for t in e.turns)


def recorded(play, *args, **kwargs):
    "(episodes, the arguments of each call of the sampler, by name)."
    from gp_spectral.play import generate

    calls, signature = [], inspect.signature(generate)

    def sampler(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return generate(*args, **kwargs)

    return play(*args, sampler=sampler, **kwargs), calls


def anew(*args):
    "`generate`, but `play` does not know it, and has every attempt read as a whole."
    from gp_spectral.play import generate

    return generate(*args)


def kept(a):
    "Seconds of whole rollouts: keys and values kept between attempts, or every attempt read anew."
    from gp_spectral.play import generate, play

    model, tokenizer, task, label = opened(a)
    n, attempts, limit = 8 if a.smoke else a.samples, 2 if a.smoke else 5, 8 if a.smoke else a.tokens or None
    problems, raw, parts = task.problems("train", n, 0), {}, []
    for size in (n, max(2, n // 4)):
        for temperature in (0.0, 1.0):
            common = dict(attempts=attempts, temperature=temperature, max_new_tokens=limit, batch_size=size)
            found = {}

            def way(name, sampler):
                def run():
                    found[name] = play(model, tokenizer, task, problems, sampler=sampler, **common)
                    return written(found[name])

                return run

            ways = {ANEW: way(ANEW, anew), KEPT: way(KEPT, generate)}
            seconds, tokens = in_turn(ways, a.repeats, clock(a.threads))
            same = sum(x.ids == y.ids for x, y in zip(found[ANEW], found[KEPT]))
            rates = {name: per_second(tokens[name], s) for name, s in seconds.items()}
            batches = "one batch" if size == n else f"batches of {size}"
            title = f"{'Sampled' if temperature else 'Greedy'}, {batches}, {same} of {n} conversations the same"
            raw[title] = dict(seconds=seconds, tokens=tokens)
            parts += [
                (title, name, spread(s), spread(rates[name]), ratios(rates[name], rates[ANEW]))
                for name, s in seconds.items()
            ]
    head = ("conversations", "what", f"{unit(a)}, median [range]", "tokens per second", f"tokens per second, × {ANEW}")
    words = f"{n} conversations of up to {attempts} attempts. {conditions(a)}"
    write(f"Keys and values kept between attempts ({label})", table(head, parts), words, raw, PACKAGES, not a.smoke)


ANEW, KEPT = "read anew", "kept (`play`)"


def replayed(calls, way, **more):
    return sum(way(c["model"], c["tokenizer"], c["prompts"], c["max_new_tokens"], **more) for c in calls)


def arrival(calls, size):
    "The same prompts, cut into batches in the order of the problems; attempts stay apart."
    by_attempt = {}
    for c in calls:
        for seed, prompt in zip(c["seeds"], c["prompts"]):
            by_attempt.setdefault(seed[-1], []).append((seed, prompt))
    for attempt in sorted(by_attempt):
        rows = sorted(by_attempt[attempt], key=lambda x: x[0])
        for i in range(0, len(rows), size):
            seeds, prompts = zip(*rows[i : i + size])
            yield calls[0] | dict(prompts=list(prompts), seeds=list(seeds))


def padding(calls):
    return 1 - sum(len(p) for c in calls for p in c["prompts"]) / sum(
        len(c["prompts"]) * max(map(len, c["prompts"])) for c in calls
    )


def rollout(a):
    from gp_spectral.env import GeneralPoints
    from gp_spectral.ppo import PPOConfig, rollout as ours_rollout
    from gp_spectral.models import load_model
    from gp_spectral.play import generate, play, prompt_ids

    class Untiring(GeneralPoints):
        "Nobody has solved anything: all conversations go on to the last attempt."

        def verify(self, problem, text):
            return replace(super().verify(problem, text), solved=False)

    model, tokenizer, task, label = opened(a)
    now, n, attempts = clock(a.threads), 8 if a.smoke else a.samples, 2 if a.smoke else 5
    limit = 8 if a.smoke else a.tokens or task.max_new_tokens
    problems = task.problems("train", n, 0)
    prompts = [prompt_ids(tokenizer, task, p) for p in problems]
    config = PPOConfig(samples=n, temperature=1.0, max_new_tokens=limit)
    PLAIN, STATIC, OURS, JUDGED = (
        "plain `model.generate`",
        "plain, static cache",
        "ours: `generate`",
        "ours: `rollout`, with verdicts",
    )

    def single(model, tokenizer):
        return {
            PLAIN: lambda: plain(model, tokenizer, prompts, limit),
            STATIC: lambda: plain(model, tokenizer, prompts, limit, cache_implementation="static"),
            OURS: lambda: sum(len(new) for new, *_ in generate(model, tokenizer, prompts, limit, 1.0)),
            JUDGED: lambda: int(ours_rollout(model, tokenizer, task, problems, config, batch_size=n).mask.sum()),
        }

    raw, text = {}, ""

    def add(title, seconds, tokens, base, extra=()):
        nonlocal text
        raw[title] = dict(seconds=seconds, tokens=tokens)
        text += (
            ("\n\n" if text else "")
            + f"{title}:\n\n"
            + table(
                (
                    "what",
                    f"{unit(a)}, median [range]",
                    "tokens",
                    "tokens per second",
                    f"tokens per second, × {base}",
                    *extra[:1],
                ),
                [
                    (
                        name,
                        spread(s),
                        f"{statistics.median(tokens[name]):.0f}",
                        spread(per_second(tokens[name], s)),
                        ratios(per_second(tokens[name], s), per_second(tokens[base], seconds[base])),
                        *(x[name] for x in extra[1:]),
                    )
                    for name, s in seconds.items()
                ],
            )
        )

    with tempfile.TemporaryDirectory() as tmp:
        never = load_model(endless(a.model, f"{tmp}/endless"), dtype="float32")
        add(
            f"One attempt, {n} conversations in one batch, every answer {limit} tokens long",
            *in_turn(single(*never), a.repeats, now),
            PLAIN,
        )
        del never
    add(
        f"One attempt, {n} conversations in one batch, answers as long as they come",
        *in_turn(single(model, tokenizer), a.repeats, now),
        PLAIN,
    )

    common = dict(attempts=attempts, temperature=1.0, max_new_tokens=limit, batch_size=n)
    episodes, calls = recorded(play, model, tokenizer, task, problems, **common)
    untiring = Untiring(style=a.style)
    _, all_calls = recorded(play, model, tokenizer, untiring, problems, **common)
    needed = written(episodes)
    PLAY, REPLAY, REPLAY_STATIC, ALL, ALL_PLAIN = (
        "ours: `play`",
        "plain `model.generate` on our prompts",
        "the same, static cache",
        "ours, nobody retires",
        "plain `model.generate`, nobody retires",
    )
    ways = {
        REPLAY: lambda: replayed(calls, plain),
        REPLAY_STATIC: lambda: replayed(calls, plain, cache_implementation="static"),
        PLAY: lambda: written(play(model, tokenizer, task, problems, **common)),
        ALL: lambda: written(play(model, tokenizer, untiring, problems, **common)),
        ALL_PLAIN: lambda: replayed(all_calls, plain),
    }
    seconds, tokens = in_turn(ways, a.repeats, now)
    gain = {name: ratios(s, seconds[PLAY]) for name, s in seconds.items()}
    add(
        f"Up to {attempts} attempts, {n} conversations, {sum(e.solved for e in episodes)} of them solved on the way, "
        f"{needed} tokens needed",
        seconds,
        tokens,
        REPLAY,
        ("seconds, × ours", gain),
    )

    size = max(2, n // 4)
    _, cut = recorded(play, model, tokenizer, task, problems, **common | dict(batch_size=size))
    arrived = list(arrival(cut, size))
    SORTED, ARRIVED = "sorted by length (ours)", "in the order of arrival"
    ways = {
        name: lambda c=c: sum(len(new) for call in c for new, *_ in generate(**call))
        for name, c in ((ARRIVED, arrived), (SORTED, cut))
    }
    add(
        f"Up to {attempts} attempts, {n} conversations in batches of {size}, the same tokens",
        *in_turn(ways, a.repeats, now),
        ARRIVED,
        ("padding of the prompts", {ARRIVED: f"{padding(arrived):.1%}", SORTED: f"{padding(cut):.1%}"}),
    )
    write(f"Rolling out ({label})", text, f"Sampling at temperature 1. {conditions(a)}", raw, PACKAGES, not a.smoke)


# --- PPO: each alternative is a process of its own that does one iteration when told to


class Gate:
    """The worker's side: at the beginning of each iteration it tells how long the last one took, and waits for the
    word to go on."""

    def __init__(self, threads):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log
        self.now, self.begun, self.threads = clock(threads), None, threads

    def __call__(self):
        from importlib import metadata

        took = None if self.begun is None else self.now() - self.begun
        self.out.write(json.dumps(dict(seconds=took, **{p: metadata.version(p) for p in PACKAGES})) + "\n")
        self.out.flush()
        if not sys.stdin.readline():
            os._exit(0)
        self.begun = self.now()


def ours_worker(job, gate):
    from gp_spectral.env import GeneralPoints
    from gp_spectral.ppo import PPOConfig, train_ppo

    class Task(GeneralPoints):
        def problems(self, split, *args, **kwargs):  # asked once at the beginning of each round
            if split == "train":
                gate()
            return super().problems(split, *args, **kwargs)

    config = PPOConfig(
        iterations=10**6,
        samples=job["samples"],
        max_new_tokens=job["tokens"],
        epochs=job["epochs"],
        minibatch=job["minibatch"],
        microbatch=job["minibatch"],
        temperature=1.0,
        lr=1e-6,
        value_lr=1e-6,
        **job["options"],
    )
    train_ppo(
        job["model"], f"{job['folder']}/run", Task(style=job["style"]), config, None, eval_every=10**6, progress=False
    )


def trl_ppo_worker(job, gate):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Free(torch.nn.Module):
        "A reward or value model that costs nothing: a number from each token id."

        base_model_prefix = "body"

        class Body(torch.nn.Module):
            def forward(self, input_ids, **_):
                return SimpleNamespace(hidden_states=((input_ids % 7)[..., None].float(),))

        def __init__(self):
            super().__init__()
            self.body, self.score = self.Body(), torch.nn.Linear(1, 1)

    class Turns(TrainerCallback):  # PPOTrainer calls no on_step_begin
        def on_train_begin(self, *_, **__):
            gate()

        def on_step_end(self, *_, **__):
            gate()

    model, ref = (AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32) for _ in range(2))
    value = (
        Free()
        if job["options"].get("free_value")
        else AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    )
    # all episodes are one 'device batch', cut into minibatches: with gradient_accumulation_steps above 1, accelerate
    # would skip optimizer steps
    args = PPOConfig(
        output_dir=f"{job['folder']}/run",
        total_episodes=job["samples"] * 10**6,
        per_device_train_batch_size=job["samples"],
        gradient_accumulation_steps=1,
        num_mini_batches=job["samples"] // job["minibatch"],
        num_ppo_epochs=job["epochs"],
        local_rollout_forward_batch_size=job["samples"],
        response_length=job["tokens"],
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args,
        AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
        model,
        ref,
        Free(),
        Dataset.from_dict(dict(input_ids=job["prompts"])),
        value,
        callbacks=[Turns()],
    )
    trainer.train()


def grpo_worker(job, gate):
    from datasets import Dataset
    from gp_spectral.env import GeneralPoints
    from gp_spectral.models import load_model
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task = GeneralPoints(style=job["style"])
    problems = task.problems("train", job["samples"] * 4, 0)
    steps = job["epochs"] * job["samples"] // job["minibatch"]

    def reward(completions, index, **_):
        return [float(task.verify(problems[i], c[0]["content"]).reward) for i, c in zip(index, completions)]

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step % steps == 0:
                gate()

    model, tokenizer = load_model(job["model"], dtype="float32")
    args = GRPOConfig(
        output_dir=f"{job['folder']}/run",
        max_steps=10**6,
        per_device_train_batch_size=job["minibatch"],
        gradient_accumulation_steps=1,
        steps_per_generation=job["samples"] // job["minibatch"],
        num_generations=min(8, job["minibatch"]),
        num_iterations=job["epochs"],
        max_completion_length=job["tokens"],
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list(
        [dict(prompt=[dict(role="user", content=task.prompt(p))], index=i) for i, p in enumerate(problems)]
    )
    GRPOTrainer(
        model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Turns()]
    ).train()


WORKERS = dict(ours=ours_worker, trl_ppo=trl_ppo_worker, grpo=grpo_worker)


def worker(a):
    job = json.loads(Path(a.job).read_text())
    gate = Gate(a.threads)
    limit_threads(a.threads)
    WORKERS[job["kind"]](job, gate)


class Worker:
    "The parent's side: starts one, and lets it do an iteration."

    def __init__(self, python, job, threads):
        folder, self.kind = Path(job["folder"]), job["kind"]
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job))
        self.log = folder / "log"
        with open(self.log, "w") as f:
            self.process = subprocess.Popen(
                [python, __file__, "worker", str(folder / "job.json"), "--threads", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=f,
                text=True,
            )
        self.versions = {p: v for p, v in self.hear().items() if p != "seconds"}

    def hear(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.kind} ended by itself:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def iteration(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def ppo_ways(a):
    """{name: (kind, options, passes without gradients, and with, times epochs)}; ours as far as this PPOConfig knows
    them."""
    from gp_spectral.ppo import PPOConfig

    def known(**options):
        try:
            PPOConfig(**options)
            return True
        except (TypeError, ValueError):
            return False

    ways = {
        "ours: `train_ppo`, value head": ("ours", {}, "policy", "policy"),
        "ours, value head, reference": ("ours", dict(kl="reward"), "policy, reference", "policy"),
        "ours, value model, reference": (
            "ours",
            dict(kl="reward", value_head="model"),
            "policy, value, reference",
            "policy, value",
        ),
    }
    ways = {name: w for name, w in ways.items() if known(**w[1])}
    if a.peer_python:
        ways |= {
            "TRL's `PPOTrainer`, value model, reference": ("trl_ppo", {}, "value, reference", "policy, value"),
            "TRL's `PPOTrainer`, value model that costs nothing, reference": (
                "trl_ppo",
                dict(free_value=True),
                "reference",
                "policy",
            ),
        }
    return ways | {"TRL's GRPO": ("grpo", {}, "policy", "policy")}


def ppo(a):
    from gp_spectral.play import prompt_ids

    model, tokenizer, task, label = opened(a)
    del model
    ways, seconds, versions, workers = ppo_ways(a), {}, {}, {}
    samples, minibatch, tokens, epochs = (
        (16, 8, 8, 2) if a.smoke else (a.samples, a.minibatch, a.tokens or task.max_new_tokens, a.epochs)
    )
    if samples % minibatch:
        raise SystemExit(f"--samples {samples} is not a multiple of --minibatch {minibatch}")
    if minibatch % min(8, minibatch):
        raise SystemExit(f"--minibatch {minibatch} is not a multiple of 8, the answers of GRPO to a prompt")

    def start(name, folder):
        kind, options, *_ = ways[name]
        w = Worker(
            a.peer_python if kind == "trl_ppo" else sys.executable,
            job | dict(kind=kind, options=options, folder=folder),
            a.threads,
        )
        versions[name] = w.versions
        w.iteration()  # the first is for warming up
        return w

    with tempfile.TemporaryDirectory() as tmp:
        job = dict(
            model=str(endless(a.model, f"{tmp}/endless")),
            samples=samples,
            minibatch=minibatch,
            tokens=tokens,
            epochs=epochs,
            style=a.style,
        )
        job["prompts"] = [prompt_ids(tokenizer, task, p) for p in task.problems("train", samples * 4, 0)]
        try:
            for repeat in range(a.repeats):
                for i, name in enumerate(ways):
                    w = workers.get(name) or start(name, f"{tmp}/{i}-{repeat}")
                    workers[name] = w
                    seconds.setdefault(name, []).append(w.iteration())
                    if a.alone:
                        workers.pop(name).close()
                        shutil.rmtree(f"{tmp}/{i}-{repeat}")
                print(
                    f"repeat {repeat + 1}: " + "; ".join(f"{name} {s[-1]:.3g} s" for name, s in seconds.items()),
                    flush=True,
                )
        finally:
            for w in workers.values():
                w.close()
    head, same = next(iter(ways)), next((name for name in ways if "ours, value model" in name), None)
    bases = {"time, × ours with a value head": head} | (
        {"time, × ours with a value model and a reference": same} if same else {}
    )
    text = table(
        (
            "what",
            f"{unit(a)} per iteration, median [range]",
            *bases,
            "passes without gradients",
            f"with gradients, in {epochs} epochs",
        ),
        [
            (name, spread(s), *(ratios(s, seconds[b]) for b in bases.values()), *ways[name][2:])
            for name, s in seconds.items()
        ],
    )
    peer = next((versions[name] for name, w in ways.items() if w[0] == "trl_ppo"), None)
    write(
        f"A PPO iteration ({label})",
        text,
        f"{samples} episodes of one attempt, {tokens} new tokens each, {epochs} epochs, minibatches of {minibatch}. "
        f"{conditions(a)}" + (f" `PPOTrainer`: {', '.join(f'{k} {v}' for k, v in peer.items())}." if peer else ""),
        dict(seconds=seconds, versions=versions),
        PACKAGES,
        not a.smoke,
    )


# --- a study


# a quarter of the preset tiny, or so
QUARTER = dict(
    test_problems=100,
    retry_problems=25,
    forced_problems=50,
    sampled_problems=12,
    curve_problems=50,
    sft_steps=80,
    sft_points=4,
    ppo_iterations=6,
    ppo_samples=96,
    ppo_minibatch=48,
    tops="0.1 0.2",
    recovery_problems=75,
)
SMOKE = QUARTER | dict(
    test_problems=8,
    retry_problems=4,
    sampled_problems=2,
    curve_problems=8,
    sft_steps=4,
    sft_points=1,
    ppo_iterations=1,
    ppo_samples=16,
    ppo_minibatch=16,
    ppo_starts="1.0",
    tops="0.2",
    test_attempts=1,
    recovery_problems=8,
)


def whole_study(a, workers):
    "(seconds, processor seconds of all processes) of the command, in a folder of its own."
    sizes = (SMOKE if a.smoke else QUARTER) | dict(model=a.model, style=a.style)
    settings = [x for k, v in sizes.items() for x in ("--set", f"{k}={v}")]
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "gp_spectral", "study", "--seeds", str(a.seeds), "--workers", str(workers)]
        before, begun = spent(), time.perf_counter()
        done = subprocess.run([*command, *settings, "--out", out], capture_output=True, text=True)
        seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return seconds, spent() - before


def study(a):
    "The same study with one worker and with more, in turn."
    counts = (1, a.workers)
    name = lambda n: f"{n} worker{'s' * (n > 1)}"
    seconds, spent = ({name(n): [] for n in counts} for _ in range(2))
    for repeat in range(a.repeats):
        for n in counts:
            for kept, value in zip((seconds, spent), whole_study(a, n)):
                kept[name(n)].append(value)
        told = "; ".join(f"{n} {s[-1]:.0f} s, CPU {spent[n][-1]:.0f} s" for n, s in seconds.items())
        print(f"repeat {repeat + 1}: {told}", flush=True)
    one = name(1)
    rows = [
        (n, spread(s), ratios(seconds[one], s), spread(spent[n]), ratios(spent[n], spent[one]), ratios(spent[n], s))
        for n, s in seconds.items()
    ]
    head = ("what", "seconds, median [range]", "throughput, × 1 worker", "CPU seconds", "× 1 worker", "cores kept busy")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{a.seeds} seeds of about a quarter of the preset `tiny`, from the start of the command to its report; "
    words += f"{a.repeats} repeats, in turn, one thread a worker, {cores} cores."
    raw = dict(seconds=seconds, cpu_seconds=spent, sizes=QUARTER)
    write(f"A study, with one worker and with {a.workers}", table(head, rows), words, raw, PACKAGES, not a.smoke)


def limit_threads(n):
    import torch

    torch.set_num_threads(n)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="what", required=True, metavar="sft | rollout | kept | ppo | study")
    for name in ("sft", "rollout", "kept", "ppo", "study"):
        c = sub.add_parser(name)
        c.add_argument("model", nargs="?", default="tiny", help="checkpoint folder; default: the model of the package")
        c.add_argument("--repeats", type=int, default=5)
        c.add_argument("--threads", type=int, default=1)
        c.add_argument(
            "--style",
            default="compact",
            choices=("compact", "paper"),
            help="of prompts and answers; the small model knows the compact one only",
        )
        c.add_argument("--smoke", action="store_true", help="once, in the smallest size, and print only")
        if name == "sft":
            c.add_argument("--steps", type=int, default=20, help="timed steps of a repeat")
            c.add_argument("--batch", type=int, default=32)
        elif name == "study":
            c.add_argument("--seeds", type=int, default=2)
            c.add_argument("--workers", type=int, default=2, help="against one")
        else:
            c.add_argument("--samples", type=int, default=192, help="conversations")
            c.add_argument("--tokens", type=int, default=0, help="of an answer at most; 0 asks the task")
        if name == "ppo":
            c.add_argument("--minibatch", type=int, default=96)
            c.add_argument("--epochs", type=int, default=2)
            c.add_argument("--peer-python", help="python of an environment with TRL 1.12")
        if name == "ppo":
            c.add_argument(
                "--alone",
                action="store_true",
                help="one process at a time, started anew in each repeat: for models of which not six fit into memory",
            )
    c = sub.add_parser("worker")
    c.add_argument("job")
    c.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    os.environ |= {k: str(a.threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} | dict(
        CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1"
    )  # before torch is imported
    if a.what != "worker":
        limit_threads(a.threads)
    if getattr(a, "smoke", False):
        a.repeats = 1
    globals()[a.what](a)


if __name__ == "__main__":
    main()
