"Training as people meet it: what is found is said, before or when it matters, with the remedy; and nothing is lost."

import errno
import json
import math
import os
import shutil
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedTokenizerFast,
)

from gp_spectral import grpo
from gp_spectral.book import Book, NoRoom, is_finished, needs_room
from gp_spectral.env import Feedback, GeneralPoints
from gp_spectral.folders import TINY
from gp_spectral.grpo import GRPOConfig, train_grpo
from gp_spectral.models import (
    check_context,
    context_length,
    end_tokens,
    load_model,
    model_record,
    open_model,
    refuse_chance,
    save_model,
    turn_end,
)
from gp_spectral.play import _Context, evaluate, generate, play, unknown_words, verdict
from gp_spectral.ppo import ActorCritic, PPOConfig, compute_gae, train_ppo, whiten
from gp_spectral.sft import train_sft
from gp_spectral.twins import RFTConfig, train_rft
from made import Parity

ID = GeneralPoints()
LITTLE = dict(iterations=2, samples=8, minibatch=8, epochs=1)


class Coin:
    "Right answer: 'even' to 'A 2', 'odd' to 'J 3'."

    max_new_tokens, rule = 8, "coin"

    def problems(self, split, n, seed=0):
        return [("A 2", "J 3")[i % 2] for i in range(n)]

    def prompt(self, problem):
        return "cards " + problem

    def answer(self, problem, seed=0):
        return "even" if problem == "A 2" else "odd"

    def verify(self, problem, text):
        right = text.strip() == self.answer(problem)
        return Feedback(float(right), "the answer has no steps", right, "" if right else "format")

    def retry(self, feedback):
        return f"You failed this trial because {feedback.message}."


# --- tokenizers of several habits, and random models for them

TURNS = "{% for m in messages %}{{ START }}{% endfor %}{% if add_generation_prompt %}{{ HEAD }}{% endif %}"
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def turns(start, head):
    return TURNS.replace("START", start).replace("HEAD", head)


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
CHATS = dict(
    gemma=dict(end="<end_of_turn>", eos="<eos>", more=["<bos>", "<start_of_turn>"], template=GEMMA),
    phi3=dict(
        end="<|end|>",
        eos="<|endoftext|>",
        more=["<|user|>", "<|assistant|>"],
        template=turns("'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n'", "'<|assistant|>\n'"),
    ),
    qwen=dict(
        end="<|im_end|>",
        eos="<|im_end|>",
        more=["<|im_start|>"],
        template=turns(
            "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'", "'<|im_start|>assistant\n'"
        ),
    ),
    gpt2=dict(
        end="<|endoftext|>",
        eos="<|endoftext|>",
        more=[],
        template=turns("m['role'] + ':\n' + m['content'] + eos_token", "'assistant:\n'"),
    ),
    new_line_before_the_end=dict(
        end="<|end|>",
        eos="<|endoftext|>",
        more=["<|user|>", "<|assistant|>"],
        template=turns("'<|' + m['role'] + '|>\n' + m['content'] + '\n<|end|>\n'", "'<|assistant|>\n'"),
    ),
    llama2=dict(end="</s>", eos="</s>", more=["<s>"], template=LLAMA2),
    endless=dict(end=None, eos=None, more=[], template=turns("m['role'] + ':\n' + m['content'] + '.'", "'assistant:'")),
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer_of(chat):
    "One token a byte, and the special ones."
    c = CHATS[chat]
    special = [x for x in dict.fromkeys((c["end"], c["eos"], *c["more"])) if x]
    t = Tokenizer(models.BPE({x: i for i, x in enumerate(ALPHABET)}, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=t, eos_token=c["eos"], padding_side="left")
    made.chat_template = c["template"]
    return made


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
CONFIGS = dict(
    llama=lambda **k: LlamaConfig(**SIZES, intermediate_size=64, **k),
    gpt2=lambda **k: GPT2Config(n_embd=32, n_layer=2, n_head=2, **k),
    opt=lambda **k: OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, **k),
    bloom=lambda **k: BloomConfig(hidden_size=32, n_layer=2, n_head=2, **k),
    falcon=lambda **k: FalconConfig(**SIZES, **k),
    phimoe=lambda **k: PhimoeConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, num_local_experts=2, **k),
)


