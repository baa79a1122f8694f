"""Another solver in the place of the package's."""

from __future__ import annotations

from collections.abc import Sequence

from compare import prune_by_fields
from families import tiny_model
from runs import calibration
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fista_modifier.pruning import layer
from fista_modifier.solver import PrunedWeight, StageSolver


def test_another_solver_is_there_for_one_run(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    asked: list[int] = []

    class Other(StageSolver):
        def prune(self, weights: Sequence[Tensor]) -> list[PrunedWeight]:
            asked.append(len(weights))
            return super().prune(weights)

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
    assert layer.StageSolver is StageSolver
