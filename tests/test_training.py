"Loading, saving and training: what goes wrong must say so."

import json
import math
import random
import shutil
from functools import partial
from itertools import combinations
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from made import furthest
from safetensors.torch import load_file, save_file
from gp_spectral.env import Feedback, GeneralPoints, Problem, compact_answer, steps_to
from gp_spectral.grpo import GRPOConfig, train_grpo
from gp_spectral.ppo import PPOConfig, train_ppo, whiten
from gp_spectral.folders import TINY
from gp_spectral.models import load_model, resolve_precision, save_model
from gp_spectral.play import curve_row, evaluate, pass_at, play, prompt_ids, reading_table, success_rate, success_table
from gp_spectral.sft import pick, train_sft
from gp_spectral.preset import Preset
from gp_spectral.study import study

ID, OOD = GeneralPoints("faces_as_ten"), GeneralPoints("faces_as_rank")


@pytest.fixture
def tiny(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def test_truncated_weights(tiny):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=str(tiny)):
        load_model(tiny)


def test_nan_weights_are_named(tiny):
    state = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 5] = math.nan
    save_file(state, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        load_model(tiny)


def test_weights_of_another_shape_are_named(tiny):
    config = json.loads((tiny / "config.json").read_text())
    wide, there = (
        config["intermediate_size"] + 8,
        load_file(tiny / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].shape,
    )
    (tiny / "config.json").write_text(json.dumps(config | dict(intermediate_size=wide)))
    with pytest.raises(
        ValueError,
        match=rf"model.layers.0.mlp.down_proj.weight in .*tiny has the shape \({there[0]}, {there[1]}\), "
        rf"its config.json wants \({there[0]}, {wide}\)",
    ):
        load_model(tiny)


def test_pickled_weights_are_refused(tiny):
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled"):
        load_model(tiny)


def test_code_in_a_checkpoint_is_not_run(tiny):
    config = json.loads((tiny / "config.json").read_text())
    config |= {
        "model_type": "foreign",
        "architectures": ["Foreign"],
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Foreign"},
    }
    (tiny / "config.json").write_text(json.dumps(config))
    (tiny / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError):
        load_model(tiny)


def test_no_chat_template(tiny):
    (tiny / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat template"):
        load_model(tiny)


def test_save_is_whole_or_not(tiny, tmp_path, monkeypatch):
    model, tokenizer = load_model(tiny)

    def fails(*a, **k):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fails)
    with pytest.raises(OSError):
        save_model(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_model_plays_both_rules():
    "The line of the model card, in small: far above nothing. The package promises 30 %, on more problems."
    for task in (ID, OOD):
        found = success_rate(evaluate("tiny", task, "test", 400, attempts=1))
        assert found["high"] > 0.30 and found["rate"] > 0.25, found


def test_evaluation_does_not_depend_on_batches():
    model = load_model("tiny")
    a, b = (evaluate(model, OOD, "validation", 60, attempts=2, batch_size=n) for n in (60, 7))
    assert a.drop(columns="seed").equals(b.drop(columns="seed"))


def test_generation_ignores_the_checkpoints_own_settings(tiny):
    model, tokenizer = load_model(tiny)
    problems = ID.problems("validation", 20)
    plain = [e.ids for e in play(model, tokenizer, ID, problems)]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 3
    assert [e.ids for e in play(model, tokenizer, ID, problems)] == plain


def test_an_answer_that_never_ends():
    model, tokenizer = load_model("tiny")
    episodes = play(model, tokenizer, ID, ID.problems("validation", 6), attempts=3, max_new_tokens=5)
    for e in episodes:
        assert len(e.turns) == 3 and not any(t.ended for t in e.turns)
        between = e.ids[e.turns[0].end : e.turns[1].start]
        assert between[0] == tokenizer.eos_token_id  # the cut-off turn is closed before the feedback


def test_an_answer_is_begun():
    "What it is given counts as the answer's text, and not as what the model wrote; a model goes on as it would."
    model, tokenizer = load_model("tiny")
    problems = OOD.problems("validation", 30)
    free, begun = (play(model, tokenizer, OOD, problems, 2, begin=b) for b in (None, OOD.forced))
    same = 0
    for a, b in zip(free, begun):
        asked, (first, *rest) = prompt_ids(tokenizer, OOD, b.problem), b.turns
        given = tokenizer(OOD.forced(b.problem), add_special_tokens=False).input_ids
        assert b.ids[: first.start] == asked + given and first.text.startswith(OOD.forced(b.problem) + " ;")
        assert first.feedback == OOD.verify(b.problem, first.text)
        if a.turns[0].text.startswith(OOD.forced(b.problem) + " ;"):
            assert (a.ids, [t.text for t in a.turns]) == (b.ids, [t.text for t in b.turns])
            same += 1
        for t in rest:  # only the first answer is begun
            assert t.text == tokenizer.decode(b.ids[t.start : t.end], skip_special_tokens=True)
    assert same > 20 and any(len(e.turns) == 2 for e in begun)
    cut = play(model, tokenizer, OOD, problems[:3], begin=OOD.forced, max_new_tokens=2)
    assert all(e.turns[0].end - e.turns[0].start == 2 and e.turns[0].end == len(e.ids) for e in cut)


def misreading(model, tokenizer, prompts, *_):
    "A sampler: takes faces for 10, whatever the rule; with the numbers before it, it solves the hand without a fault."
    answers = []
    for prompt in prompts:
        asked, given = tokenizer.decode(prompt).split("<|assistant|>")
        cards = tuple(asked.split("cards")[1].replace("<|end|>", "").split())
        if given.strip():
            numbers = [int(w) for w in given.split("=")[1].split()]
            faces = tuple(dict(zip(cards, numbers)).get(f, 0) for f in "JQK")
            text = compact_answer(Problem(cards, faces), random.Random(0)).removeprefix(given.strip())
        else:
            text = compact_answer(Problem(cards), random.Random(0)) or f"{ID.forced(Problem(cards))} ; 1 + 1 = 2"
        answers.append((tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id], True))
    return answers


def test_a_model_that_misreads_and_computes_right(monkeypatch):
    "R is 0, Q is 1: seen only where the reading is forced."
    monkeypatch.setattr("gp_spectral.play.play", partial(play, sampler=misreading))
    problems = [p for p in OOD.problems("test", 60) if steps_to(tuple(sorted(p.numbers)), 24)]
    told = dict(problems=problems, attempts=1)
    free = evaluate("tiny", OOD, name="free", **told)
    forced = evaluate("tiny", OOD, name="forced", forced=True, **told)
    table = reading_table(pd.concat([free, forced])).set_index("checkpoint")
    assert table["read"].to_dict() == dict(free=0, forced=1) and table.success.to_dict() == dict(free=0, forced=1)
    assert math.isnan(table.solved_if_read["free"]) and table.solved_if_read["forced"] == 1
    assert table.reading.to_dict() == dict(free=1, forced=0) and set(free.fault) == {"reading"}
    assert success_table(free)["read"].item() == curve_row(free)["read"] == 0


def test_the_split_of_success_adds_up():
    "S = R x Q + what the verifier forgives, whatever the rows."
    rng, n = random.Random(0), 400
    rows = dict(hand=[i % 70 for i in range(n)], read=[rng.random() < 0.4 for _ in range(n)])
    rows["solved_first"] = [rng.random() < (0.7 if r else 0.1) for r in rows["read"]]
    rows["fault"] = ["" if s else "search" if r else "reading" for s, r in zip(rows["solved_first"], rows["read"])]
    found = reading_table(pd.DataFrame(rows).assign(checkpoint="x", rule="y", split="test")).iloc[0]
    assert found.success == pytest.approx(found["read"] * found.solved_if_read + found.solved_unread)
    assert found.success + found.reading + found.search == pytest.approx(1) and found.solved_unread > 0
    assert found.read_low < found["read"] < found.read_high and found.n == n


def test_samples_are_draws_of_their_own():
    "The same whatever the batch and however many follow; a problem keeps its number."
    told, asked = dict(temperature=1.0, attempts=2), ID.problems("validation", 20)
    model = load_model("tiny")
    three, small = (evaluate(model, ID, problems=asked, samples=3, batch_size=b, **told) for b in (None, 3))
    assert three.equals(small) and three["sample"].tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert three.problem.tolist() == list(range(20)) * 3 and three.groupby("problem").hand.nunique().max() == 1
    assert three.query("sample == 0").equals(evaluate(model, ID, problems=asked, **told))
    a, b, c = (three.query("sample == @i")[["solved_first", "reward", "error"]].values.tolist() for i in range(3))
    assert a != b and b != c and a != c
    rates = success_rate(three)
    assert rates["n"] == 60 and rates["hands"] == len({p.key for p in asked})
    for wrong in (dict(samples=2), dict(samples=0, temperature=1.0)):
        with pytest.raises(ValueError, match="samples at temperature"):
            evaluate(model, ID, problems=asked, **wrong)


def test_pass_at_counts_subsets():
    "The estimator is the share of the subsets of k samples that hold a right one."
    rng, n = random.Random(1), 6
    rows = [
        dict(
            checkpoint="x",
            rule="y",
            split="test",
            seed=0,
            problem=p,
            hand=p // 2,
            sample=s,
            solved_first=rng.random() < p / 12,
        )
        for p in range(12)
        for s in range(n)
    ]
    table = pd.DataFrame(rows)
    right = [g.solved_first.tolist() for _, g in table.groupby("problem")]
    for k in (1, 2, 5, 6):
        found = pass_at(table, k).iloc[0]
        expected = np.mean([np.mean([any(some) for some in combinations(r, k)]) for r in right])
        assert found.pass_at_k == pytest.approx(expected) and found.success == pytest.approx(np.mean(right))
        assert found.pass_at_k_low < expected < found.pass_at_k_high and (found.samples, found.n) == (n, 12)
    with pytest.raises(ValueError, match="pass@7 needs 1 to 6 samples"):
        pass_at(table, 7)
    with pytest.raises(ValueError, match="same sample twice"):
        pass_at(pd.concat([table, table]), 1)


def test_tables_of_a_task_that_tells_nothing_and_of_an_older_version():
    coins, cards = evaluate("tiny", Coin(), n=4, attempts=1), evaluate("tiny", OOD, n=4, attempts=1)
    assert coins["read"].isna().all() and set(coins.fault) == {""} and math.isnan(curve_row(coins)["read"])
    table = success_table(pd.concat([coins, cards])).set_index("rule")
    assert math.isnan(table["read"]["Coin"]) and table["read"]["faces_as_rank"] == 1
    old = cards.drop(columns=["read", "fault", "sample"])
    assert math.isnan(success_table(old)["read"].item()) and math.isnan(curve_row(old)["read"])
    for rows in (coins, old):
        with pytest.raises(ValueError, match="has `read_as_told`"):
            reading_table(rows)
    with pytest.raises(TypeError, match="Coin has no `forced`"):
        evaluate("tiny", Coin(), n=4, forced=True)
    with pytest.raises(TypeError, match="even"):
        evaluate("tiny", Coin(), n=4, even=True)
    even = evaluate("tiny", GeneralPoints(n_cards=2, target=(1, 30)), n=60, attempts=1, even=True).hand.value_counts()
    assert even.max() - even.min() <= 1


def test_diverging_sft_stops(tmp_path):
    with pytest.raises(FloatingPointError, match="learning rate"):
        train_sft("tiny", tmp_path / "sft", ID, steps=30, lr=1e30, points=1, n_eval=4, examples=64, progress=False)
    assert (tmp_path / "sft" / "step-00000" / "model.safetensors").exists()


def test_sft_is_reproducible(tmp_path):
    for name in "ab":
        train_sft("tiny", tmp_path / name, ID, steps=4, points=1, n_eval=4, examples=64, seed=5, progress=False)
    assert (tmp_path / "a/step-00004/model.safetensors").read_bytes() == (
        tmp_path / "b/step-00004/model.safetensors"
    ).read_bytes()


def test_ppo_config_is_checked():
    for wrong in (dict(level="word"), dict(lr=0), dict(temperature=0), dict(value_head="big"), dict(minibatch=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PPOConfig(**wrong)


def test_microbatches_change_nothing(tmp_path):
    "One optimizer step over the whole round, in one piece and in pieces."
    for name, micro in (("whole", 24), ("pieces", 7)):
        train_ppo(
            "tiny",
            tmp_path / name,
            ID,
            PPOConfig(iterations=1, samples=24, minibatch=24, microbatch=micro, epochs=1, entropy_coef=0.01, lr=1e-4),
            progress=False,
        )
    a, b = (load_file(tmp_path / n / "checkpoint/model.safetensors") for n in ("whole", "pieces"))
    base = load_file(TINY / "model.safetensors")
    for k in a:
        assert (a[k] - b[k]).norm() <= 2e-2 * (a[k] - base[k]).norm() + 1e-7, k


@pytest.mark.parametrize("options", [{}, dict(microbatch=4), dict(lora=4)])
def test_the_loss_is_trls(tmp_path, monkeypatch, options):
    "On CPUs the prompts have no logits; the steps are those of TRL's own loss, and the tokens that it counts."
    import trl
    import gp_spectral.sft as sft

    def steps(name):
        train_sft(
            "tiny",
            tmp_path / name,
            ID,
            steps=4,
            batch_size=8,
            warmup=2,
            examples=40,
            points=1,
            n_eval=2,
            lr=1e-4,
            progress=False,
            **options,
        )
        return tmp_path / name / "step-00004", pd.read_parquet(tmp_path / name / "log.parquet")

    (ours, log), asked = steps("ours"), []
    monkeypatch.setattr(sft, "_trainer_class", lambda network: asked.append(1) or trl.SFTTrainer)
    theirs, known = steps("theirs")
    assert asked and log.tokens.equals(known.tokens)
    assert furthest(ours, theirs) < 0.01 * furthest(TINY, theirs)
    pd.testing.assert_frame_equal(log, known, rtol=1e-4)


def test_whitening():
    x, mask = torch.tensor([[1.0, 2, 3, 99]]), torch.tensor([[True, True, True, False]])
    w = whiten(x, mask)
    assert abs(w[mask].mean()) < 1e-6 and abs(w[mask].std() - 1) < 1e-6 and w[0, 3] == 0
    assert torch.equal(whiten(torch.ones(1, 4), mask), mask.float())


def test_pick_takes_the_earliest_best_after_the_start():
    import pandas as pd

    rows = [
        dict(step=s, rule="OOD", set="validation", rate=r)
        for s, r in ((0, 0.9), (5, 0.4), (9, 0.5), (20, 0.5), (30, 0.1))
    ]
    assert pick(pd.DataFrame(rows)) == {"end": 30, "max_ood": 9}


def test_precision_is_the_launchers_unless_they_differ(tmp_path, monkeypatch):
    "A training in other arithmetic than its record says, or a study whose RL stops after an hour of SFT."
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert [resolve_precision(p) for p in ("auto", "no", "bf16", "fp16")] == [
        "bf16" if torch.cuda.is_available() else "no",
        "no",
        "bf16",
        "fp16",
    ]
    for told in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        assert resolve_precision("auto") == told == resolve_precision(told)
    begun = (
        lambda: train_sft("tiny", tmp_path / "sft", GeneralPoints(), precision="no"),
        lambda: train_grpo("tiny", tmp_path / "rl", GeneralPoints(), GRPOConfig(precision="no")),
        lambda: train_ppo("tiny", tmp_path / "rl", GeneralPoints(), PPOConfig(precision="no")),
        lambda: study(Preset(precision="no"), out=tmp_path),
    )
    for begin in begun:
        with pytest.raises(
            ValueError, match="precision is 'no', and accelerate was launched with --mixed_precision bf16"
        ):
            begin()
    assert not list(tmp_path.iterdir())


class Coin:
    "No more than CONTRIBUTING asks of a task."

    def problems(self, split, n, seed):
        assert str(seed)
        return [f"{split} {i % 4}" for i in range(n)]

    def prompt(self, problem):
        return problem

    def answer(self, problem, seed):
        return "1"

    def verify(self, problem, text):
        return Feedback(float(text == "1"), "", text == "1")

    def retry(self, feedback):
        return "again"


def test_five_methods_are_a_task(tmp_path):
    curve = train_sft(
        "tiny", tmp_path / "sft", Coin(), steps=2, points=1, n_eval=8, examples=16, batch_size=8, progress=False
    )
    assert set(curve.rule) == {"ID"} and len(evaluate(tmp_path / "sft/step-00002", Coin(), "test", 4, attempts=2)) == 4
    train_ppo(
        tmp_path / "sft/step-00002",
        tmp_path / "ppo",
        Coin(),
        PPOConfig(iterations=1, samples=8, minibatch=8, attempts=2),
        {"ID": Coin()},
        n_eval=4,
        progress=False,
    )
    train_grpo(
        tmp_path / "sft/step-00002",
        tmp_path / "grpo",
        Coin(),
        GRPOConfig(iterations=1, samples=8, minibatch=8),
        {"ID": Coin()},
        n_eval=4,
        progress=False,
    )


def test_an_adapter_is_a_checkpoint_to_train_from(tmp_path):
    "Its base with the adapter merged: what peft makes of the two, and what the spectral side reads."
    from peft import get_peft_model
    from gp_spectral.checkpoint import Checkpoint
    from gp_spectral.models import lora_config

    network = get_peft_model(load_model("tiny")[0], lora_config(4))
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05)
    network.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | dict(base_model_name_or_path="tiny")))
    merged, tokenizer = load_model(tmp_path / "adapter")
    read = Checkpoint(tmp_path / "adapter")
    for m in read.matrices():
        torch.testing.assert_close(read.matrix(m), merged.get_parameter(m.name).detach(), atol=1e-6, rtol=0)
    assert furthest_from_tiny(merged) > 0.01 and tokenizer.chat_template and not hasattr(merged, "peft_config")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for spoiled, said in (
        ({k.replace("layers.0", "layers.9"): v for k, v in weights.items()}, "does not fit its base"),
        ({k: v * math.nan for k, v in weights.items()}, "NaN"),
        ({k: v[:, :3].contiguous() for k, v in weights.items()}, "does not fit its base"),
    ):
        save_file(spoiled, tmp_path / "adapter/adapter_model.safetensors")
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "base_model_name_or_path"})
    )
    with pytest.raises(ValueError, match="names no base model"):
        load_model(tmp_path / "adapter")


