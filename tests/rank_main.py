"""What one rank of a distributed run does."""

from __future__ import annotations

import json
import os
import signal
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import checkpoint
from runs import calibration, run, samples, weights

import fista_modifier
from fista_modifier.checkpoint import on_save
from fista_modifier.models.loading import load_to_prune
from fista_modifier.pruning.progress import LayerProgress
from fista_modifier.pruning.results import PruningReport


def main(output: str, family: str, fields: str, dies: str = "") -> None:
    """
    :param output: folder for ``RANK.pt``: the pruned weights and the names of results
    :param family: of the tiny model
    :param fields: of the modifier, JSON; "modifier" is its class, FISTA's
        with 2:4 if left out
    :param dies: "killed" or "fails": what rank 1 does when it has pruned an operator;
        "same data": the ranks share one part of the data; "unreached": nothing dies,
        but the model has one more layer, which it does not run; "one reaches": rank 0
        runs that layer; "reads": each rank saves the model, and reads what is there
    """
    torch.set_num_threads(1)
    folder = checkpoint(family)  # once there are ranks, only the first saves models
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = load_to_prune(str(folder))
    assert model.get_input_embeddings().weight.is_shared(), "all have one copy"
    if dies in ("unreached", "one reaches"):
        model.tower = torch.nn.ModuleList([deepcopy(model.model.layers[0])])
    if dies == "one reaches" and rank == 0:

        def reach(
            _layer: object, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            model.tower[0](*args, **kwargs)

        model.model.layers[0].register_forward_pre_hook(reach, with_kwargs=True)

    def end(*_: object) -> None:
        if dies == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no more")

    if dies in ("killed", "fails") and rank == 1:
        LayerProgress.on_operator = end  # type: ignore[method-assign]
    own = samples().chunk(dist.get_world_size())[0 if dies == "same data" else rank]
    data = {"dataset": calibration(own), "num_calibration_samples": len(own)}
    if dies == "one reaches":  # the other pipeline runs no hooks of layers
        data["pipeline"] = "basic"
    default = {"modifier": "FISTAPruningModifier", "mask_structure": "2:4"}
    chosen = json.loads(fields)
    if "modifier" not in chosen:
        chosen = default | chosen
    kind = getattr(fista_modifier, chosen.pop("modifier"))
    modifier = kind(**chosen)
    run(model, modifier, **data)
    if dies == "reads":
        if rank == 0:
            write = on_save.write_sizes

            def write_late(*arguments: Any) -> None:
                time.sleep(1)
                write(*arguments)

            on_save.write_sizes = write_late
        model.save_pretrained(Path(output) / "saved")
        PruningReport.load(Path(output) / "saved")
    names = [result.name for result in modifier.results]
    torch.save((weights(model), names), Path(output) / f"{rank}.pt")
