"""The user's calibration batches in the order in which a pipeline runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.core import active_session
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from torch import Tensor

from fista_modifier.calibration.digest import batch_digest
from fista_modifier.calibration.padding import RealTokens
from fista_modifier.models.layers import MaskName

__all__ = ["CalibrationBatches"]

FirstBatch = Callable[[dict[str, Any]], object]


class CalibrationBatches:
    """
    The padding and the number of tokens of each batch, as the user's data give them.
    The masks that a model's family makes are not used: some are True where a token is
    hidden, and others carry positions.

    :param compared: whether the batches are to be compared with those of other runs or
        ranks
    """

    def __init__(self, compared: bool = False) -> None:
        self.digests: list[str] = []
        self._compared = compared
        self._masks: list[dict[str, Tensor]] = []
        self._sizes: list[int] = []
        self._warned: set[MaskName] = set()

    def __len__(self) -> int:
        return len(self._sizes)

    @contextmanager
    def watched(self, on_first: FirstBatch) -> Iterator[None]:
        """
        Record the batches as the sequential pipeline loads them, once and in its order.
        A second walk through the data loader might shuffle anew.

        :param on_first: called with the first batch, ready to be run
        """
        load = IntermediatesCache.from_dataloader

        def loaded(*args: Any, **kwargs: Any) -> IntermediatesCache:
            cache = load(*args, **kwargs)
            for number, batch in enumerate(cache.batch_intermediates):
                masks = [name for name in batch if name.endswith("attention_mask")]
                wanted = None if self._compared else ["input_ids", *masks]
                self.add(cache.fetch(number, wanted))
            if cache.batch_intermediates:
                on_first(cache.fetch(0))
            return cache

        with patch_attr(IntermediatesCache, "from_dataloader", loaded):
            yield

    def on_model_call(
        self, _model: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """
        Record the batch of a call of the model. This is a forward pre-hook of the
        model, for pipelines that call it as a whole.
        """
        self.add(kwargs)

    def add(self, batch: dict[str, Any]) -> None:
        """
        Record the next batch.

        :param batch: arguments of the model by their names
        """
        masks = {
            name: value.bool().cpu()
            for name, value in batch.items()
            if name.endswith("attention_mask")
            and isinstance(value, Tensor)
            and value.ndim == 2
        }
        self._masks.append(masks)
        if self._compared:
            self.digests.append(batch_digest(batch))
        tokens = batch.get("input_ids")
        if "attention_mask" in masks:
            self._sizes.append(int(masks["attention_mask"].sum()))
        else:
            self._sizes.append(tokens.numel() if isinstance(tokens, Tensor) else 0)

    def real(self, mask_name: MaskName | None, hidden_states: Tensor) -> RealTokens:
        """
        Say what is not padding in the batch that runs now.

        :param mask_name: name of the mask that goes with a layer's input; None if no
            mask does
        :param hidden_states: the layer's input in the batch that runs now
        :return: the tokens that are not padding, in the layer's input and, for a layer
            of a decoder with an encoder, in the encoder's output
        """
        own = self.real_tokens(mask_name, hidden_states)
        if mask_name != "decoder_attention_mask":
            return RealTokens(own, own)
        return RealTokens(own, self._mask("attention_mask"))

    def _mask(self, name: MaskName) -> Tensor | None:
        """
        Return a mask of the batch that runs now; None if the batch has no such mask, or
        all of it is True.
        """
        batch = active_session().state.current_batch_idx
        if not 0 <= batch < len(self._masks):
            return None
        real = self._masks[batch].get(name)
        return None if real is None or bool(real.all()) else real

    @property
    def tokens(self) -> int:
        """
        The number of tokens of all batches without padding; 0 if the data hold no
        tokens.
        """
        return sum(self._sizes)

    def real_tokens(
        self, mask_name: MaskName | None, hidden_states: Tensor
    ) -> Tensor | None:
        """
        Say which tokens of a layer's input are not padding.

        :param mask_name: name of the mask that goes with the layer's input; None if no
            mask does
        :param hidden_states: the layer's input in the batch that runs now
        :return: bool batch×sequence, True where a token is not padding; None if all are
            taken for tokens, as where the shape of the mask does not fit (with a
            warning)
        """
        real = None if mask_name is None else self._mask(mask_name)
        if mask_name is None or real is None:
            return None
        flat = hidden_states.ndim == 2 and len(hidden_states) == real.numel()
        if flat or hidden_states.shape[-3:-1] == real.shape:
            return real
        if mask_name not in self._warned:
            self._warned.add(mask_name)
            logger.warning(
                f"A layer is called with hidden states of shape "
                f"{tuple(hidden_states.shape)}, and the data's {mask_name} has the "
                f"shape {tuple(real.shape)}: its padding counts like tokens. Calibrate "
                "with batch_size 1 to have none"
            )
        return None
