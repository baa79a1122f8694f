"""A ``Trainer`` whose loss is the divergence from a teacher's predictions."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from fista_modifier.evaluation.perplexity import in_chunks
from fista_modifier.models.operators import mean_kept
from fista_modifier.recovery.sharding import is_sharded, whole
from fista_modifier.solver.precision import bfloat16_on_cpu

__all__ = ["DistillationTrainer", "mean_divergence"]


def mean_divergence(
    dense: Tensor, pruned: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """
    Return the mean KL(dense ‖ pruned) over the real tokens. It can be differentiated
    with respect to ``pruned``, once. Beside the two tensors it takes memory only for
    the gradient and a chunk of tokens.

    :param dense: logits, sequences×tokens×vocabulary, of any floating dtype
    :param pruned: logits of the same shape, of any floating dtype
    :param attention_mask: sequences×tokens, 0 for padding; None if there is none
    :return: nats per token, a scalar in float32
    """
    real = torch.ones(pruned.shape[:2], dtype=torch.bool, device=pruned.device)
    if attention_mask is not None:
        real = attention_mask.to(pruned.device) != 0
    loss: Tensor = _MeanDivergence.apply(  # type: ignore[no-untyped-call]
        dense.flatten(0, 1), pruned.flatten(0, 1), real.flatten()
    )
    return loss


class _MeanDivergence(torch.autograd.Function):
    """
    The mean divergence, and its gradient (q − p) / tokens. Padding has no part in it,
    as its logits may be NaN.
    """

    @staticmethod
    def forward(ctx: Any, dense: Tensor, pruned: Tensor, real: Tensor) -> Tensor:
        count = real.sum().clamp(min=1)
        every = bool(real.all())  # then no row has to be looked for
        total = torch.zeros((), dtype=torch.float64, device=pruned.device)
        gradient = torch.zeros_like(pruned)
        for one, other, kept, result in in_chunks(dense, pruned, real, gradient):
            rows = slice(None) if every else kept
            target = _log_probabilities(one.to(other.device)[rows])
            own = _log_probabilities(other[rows])
            probabilities = target.exp()
            difference = probabilities * (target - own)
            total += difference.sum(dtype=torch.float64)
            result[rows] = (own.exp_().sub_(probabilities) / count).to(result.dtype)
        ctx.save_for_backward(gradient)
        return (total / count).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        # in place, as another tensor of this size may not fit; a second time is refused
        return None, gradient.mul_(slope), None


def _log_probabilities(logits: Tensor) -> Tensor:
    """
    Return log softmax in float32, of tokens×vocabulary. The sums are float64, as those
    of the perplexity are.
    """
    shifted = logits.float()
    shifted = shifted - shifted.amax(-1, keepdim=True)
    totals = shifted.exp().sum(-1, keepdim=True, dtype=torch.float64)
    return shifted - totals.log().float()


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
        placed = getattr(teacher, "hf_device_map", None) is not None
        if not placed and not is_sharded(teacher):
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
        # torch's norms refuse float16 weights under autocast to bfloat16
        halves = self.teacher.dtype == torch.float16
        with torch.no_grad(), nullcontext() if halves else bfloat16_on_cpu():
            dense = self.teacher(**given, use_cache=False).logits
        with bfloat16_on_cpu():
            outputs = model(**given, use_cache=False)
        loss = mean_divergence(dense, outputs.logits, given.get("attention_mask"))
        return (loss, outputs) if return_outputs else loss

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """
        Make the arguments' schedule. The rate is zero at the first step of a rise, so
        there is none where the arguments ask for a share that is less than a step.

        :param num_training_steps: steps of the training
        :param optimizer: the optimizer; the trainer's own by default
        :return: the schedule
        """
        if num_training_steps * self.args.warmup_steps < 1:
            self.args.warmup_steps = 0
        schedule: LRScheduler = super().create_scheduler(num_training_steps, optimizer)
        return schedule

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
                {"params": [weight], "lr": rate * mean_kept(whole(weight.detach()))}
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
