"""Attention in the toolkit's pipeline, and what its tracer does to it and to memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.calibration.replay import (
    LayerCall,
    LayerInputs,
    calibration_runs,
    outputs_of_parts,
    real_rows,
)

__all__ = [
    "FusedAttention",
    "check_causal",
    "same_output",
    "traced_with_masks",
    "traces_forgotten",
]

ROUNDING = 1e-4
"""what kernels may differ by in float32, as a share of a module's output"""


@contextmanager
def traced_with_masks(model: PreTrainedModel) -> Iterator[None]:
    """
    Make the toolkit's tracer keep the attention implementation of a model's config.

    The tracer rebuilds configs from ``to_dict()``, which leaves the attention
    implementation out. Families that choose their mask function in a branch (Mistral,
    Phi-3, Mixtral and others in llm-compressor 0.14) then get no mask at all, and
    eager attention, which calibration forces, looks at future tokens and padding. An
    extra attribute of the config is written by ``to_dict()`` and understood by the
    config's constructor.

    :param model: the model that will be traced
    """
    configs = {id(model.config): model.config}
    text_config = model.config.get_text_config()
    configs[id(text_config)] = text_config
    with ExitStack() as stack:
        for config in configs.values():
            stack.enter_context(patch_attr(config, "attn_implementation", "eager"))
        yield


@contextmanager
def traces_forgotten() -> Iterator[None]:
    """
    Let go of the model when it was traced. llm-compressor 0.14 names the functions that
    its tracer wraps in a table of torch.fx, which keeps them, and all that they refer
    to, for as long as the process lives: each run of ``oneshot()`` its whole model.
    """
    table = torch.fx._symbolic_trace._wrapped_fns_to_patch
    before = set(table)
    try:
        yield
    finally:
        for name in set(table) - before:
            del table[name]


def check_causal(call: LayerCall, name: str) -> None:
    """
    Refuse a layer that lets a token see later ones: its activations would not be those
    of the model in use. The later half of the input is negated; the output of the
    earlier half must stay as it is.

    :param call: a batch of the layer
    :param name: the layer's name, for the message
    :raises RuntimeError: if the earlier half of the output changes
    """
    hidden_states = call.hidden_states
    half = hidden_states.shape[1] // 2
    if half == 0:
        return
    disturbed = hidden_states.clone()
    disturbed[:, half:].neg_()
    expected = call.run()[:, :half].float()
    other = LayerCall(call.layer, (disturbed, *call.args[1:]), call.kwargs).run()
    change = (other[:, :half].float() - expected).abs()
    real = call.real_tokens()
    if real is not None:  # padding on the left, where all is masked, attends to all
        change, expected = change[real[:, :half]], expected[real[:, :half]]
    if change.numel() and change.max() > 1e-2 * expected.abs().max():
        raise RuntimeError(
            f"in the calibration pipeline the tokens of {name} see later tokens "
            f"(the {type(call.layer).__name__} runs without a causal mask), so its "
            "activations are not those of the model; use pipeline='basic', or report "
            "this model family"
        )


def same_output(one: Tensor, other: Tensor) -> bool:
    """
    :param one: what a module put out
    :param other: what it put out in another run
    :return: whether they differ by no more than kernels do, in the dtype of ``other``
    """
    tolerance = max(ROUNDING, torch.finfo(other.dtype).eps)
    difference = one.float() - other.float()
    return bool(difference.norm() <= tolerance * other.float().norm())


class FusedAttention:
    """
    Runs attention by torch's fused kernels in the place of the eager one that the
    toolkit asks for, which holds a matrix of tokens×tokens for each head. The two are
    the same up to rounding, but not in every model: transformers leaves out soft caps
    of the scores, and puts in a causal mask where there is none. So the first batch of
    the first layer of each class is run both ways, and only if the outputs agree is
    eager left. What is compared is the first part of the layer that differs at all,
    attention itself: beside the residual stream, a change of it may look like rounding.

    :param model: the model being calibrated
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._implementation: str | None = None
        self._seen: set[type[torch.nn.Module]] = set()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within this, layers run as they do in the toolkit's passes."""
        chosen = self._implementation or "eager"
        with patch_attr(self._model.config, "_attn_implementation", chosen):
            yield

    def choose(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """
        A forward pre-hook with keyword arguments, of the first layer of each class.
        What it sets holds for the toolkit's passes until it restores the model's own.
        """
        if self._implementation != "eager" and type(layer) not in self._seen:
            self._seen.add(type(layer))
            inputs = LayerInputs(layer)
            inputs.append(args, kwargs)
            same = self._model._supports_sdpa and self._agree(inputs[0])
            self._implementation = "sdpa" if same else "eager"
            self._model.config._attn_implementation = self._implementation

    def _agree(self, call: LayerCall) -> bool:
        real = call.real_tokens()

        def outputs(implementation: str) -> list[Tensor]:
            config = self._model.config
            with patch_attr(config, "_attn_implementation", implementation):
                found = outputs_of_parts(call)
            return [real_rows(output, real) for output in found]

        with calibration_runs(self._model):
            pairs = list(zip(outputs("sdpa"), outputs("eager"), strict=True))
        first = next((pair for pair in pairs if not torch.equal(*pair)), None)
        return first is None or same_output(*first)
