"""A few batches run, so that every kind of layer can be looked at."""

from __future__ import annotations

import torch
from families import tiny_model

from fista_modifier.channels.layers import ProbedLayer, probed_layers
from fista_modifier.models.layers import group_by_layer, layer_targets
from fista_modifier.models.targets import find_operators


def test_each_kind_of_layer_is_called_with_every_batch() -> None:
    # experts of the last layer may be reached by a later batch only
    model = tiny_model("qwen2_moe", decoder_sparse_step=2)
    operators = find_operators(model, ["Linear"], ["lm_head"])
    layers = group_by_layer(model, operators, layer_targets(model, operators))
    seen: dict[str, int] = {}

    def look(layer: ProbedLayer) -> tuple[list[object], str]:
        seen[layer.operators[0].name] = len(layer.calls)
        return [], ""

    batches = [{"input_ids": torch.full((1, 4), token)} for token in (3, 4, 5)]
    probed_layers(model, layers, batches, look)
    assert len(seen) == 2
    assert set(seen.values()) == {3}
