"""Progress of the pruning of one layer."""

from __future__ import annotations

from types import TracebackType

from loguru import logger
from tqdm import tqdm

from fista_modifier.calibration.layers import DecoderLayer
from fista_modifier.layer import OperatorResult

__all__ = ["LayerProgress"]


class LayerProgress:
    """
    One bar for a layer: batches replayed and operators pruned; a log line for each
    operator in the toolkit's METRIC level.

    :param layer: the layer
    :param batches: calibration batches
    :param results: the list to which results are added
    """

    def __init__(
        self, layer: DecoderLayer, batches: int, results: list[OperatorResult]
    ) -> None:
        self._results = results
        self._operators = len(layer.operators)
        self._bar = tqdm(desc=f"Pruning {layer.name}", unit="batch", leave=False)

    def __enter__(self) -> LayerProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def on_batch(self) -> None:
        """One batch was replayed for one stage."""
        self._bar.update()

    def on_operator(self, result: OperatorResult) -> None:
        """One operator was pruned."""
        self._results.append(result)
        self._bar.set_postfix_str(f"{result.kind} error {result.relative_error:.3f}")
        logger.log(
            "METRIC",
            f"{result.name}: {result.pattern}, relative error "
            f"{result.relative_start_error:.4f} -> {result.relative_error:.4f}, "
            f"λ {result.penalty:.2g} after {result.trials} trials, "
            f"{result.seconds:.1f} s",
        )
