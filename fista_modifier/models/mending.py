"""What the toolkit leaves in a model that a run must not meet."""

from __future__ import annotations

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationMetadata, QuantizationStatus
from transformers import PreTrainedModel

__all__ = ["forget_decompression", "forget_quantisation", "tie_again"]


def forget_decompression(model: PreTrainedModel) -> None:
    """
    Remove the hook that decompresses a model when it runs next, if nothing in it is
    compressed. Saving leaves that hook in any model (compressed-tensors 0.19). If a
    recipe then quantises the model, the hook would make weights of scales that are not
    known yet.

    :param model: the model, before a quantisation begins
    """
    states = (getattr(one, "quantization_status", None) for one in model.modules())
    if hasattr(model, "ct_decompress_hook") and (
        QuantizationStatus.COMPRESSED not in states
    ):
        model.ct_decompress_hook.remove()
        del model.ct_decompress_hook


def forget_quantisation(model: PreTrainedModel) -> None:
    """
    Remove what a recipe's quantisation has prepared in a model and not begun, because
    the recipe has ended with an error. A model that is saved would count as quantised,
    with scales that nothing has measured.

    :param model: the model, after the error
    """
    for module in model.modules():
        status = getattr(module, "quantization_status", None)
        if status is not QuantizationStatus.INITIALIZED:
            continue
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            QuantizationMetadata.clear_quantization(module)
        else:  # attention, whose forward pass is its own
            QuantizationMetadata.clear_all_qparams(module)
            del module.quantization_scheme
        del module.quantization_status


def tie_again(model: PreTrainedModel) -> None:
    """
    Make one parameter of those that are tied. On all ranks but the first
    ``load_offloaded_model`` (compressed-tensors 0.19) makes two in the same memory, so
    that these ranks find others than the first one.

    :param model: the model of one of several ranks
    """
    with disable_onloading():
        for name, source in model.all_tied_weights_keys.items():
            own, tied = model.get_parameter(name), model.get_parameter(source)
            if own is not tied and not own.is_meta and torch.equal(own, tied):
                module, _, last = name.rpartition(".")
                setattr(model.get_submodule(module), last, tied)
