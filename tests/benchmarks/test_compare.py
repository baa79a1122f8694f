"""Another solver in the place of the package's."""

from __future__ import annotations

from collections.abc import Sequence

from compare import prune_by_fields
from families import tiny_model
from runs import calibration
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fista_modifier.solver import (
    FISTAPruner,
    GramStatistics,
    PrunedWeight,
    SolverOptions,
    SparsityPattern,
)


def test_a_run_may_have_another_solver(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    asked: list[int] = []

    class Other(FISTAPruner):
        def __init__(self, statistics: GramStatistics) -> None:
            super().__init__(statistics, SolverOptions())

        def prune(
            self, weights: Sequence[Tensor], patterns: Sequence[SparsityPattern]
        ) -> list[PrunedWeight]:
            asked.append(len(weights))
            return super().prune(weights, patterns)

    prune_by_fields(
        tiny_model("llama"),
        tiny_tokenizer,
        calibration(),
        pattern="2:4",
        method="fista",
        fields={"reconstruction_epochs": 0},
        solver=Other,
    )
    assert asked
