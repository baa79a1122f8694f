"""vLLM reads the packed formats of this package: a plugin that unpacks on loading."""

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
    Called by vLLM in each of its processes (entry point ``vllm.general_plugins``).

    Registers the load format ``sparse-bitmask``, for checkpoints in either of the
    bitmask formats, and lets vLLM's reader of compressed-tensors configurations accept
    those formats, which it has refused since 2026. The weights are dense from then on.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
    )
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class BitmaskLoader(DefaultModelLoader):  # type: ignore[misc]
        """Finds and reads files as for safetensors."""

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
        """Knows no sparsity once the weights are unpacked."""

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
    :param tensors: of a checkpoint, with their names, in any order
    :return: the same, where a weight that was packed is a dense one
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
