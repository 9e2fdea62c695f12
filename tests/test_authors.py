"The published recipe on the real classes at toy width: Qwen2, and the language part of a Llama that also sees."

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from gp_spectral.env import GeneralPoints
from gp_spectral.models import load_model, save_model
from gp_spectral.play import generate, prompt_ids, retry_ids
from gp_spectral.cli import main
from gp_spectral.preset import load_preset

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content "
    "}}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "mllama": (
        "<|finetune_right_pad_id|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
}


def tokenizer_for(kind):
    "A byte-level BPE tokenizer of some 400 words, trained on the game's prompts and answers."
    task = GeneralPoints(style="paper")
    problems = task.problems("pretrain", 60)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        [task.prompt(p) + task.answer(p) for p in problems],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(TOKENS[kind]),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names = TOKENS[kind]
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        chat_template=QWEN if kind == "qwen" else LLAMA,
        pad_token=names[0],
        eos_token=names[-1],
        **(dict(bos_token=names[1]) if kind == "mllama" else {}),
    )


@pytest.fixture(scope="module", params=["qwen", "mllama"])
def checkpoint(request, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("authors") / request.param, tokenizer_for(request.param)
    torch.manual_seed(0)
    same = dict(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if request.param == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=4, bos_token_id=None, tie_word_embeddings=False, **same))
    else:
        text = MllamaTextConfig(
            num_hidden_layers=5,
            cross_attention_layers=[3],
            bos_token_id=tokenizer.bos_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            **same,
        )
        vision = MllamaVisionConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            intermediate_size=16,
            vision_output_dim=32,
            image_size=28,
            patch_size=14,
            intermediate_layers_indices=[0],
            max_num_tiles=1,
            supported_aspect_ratios=[[1, 1]],
        )
        model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_loading_and_saving(checkpoint, tmp_path):
    model, tokenizer = load_model(checkpoint)
    assert (
        type(model).__name__ == {"qwen": "Qwen2ForCausalLM", "mllama": "MllamaForCausalLM"}[checkpoint.name]
        and model.dtype == torch.bfloat16
    )
    save_model(model, tokenizer, tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    assert type(again) is type(model) and all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    ids = torch.randint(5, 100, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_a_missing_weight_is_named(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer = load_model(checkpoint)
    file = save_model(model, tokenizer, tmp_path / "saved") / "model.safetensors"
    state = load_file(file)
    gone = next(k for k in state if "layers.2.mlp.up_proj" in k)
    del state[gone]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights.*up_proj"):
        load_model(tmp_path / "saved")


def test_templates(checkpoint):
    "The next attempt is appended to the ids as the template would have rendered the whole conversation."
    model, tokenizer = load_model(checkpoint)
    task = GeneralPoints(style="paper")
    problem = task.problems("train", 1)[0]
    ids, answer = prompt_ids(tokenizer, task, problem), tokenizer("no idea", add_special_tokens=False).input_ids
    feedback = task.verify(problem, "no idea")
    end = [tokenizer.eos_token_id]
    for wrote, ended in ((answer + end, True), (answer, False)):
        whole = tokenizer.apply_chat_template(
            [
                dict(role="user", content=task.prompt(problem)),
                dict(role="assistant", content="no idea"),
                dict(role="user", content=task.retry(feedback)),
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert tokenizer.decode(ids + wrote + retry_ids(tokenizer, task, feedback, ended)) == whole
    assert generate(model, tokenizer, [ids], 3)[0][0]


@pytest.mark.filterwarnings("ignore:no answer", "ignore:.*untrained")
def test_the_recipe_from_end_to_end(checkpoint, tmp_path, capsys):
    "SFT, PPO with the published settings, evaluation, comparison and repair, by the commands that a person would type."
    few = {
        "sft_steps": 3,
        "sft_batch": 4,
        "sft_microbatch": 2,
        "sft_points": 1,
        "sft_examples": 8,
        "sft_lr": 1e-2,
        "curve_problems": 2,
        "max_new_tokens": 6,
        "ppo_iterations": 2,
        "ppo_samples": 4,
        "ppo_minibatch": 4,
        "ppo_microbatch": 2,
        "ppo_attempts": 2,
        "ppo_lr": 1e-2,
        "test_problems": 2,
        "test_attempts": 2,
    }
    options = ["--preset", "authors"] + [x for k, v in few.items() for x in ("--set", f"{k}={v}")]

    def ok(*argv):
        assert main([str(a) for a in argv]) == 0, capsys.readouterr().err

    sft, ppo = tmp_path / "sft", tmp_path / "ppo"
    ok("sft", checkpoint, sft, *options)
    ok("ppo", sft / "step-00003", ppo, *options)
    log = pd.read_parquet(ppo / "log.parquet")
    assert len(log) == 2 and (log.attempts == 3).all()  # two, and the one that nobody reads
    ok("evaluate", checkpoint, ppo / "checkpoint", *options)
    ok(
        "compare",
        sft / "step-00000",
        sft / "step-00003",
        ppo / "checkpoint",
        "--out",
        tmp_path / "comparison",
        "--cache",
        "none",
    )
    table = pd.read_parquet(tmp_path / "comparison/angles.parquet")
    assert {"q_proj", "k_proj", "v_proj", "down_proj"} <= set(table.kind) and table["mean"].max() > 0
    ok(
        "recover",
        ppo / "checkpoint",
        "--donor",
        sft / "step-00000",
        "--method",
        "anchored",
        "--top",
        "0.2",
        "--out",
        tmp_path / "repaired",
        "--cache",
        "none",
    )
    assert generate(*load_model(tmp_path / "repaired"), [[7, 8, 9]], 2)


def test_presets_carry_the_papers_numbers():
    for name, steps, rounds in (("qwen2.5-7b", 800, 300), ("llama-3.2-11b", 1100, 100)):
        p = load_preset(name)
        c = p.ppo
        assert (
            c.level,
            c.gamma,
            c.lam,
            c.clip,
            c.epochs,
            c.value_coef,
            c.temperature,
            c.kl,
            c.lr,
            c.lr_end,
            c.attempts,
            c.published,
        ) == ("turn", 0.9, 0.95, 0.1, 4, 0.5, 0.2, "off", 1e-6, 1e-9, 5, True)
        assert (p.sft_steps, p.ppo_iterations, p.test_problems, p.sft_lr, p.sft_batch, p.style, c.value_head) == (
            steps,
            rounds,
            234,
            1e-6,
            64,
            "paper",
            "mlp",
        )
        assert p.tasks()["ID"].max_new_tokens == 512 and p.tasks()["ID"].target == 24
