"""A plugin for vLLM that unpacks the packed formats of this package on loading."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any, get_args

from torch import Tensor

from fista_modifier.checkpoint.packing import (
    LOAD_FORMAT,
    PackedFormat,
    is_complete,
    parts_of,
    unpack,
)

__all__ = ["register", "unpacked"]


def register() -> None:
    """
    Register the load format ``sparse-bitmask`` with vLLM.

    vLLM calls this in each of its processes (entry point ``vllm.general_plugins``). The
    load format is for checkpoints in either of the bitmask formats. vLLM's reader of
    compressed-tensors configurations has refused those formats since 2026, and is made
    to accept them. The weights are dense once they are loaded.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
    )
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class BitmaskLoader(DefaultModelLoader):  # type: ignore[misc]
        """A loader that reads safetensors files and unpacks their weights."""

        def __init__(self, load_config: Any) -> None:
            load_config = copy(load_config)
            load_config.load_format = "safetensors"
            super().__init__(load_config)

        def get_all_weights(
            self, *args: Any, **kwargs: Any
        ) -> Iterator[tuple[str, Tensor]]:
            yield from unpacked(super().get_all_weights(*args, **kwargs))

    class BitmaskConfig(
        compressed_tensors.CompressedTensorsConfig  # type: ignore[misc]
    ):
        """A configuration without the sparsity of weights that the loader unpacks."""

        @classmethod
        def _parse_sparsity_config(cls, config: dict[str, Any]) -> Any:
            sparsity = config.get("sparsity_config") or {}
            if sparsity.get("format") in get_args(PackedFormat):
                config = config | {"sparsity_config": {}}
            return super()._parse_sparsity_config(config)

    register_model_loader(LOAD_FORMAT)(BitmaskLoader)
    register_quantization_config("compressed-tensors")(BitmaskConfig)


def unpacked(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """
    Unpack the packed weights among the tensors of a checkpoint.

    :param tensors: the tensors with their names, in any order
    :return: the same tensors, with a dense weight in place of the parts of a packed one
    :raises ValueError: if parts of a packed weight are missing or contradict each other
    """
    waiting: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        found = parts_of(name)
        if found is None:
            yield name, tensor
            continue
        operator, part = found
        waiting[operator][part] = tensor
        if is_complete(waiting[operator]):
            yield f"{operator}.weight", unpack(waiting.pop(operator))
    if waiting:
        raise ValueError(
            f"parts of the packed weight of {next(iter(waiting))} are missing: the "
            "checkpoint is not whole"
        )
