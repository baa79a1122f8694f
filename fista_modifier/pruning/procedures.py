"""What is done to a layer, whatever the pattern, and the choices that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fista_modifier.pruning.layer import ErrorCorrection
from fista_modifier.pruning.reconstruction import Reconstruction
from fista_modifier.solver import FAST, PAPER, SolverOptions

__all__ = ["PRESETS", "Preset", "Procedure"]


@dataclass(frozen=True)
class Procedure:
    """
    :param solver: parameters of Algorithm 1
    :param reconstruction: of a layer, once its operators are pruned
    :param error_correction: what X* is
    """

    solver: SolverOptions = SolverOptions()
    reconstruction: Reconstruction = Reconstruction()
    error_correction: ErrorCorrection = "intra"

    @property
    def reconstructs(self) -> bool:
        """whether layers are trained at all"""
        return self.reconstruction.epochs > 0

    @property
    def chains_layers(self) -> bool:
        """whether a layer depends on how those before it were pruned"""
        return self.error_correction == "full"


Preset = Literal["default", "best", "fast", "paper"]
PRESETS: dict[Preset, Procedure] = {
    "default": Procedure(),
    "best": Procedure(reconstruction=Reconstruction(epochs=2), error_correction="full"),
    "fast": Procedure(FAST, Reconstruction(epochs=0)),
    "paper": Procedure(PAPER, Reconstruction(epochs=0)),
}
