"""One of several processes, each of which trains its part of the model in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from runs import samples
from test_zeros import zeros
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from fista_modifier import KeepZeros, masks_of


def main() -> None:
    """Accelerate itself shards on accelerators only, so this is done by hand."""
    Accelerator(cpu=True)  # which a Trainer has, and which starts the processes
    for given in (False, True):
        model = AutoModelForCausalLM.from_pretrained(Path(sys.argv[1]) / "model")
        before, masks = zeros(model), masks_of(model) if given else None
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        trained = step(model, KeepZeros(masks))
        for name, value in model.state_dict().items():
            whole = value.full_tensor()
            if name in trained:
                assert torch.equal(whole == 0, before[name]), name
        assert len(trained) == 14
    print("the zeros are those of before")


def step(model: torch.nn.Module, callback: KeepZeros) -> list[str]:
    """Train a little, and return the sparse weights without gradients for zeros."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    callback.on_train_begin(None, None, None, model=model)
    ids = samples()[torch.distributed.get_rank() :: 2]
    found = []
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        found = [
            name
            for name, weight in model.named_parameters()
            if name.endswith("proj.weight")
            and torch.equal(
                weight.grad.full_tensor() != 0, weight.detach().full_tensor() != 0
            )
        ]
        optimizer.step()
        callback.on_optimizer_step()
        optimizer.zero_grad()
    callback.on_train_end()
    return found


if __name__ == "__main__":
    main()
