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
    "leave_ranks",
    "shared_out",
]

Value = TypeVar("Value")
Distribution = Literal["layers", "data"]

LONGEST_WAIT = timedelta(days=1)
"""
The longest time that a rank waits for another, which may be pruning a wide layer. A
rank that died is noticed at once, because its connections close.
"""


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
        """
        Replace a tensor by its sum over all ranks.

        :param tensor: changed in place; on any device
        """
        if self.size > 1:
            on_cpu = tensor.device.type == "cpu"
            dist.all_reduce(tensor, group=self.group if on_cpu else None)

    def all(self, value: Value) -> list[Value]:
        """
        Return the values of all ranks to each of them.

        :param value: this rank's value, with tensors on the CPU
        :return: the values of all ranks, in the order of the ranks
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, work: Callable[[], Value]) -> list[Value]:
        """
        Let every rank do work that may fail. If it fails on one, all of them fail.

        :param work: the work of this rank; it returns tensors on the CPU
        :return: what the work of each rank returned, in the order of the ranks
        :raises RuntimeError: if it failed on another rank, with the number of that rank
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

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        self.all(None)

    def in_turn(self, work: Callable[[], object]) -> None:
        """
        Let one rank after the other do its work, such as a change of weights that they
        share. The first one begins when all have come here, because some may still read
        what it changes until then.

        :param work: the work of this rank
        """
        self.wait()
        for rank in range(self.size):
            if rank == self.rank:
                work()
            self.wait()

    def gather(self, value: Value, to: int) -> list[Value] | None:
        """
        Return the values of all ranks to one of them.

        :param value: this rank's value, with tensors on the CPU
        :param to: the number of the rank that gets the values
        :return: on that rank, the values of all ranks in the order of the ranks; None
            on the others
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
    Become a rank of ``torchrun``, if it has started this process.

    :return: the processes of the run
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not is_distributed():
        if torch.accelerator.is_available():
            init_dist()
        else:
            dist.init_process_group("gloo")
    return current_ranks()


def leave_ranks() -> Ranks:
    """
    End the run of several processes, once all have come here. After that each goes on
    alone: what one of them does, such as loading a model, waits for no other.

    :return: the processes of the run that has ended
    """
    ranks = current_ranks()
    if is_distributed():
        # the toolkit's own group would wait for minutes, and the first rank packs
        ranks.wait()
        dist.destroy_process_group()
        _objects.cache_clear()
    return ranks


def current_ranks() -> Ranks:
    """
    Return the ranks of this run, as ``torch.distributed`` knows them.

    :return: the processes of its default group (``torchrun`` and ``init_dist()``, or
        ``init_process_group("gloo")`` on CPUs); ``ALONE`` if there is no such group,
        or only this process in it
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), _objects(dist.group.WORLD))


@cache
def _objects(_world: dist.ProcessGroup) -> dist.ProcessGroup:
    """
    Return the group that exchanges objects on the CPU. All runs in the same world share
    one, because each group costs connections.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return group


def shared_out(costs: list[int], ranks: Ranks) -> list[int]:
    """
    Spread pieces of work evenly over the ranks.

    :param costs: what each piece of work costs, the same list on all ranks
    :param ranks: the processes that share the work
    :return: the number of the rank that does each piece
    """
    _, _, owners = greedy_bin_packing(
        list(range(len(costs))), ranks.size, lambda piece: costs[piece]
    )
    return [owners[piece] for piece in range(len(costs))]
