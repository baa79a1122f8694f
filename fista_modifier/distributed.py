"""The processes of a distributed run, by the toolkit's convention."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from compressed_tensors.distributed import greedy_bin_packing, init_dist, is_distributed
from torch import Tensor

__all__ = [
    "ALONE",
    "Distribution",
    "Ranks",
    "current_ranks",
    "join_ranks",
    "shared_out",
]

Value = TypeVar("Value")
Distribution = Literal["layers", "data"]

LONGEST_WAIT = timedelta(days=1)
"""How long a rank waits for another, which may be pruning a wide layer. A rank that
died is noticed at once, because its connections close."""


@dataclass(frozen=True)
class Ranks:
    """
    The processes that prune a model together. All of them must call each method.

    :param rank: number of this one
    :param size: how many there are
    :param group: exchanges objects on the CPU; None if there is just one process
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> None:
        """:param tensor: replaced by the sum over all ranks, on whichever device"""
        if self.size > 1:
            on_cpu = tensor.device.type == "cpu"
            dist.all_reduce(tensor, group=self.group if on_cpu else None)

    def all(self, value: Value) -> list[Value]:
        """
        :param value: this rank's, with tensors on the CPU
        :return: those of all ranks, in their order
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, work: Callable[[], Value]) -> list[Value]:
        """
        Let every rank do something that may fail. If one fails, all of them fail.

        :param work: of this rank; what it returns has its tensors on the CPU
        :return: what the work of each rank returned, in their order
        :raises RuntimeError: if it failed elsewhere, with the number of the rank
        """
        if self.size == 1:
            return [work()]
        failure: Exception | None = None
        done: Value | None = None
        try:
            done = work()
        except Exception as error:
            failure = error
        outcomes = self.all((done, failure and f"{type(failure).__name__}: {failure}"))
        if failure:
            raise failure
        for rank, (_, message) in enumerate(outcomes):
            if message:
                raise RuntimeError(f"rank {rank} failed: {message}")
        return [cast(Value, done) for done, _ in outcomes]

    def in_turn(self, work: Callable[[], object]) -> None:
        """
        Let one rank after the other do something, such as a change of weights that they
        share. The first one begins when all have come here: before, some may still read
        what it changes.

        :param work: of this rank
        """
        self.all(None)
        for rank in range(self.size):
            if rank == self.rank:
                work()
            self.all(None)

    def gather(self, value: Value, to: int) -> list[Value] | None:
        """
        :param value: this rank's, with tensors on the CPU
        :param to: the rank that is to have them
        :return: those of all ranks in their order, or None elsewhere
        """
        if self.size == 1:
            return [value]
        here = self.rank == to
        values: list[Any] | None = [None] * self.size if here else None
        dist.gather_object(value, values, dst=to, group=self.group)
        return values


ALONE = Ranks()


def join_ranks() -> Ranks:
    """
    Under ``torchrun``, become one of its ranks.

    :return: the processes of the run
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not is_distributed():
        if torch.accelerator.is_available():
            init_dist()
        else:
            dist.init_process_group("gloo")
    return current_ranks()


def current_ranks() -> Ranks:
    """
    :return: the processes of ``torch.distributed``'s default group (``torchrun`` and
        ``init_dist()``, or ``init_process_group("gloo")`` on CPUs), if there is one
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), _objects(dist.group.WORLD))


@cache
def _objects(_world: dist.ProcessGroup) -> dist.ProcessGroup:
    """One group for all runs in the same world: each costs connections."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return group


def shared_out(costs: list[int], ranks: Ranks) -> list[int]:
    """
    :param costs: what each piece of work costs, the same list on all ranks
    :param ranks: the processes that share the work
    :return: the rank of each piece, the work spread evenly
    """
    _, _, owners = greedy_bin_packing(
        list(range(len(costs))), ranks.size, lambda piece: costs[piece]
    )
    return [owners[piece] for piece in range(len(costs))]
