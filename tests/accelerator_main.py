"""
Prunes models on a device that is not the CPU: ``accelerator_main.py LIBRARY OUT``.

It has a process of its own, as from here on torch has an accelerator.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from families import tiny_model
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from runs import calibration, prune, run, samples, weights
from torch import Tensor
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
)

from fista_modifier import (
    FASPPruningModifier,
    FISTAPruningModifier,
    MaskedGPTQModifier,
    RecoveryModifier,
    SPAPPruningModifier,
)
from fista_modifier.calibration.activations import MAIN_MEMORY
from fista_modifier.calibration.calls import LayerCall, LayerInputs
from fista_modifier.calibration.pieces import Piece
from fista_modifier.solver import blocks

DEVICE = "standin"
HALF: dict[str, Any] = {"mask_structure": "0:0", "sparsity": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "best": ("llama", {"preset": "best"}),
    "fast": ("llama", {"preset": "fast", **HALF}),
    "paper": ("llama", {"preset": "paper"}),
    "from Wanda": ("llama", {"warm_start": "wanda"}),
    "matrices offloaded": ("llama", {"offload_hessians": True}),
    "biases": ("opt", {"preset": "best"}),
    "Conv1D": ("gpt2", {}),
    "experts": ("mixtral", {}),
    "attention without a kernel": ("phi3", {"preset": "fast"}),
}
SMALLER: dict[str, tuple[str, Modifier]] = {
    "MLPs in turn": (
        "llama",
        SPAPPruningModifier(sparsity=0.2, multiple_of=4, preset="paper"),
    ),
    "values": (
        "opt",
        FASPPruningModifier(
            sparsity=0.2,
            multiple_of=4,
            structures=["mlp", "value_dims"],
            preset="paper",
        ),
    ),
}
# with fewer tokens than inputs, rounding decides which of two supports it is
DATA = {"dataset": calibration(samples(16, 48, seed=1))}
MEASURED: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"preset": "best"},
    "fast": {"preset": "fast"},
    "fast, 50 %": {"preset": "fast", **HALF},
    "matrices offloaded": {"preset": "fast", "offload_hessians": True},
}
IN_BLOCKS = ("fast, 50 %", "matrices offloaded")
BLOCK = 2**15
"""
The number of entries in a block. The largest weight that is measured has seven times as
many.
"""
TOKENS = 64
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "max_position_embeddings": TOKENS,
}
"""
The sizes of a layer that is thirty-two times as narrow as one of LLaMA-3-70B. A
sequence of 64 tokens stands for one of 2048.
"""


def add_accelerator(library: str) -> None:
    """What torch wants to know of a device besides its operations."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(DEVICE)
    torch._register_device_module(DEVICE, _DummyBackendModule())
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._C._acc.register_python_privateuseone_hook(_DummyPrivateUse1Hook())


def pruned(family: str, fields: dict[str, Any]) -> dict[str, Tensor]:
    """Weights, on the CPU, of a model that was pruned wherever the toolkit does it."""
    model = tiny_model(family)
    prune(model, oneshot_arguments=DATA, **fields)
    return {name: weight.cpu() for name, weight in weights(model).items()}


def smaller(family: str, modifier: Modifier) -> dict[str, Tensor]:
    """The same without some channels."""
    model = tiny_model(family)
    run(model, modifier.model_copy(deep=True), **DATA)
    return {name: weight.cpu() for name, weight in weights(model).items()}


def quantised() -> dict[str, Tensor]:
    """The same after recovery and quantisation."""
    model = tiny_model("llama")
    scheme = {"scheme": "W8A8", "targets": ["Linear"], "ignore": ["lm_head"]}
    with TemporaryDirectory() as dense:
        model.save_pretrained(dense)
        recipe: list[Modifier] = [
            FISTAPruningModifier(mask_structure="2:4", ignore=["lm_head"]),
            RecoveryModifier(teacher=dense),
            MaskedGPTQModifier(**scheme),
        ]
        run(model, recipe, **DATA)
    return {name: weight.cpu() for name, weight in weights(model).items()}


def peak_memory(modifier: Modifier) -> int:
    """Bytes on the accelerator; what only the collector would find stays there."""
    model = tiny_model("llama", torch.bfloat16, **WIDE)
    gc.collect()
    gc.disable()
    torch.accelerator.reset_peak_memory_stats()
    run(model, modifier, dataset=calibration(samples(4, TOKENS)))
    gc.enable()
    return torch.accelerator.max_memory_allocated()


def peaks(cases: Iterable[str]) -> dict[str, int]:
    """The same of some cases."""
    return {
        case: peak_memory(
            FISTAPruningModifier(**{"mask_structure": "2:4"} | MEASURED[case])
        )
        for case in cases
    }


def peaks_in_blocks() -> dict[str, int]:
    """As of weights so large that they do not go in one block."""
    with patch.object(blocks, "ENTRIES", BLOCK):
        return peaks(IN_BLOCKS)


def kept_once() -> bool:
    """Whether recordings and the toolkit's caches share what they keep of a tensor."""
    tensor = torch.ones(3, device=DEVICE)
    kept = MAIN_MEMORY.keep(tensor)
    cache = IntermediatesCache(None, torch.device("cpu"))
    cache.append({"hidden_states": tensor})
    return cache.batch_intermediates[0]["hidden_states"].value is kept


def fetched_bytes() -> tuple[int, int]:
    """Bytes that come to the device for a sequence, and for a quarter of it."""
    inputs = LayerInputs(torch.nn.Linear(8, 8))
    inputs.append((torch.ones(1, 4096, 8, device=DEVICE),), {})
    gc.collect()

    def added(cut: Callable[[LayerCall], LayerCall]) -> int:
        before = torch.accelerator.memory_allocated()
        call = inputs.fetch(0, cut)
        assert call.hidden_states.device.type == DEVICE
        return torch.accelerator.memory_allocated() - before

    return added(lambda call: call), added(Piece(0, start=1024, stop=2048).of_call)


def main(library: str, output: str) -> None:
    """
    :param library: with the device
    :param output: file for weights of each case, the memory of some, what comes of
        tensors of two devices, whether recordings share memory with the toolkit, and
        what is fetched for a piece of a sequence
    """
    add_accelerator(library)
    torch.set_num_threads(1)
    mixed = ""
    try:
        torch.ones(2, device=DEVICE).dot(torch.ones(2))
    except RuntimeError as error:
        mixed = str(error)
    results = {
        "mixed": mixed,
        "kept once": kept_once(),
        "fetched": fetched_bytes(),
        "weights": {name: pruned(*case) for name, case in CASES.items()},
        "smaller": {name: smaller(*case) for name, case in SMALLER.items()},
        "quantised": quantised(),
        "sparsegpt's memory": peak_memory(
            SparseGPTModifier(sparsity=0.5, mask_structure="2:4", ignore=["lm_head"])
        ),
        "memory": peaks(MEASURED),
        "memory in blocks": peaks_in_blocks(),
    }
    torch.save(results, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
