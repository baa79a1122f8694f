"""The tokens of a batch that are not padding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fista_modifier.calibration.calls import LayerCall

__all__ = ["RealTokens", "real_rows"]


@dataclass(frozen=True)
class RealTokens:
    """
    The tokens of one batch that are not padding, bool batch×sequence; None if all are.

    :param own: those of the layer's input
    :param context: those of other states that the layer is given, such as the encoder's
        output in a decoder
    """

    own: Tensor | None = None
    context: Tensor | None = None

    def rows(
        self, value: Tensor, call: LayerCall, source: Tensor | None = None
    ) -> Tensor:
        """
        Return an operator's input or output for the tokens that are not padding.

        :param value: input or output of an operator, … × features, an entry a token
        :param call: the call of the layer or block in which the operator runs
        :param source: the operator's input, if ``value`` is its output
        :return: real tokens × features
        """
        reads_context = call.is_context(value if source is None else source)
        return real_rows(value, self.context if reads_context else self.own)


def real_rows(value: Tensor, real: Tensor | None) -> Tensor:
    """
    Return the rows of the tokens that are not padding.

    :param value: … × features, an entry a token
    :param real: which tokens are not padding, batch×sequence; None for all. It is
        ignored for a module that is not given the whole batch (an expert)
    :return: real tokens × features
    """
    if real is not None and value.shape[-3:-1] == real.shape:
        value = value[..., real.to(value.device), :]
    flat = value.reshape(-1, value.shape[-1])
    if real is None or real.numel() != flat.shape[0]:
        return flat
    return flat[real.flatten().to(flat.device)]
