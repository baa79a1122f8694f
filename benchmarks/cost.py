"""
The operations that fista_modifier.cost predicts, beside those of a real run.

torch's FlopCounterMode counts matrix products in a run of oneshot(); what it does not
count (Cholesky factors and their inverses, eigenvalues) is left out of both sides.

    python benchmarks/cost.py --model DIR --calibration FILE.txt --layers 2 \\
        --samples 16 --seq-len 512 --out benchmarks/results/cost.md
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from typing import Any
from unittest.mock import patch

import inputs
import torch
from datasets import Dataset
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import fista_modifier.pruning.corrected
import fista_modifier.pruning.reconstruction
import fista_modifier.pruning.structured
from fista_modifier import FISTAPruningModifier, pipeline
from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.stream import PrunedStream
from fista_modifier.calibration.sums import SumsInPass
from fista_modifier.cost import LayerShape, layer_cost, shape_of
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.modifiers.base import LayerwiseModifier
from fista_modifier.pruning.corrected import CorrectedProcedure
from fista_modifier.pruning.presets import PRESETS
from fista_modifier.pruning.sparse import SparseProcedure
from fista_modifier.solver import FISTAPruner

PHASES = {
    "replays and sums": [
        (fista_modifier.pruning.corrected, "wave_statistics"),
        (LayerInputs, "of_block"),
        (PrunedStream, "advance"),
        (SumsInPass, "add"),
    ],
    "solver": [
        (FISTAPruner, "prune"),
        (fista_modifier.pruning.structured, "prune_channels"),
        (fista_modifier.pruning.structured, "alternated"),
    ],
    "reconstruction": [(fista_modifier.pruning.reconstruction, "reconstruct")],
}
# what torch's counter does not know by itself
ATEN = torch.ops.aten
UNKNOWN = {
    ATEN.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
    ATEN._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
    ),
}


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=UNKNOWN)


def counted(
    model: Any, tokenizer: Any, data: Dataset, modifier: LayerwiseModifier
) -> dict[str, float]:
    """Count the operations of a run by phase. The toolkit's pass is what is left."""
    found: Counter[str] = Counter()

    def counting(phase: str, function: Any) -> Any:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with counter() as here:
                result = function(*args, **kwargs)
            found[phase] += here.get_total_flops()
            return result

        return run

    with ExitStack() as stack:
        for phase, functions in PHASES.items():
            for owner, name in functions:
                wrapper = counting(phase, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, wrapper))
        total = stack.enter_context(counter())
        pipeline.prune(model, tokenizer, data, modifier)
    found["recording"] = total.get_total_flops() - sum(found.values())
    return dict(found)


def predicted(
    config: Any, shape: LayerShape, samples: int, procedure: CorrectedProcedure
) -> dict[str, float]:
    """
    Predict the operations of a run by phase, with those of the output embedding, which
    is in no layer.
    """
    cost = layer_cost(shape, samples, procedure)
    inverses = 0.0
    if isinstance(procedure, SparseProcedure):
        inverses = layer_cost(
            replace(shape, stages=tuple(replace(one, rows=()) for one in shape.stages)),
            samples,
            replace(procedure, solver=replace(procedure.options, patience=0)),
        ).refits
    head = 2 * samples * shape.seq_len * shape.hidden * config.vocab_size
    layers = shape.layers
    return {
        "recording": layers * cost.recording + head,
        "replays and sums": layers * (cost.replays + cost.gram + cost.drift),
        "solver": layers * (cost.search + cost.refits - inverses),
        "reconstruction": layers * cost.reconstruction,
    }


def table(measured: dict[str, float], expected: dict[str, float]) -> str:
    measured |= {"all": sum(measured.values())}
    expected |= {"all": sum(expected.values())}
    lines: list[list[str]] = []
    for phase, value in expected.items():
        if value:
            real = measured[phase]
            figures = [f"{real / 1e9:.1f}", f"{value / 1e9:.1f}", f"{value / real:.2f}"]
            lines.append([phase, *figures])
    header = ["phase", "measured, Gflop", "predicted, Gflop", "ratio"]
    return markdown_table(header, lines) + "\n"


def main() -> None:
    args = inputs.arguments(__doc__, 16, layers=2).parse_args()
    tokenizer = pipeline.load_tokenizer(args.model)
    data = inputs.calibration(args)
    pages = []
    for preset in ("default", "fast"):
        model = inputs.first_layers(args.model, args.layers)
        modifier = FISTAPruningModifier(
            mask_structure="2:4", preset=preset, ignore=["re:.*lm_head"]
        )
        measured = counted(model, tokenizer, data, modifier)
        shape = shape_of(model.config, args.seq_len)
        expected = predicted(model.config, shape, args.samples, PRESETS[preset])
        pages.append(f"`preset: {preset}`\n\n{table(measured, expected)}")
    inputs.show(args.out, "\n".join(pages))


if __name__ == "__main__":
    main()
