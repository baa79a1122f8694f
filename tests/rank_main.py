"""One rank of a distributed run: ``python rank_main.py OUT FAMILY FIELDS [DIES]``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import tiny_model
from runs import prune, weights

from fista_modifier.progress import LayerProgress


def main(output: str, family: str, fields: str, dies: str = "") -> None:
    """
    :param output: folder for ``RANK.pt``: the pruned weights and the names of results
    :param family: of the tiny model
    :param fields: of the modifier, JSON
    :param dies: "killed" or "fails" when rank 1 has pruned its first operator
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def end(*_: object) -> None:
        if dies == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no more")

    if dies and rank == 1:
        LayerProgress.on_operator = end  # type: ignore[method-assign]
    model = tiny_model(family)
    modifier = prune(model, **json.loads(fields))
    names = [result.name for result in modifier.results]
    torch.save((weights(model), names), Path(output) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
