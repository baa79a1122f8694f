"""The steps at which an iteration looks whether it has ended."""

from __future__ import annotations

from torch import Tensor

__all__ = [
    "INTERVAL",
    "ended",
]

INTERVAL = 5
"""The number of steps between two readings of the flag on an accelerator."""


def ended(done: Tensor, step: int) -> bool:
    """
    Say whether to leave a loop. Reading a flag makes the host wait for all work that it
    has given to the device. On a CPU that costs nothing. On an accelerator only every
    fifth step reads it, and the steps between the end and the next reading must leave
    the result as it is.

    :param done: whether the iteration has converged, a boolean scalar
    :param step: number of the step just done, from 1
    :return: whether to leave the loop
    """
    looks = done.device.type == "cpu" or step % INTERVAL == 0
    return looks and bool(done)