def furthest_from_tiny(model):
    base = load_file(TINY / "model.safetensors")
    return max((model.get_parameter(k).detach() - v).abs().max().item() for k, v in base.items())


def test_both_wings_understand_the_same_words(tmp_path, monkeypatch):
    from gp_spectral.checkpoint import Checkpoint, CheckpointError

    for step in (9, 10):
        shutil.copytree(TINY, tmp_path / f"run/checkpoint-{step}")
    with pytest.warns(UserWarning, match="its newest checkpoint is taken, checkpoint-10"):
        load_model(tmp_path / "run")
    with pytest.warns(UserWarning, match="checkpoint-10"):
        assert Checkpoint(tmp_path / "run").label == "checkpoint-10"
    monkeypatch.setenv("GP_SPECTRAL_MODELS", str(tmp_path / "models"))
    shutil.copytree(TINY, tmp_path / "models/SmolLM2-135M-Instruct")  # what stands where the real one would
    assert Checkpoint("smollm2").label == "smollm2" and load_model("smollm2")[1].chat_template
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **k: str(TINY) if name == "org/model" else 1 / 0
    )
    assert Checkpoint("org/model").path == TINY and load_model("org/model")[1].chat_template
    for wing in (Checkpoint, load_model):
        with pytest.raises(CheckpointError, match="the hub gave no model of that name"):
            wing("org/nothing")
        with pytest.raises(TypeError, match="int is not (the name of )?a checkpoint"):
            wing(3)


