"""A ``Trainer`` whose loss is the divergence from a teacher's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from fista_modifier.evaluation.agreement import divergences
from fista_modifier.models.operators import mean_kept

__all__ = ["DistillationTrainer", "mean_divergence"]

CHUNK_TOKENS = 512
"""The number of tokens whose probabilities are held in float32 at a time."""


def mean_divergence(
    dense: Tensor, pruned: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """
    Return the mean KL(dense ‖ pruned) over the real tokens. It can be differentiated.
    Beside the two tensors it takes memory only for a chunk of tokens, because the
    backward pass computes the probabilities again.

    :param dense: logits, sequences×tokens×vocabulary, of any floating dtype
    :param pruned: logits of the same shape, of any floating dtype
    :param attention_mask: sequences×tokens, 0 for padding; None if there is none
    :return: nats per token, a scalar in float32
    """
    real = torch.ones(pruned.shape[:2], dtype=torch.bool, device=pruned.device)
    if attention_mask is not None:
        real = attention_mask.to(pruned.device) != 0
    total = torch.zeros((), dtype=torch.float64, device=pruned.device)
    for chunk in zip(
        torch.split(dense.flatten(0, 1), CHUNK_TOKENS),
        torch.split(pruned.flatten(0, 1), CHUNK_TOKENS),
        torch.split(real.flatten(), CHUNK_TOKENS),
        strict=True,
    ):
        total = total + checkpoint(
            _sum, *chunk, use_reentrant=False, preserve_rng_state=False
        )
    return (total / real.sum().clamp(min=1)).float()


def _sum(dense: Tensor, pruned: Tensor, real: Tensor) -> Tensor:
    """Sum the divergences of the real tokens. Padding may have logits that are NaN."""
    dense = dense.to(pruned.device)
    return divergences(dense[real].float(), pruned[real].float()).sum()


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """
    A ``Trainer`` that trains a model towards the predictions of another one. The loss
    of a batch is the mean KL(teacher ‖ model) over its real tokens (Hinton et al.,
    2015, at temperature 1). Its checkpoints hold the trained weights and no others.

    :param arguments: positional arguments of ``Trainer``
    :param teacher: the model to learn from, with the same vocabulary; it gets no
        gradient, and keeps its dtype
    :param options: keyword arguments of ``Trainer``
    """

    optimizer: Optimizer | None

    def __init__(
        self, *arguments: Any, teacher: PreTrainedModel, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        # the loss of each batch is a mean already
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher.eval().requires_grad_(False)
        if getattr(teacher, "hf_device_map", None) is None:
            self.teacher.to(self.args.device)

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """
        Compute the loss of a batch.

        :param model: the pruned model, maybe wrapped
        :param inputs: a batch; labels are not looked at
        :param return_outputs: whether to return the model's outputs, too
        :param num_items_in_batch: not used
        :return: nats per token, a scalar; with the model's outputs if asked for
        """
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            dense = self.teacher(**given, use_cache=False).logits
        outputs = model(**given, use_cache=False)
        loss = mean_divergence(dense, outputs.logits, given.get("attention_mask"))
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Module | None = None) -> Optimizer:
        """
        Make the arguments' optimizer. The learning rate of each weight is the
        arguments' one, times the mean absolute value of what is not zero in it.

        :param model: not used
        :return: the optimizer
        """
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            rate = options.pop("lr")
            groups = [
                {"params": [weight], "lr": rate * mean_kept(weight.detach())}
                for weight in self._trained().values()
            ]
            decay = self.args.weight_decay
            self.optimizer = kind(groups, weight_decay=decay, **options)
        return self.optimizer

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self._trained().items()
        }
        save_file(trained, folder / SAFE_WEIGHTS_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: Module | None = None
    ) -> None:
        file = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        stored, trained = load_file(file), self._trained()
        if stored.keys() != trained.keys():
            raise ValueError(f"{file} has other weights than those that are trained")
        with torch.no_grad():
            for name, value in stored.items():
                trained[name].copy_(value)
