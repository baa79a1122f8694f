"""Zeros of a pruned model in trainings by transformers' Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from command_line import TWO_PROCESSES
from families import tiny_model
from peft import LoraConfig, get_peft_model
from runs import calibration, prune, samples, weights
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from fista_modifier import KeepZeros, apply_masks_, masks_of
from fista_modifier.models.masks import fused_experts

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.01,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "weight_decay": 0.1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def pruned(family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family)
    prune(model, preset="fast")
    return model


def language_modelling(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def train(
    model: torch.nn.Module, folder: Path, *callbacks: Any, **settings: Any
) -> Trainer:
    """A fine-tuning of six steps, in which every entry gets a gradient."""
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **SETTINGS | settings),
        train_dataset=calibration(),
        data_collator=language_modelling,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value == 0 for name, value in weights(model).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "optimizer",
    [
        {"optim": "adamw_torch"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor"},
        {"optim": "adamw_torch", "gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_zeros_stay_zeros_and_everything_else_is_trained(
    family: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    model = pruned(family)
    before, at_first = weights(model), zeros(model)
    trainer = train(model, tmp_path, KeepZeros(), **optimizer)
    sparse = {f"{name}.weight" for name in masks_of(model)}
    assert len(sparse) == (14 if family == "llama" else 8)
    for name, value in weights(model).items():
        if name in sparse:
            assert torch.equal(value == 0, at_first[name]), name
            assert not value[at_first[name]].any()
        assert not torch.equal(value, before[name]), name
    parameters = dict(model.named_parameters())
    for name in sparse:  # nor does the optimizer remember anything of them
        for value in trainer.optimizer.state[parameters[name]].values():
            if isinstance(value, Tensor) and value.shape == at_first[name].shape:
                assert not value[at_first[name]].any(), name


def test_without_it_the_zeros_are_lost(tmp_path: Path) -> None:
    model = pruned()
    masks = masks_of(model)
    train(model, tmp_path)
    assert all(bool(model.get_submodule(name).weight.all()) for name in masks)


def test_zeros_have_no_part_in_the_norm_of_the_gradient(tmp_path: Path) -> None:
    """By hand: the norm that the Trainer logs is that of the kept entries."""
    model = pruned()
    masks = {f"{name}.weight": mask for name, mask in masks_of(model).items()}
    ids = samples()
    model(input_ids=ids, labels=ids).loss.backward()
    squares = sum(
        float((parameter.grad * masks.get(name, 1)).square().sum())
        for name, parameter in model.named_parameters()
    )
    model.zero_grad()
    trainer = train(
        model,
        tmp_path,
        KeepZeros(),
        per_device_train_batch_size=6,
        max_steps=1,
        logging_steps=1,
    )
    logged = trainer.state.log_history[0]["grad_norm"]
    assert logged == pytest.approx(squares**0.5, rel=1e-4)


def test_after_the_training_gradients_are_whole_again(tmp_path: Path) -> None:
    model = pruned()
    train(model, tmp_path, KeepZeros())
    model.zero_grad()
    model(input_ids=samples(), labels=samples()).loss.backward()
    for name in masks_of(model):
        assert bool((model.get_submodule(name).weight.grad != 0).all())


def test_the_zeros_of_another_checkpoint_are_kept(tmp_path: Path) -> None:
    masks = masks_of(pruned())
    model = tiny_model("llama")
    train(model, tmp_path, KeepZeros(masks))
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)


def test_trl_keeps_zeros(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = pruned()
    at_first, before = zeros(model), weights(model)
    own = {"bf16": False, "gradient_checkpointing": False}
    SFTTrainer(
        model,
        args=SFTConfig(output_dir=str(tmp_path), **SETTINGS, **own),
        train_dataset=calibration().select_columns(["input_ids"]),
        processing_class=tiny_tokenizer,
        callbacks=[KeepZeros()],
    ).train()
    after = weights(model)
    for name in masks_of(pruned()):
        value = after[f"{name}.weight"]
        assert torch.equal(value == 0, at_first[f"{name}.weight"]), name
        assert not torch.equal(value, before[f"{name}.weight"]), name


def test_experts_that_transformers_fuses_keep_their_zeros(tmp_path: Path) -> None:
    pruned("mixtral").save_pretrained(tmp_path / "model")
    model = tiny_model("mixtral").from_pretrained(tmp_path / "model")
    assert len(fused_experts(model)) == 4
    at_first = zeros(model)
    train(model, tmp_path, KeepZeros())
    after = zeros(model)
    for name in fused_experts(model):
        assert float(at_first[name].float().mean()) == pytest.approx(0.5)
        assert torch.equal(after[name], at_first[name])


def test_merged_adapters_have_the_zeros_again(tmp_path: Path) -> None:
    model = pruned()
    masks, at_first = masks_of(model), zeros(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    train(adapted, tmp_path, learning_rate=0.1)
    merged = adapted.merge_and_unload()
    name = "model.layers.0.self_attn.q_proj"
    assert bool(merged.get_submodule(name).weight.all())
    apply_masks_(merged, masks)
    assert all(
        torch.equal(value, at_first[name]) for name, value in zeros(merged).items()
    )


@pytest.mark.parametrize(
    ("model", "callback", "message"),
    [
        (lambda: tiny_model("llama"), KeepZeros, "no sparse operator"),
        (
            lambda: get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"])),
            KeepZeros,
            "before the adapters are added",
        ),
        (
            lambda: tiny_model("opt"),
            lambda: KeepZeros(masks_of(pruned())),
            "take other masks",
        ),
    ],
    ids=["dense", "adapters", "other model"],
)
def test_a_model_whose_zeros_cannot_be_kept_is_refused(
    model: Any, callback: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(model(), tmp_path, callback())


@pytest.mark.parametrize("program", ["zeros_main.py", "shards_main.py"])
def test_several_processes_keep_zeros(program: str, tmp_path: Path) -> None:
    """Each of which has the whole model, or a part of each weight."""
    pruned().save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [*TWO_PROCESSES, str(HERE / program), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the zeros are those of before") == 2


def test_weights_without_their_shapes_are_refused() -> None:
    model = pruned()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 0  # as DeepSpeed marks its parts
    Accelerator(cpu=True)
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        KeepZeros().on_train_begin(None, None, None, model=model)
