"""The presets: procedures that have a name."""

from __future__ import annotations

from typing import Literal

from fista_modifier.pruning.reconstruction import Reconstruction
from fista_modifier.pruning.sparse import SparseProcedure
from fista_modifier.solver import FAST, PAPER

__all__ = ["PRESETS", "Preset"]

Preset = Literal["default", "best", "fast", "paper"]
PRESETS: dict[Preset, SparseProcedure] = {
    "default": SparseProcedure(),
    "best": SparseProcedure(
        reconstruction=Reconstruction(epochs=2), error_correction="full"
    ),
    "fast": SparseProcedure(solver=FAST, reconstruction=Reconstruction(epochs=0)),
    "paper": SparseProcedure(solver=PAPER, reconstruction=Reconstruction(epochs=0)),
}
