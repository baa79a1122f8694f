"""The training of all kept weights of a decoder layer whose operators are pruned."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.hooks import RemovableHandle

from fista_modifier.calibration.recording import Recording
from fista_modifier.calibration.replay import (
    LayerCall,
    LayerInputs,
    RealTokens,
    real_rows,
)
from fista_modifier.models.operators import (
    UNCHANGED,
    Operator,
    mean_kept,
    replaced_weights,
    trainable,
)
from fista_modifier.pruning.procedures import LayerTask
from fista_modifier.pruning.results import ReconstructionResult
from fista_modifier.solver.precision import matmul_precision

__all__ = [
    "MEASURED_EVERY",
    "WATCHED_SHARE",
    "Reconstruction",
    "reconstruct",
    "reconstructed",
]

BETAS = (0.9, 0.95)
WARM_UP_STEPS = 10
MEASURED_EVERY = 16
WATCHED_SHARE = 0.5
"""The share of the steps, from the first, in which the rate may turn out too high."""
WATCHED_BATCHES = 8
"""The batches whose errors together say whether a rate is too high."""
HIGHEST_RISE = 1.04
"""
The highest share of the start's sum of squared errors that a rate may lead to on its
way. A rate that pays may lead a little above the start.
"""
MOST_RATES = 7
"""The rates that are tried for a layer, each half of the one before."""
SMALLEST = 1e-12
"""
The least norm by which an error is divided. It matters where an output is zero.
"""
LEAST_SHARE = 1e-6
"""
The least share of a feature in the output, beside the mean share of all. It matters for
features that are always zero.
"""


@dataclass(frozen=True)
class Reconstruction:
    """
    How the kept weights of a layer are trained.

    :param epochs: passes over the calibration batches, one step of Adam a batch; may be
        a fraction. 0 means no training
    :param rate: the highest learning rate to try, as a share of an operator's mean kept
        |W_ij|
    """

    epochs: float = 1.0
    rate: float = 0.01


def reconstructed(
    pruned: dict[Operator, Tensor],
    task: LayerTask,
    options: Reconstruction,
    biases: Mapping[Operator, Tensor] = UNCHANGED,
) -> tuple[dict[Operator, Tensor], ReconstructionResult]:
    """
    Train the kept weights of a layer on the batches of all ranks. Rank 0 does this
    alone, because each step follows the one before.

    :param pruned: out×in weight of each operator, in the dtype of the module
    :param task: the task of the layer, whose recording has the dense layer's outputs
    :param options: how long and how fast to train
    :param biases: biases of operators that have got another bias; they stay as they are
    :return: the new weights, on all ranks, and what became of the layer
    """
    whole, inputs = _collected(task)

    def train() -> tuple[list[Tensor], ReconstructionResult] | None:
        if task.ranks.rank:
            return None
        weights, outcome = reconstruct(
            whole, inputs, pruned, options, task.on_batch, biases
        )
        return [weights[operator].cpu() for operator in pruned], outcome

    trained = task.ranks.each(train)[0]
    assert trained is not None  # Rank 0 has it.
    weights, outcome = trained
    return {
        operator: weight.to(pruned[operator])
        for operator, weight in zip(pruned, weights, strict=True)
    }, outcome


def _collected(task: LayerTask) -> tuple[Recording, LayerInputs]:
    """
    Return the recordings of all ranks and the inputs of the pruned layer, on rank 0.
    Other ranks get their own.
    """
    whole = task.recording.gathered(task.ranks, 0)
    if task.pruned_inputs is None:
        return whole, whole.inputs
    return whole, task.pruned_inputs.gathered(task.ranks, 0)


def reconstruct(
    recording: Recording,
    inputs: LayerInputs,
    pruned: dict[Operator, Tensor],
    options: Reconstruction,
    on_batch: Callable[[], object] = lambda: None,
    biases: Mapping[Operator, Tensor] = UNCHANGED,
) -> tuple[dict[Operator, Tensor], ReconstructionResult]:
    """
    Train the kept weights of all operators of a layer towards the dense layer's output:

        min Σ_t ‖o*_t − o_t‖² / ‖o_t‖²   over the non-zero entries of the layer's W*,

    t running over the tokens, and ‖x‖² = Σ_d x_d² / s_d, where s_d is the share of
    feature d in the sum of squares of a token's output, as a mean over the tokens. The
    solver of one operator cannot know which part of its error another operator can make
    up for, and which part is small beside the residual stream. Errors are relative to
    each token's output and to each feature's size, because a few tokens and a few
    features with massive activations make up almost all of a plain sum of squares.
    Zeros stay exactly zero, and biases and norms as they are.

    Adam has a short warm-up and a cosine decay. It takes one step a batch, in an order
    that the number of batches fixes. How high a rate a layer bears differs fourfold
    between models. So the errors of the batches of the first half, each before its
    step, are compared with those at the start. Where eight together have risen by more
    than 2 % (root mean square), the training starts anew at half the rate.

    Weights and moments are float32 whatever the model's dtype. The factors of products
    in the steps are rounded to bfloat16 (on a GPU to TensorFloat-32) where that is
    faster. This adds noise of 0.2 % to the gradient of one batch. Because a step is a
    batch, the result depends on the batch size. If the layer's error does not fall (it
    is measured on every sixteenth batch), the weights are returned as they came. The
    training takes 16 bytes for each kept weight (itself, Adam's two moments and its
    place), a copy of the layer's operators in their own dtype, the largest operator's
    gradient and the activations of one batch.

    :param recording: the recording of the dense layer, with its outputs
    :param inputs: what the pruned layer is called with
    :param pruned: out×in weight of each operator, in the dtype of the module
    :param options: how long and how fast to train
    :param on_batch: called after each batch, for a progress bar
    :param biases: biases of operators that have got another bias; they stay as they are
    :return: the new weights, in the same dtypes, and what became of the layer
    """
    started = time.perf_counter()
    batches = range(len(inputs))
    measured = batches[::MEASURED_EVERY]
    steps = math.ceil(options.epochs * len(batches))
    current = {
        operator: weight.clone(memory_format=torch.contiguous_format)
        for operator, weight in pruned.items()
    }

    scales = _feature_scales(recording)

    def errors(batch: int) -> Tensor:
        real, target = recording.real_tokens[batch].own, recording.outputs[batch]
        return _token_errors(inputs[batch].run(), target, real, scales)

    def start_error_of(batch: int) -> float:
        with replaced_weights(pruned, biases), matmul_precision("bf16"):
            return float(errors(batch).sum())

    def descend(batch: int) -> Tensor:
        with torch.enable_grad(), matmul_precision("bf16"):
            loss = errors(batch).sum()
            # In float16, gradients of a smaller multiple would underflow.
            torch.autograd.backward(loss * recording.outputs[batch].shape[-1])
        on_batch()
        return loss.detach()

    with replaced_weights(current, biases), trainable(inputs.layer, current):
        start_error = _root_mean([errors(batch) for batch in measured])
        order = _shuffled(batches)
        rate = options.rate
        for _ in range(MOST_RATES):
            kept = _KeptWeights(current, rate, steps)
            watch = _Watch(start_error_of, steps)
            if kept.train(descend, islice(order, steps), watch):
                break
            for operator, weight in pruned.items():
                current[operator].copy_(weight)
            rate /= 2
    final_errors = partial(_errors, biases, scales, recording, inputs, measured)
    error, operator_errors = final_errors(current)
    if not error < start_error:
        current, steps = pruned, 0
        error, operator_errors = final_errors(current)
    result = ReconstructionResult(
        start_error=start_error,
        error=error,
        operator_errors=operator_errors,
        steps=steps,
        rate=rate,
        seconds=time.perf_counter() - started,
    )
    return current, result


def _feature_scales(recording: Recording) -> Tensor:
    """
    Return 1 / √s_d of each feature d, in float32. s_d is its share in the sum of
    squares of a real token's output, as a mean over the tokens of all batches.
    """
    total = torch.zeros((), dtype=torch.float64)
    for output, real in zip(recording.outputs, recording.real_tokens, strict=True):
        squares = real_rows(output, real.own).float().square()
        of_tokens = squares / squares.sum(-1, keepdim=True).clamp_min(SMALLEST)
        total = total.to(of_tokens.device) + of_tokens.sum(0, dtype=torch.float64)
    shares = total / total.sum().clamp_min(SMALLEST)
    return shares.clamp_min(LEAST_SHARE / len(shares)).rsqrt().float()


def _token_errors(
    output: Tensor, target: Tensor, real: Tensor | None, scales: Tensor
) -> Tensor:
    """Return ‖o* − o‖² / ‖o‖² of each real token of a batch, with scaled features."""
    scales = scales.to(output.device)
    target = target.to(output.device, torch.float32) * scales
    norms = target.square().sum(-1).clamp_min(SMALLEST)
    errors = (output.float() * scales - target).square().sum(-1) / norms
    if real is None:
        return errors.flatten()
    # Some layers have their tokens in one row, and some several outputs for each token.
    real = real.to(errors.device)
    where = real if errors.shape[-2:] == real.shape else real.flatten()
    return errors[..., where].flatten()


def _root_mean(squares: Iterable[Tensor]) -> float:
    return float(torch.cat(list(squares)).mean(dtype=torch.float64).sqrt())


def _errors(
    biases: Mapping[Operator, Tensor],
    scales: Tensor,
    recording: Recording,
    inputs: LayerInputs,
    batches: Iterable[int],
    weights: dict[Operator, Tensor],
) -> tuple[float, dict[str, float]]:
    """
    Return the error of the layer, and the relative error of each operator by its name.
    Operators that not all tokens reach exactly once are left out.
    """
    of_layer: list[Tensor] = []
    squared: defaultdict[str, float] = defaultdict(float)
    power: defaultdict[str, float] = defaultdict(float)
    for batch in batches:
        real, call = recording.real_tokens[batch], recording.inputs[batch]
        dense, _ = _outputs(weights, call, real)
        with replaced_weights(weights, biases):
            pruned, output = _outputs(weights, inputs[batch], real)
        of_layer.append(
            _token_errors(output, recording.outputs[batch], real.own, scales)
        )
        for operator, output in dense.items():
            other = pruned.get(operator)
            if other is not None and len(other) == len(output):
                squared[operator.name] += float((other - output).square().sum())
                if operator.module.bias is not None:
                    output = output - operator.module.bias
                power[operator.name] += float(output.square().sum())
    return _root_mean(of_layer), {
        name: math.sqrt(error / power[name]) if power[name] else 0.0
        for name, error in squared.items()
    }


def _outputs(
    operators: Iterable[Operator], call: LayerCall, real: RealTokens
) -> tuple[dict[Operator, Tensor], Tensor]:
    """
    Run a layer and return the outputs of each operator that all tokens reach exactly
    once (real tokens × out features, float32), and the output of the layer.
    """
    outputs: defaultdict[Operator, list[Tensor]] = defaultdict(list)
    partly: set[Operator] = set()

    def record(operator: Operator) -> RemovableHandle:
        def hook(_module: torch.nn.Module, args: Any, output: Tensor) -> None:
            tokens = args[0].shape[:-1].numel()
            if tokens != call.tokens and not call.is_context(args[0]):
                partly.add(operator)  # It is an expert.
            outputs[operator].append(real.rows(output, call, args[0]).float())

        return operator.module.register_forward_hook(hook)

    with ExitStack() as hooks:
        for operator in operators:
            hooks.enter_context(record(operator))
        output = call.run()
    whole = {
        operator: seen[0]
        for operator, seen in outputs.items()
        if len(seen) == 1 and operator not in partly
    }
    return whole, output


def _shuffled(batches: Sequence[int]) -> Iterator[int]:
    """Yield the batches of one epoch after the other, each in an order of its own."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def _share_of_rate(steps: int, step: int) -> float:
    """
    Return the learning rate of a step as a share of the highest. This is a function and
    not a method, because weights that a schedule refers to would wait for the garbage
    collector.
    """
    warm_up = min(1, (step + 1) / WARM_UP_STEPS)
    return warm_up * (1 + math.cos(math.pi * step / steps)) / 2


