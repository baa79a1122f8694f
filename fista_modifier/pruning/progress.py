"""The progress of a run and of the pruning of one layer."""

from __future__ import annotations

import time
from types import TracebackType

from loguru import logger
from tqdm import tqdm

from fista_modifier.models.layers import DecoderLayer
from fista_modifier.pruning.results import OperatorResult, ReconstructionResult

__all__ = ["LayerProgress", "RunProgress"]


class RunProgress:
    """
    The progress of a run, told by the layers that it has pruned so far.

    :param layers: how many layers this process prunes
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._done = 0
        self._started: float | None = None

    def layer(self, layer: DecoderLayer) -> LayerProgress:
        """
        Start the next layer.

        :param layer: the next layer
        :return: the progress of the layer
        """
        label = f"Pruning {layer.name} ({self._done + 1}/{self._layers}"
        if self._started is None:
            self._started = time.monotonic()
        if self._done:
            elapsed = time.monotonic() - self._started
            left = elapsed / self._done * (self._layers - self._done)
            label += f", {tqdm.format_interval(left)} left"
        self._done += 1
        return LayerProgress(layer.name, label + ")")


class LayerProgress:
    """
    The progress of a layer. One bar counts batches replayed, and shows operators
    pruned. In the toolkit's METRIC level there is a log line for each operator and for
    the reconstruction.

    :param name: name of the layer
    :param label: label of the bar
    """

    def __init__(self, name: str, label: str) -> None:
        self._name = name
        self._bar = tqdm(desc=label, unit="batch", leave=False)

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
        """Count one batch that was replayed for one stage, or trained on."""
        self._bar.update()

    def on_operator(self, result: OperatorResult) -> None:
        """
        Show one operator that was pruned.

        :param result: what became of the operator
        """
        self._bar.set_postfix_str(f"{result.kind} error {result.relative_error:.3f}")
        trials = ""
        if result.trials:
            trials = f"λ {result.penalty:.2g} after {result.trials} trials, "
        logger.log(
            "METRIC",
            f"{result.name}: {result.pattern}, relative error "
            f"{result.relative_start_error:.4f} -> {result.relative_error:.4f}, "
            f"{trials}{result.seconds:.1f} s",
        )

    def on_reconstruction(self, result: ReconstructionResult) -> None:
        """
        Log the reconstruction of the layer.

        :param result: what became of the layer
        """
        logger.log(
            "METRIC",
            f"{self._name}: reconstructed in {result.steps} steps at a rate of "
            f"{result.rate:.3g}, relative error "
            f"{result.start_error:.4f} -> {result.error:.4f}, {result.seconds:.1f} s",
        )
