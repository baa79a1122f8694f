"""The pruned model's hidden states between decoder layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fista_modifier.calibration.activations import ActivationStorage
from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.tensors import same_output
from fista_modifier.models.operators import UNCHANGED, Operator, replaced_weights

__all__ = ["PrunedStream"]


class PrunedStream:
    """
    The hidden states X* that ``error_correction: full`` carries from layer to layer,
    while the toolkit's pipeline carries the dense model's activations.

    :param storage: where the hidden states wait, one tensor a batch
    """

    def __init__(self, storage: ActivationStorage) -> None:
        self._storage = storage
        self._hidden_states: list[Tensor] | None = None
        self._dense_output: Tensor | None = None

    def inputs_of(self, dense_inputs: LayerInputs, name: str) -> LayerInputs:
        """
        Return a layer's inputs in the model pruned so far.

        :param dense_inputs: the layer's inputs in the dense model
        :param name: the layer's name, for messages
        :return: its inputs in the model pruned so far
        :raises ValueError: if the layer is not given what the layer before it returned,
            once for each batch
        """
        if self._hidden_states is None:
            return dense_inputs
        if not self._is_followed_by(dense_inputs):
            raise ValueError(
                f"{name} is not called with the output of the decoder layer before it, "
                "so error_correction: full cannot follow the pruned model through this "
                "architecture; use error_correction: intra"
            )
        return dense_inputs.with_hidden_states(self._hidden_states)

    def _is_followed_by(self, dense_inputs: LayerInputs) -> bool:
        hidden_states, output = self._hidden_states, self._dense_output
        if hidden_states is None or output is None:
            return False
        received = next(iter(dense_inputs)).hidden_states
        return len(dense_inputs) == len(hidden_states) and same_output(received, output)

    def advance(
        self,
        dense_inputs: LayerInputs,
        pruned_inputs: LayerInputs,
        pruned: Mapping[Operator, Tensor],
        biases: Mapping[Operator, Tensor] = UNCHANGED,
    ) -> None:
        """
        Run the pruned layer. Its outputs are the next layer's inputs.

        :param dense_inputs: the layer's inputs in the dense model
        :param pruned_inputs: its inputs in the model pruned so far
        :param pruned: its pruned weights, out×in
        :param biases: biases of its operators that have got another bias
        """
        self._dense_output = next(iter(dense_inputs)).run()
        with replaced_weights(pruned, biases):
            self._hidden_states = [
                self._storage.keep(call.run()) for call in pruned_inputs
            ]
