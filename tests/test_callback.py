"Angles through training: what the callback sees is what a comparison of the saved checkpoints finds."

import time
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from gp_spectral.angles import compare_all
from gp_spectral.callback import SpectralCallback, sample_evenly
from gp_spectral.models import load_model

TOKENS = torch.randint(5, 200, (16,), generator=torch.Generator().manual_seed(0))
STATE = SimpleNamespace(global_step=0, is_world_process_zero=True)


def train(model, folder, callback, steps=4, attach=False):
    "A few steps of transformers' trainer."
    said = dict(per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True)
    args = TrainingArguments(folder, max_steps=steps, save_strategy="no", **said)
    data = [dict(input_ids=TOKENS, labels=TOKENS)] * (2 * steps)
    trainer = Trainer(model, args, train_dataset=data, callbacks=None if attach else [callback])
    if attach:
        callback.attach(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_it_sees_what_a_comparison_finds(tmp_path, lora):
    model, _ = load_model("tiny", device="cpu")
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    watch = SpectralCallback(tmp_path / "a.parquet", every=100, matrices=6)
    train(model, tmp_path, watch)
    (model.merge_and_unload() if lora else model).save_pretrained(tmp_path / "after")
    seen = pd.read_parquet(tmp_path / "a.parquet").set_index(["matrix", "side", "band"])
    found = compare_all(["tiny", tmp_path / "after"], progress=False, cache=None).angles
    found = found.set_index(["matrix", "side", "band"]).loc[seen.index]
    assert set(seen.step) == {4} and seen.index.get_level_values("matrix").nunique() == 6
    np.testing.assert_allclose(seen["mean"], found["mean"], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(seen.isotropic, found.isotropic, rtol=1e-3, atol=1e-6)
    assert (seen["mean"] > 0).any()


def test_looks_take_no_more_than_their_share(tmp_path):
    "A look that would take more is put off; the last one is always made."
    model, _ = load_model("tiny", device="cpu")
    watch = SpectralCallback(tmp_path / "a.parquet", every=1, matrices=2, share=0.5)
    watch.on_train_begin(None, STATE, None, model=model)
    watch.spent, watch.began = 10.0, time.monotonic() - 19  # more than half
    watch.on_step_end(None, SimpleNamespace(global_step=1, is_world_process_zero=True), None, model=model)
    assert watch.table().empty
    watch.began -= 2
    watch.on_step_end(None, SimpleNamespace(global_step=2, is_world_process_zero=True), None, model=model)
    watch.on_train_end(None, SimpleNamespace(global_step=2, is_world_process_zero=True), None, model=model)
    assert set(watch.table().step) == {2} and len(watch.table()) == 2 * 6  # not twice
    watch.look(model, SimpleNamespace(global_step=3, is_world_process_zero=False))
    assert set(watch.table().step) == {2}  # the first process looks


def test_a_training_that_goes_on_keeps_its_table(tmp_path):
    model, _ = load_model("tiny", device="cpu")
    file = tmp_path / "a.parquet"
    train(model, tmp_path, SpectralCallback(file, every=2, matrices=2, share=1.0))
    later = SpectralCallback(file, every=2, matrices=2, share=1.0, start="tiny")
    later.on_train_begin(None, SimpleNamespace(global_step=2, is_world_process_zero=True), None, model=model)
    assert set(later.table().step) == {2}  # what came after the checkpoint is seen again
    later.look(model, SimpleNamespace(global_step=4, is_world_process_zero=True))
    again = pd.read_parquet(file)
    assert sorted(set(again.step)) == [2, 4] and (again["mean"] > 0).any()


def test_means_go_where_the_trainer_logs(tmp_path):
    model, _ = load_model("tiny", device="cpu")
    watch = SpectralCallback(tmp_path / "a.parquet", every=2, matrices=2, share=1.0)
    history = train(model, tmp_path, watch, attach=True).state.log_history
    logs = [x for x in history if "spectral/tail_angle" in x]
    assert [x["step"] for x in logs] == [2, 4] and logs[-1] | watch.means() == logs[-1]


@pytest.mark.parametrize("wrong", [dict(every=0), dict(matrices=0), dict(share=0), dict(share=1.5)])
def test_what_makes_no_sense_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SpectralCallback(tmp_path / "a.parquet", **wrong)


def test_samples_lie_evenly():
    assert sample_evenly(list("abcdefg"), 3) == ["a", "d", "g"] and sample_evenly([1], 8) == [1]
    assert sample_evenly([1, 2, 3], 1) == [1]