class _Watch:
    """
    The comparison of a training with its start, on batches that it has not seen yet, in
    its first half. A rate that is too high shows there as an error that has risen:
    steps are then mostly noise along the directions in which activations are large. The
    second half, in which the rate falls, cannot make up for much.

    :param start_error: returns the error of a batch before the training
    :param steps: the steps of the training
    """

    def __init__(self, start_error: Callable[[int], float], steps: int) -> None:
        self._start_error = start_error
        self._left = int(WATCHED_SHARE * steps)
        self._errors: list[tuple[float, float]] = []

    def stops(self, batch: int, error: Tensor) -> bool:
        """
        Say whether the last batches together have a higher error than at the start.

        :param batch: the batch that was run last
        :param error: its error before its step
        :return: whether to stop
        """
        if not self._left:
            return False
        self._left -= 1
        self._errors.append((float(error), self._start_error(batch)))
        if len(self._errors) < WATCHED_BATCHES:
            return False
        now, before = (sum(column) for column in zip(*self._errors, strict=True))
        self._errors.clear()
        return bool(now > HIGHEST_RISE * before)


class _KeptWeights:
    """
    Adam on the non-zero entries of weights. It holds nothing for the other entries,
    which stay zero. Each weight takes its step as soon as its gradient is there, so
    that there is only ever one gradient.

    :param weights: out×in weights in the modules' dtype, contiguous, updated in place
    :param rate: the highest learning rate, as a share of the mean kept |W_ij|
    :param steps: number of steps after which the rate is zero
    """

    def __init__(
        self, weights: dict[Operator, Tensor], rate: float, steps: int
    ) -> None:
        self._weights = weights
        # 32 bits are enough for operators of two thousand million entries.
        self._kept = {
            operator: weight.flatten().nonzero().flatten().to(torch.int32)
            for operator, weight in weights.items()
        }
        self._masters = {
            operator: self._entries(weight, operator)
            for operator, weight in weights.items()
        }
        self._optimizers = {
            operator: Adam(
                [master],
                lr=rate * mean_kept(master),
                betas=BETAS,
                fused=True,
            )
            for operator, master in self._masters.items()
        }
        self._schedules = [
            LambdaLR(optimizer, partial(_share_of_rate, steps))
            for optimizer in self._optimizers.values()
        ]

    def train(
        self, descend: Callable[[int], Tensor], batches: Iterable[int], watch: _Watch
    ) -> bool:
        """
        Take a step for each batch.

        :param descend: runs the layer forwards and backwards on a batch, and returns
            its error before the step
        :param batches: the batches, in the order of the steps
        :param watch: says whether to stop
        :return: False if the watch stopped the training
        """
        with self._following_gradients():
            for batch in batches:
                error = descend(batch)
                for schedule in self._schedules:
                    schedule.step()
                if watch.stops(batch, error):
                    return False
        return True

    @contextmanager
    def _following_gradients(self) -> Iterator[None]:
        """
        Let the backward passes within the context take the steps. An expert that no
        token of a batch is routed to has no gradient, and takes no step.
        """
        for operator in self._weights:
            # The new gradient would be added to an old one.
            operator.module.weight.grad = None
        hooks = [
            operator.module.weight.register_post_accumulate_grad_hook(
                partial(self._step, operator)
            )
            for operator in self._weights
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _step(self, operator: Operator, parameter: Tensor) -> None:
        assert parameter.grad is not None
        master, weight = self._masters[operator], self._weights[operator]
        master.grad = self._entries(operator.oriented(parameter.grad), operator)
        parameter.grad = None
        self._optimizers[operator].step()
        master.grad = None
        weight.view(-1).scatter_(0, self._kept[operator].long(), master.to(weight))

    def _entries(self, weight: Tensor, operator: Operator) -> Tensor:
        """Return the kept entries of an operator's weight or gradient, float32."""
        return weight.reshape(-1).index_select(0, self._kept[operator]).float()
