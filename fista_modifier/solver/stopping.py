"""When an iteration looks whether it has ended."""

from __future__ import annotations

from torch import Tensor

__all__ = [
    "INTERVAL",
    "ended",
]

INTERVAL = 5
"""steps between two looks on an accelerator"""


def ended(done: Tensor, step: int) -> bool:
    """
    To read a flag, the host waits for all that it has given to the device. On a CPU
    that is nothing; on an accelerator every fifth step looks, and the steps between
    the end and the next look must leave the result as it is.

    :param done: whether the iteration has converged, a boolean scalar
    :param step: number of the step just done, from 1
    :return: whether to leave the loop
    """
    looks = done.device.type == "cpu" or step % INTERVAL == 0
    return looks and bool(done)