def model_of(kind, vocab=280, seed=0, **settings):
    torch.manual_seed(seed)
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](vocab_size=vocab, **special, **settings)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def scripted(tokenizer, *texts, end=None):
    "A sampler whose rows all say the texts, one attempt after the other; without an end they are cut off."
    said = iter(texts)

    def sampler(model, tokenizer, prompts, *rest):
        ids = tokenizer(next(said), add_special_tokens=False).input_ids
        return [(ids + [end] if end is not None else ids, end is not None)] * len(prompts)

    return sampler


# --- the end of a turn


def talk(chat, end, attempts=3):
    "(episode of wrong answers, the conversation as the template writes it) up to the last attempt."
    tokenizer, task = tokenizer_of(chat), Coin()
    sampler = scripted(tokenizer, *["odd odd"] * attempts, end=end)
    [e] = play(None, tokenizer, task, ["A 2"], attempts, batch_size=1, sampler=sampler)
    said = [dict(role="user", content=task.prompt("A 2"))]
    for t in e.turns[:-1]:
        said += [dict(role="assistant", content="odd odd"), dict(role="user", content=task.retry(t.feedback))]
    return tokenizer, e, tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("chat", [c for c in CHATS if c != "endless"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_turn_ends_once(chat, cut):
    "The ids of three attempts are the template's, whoever has written the end; blanks before it may be missing."
    end = tokenizer_of(chat).convert_tokens_to_ids(CHATS[chat]["end"])
    tokenizer, e, text = talk(chat, None if cut else end)
    ours, close = tokenizer.decode(e.ids[: e.turns[-1].start]), CHATS[chat]["end"]
    plain = lambda x: x.replace(f"\n{close}", close).replace(f" {close}", close).replace("] odd", "]odd")
    assert plain(ours) == plain(text) and ours.count(close) == text.count(close)
    if chat != "llama2" and (cut or chat != "new_line_before_the_end"):
        assert ours == text


def test_another_end_is_the_models_own_and_the_turn_is_closed_all_the_same():
    tokenizer = tokenizer_of("gemma")
    _, e, _ = talk("gemma", tokenizer.eos_token_id)
    between = tokenizer.decode(e.ids[e.turns[0].end - 1 : e.turns[1].start])
    assert between.startswith("<eos><end_of_turn>\n<start_of_turn>user\nYou failed")


@pytest.mark.parametrize("chat", CHATS)
def test_the_templates_end_is_an_end(chat):
    "Also where neither the tokenizer nor the generation settings name it."
    tokenizer, model = tokenizer_of(chat), model_of("llama")
    wanted = {tokenizer.convert_tokens_to_ids(CHATS[chat][x]) for x in ("end", "eos") if CHATS[chat][x]}
    assert turn_end(tokenizer) == (tokenizer.convert_tokens_to_ids(CHATS[chat]["end"]) if wanted else None)
    if wanted:
        assert set(end_tokens(model, tokenizer)) == wanted
        model.generation_config = GenerationConfig(eos_token_id=7)
        assert set(end_tokens(model, tokenizer)) == {*wanted, 7}


def test_a_template_without_a_place_for_answers_has_no_end():
    tokenizer = tokenizer_of("qwen")
    tokenizer.chat_template = "{{ raise_exception('only one user turn') if messages | length > 1 }}"
    assert turn_end(tokenizer) is None and end_tokens(model_of("llama"), tokenizer) == [tokenizer.eos_token_id]


# --- no end token


def begin(train, model, out, task=None, tokenizer=None, **settings):
    task = task or Coin()
    if train is train_sft:
        told = dict(steps=2, points=1, n_eval=2, examples=8, batch_size=4) | settings
        return train_sft(model, out, task, tokenizer=tokenizer, progress=False, **told)
    config = {train_ppo: PPOConfig, train_rft: RFTConfig, train_grpo: GRPOConfig}[train]
    more = dict(generations=4) if train is train_grpo else {}
    return train(model, out, task, config(**LITTLE | more | settings), tokenizer=tokenizer, progress=False)


TRAININGS = [train_sft, train_ppo, train_rft, train_grpo]


@pytest.mark.parametrize("train", TRAININGS)
def test_a_model_whose_answers_cannot_end_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="no token ends an answer of LlamaForCausalLM.*set one of them"):
        begin(train, model_of("llama"), tmp_path / "x", tokenizer=tokenizer_of("endless"))
    assert not (tmp_path / "x").exists()


def test_an_end_among_the_generation_settings_is_enough(tmp_path):
    "And rows are padded with it."
    model, tokenizer = model_of("llama"), tokenizer_of("endless")
    with pytest.raises(ValueError, match="no token ends an answer"):
        play(model, tokenizer, Coin(), ["A 2"])
    model.generation_config = GenerationConfig(eos_token_id=7)
    assert len(play(model, tokenizer, Coin(), ["A 2", "J 3 J 3"], attempts=2)) == 2
    assert open_model((model, tokenizer))[1].pad_token_id == 7
    save_model(model, tokenizer, tmp_path / "m")
    assert load_model(tmp_path / "m")[1].pad_token_id == 7 and len(evaluate(tmp_path / "m", Coin(), n=4, attempts=2))


# --- words


class Foreign(Coin):
    "Asks in words that the tiny model has; `words` says which of its answers are in other ones."

    def __init__(self, *words):
        self.words = words

    def prompt(self, problem):
        return "cards " + problem

    def answer(self, problem, seed=0):
        return self.words[problem == "J 3"]


def test_unknown_words_are_found():
    tokenizer = load_model("tiny")[1]
    assert unknown_words(tokenizer, ["cards A gerade", "J ungerade gerade"]) == ["gerade", "ungerade"]
    assert unknown_words(tokenizer, ["cards A 2"]) == [] and unknown_words(tokenizer_of("gpt2"), ["gerade é"]) == []


def test_answers_that_cannot_be_said(tmp_path):
    with pytest.raises(ValueError, match="8 of 8 answers of Foreign.*'gerade'.*no token for 'gerade'.*get_vocab"):
        begin(train_sft, "tiny", tmp_path / "x", Foreign("gerade", "ungerade"))
    assert not (tmp_path / "x").exists()
    with pytest.warns(UserWarning, match="4 of 8 answers of Foreign.*no token for 'ungerade'.*leave such problems out"):
        begin(train_sft, "tiny", tmp_path / "x", Foreign("2", "ungerade"))


def test_answers_that_the_tokenizer_does_not_give_back(tmp_path):
    "It has all words of them, and loses what lies between: the verifier wants no blanks."
    with pytest.raises(ValueError, match=r"8 of 8 answers.*'2\+2' for one: it gives back '2 \+ 2'"):
        begin(train_sft, "tiny", tmp_path / "x", Foreign("2+2", "3+3"))


def test_questions_that_cannot_be_read():
    class Odd(Coin):
        def prompt(self, problem):
            return "Karten " + problem

    class Again(Coin):
        def retry(self, feedback):
            return "noch einmal"

    loaded = load_model("tiny")
    with pytest.warns(UserWarning, match="no token for 'Karten' of what the model is told: it reads <unk>"):
        play(*loaded, Odd(), ["A 2"])
    with pytest.warns(UserWarning, match="no token for 'noch', 'einmal'"):
        play(*loaded, Again(), ["A 2"], attempts=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        play(*loaded, Again(), ["A 2"])
        play(*loaded, ID, ID.problems("test", 4), attempts=2)


# --- contexts


@pytest.mark.parametrize("kind, size", [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_a_table_of_positions_ends(kind, size):
    model, tokenizer = model_of(kind, **{size: 64}), tokenizer_of("qwen")
    with pytest.raises(ValueError, match="a context of 64 tokens.*max_new_tokens"):
        generate(model, tokenizer, [[5] * 40, [5]], 30)
    assert [len(ids) for ids, _ in generate(model, tokenizer, [[5] * 40, [5]], 24)][0] <= 24
    with pytest.raises(ValueError, match="a context of 64 tokens"):
        generate(model, tokenizer, [[5] * 64], 1)


def test_rotary_positions_end_where_the_config_says():
    model, tokenizer = model_of("llama", max_position_embeddings=64), tokenizer_of("qwen")
    end = tokenizer.eos_token_id
    with pytest.raises(ValueError, match="a context of 64 tokens.*fewer attempts"):
        generate(model, tokenizer, [[5] * 50], 30)
    model.lm_head.weight.data[end] = 1e3 * model.lm_head.weight.data.sum(0).sign()  # it may end, and then has room
    ends = [ended for _, ended in generate(model, tokenizer, [[5] * 60, [6]], 30)]
    assert len(ends) == 2
    with pytest.raises(ValueError, match="a context of 64 tokens"):
        evaluate(model, Coin(), n=2, attempts=5, tokenizer=tokenizer)


def test_an_answer_that_fits_is_not_refused():
    "Its limit may lie beyond the context, and so may the padding of a row that has ended."
    model, tokenizer = model_of("llama", max_position_embeddings=64), tokenizer_of("qwen")
    ends = end_tokens(model, tokenizer)
    seen = _Context(model, [[5] * 60, [5] * 8], ends)
    rows = torch.full((2, 70), 5)
    rows[0, 62] = ends[0]
    assert seen(rows, "scores") == "scores"  # the first has ended; the second has 52 columns of padding
    rows[0, 62] = 5
    with pytest.raises(ValueError, match="64"):
        seen(rows, "scores")
    assert _Context(model_of("bloom"), [[5]], ends)(torch.full((1, 9000), 5), 1) == 1


def test_a_task_that_says_no_length_has_room():
    "The 512 tokens of such a task are fewer where the context is short, and leave room for all attempts."

    class Brief(Coin):
        max_new_tokens = None

        def retry(self, feedback):
            return "again"

    model, tokenizer = model_of("llama", max_position_embeddings=256), tokenizer_of("qwen")
    [e] = play(model, tokenizer, Brief(), ["A 2"], attempts=2, sampler=lambda *a: [([5] * a[3], False)], batch_size=1)
    assert 200 < len(e.ids) <= 256 and len(e.turns) == 2


def test_how_long_a_context_is():
    stretched = dict(rope_type="linear", factor=4.0, rope_theta=1e4)
    assert context_length(model_of("llama", max_position_embeddings=64)) == 64
    assert context_length(model_of("llama", max_position_embeddings=64, rope_parameters=stretched)) == 256
    assert context_length(ActorCritic(model_of("gpt2", n_positions=48))) == 48
    assert context_length(model_of("bloom")) is None and context_length(torch.nn.Linear(2, 2)) is None
    check_context(model_of("bloom"), 10**9, "a text")
    check_context(model_of("gpt2", n_positions=48), 48, "a text")
    with pytest.raises(ValueError, match="a context of 48 tokens, and a text needs 49 or more"):
        check_context(model_of("gpt2", n_positions=48), 49, "a text")


@pytest.mark.parametrize("train", [train_sft, train_grpo])
def test_trainers_say_what_does_not_fit(train, tmp_path):
    model, tokenizer = model_of("gpt2", n_positions=64), tokenizer_of("gpt2")

    class Long(Coin):
        max_new_tokens = 60

        def answer(self, problem, seed=0):
            return 50 * "even "

    with pytest.raises(ValueError, match="a context of 64 tokens"):
        begin(train, model, tmp_path / "x", Long(), tokenizer)
    assert not (tmp_path / "x").exists()


# --- verdicts and other words of a task


class Bad(Coin):
    "Gives the verdict that it is told."

    def __init__(self, verdict):
        self.verdict = verdict

    def answer(self, problem, seed=0):
        return "24"  # a word of the small model

    def verify(self, problem, text):
        return self.verdict


@pytest.mark.parametrize("train", TRAININGS)
def test_a_reward_that_is_no_number(train, tmp_path):
    with pytest.raises(ValueError, match="Bad gave the reward nan: expected a finite number"):
        begin(train, "tiny", tmp_path / "x", Bad(Feedback(math.nan, "x", False, "format")))


@pytest.mark.parametrize("reward", [math.inf, -math.inf, None, "1", np.float64("nan"), [1.0]], ids=str)
def test_rewards_that_are_no_numbers(reward):
    with pytest.raises(ValueError, match="Bad gave the reward .*: expected a finite number"):
        verdict(Bad(Feedback(reward, "x", False)), "A 2", "x")


@pytest.mark.parametrize(
    "found",
    [(1.0, "no", False), 1.0, None, "right", dict(reward=1.0), SimpleNamespace(reward=1.0, solved=True, error="")],
    ids=str,
)
def test_a_verdict_that_is_none(found):
    with pytest.raises(TypeError, match=r"Bad.verify gave .*: expected a Feedback\(reward, message, solved, error\)"):
        play(*load_model("tiny"), Bad(found), ["A 2"])


def test_verdicts_of_other_kinds_are_taken():
    assert verdict(Bad(Feedback(np.float32(1), "", np.True_)), "A 2", "x").reward == 1
    assert verdict(Bad(Feedback(torch.tensor(1.0), "", False)), "A 2", "x").reward == 1
    with pytest.raises(TypeError, match="solved='no': expected True or False"):
        verdict(Bad(Feedback(1.0, "", "no")), "A 2", "x")


@pytest.mark.parametrize("method", ["prompt", "answer", "retry"])
@pytest.mark.parametrize("found", [None, 3, b"x", ["x"]], ids=str)
def test_what_is_no_text_is_named(method, found, tmp_path):
    task = type("Mute", (Coin,), {method: lambda self, *a: found})()
    with pytest.raises(TypeError, match=f"Mute.{method} gave .*: expected text"):
        if method == "retry":
            play(*load_model("tiny"), task, ["A 2"], attempts=2)
        else:
            begin(train_sft, "tiny", tmp_path / "x", task)
    assert not (tmp_path / "x").exists()


# --- chance


def passes(net, n=3):
    b = [torch.arange(4, 40).remainder(250).reshape(2, 18) for _ in range(n)]
    with torch.no_grad():
        return [net(ids, torch.ones_like(ids))[0] for ids in b]


RANDOM = dict(
    gpt2=dict(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5),
    bloom=dict(hidden_dropout=0.5, attention_dropout=0.5),
    falcon=dict(hidden_dropout=0.5, attention_dropout=0.5),
    opt=dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
    llama=dict(attention_dropout=0.5),
    phimoe=dict(attention_dropout=0.5, router_jitter_noise=0.5, input_jitter_noise=0.5),
)


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("head", ["linear", "model"])
def test_no_chance_in_training_mode(kind, head):
    model = model_of(kind, **RANDOM[kind])
    model.train()
    ids = torch.arange(4, 40).reshape(2, 18)
    alive = [model(input_ids=ids, use_cache=False).logits for _ in range(3)]
    assert not all(torch.equal(alive[0], x) for x in alive[1:])
    with pytest.raises(ValueError, match="other numbers at each pass"):
        refuse_chance(model, "leave it")
    net = ActorCritic(model, head)
    wanted = passes(net)[0]
    net.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    assert all(torch.equal(x, passes(net)[0]) for x in passes(net)) and torch.allclose(passes(net)[0], wanted)
    refuse_chance(model, "leave it")
    kept = model.config.to_dict()
    assert {k: kept[k] for k in RANDOM[kind]} == RANDOM[kind]  # a saved model's config says what it said


def test_chance_of_a_kind_that_is_not_known_is_refused(tmp_path, monkeypatch):
    model, tokenizer = model_of("llama"), tokenizer_of("qwen")
    block = type(model.model.layers[0].mlp)
    forward = block.forward
    noisy = lambda self, x: forward(self, x) + (torch.randn_like(x) if self.training else 0)
    monkeypatch.setattr(block, "forward", noisy)
    with pytest.raises(ValueError, match="LlamaForCausalLM gives other numbers.*gradient_checkpointing = False"):
        begin(train_ppo, model, tmp_path / "x", tokenizer=tokenizer, gradient_checkpointing=True)
    assert not (tmp_path / "x").exists()


def test_grpo_takes_chance_out(tmp_path, monkeypatch):
    "TRL works in training mode, and makes nothing of dropout but modules."

    class Seen(Exception):
        pass

    def look(method, network, *more):
        refuse_chance(network, "leave it")
        raise Seen

    monkeypatch.setattr(grpo, "_trainer", look)
    with pytest.raises(Seen):
        begin(train_grpo, model_of("bloom", **RANDOM["bloom"]), tmp_path / "x", tokenizer=tokenizer_of("qwen"))


def test_the_first_step_of_a_model_with_functional_dropout(tmp_path):
    "Ratio 1 and KL 0, although gradient checkpointing works in training mode."
    model = model_of("bloom", **RANDOM["bloom"])
    begin(train_ppo, model, tmp_path, tokenizer=tokenizer_of("qwen"), gradient_checkpointing=True, iterations=1)
    assert abs(pd.read_parquet(tmp_path / "log.parquet").approx_kl[0]) < 1e-7
    assert json.loads((tmp_path / "checkpoint/config.json").read_text())["hidden_dropout"] == 0.5


# --- a reward that says nothing


def test_a_constant_and_its_rounding_are_not_whitened():
    mask = torch.ones(4, 50, dtype=torch.bool)
    for size in (1.0, 5.0, 1e4):
        x = size * (1 + 1e-7 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(whiten(x, mask), x)  # one number for all tokens: a gradient that is noise
    assert abs(whiten(1 + 1e-3 * torch.randn(4, 50), mask).std() - 1) < 1e-5


def test_a_round_whose_rewards_are_all_the_same(tmp_path):
    bad = Bad(Feedback(-1.0, "the answer has no steps", False, "format"))
    with pytest.warns(UserWarning, match="every answer of a round earned the same, -1.0: there is nothing to learn"):
        begin(train_ppo, "tiny", tmp_path / "a", bad)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="every answer")
        begin(train_ppo, "tiny", tmp_path / "b", ID, samples=48, minibatch=48)
        begin(train_ppo, "tiny", tmp_path / "c", Bad(Feedback(5.0, "", True)))  # all is solved


def test_without_lambda_and_whitening_silence_is_silent():
    "Advantages of a constant reward are one number for all tokens of all answers, however long they are."
    mask = torch.arange(9)[None] < torch.tensor([[3], [9], [6]])
    rewards = torch.zeros(3, 9)
    rewards[[0, 1, 2], [2, 8, 5]] = -0.2
    found = compute_gae(rewards, torch.zeros(3, 9), mask, 1.0, 1.0)[0]
    assert torch.equal(whiten(found, mask), found) and found[mask].unique().numel() == 1


# --- a model that is known by its path


@pytest.fixture
def base(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "base"))


def made_anew(base):
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"] *= 1.01
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("train", TRAININGS)
def test_a_base_that_was_made_anew_is_another(train, base, tmp_path):
    begin(train, base, tmp_path / "x", Parity())
    before = {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}
    made_anew(base)
    with pytest.raises(ValueError, match="a finished run of .*base as it was before.*another folder.*bring back"):
        begin(train, base, tmp_path / "x", Parity())
    assert before == {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}
    shutil.rmtree(base)
    begin(train, base, tmp_path / "x", Parity())  # its results outlive the base


def test_an_unfinished_run_does_not_go_on_from_another_base(base, tmp_path):
    config = PPOConfig(**LITTLE, kl="loss")
    train_ppo(base, tmp_path / "x", Parity(), config, progress=False, stop_after=1)
    kept = (base / "model.safetensors").read_bytes()
    made_anew(base)
    with pytest.raises(ValueError, match="an unfinished run of .*base as it was before"):
        train_ppo(base, tmp_path / "x", Parity(), config, progress=False)
    (base / "model.safetensors").write_bytes(kept)
    train_ppo(base, tmp_path / "x", Parity(), config, progress=False)
    train_ppo(base, tmp_path / "y", Parity(), config, progress=False)
    a, b = ((tmp_path / n / "checkpoint/model.safetensors").read_bytes() for n in "xy")
    assert a == b


def test_what_a_digest_looks_at(base, tmp_path):
    first = model_record(base)
    assert first["weights"] == model_record("tiny")["weights"] and first["model"] == str(base)
    (base / "README.md").write_text("other words")
    os.utime(base / "model.safetensors", (1, 1))
    assert model_record(base) == first
    for name in ("chat_template.jinja", "config.json", "tokenizer.json", "generation_config.json"):
        text = (base / name).read_text()
        (base / name).write_text(text + " ")
        assert model_record(base) != first
        (base / name).write_text(text)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path=str(base))))
    save_file(dict(x=torch.ones(1)), adapter / "adapter_model.safetensors")
    over = model_record(adapter)
    made_anew(base)
    assert model_record(adapter) != over and set(over) == {"model", "weights"}
    assert model_record(tmp_path / "nowhere") == dict(model=str(tmp_path / "nowhere"))
    assert set(model_record(load_model("tiny")[0])) == {"model"}


