"""The contexts in which layers are run outside the toolkit's own passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from compressed_tensors.offload import disable_offloading, disable_onloading
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import context as moe
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.helpers import calibration_forward_context
from transformers import PreTrainedModel

__all__ = ["calibration_runs", "forward_context", "plain_forward"]


@contextmanager
def calibration_runs(model: PreTrainedModel) -> Iterator[None]:
    """
    Prepare for runs of a layer outside the toolkit's own passes: no gradients, no KV
    cache, evaluation mode, eager attention (unless
    :class:`~fista_modifier.calibration.attention.FusedAttention` sets another), weights
    that stay onloaded, no hooks of other modifiers, weights and inputs that are not
    rounded for a quantisation to come, and experts that see only the tokens that are
    routed to them. This is the context of every such run.

    :param model: the model being calibrated
    """
    with (
        forward_context(model),
        disable_offloading(),
        plain_forward(model),
    ):
        yield


@contextmanager
def forward_context(model: PreTrainedModel) -> Iterator[None]:
    """
    Enter the toolkit's context of calibration. It asks for the shape of the output
    embedding by way of a copy on the device, where the copy would stay as long as
    layers are onloaded.

    :param model: the model being calibrated
    """
    with ExitStack() as stack:
        with disable_onloading():
            stack.enter_context(calibration_forward_context(model))
        yield


@contextmanager
def plain_forward(model: PreTrainedModel) -> Iterator[None]:
    """
    Let a model compute what it computes outside the toolkit: no hooks of modifiers, no
    rounding for a quantisation to come, and experts that see only the tokens that are
    routed to them.

    :param model: the model being calibrated
    """
    with ExitStack() as stack:
        stack.enter_context(HooksMixin.disable_hooks())
        # The toolkit enables a quantisation to come after each modifier's pass, though
        # its scales are not known yet.
        for module in model.modules():
            if getattr(module, "quantization_enabled", False):
                stack.enter_context(patch_attr(module, "quantization_enabled", False))
        # oneshot may let all experts of a mixture see all tokens in its own passes
        stack.enter_context(patch_attr(moe, "_CALIBRATE_ALL_EXPERTS", False))
        yield
