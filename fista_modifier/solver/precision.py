"""Products that may be less precise than float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import backends

__all__ = ["Precision", "bfloat16_on_cpu", "matmul_precision"]

Precision = Literal["float32", "tf32", "bf16"]


@contextmanager
def matmul_precision(lowest: Precision) -> Iterator[None]:
    """
    Let a device that is faster at it round float32 matrices as they enter a product,
    whose sums stay float32. A GPU rounds to TensorFloat-32, and a CPU to bfloat16.

    :param lowest: "float32" changes nothing; "tf32" changes nothing on a CPU; what the
        user has set stays where it is lower
    """
    gpu: Any = backends.cuda.matmul
    cpu: Any = backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = gpu.fp32_precision, cpu.fp32_precision
    if lowest != "float32":
        gpu.fp32_precision = "tf32"
    if lowest == "bf16":
        cpu.fp32_precision = "bf16"
    try:
        yield
    finally:
        gpu.fp32_precision, cpu.fp32_precision = before


def bfloat16_on_cpu() -> AbstractContextManager[object]:
    """
    Let operators compute and return bfloat16 on a CPU that has instructions for it, by
    PyTorch's autocast. A weight that is trained has one rounded copy from its first use
    to the end, so it may not change in between.

    :return: the context; it does nothing on other devices
    """
    # public names for this are younger than the oldest PyTorch that is supported
    if torch.cpu._is_avx512_bf16_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()
