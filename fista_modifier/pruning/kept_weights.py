"""Adam on the kept weights of a layer, and a watch over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from fista_modifier.calibration.pieces import Piece
from fista_modifier.models.operators import Operator, mean_kept

__all__ = ["WATCHED_SHARE", "KeptWeights", "Watch"]

BETAS = (0.9, 0.95)
WARM_UP_STEPS = 10
WATCHED_SHARE = 0.5
"""The share of the steps, from the first, in which the rate may turn out too high."""
WATCHED_STEPS = 8
"""The steps before which errors together say whether a rate is too high."""
HIGHEST_RISE = 1.04
"""
The highest share of the start's sum of squared errors that a rate may lead to on its
way. A rate that pays may lead a little above the start.
"""


class Watch:
    """
    The comparison of a training with its start, on pieces that it has not seen yet, in
    its first half. A rate that is too high shows there as an error that has risen:
    steps are then mostly noise along the directions in which activations are large. The
    second half, in which the rate falls, cannot make up for much.

    :param start_error: returns the error of a piece before the training
    :param steps: the steps of the training
    """

    def __init__(self, start_error: Callable[[Piece], Tensor], steps: int) -> None:
        self._start_error = start_error
        self._left = int(WATCHED_SHARE * steps)
        self._errors: list[Tensor] = []  # on the device, which is not waited for

    def stops(self, piece: Piece, error: Tensor) -> bool:
        """
        Say whether the last pieces together have a higher error than at the start.

        :param piece: the piece that was run last
        :param error: its error before its step
        :return: whether to stop
        """
        if not self._left:
            return False
        self._left -= 1
        self._errors.append(torch.stack((error, self._start_error(piece))))
        if len(self._errors) < WATCHED_STEPS:
            return False
        now, before = torch.stack(self._errors).sum(0, dtype=torch.float64).tolist()
        self._errors.clear()
        return bool(now > HIGHEST_RISE * before)


class KeptWeights:
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
        self._reached: set[Operator] = set()
        self._schedules = [
            LambdaLR(optimizer, partial(_share_of_rate, steps))
            for optimizer in self._optimizers.values()
        ]

    def train(
        self, descend: Callable[[Piece], Tensor], pieces: Iterable[Piece], watch: Watch
    ) -> bool:
        """
        Take a step for each piece.

        :param descend: runs the layer forwards and backwards on a piece, and returns
            its error before the step
        :param pieces: the pieces, in the order of the steps
        :param watch: says whether to stop
        :return: False if the watch stopped the training
        """
        with self._following_gradients():
            for piece in pieces:
                self._reached.clear()
                error = descend(piece)
                for schedule in self._schedules:
                    schedule.step()
                if watch.stops(piece, error):
                    return False
        return True

    @contextmanager
    def _following_gradients(self) -> Iterator[None]:
        """
        Let the backward passes within the context take the steps. An expert that no
        token of a piece is routed to takes no step.
        """
        with ExitStack() as hooks:
            for operator in self._weights:
                module = operator.module
                # The new gradient would be added to an old one.
                module.weight.grad = None
                note = partial(self._note_tokens, operator)
                step = partial(self._step, operator)
                hooks.enter_context(module.register_forward_pre_hook(note))
                hooks.callback(
                    module.weight.register_post_accumulate_grad_hook(step).remove
                )
            yield

    def _note_tokens(
        self, operator: Operator, _module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> None:
        """The toolkit runs experts on no tokens, too: their gradients are zeros."""
        if torch.is_grad_enabled() and args[0].numel():
            self._reached.add(operator)

    def _step(self, operator: Operator, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        if operator not in self._reached:
            return
        master, weight = self._masters[operator], self._weights[operator]
        master.grad = self._entries(operator.oriented(gradient), operator)
        self._optimizers[operator].step()
        master.grad = None
        weight.view(-1).scatter_(0, self._kept[operator].long(), master.to(weight))

    def _entries(self, weight: Tensor, operator: Operator) -> Tensor:
        """Return the kept entries of an operator's weight or gradient, float32."""
        return weight.reshape(-1).index_select(0, self._kept[operator]).float()


def _share_of_rate(steps: int, step: int) -> float:
    """
    Return the learning rate of a step as a share of the highest. This is a function and
    not a method, because weights that a schedule refers to would wait for the garbage
    collector.
    """
    warm_up = min(1, (step + 1) / WARM_UP_STEPS)
    return warm_up * (1 + math.cos(math.pi * step / steps)) / 2
