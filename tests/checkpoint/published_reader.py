"""Run beside the last compressed-tensors with sparse compressors: reads our files."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import (
    Sparse24BitMaskCompressor,
)
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import (
    BitmaskCompressor,
)
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import load_file

COMPRESSORS = {
    "sparse-bitmask": BitmaskCompressor(BitmaskConfig(format="sparse-bitmask")),
    "sparse-24-bitmask": Sparse24BitMaskCompressor(
        Sparse24BitMaskConfig(format="sparse-24-bitmask", sparsity_structure="2:4")
    ),
}


def main(packed_format: str, packed: Path, dense: Path) -> None:
    """Their decompressed weights are ours, and their packed tensors are our bytes."""
    compressor = COMPRESSORS[packed_format]
    ours, expected = load_file(packed), load_file(dense)
    names = {name.rpartition(".")[0] for name in ours if name.endswith(".bitmask")}
    for name in names:
        parts = {
            part: ours[f"{name}.{part}"]
            for part in ("compressed", "bitmask", "shape", "row_offsets")
            if f"{name}.{part}" in ours
        }
        weight = expected[f"{name}.weight"]
        assert torch.equal(compressor.decompress_weight(parts), weight), name
        theirs = compressor.compress_weight(name, weight)
        for full_name, tensor in theirs.items():
            mine = ours[full_name]
            assert mine.dtype == tensor.dtype, full_name
            assert torch.equal(mine, tensor), full_name
        assert len(theirs) == len(parts)
    print(len(names))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
