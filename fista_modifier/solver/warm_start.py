"""Feasible weights to start from. Wanda and SparseGPT are the toolkit's kernels."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fista_modifier.solver.patterns import SparsityPattern, project
from fista_modifier.solver.quadratic import unit_of

__all__ = ["OneShot", "warm_start"]

OneShot = Literal["magnitude", "wanda", "sparsegpt"]


def warm_start(
    kind: OneShot,
    weight: Tensor,
    gram: Tensor,
    pattern: SparsityPattern,
    *,
    block_size: int = 128,
    dampening_frac: float = 0.01,
) -> Tensor:
    """
    Find W₀* of Algorithm 1 by a one-shot method (section F.2 of the paper compares
    them).

    :param kind: "magnitude", "wanda" (Sun et al. 2023) or "sparsegpt" (Frantar &
        Alistarh 2023)
    :param weight: dense weight W, float32 m×n
    :param gram: G = X* X*ᵀ, float32 n×n
    :param pattern: the sparsity asked for
    :param block_size: columns that SparseGPT prunes at once
    :param dampening_frac: SparseGPT's damping, as a fraction of the mean of diag(G)
    :return: W₀*, float32 m×n
    :raises ValueError: for any other kind
    """
    # The imports are here, as vLLM's environment cannot have the toolkit. Without
    # them the solver does not need it.
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import (
        sparsify_weight as sparsify_by_sparsegpt,
    )
    from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import (
        sparsify_weight as sparsify_by_wanda,
    )

    module = torch.nn.Linear(
        weight.shape[1], weight.shape[0], bias=False, device="meta"
    )
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    match kind:
        case "magnitude":
            return project(weight, pattern)
        case "wanda":
            pruned = sparsify_by_wanda(
                module=module,
                row_scalars_dict={module: gram.diagonal()},
                sparsity=pattern.sparsity,
                **_host_pattern(pattern),
            )
        case "sparsegpt":
            _, pruned = sparsify_by_sparsegpt(
                module=module,
                # The kernel's curvature of a feature without data is 1, in any unit.
                hessians_dict={module: gram / unit_of(gram.diagonal())},
                sparsity=pattern.sparsity,
                block_size=_whole_groups(block_size, pattern),
                dampening_frac=dampening_frac,
                preserve_sparsity_mask=False,
                **_host_pattern(pattern),
            )
        case _:
            raise ValueError(f"warm start '{kind}' is none of {get_args(OneShot)}")
    # The kernels round the number of zeros down for each row or block.
    return project(pruned, pattern)


def _host_pattern(pattern: SparsityPattern) -> dict[str, int]:
    """
    Return the pattern as the toolkit's kernels take it. Their n counts the pruned
    entries of a group, and 0:0 is unstructured.
    """
    n, m = pattern.group or (0, 0)
    return {"prune_n": m - n, "prune_m": m}


def _whole_groups(block_size: int, pattern: SparsityPattern) -> int:
    """
    Return the block size, rounded down so that no group of m straddles two blocks. It
    is at least one group.
    """
    _, m = pattern.group or (1, 1)
    return max(block_size // m, 1) * m
