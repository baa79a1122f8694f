"""One of several processes that train the pruned model in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_zeros import train, zeros
from transformers import AutoModelForCausalLM

from fista_modifier import KeepZeros


def main() -> None:
    folder = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = zeros(model)
    train(model, folder / "out", KeepZeros(), ddp_backend="gloo")
    after = zeros(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    print("the zeros are those of before")


if __name__ == "__main__":
    main()