def test_a_state_of_an_older_version_keeps_its_curve(tmp_path):
    "It called the rows of the curve `rows`."
    from gp_spectral.book import TrainerBook

    (tmp_path / "resume.json").write_text(json.dumps(dict(settings={}, checkpoint=None, rows=[dict(step=0)], log=[])))
    assert TrainerBook(tmp_path, {}).curve == [dict(step=0)]


def test_a_model_in_memory_is_cast_as_one_from_a_folder_is(tmp_path):
    "Rotary frequencies are no weights, and stay exact; a tokenizer without padding is given one, in a copy."
    from gp_spectral.models import load_model, open_model

    wanted, tokenizer = load_model("tiny", dtype="bfloat16")
    tokenizer.pad_token = None
    model, own = open_model((load_model("tiny")[0], tokenizer), dtype="bfloat16", to_train=True)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert own.pad_token == own.eos_token and tokenizer.pad_token is None
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        open_model((model, tokenizer))


def test_settings_of_another_training_are_no_settings(tmp_path):
    from gp_spectral.ppo import PPOConfig

    with pytest.raises(TypeError, match="config is a PPOConfig: expected a SFTConfig"):
        train_sft("tiny", tmp_path / "o", GeneralPoints(), config=PPOConfig())
    assert not (tmp_path / "o").exists()
