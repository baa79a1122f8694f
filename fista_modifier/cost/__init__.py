"""
The cost of pruning a model, predicted from its configuration alone: see docs/cost.md.

Use the names below. The folder may import ``pruning``, ``calibration``, ``models``,
``solver`` and the modules at the root.
"""

from fista_modifier.cost.devices import DEVICES, Device, seconds
from fista_modifier.cost.memory import (
    KEPT,
    ROOM,
    finished_memory,
    peak_device_memory,
    peak_host_memory,
    reconstruction_memory,
    recorded_memory,
    recovery_memory,
    state_files,
    training_memory,
)
from fista_modifier.cost.operations import Cost, layer_cost
from fista_modifier.cost.shape import LayerShape, StageShape, shape_of

__all__ = [
    "DEVICES",
    "KEPT",
    "ROOM",
    "Cost",
    "Device",
    "LayerShape",
    "StageShape",
    "finished_memory",
    "layer_cost",
    "peak_device_memory",
    "peak_host_memory",
    "reconstruction_memory",
    "recorded_memory",
    "recovery_memory",
    "seconds",
    "shape_of",
    "state_files",
    "training_memory",
]
