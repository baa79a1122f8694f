"""The interface of a procedure, which says what is done to a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.recording import Recorded, Recording
from fista_modifier.distributed import ALONE, Ranks
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator
from fista_modifier.pruning.results import OperatorResult, ReconstructionResult

__all__ = ["LayerTask", "Procedure", "PrunedLayer"]


@dataclass(frozen=True)
class LayerTask:
    """
    One decoder layer that is to be pruned. The model stays as it is: the caller stores
    the result when it suits the pipeline.

    :param layer: the layer, with the operators that are to be pruned
    :param recording: what the layer was called with in the dense model
    :param pruned_inputs: what the layer is called with in the model pruned so far; None
        if that is the same
    :param ranks: processes that prune this layer together, each with batches of its
        own: sums go over all of them, operators are shared out, and rank 0 reconstructs
    :param offload: whether to keep n×n matrices in main memory
    :param on_batch: called after each batch of each wave and of the reconstruction
    :param on_operator: called with the result of each operator, as soon as it is known
    """

    layer: DecoderLayer
    recording: Recording
    pruned_inputs: LayerInputs | None = None
    ranks: Ranks = ALONE
    offload: bool = False
    on_batch: Callable[[], object] = lambda: None
    on_operator: Callable[[OperatorResult], object] = lambda _: None

    @property
    def operators(self) -> Sequence[Operator]:
        """The operators of the layer that are to be pruned."""
        return self.layer.operators


@dataclass(frozen=True)
class PrunedLayer:
    """
    The result of one layer.

    :param weights: out×in weight of each operator by its name, in the dtype of the
        module, of its shape or a smaller one; an operator that is missing stays dense
    :param biases: biases, by the operators' names, that changed or became shorter
    :param operators: what became of each operator
    :param reconstruction: what became of the layer; None if it was not reconstructed
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    operators: Sequence[OperatorResult] = ()
    reconstruction: ReconstructionResult | None = None
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def on_cpu(self) -> PrunedLayer:
        """
        Return the same result on the CPU, to be sent to another process or to disk.

        :return: the result, with all tensors on the CPU
        """
        weights = {name: weight.cpu() for name, weight in self.weights.items()}
        biases = {name: bias.cpu() for name, bias in self.biases.items()}
        return replace(self, weights=weights, biases=biases)


class Procedure(Protocol):
    """
    The interface of a procedure, which prunes each layer. The code that runs it, stores
    its results or reports them does not depend on the kind of pruning.
    """

    @property
    def chains_layers(self) -> bool:
        """True if a layer depends on how those before it were pruned."""
        ...

    def recorded(self, layer: DecoderLayer) -> Recorded:
        """
        Return what has to be recorded of a layer for its task.

        :param layer: a layer with operators that are to be pruned
        :return: what is recorded beside what the layer is called with
        """
        ...

    def prune(self, task: LayerTask) -> PrunedLayer:
        """
        Prune a layer.

        :param task: the task of the layer
        :return: weights, and what became of the operators, alike on all ranks
        :raises ValueError: if an activation is NaN or infinite
        """
        ...