def test_records_without_a_digest_are_not_refused(tmp_path):
    "Those of older versions, and of runs whose base is gone."
    old, new = dict(model="m", lr=1.0), dict(model="m", lr=1.0, weights="3f")
    for kept, asked in ((old, new), (new, old)):
        assert not is_finished(tmp_path, asked, kept)
    with pytest.raises(ValueError, match=r"an unfinished run with other settings \(lr, weights\)"):
        is_finished(tmp_path, new | dict(weights="a0", lr=2.0), new)


# --- disks that are full


@pytest.mark.parametrize(
    "e",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda e: str(e)[:30],
)
def test_a_full_disk_by_any_name(e, tmp_path):
    with pytest.raises(NoRoom, match=f"no room in {tmp_path}.*make room and start the same command again"):
        with needs_room(tmp_path):
            try:
                raise e
            except type(e) as inner:
                raise KeyError("on the way") from inner


def test_other_errors_stay_what_they_are(tmp_path):
    for e in (OSError(errno.EACCES, "Permission denied"), RuntimeError("shapes"), KeyboardInterrupt()):
        with pytest.raises(type(e)) as caught, needs_room(tmp_path):
            raise e
        assert caught.value is e
    with pytest.raises(OSError, match="step 1 could not be kept") as caught, Book.open(tmp_path / "x", {}) as book:
        book.begin()
        book.write = lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        book.keep("step 1")
    assert type(caught.value) is OSError


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 24 MB, where one may mount."
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("train", [train_sft, train_ppo])
def test_a_disk_that_is_really_full(train, small_disk, tmp_path):
    "Wherever it fills up: the error names the folder and the remedy, and afterwards the run ends with the same bits."
    out, ballast, failed = small_disk / "x", small_disk / "ballast", 0
    for left in (0.3, 4, 9):
        ballast.write_bytes(bytes(int((24 - left) * 2**20)))
        try:
            begin(train, "tiny", out, Parity())
        except OSError as e:
            assert isinstance(e, NoRoom) and str(out) in str(e) and "make room" in str(e), e
            failed += 1
        ballast.unlink()
    begin(train, "tiny", out, Parity())
    begin(train, "tiny", tmp_path / "y", Parity())
    [name] = {p.name for p in (tmp_path / "y").iterdir() if p.name in ("checkpoint", "step-00002")}
    assert (
        failed > 1
        and (out / name / "model.safetensors").read_bytes()
        == (tmp_path / "y" / name / "model.safetensors").read_bytes()
    )
