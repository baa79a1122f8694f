"""``pruning_report.json``: what was done to a checkpoint, and how well it went."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fista_modifier.host import package_versions
from fista_modifier.layer import OperatorResult
from fista_modifier.reconstruction import ReconstructionResult

__all__ = ["PACKAGES", "REPORT_NAME", "Calibration", "PruningReport"]

REPORT_NAME = "pruning_report.json"
PACKAGES = (
    "fista-modifier",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
)


@dataclass(frozen=True)
class Calibration:
    """
    The data that a model was calibrated on.

    :param dataset: local file or hub id
    :param samples: number of sequences
    :param seq_len: tokens in each
    :param seed: of their choice
    :param text_column: that holds the text, if the user named one
    """

    dataset: str
    samples: int
    seq_len: int
    seed: int
    text_column: str | None = None


@dataclass(frozen=True)
class PruningReport:
    """
    :param model: what was pruned, a folder or a hub id
    :param calibration: what it was calibrated on; None if the caller of ``oneshot()``
        alone knows
    :param seconds: wall time of calibration and pruning
    :param operators: what became of each operator, in the order of pruning
    :param layers: what became of each reconstructed decoder layer, by its name
    :param storage_format: how the operators' weights are stored
    :param stored_share: bytes of these weights, as a share of those of dense ones
    :param share_of_layers: what the pruned operators hold of the matrices in the
        decoder layers; reports of older versions have none
    :param recipe: what was applied, as YAML; reports of older versions have none
    :param versions: of this package and of those that its result depends on
    """

    model: str
    calibration: Calibration | None
    seconds: float
    operators: Sequence[OperatorResult]
    layers: dict[str, ReconstructionResult] = field(default_factory=dict)
    storage_format: str = "dense"
    stored_share: float = 1.0
    share_of_layers: float | None = None
    recipe: str = ""
    versions: dict[str, str] = field(
        default_factory=lambda: package_versions(*PACKAGES)
    )

    @property
    def tokens(self) -> int:
        """of the calibration data, padding left out"""
        return max((operator.tokens for operator in self.operators), default=0)

    def followed_by(self, later: PruningReport) -> PruningReport:
        """
        :param later: of what was done to the same model afterwards
        :return: a report of both
        """
        share = None
        if self.share_of_layers is not None and later.share_of_layers is not None:
            again = {operator.name for operator in later.operators}
            before = [one for one in self.operators if one.name not in again]
            left = _weights(before) / max(_weights(self.operators), 1)
            share = later.share_of_layers + left * self.share_of_layers
        return replace(
            later,
            model=self.model,
            share_of_layers=share,
            calibration=self.calibration or later.calibration,
            seconds=self.seconds + later.seconds,
            operators=[*self.operators, *later.operators],
            layers=self.layers | later.layers,
        )

    def save(self, folder: Path) -> None:
        """
        :param folder: of the checkpoint; ``pruning_report.json`` is written into it
        """
        text = json.dumps(asdict(self), indent=2)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PruningReport:
        """
        :param folder: of the checkpoint
        :return: its report
        :raises FileNotFoundError: if it has none
        :raises ValueError: if the file is not such a report, naming the field
        """
        file = folder / REPORT_NAME
        try:
            return TypeAdapter(cls).validate_json(file.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{file} is not a pruning report: {error}") from error


def _weights(operators: Sequence[OperatorResult]) -> int:
    return sum(math.prod(operator.shape) for operator in operators)
