"""The loss of a recovery, beside torch's own on whole logits."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from families import tiny_model
from runs import calibration, prune, samples
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import TrainingArguments, default_data_collator

from fista_modifier.recovery.distillation import DistillationTrainer, mean_divergence
from fista_modifier.solver.precision import bfloat16_on_cpu

PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, 5, 7, generator=generator)).to(dtype)


def whole(dense: Tensor, pruned: Tensor, real: Tensor) -> Tensor:
    """In float64 and in one piece."""
    each = kl_div(
        pruned.double().log_softmax(-1),
        dense.double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    return each[real.bool()].mean()


@pytest.mark.parametrize("chunk", [1, 14, 2**21])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_loss_and_gradient_are_those_of_torch(
    chunk: int, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = import_module("fista_modifier.evaluation.perplexity")
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", chunk)
    real = torch.ones(2, 5) if mask is None else mask
    dense, pruned = logits(0), logits(1).requires_grad_()
    loss = mean_divergence(dense, pruned, mask)
    [gradient] = torch.autograd.grad(loss, pruned)
    expected = whole(dense, pruned, real)
    [wanted] = torch.autograd.grad(expected, pruned)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, wanted, atol=1e-7)
    assert not gradient[real == 0].any()


def test_what_is_predicted_at_padding_does_not_matter() -> None:
    dense, pruned = logits(0), logits(1)
    expected = float(mean_divergence(dense, pruned, PADDED))
    dense[PADDED == 0], pruned[PADDED == 0] = float("nan"), float("inf")
    pruned.requires_grad_()
    loss = mean_divergence(dense, pruned, PADDED)
    loss.backward()
    assert loss.item() == expected
    assert bool(pruned.grad.isfinite().all())


def test_half_precision_is_summed_in_more() -> None:
    dense, pruned = logits(0, torch.bfloat16), logits(1, torch.bfloat16)
    expected = float(whole(dense, pruned, torch.ones(2, 5)))
    assert float(mean_divergence(dense, pruned)) == pytest.approx(expected, rel=1e-6)


def test_the_trainer_logs_the_divergence_and_leaves_the_teacher(tmp_path: Path) -> None:
    teacher, model = tiny_model("llama"), tiny_model("llama")
    prune(model, preset="fast")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    ids = samples()
    with torch.no_grad():
        exact = whole(teacher(ids).logits, model(ids).logits, torch.ones_like(ids))
        with bfloat16_on_cpu():
            losses = [
                whole(teacher(some).logits, model(some).logits, torch.ones_like(some))
                for some in ids.split(2)
            ]
    expected = torch.stack(losses).mean()
    assert float(expected) == pytest.approx(float(exact), rel=2e-3)
    trainer = DistillationTrainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        teacher=teacher,
        train_dataset=calibration(ids),
        data_collator=default_data_collator,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected))
    assert all(
        torch.equal(value, before[name]) for name, value in teacher.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_rate_is_a_share_of_the_weights_that_are_kept(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prune(model, preset="fast")
    for factor, layer in zip((1.0, 0.1), model.model.layers, strict=True):
        layer.mlp.down_proj.weight.data *= factor
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.01, use_cpu=True)
    trainer = DistillationTrainer(model, arguments, teacher=tiny_model("llama"))
    rate_of = {
        id(group["params"][0]): group["lr"]
        for group in trainer.create_optimizer().param_groups
    }
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        mean = float(weight[weight != 0].abs().mean())
        assert rate_of[id(weight)] == pytest.approx(0.01 * mean)
