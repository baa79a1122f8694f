"""The solver: pure torch, knows tensors and not models."""

from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.patterns import (
    NofM,
    SparsityPattern,
    Unstructured,
    Within,
    parse_pattern,
    pattern_of,
    register,
)
from fista_modifier.solver.prune import (
    FAST,
    PAPER,
    PrunedWeight,
    SolverOptions,
    StageSolver,
    WarmStart,
    prune_weight,
)

__all__ = [
    "GramStatistics",
    "FAST",
    "PAPER",
    "NofM",
    "PrunedWeight",
    "SolverOptions",
    "SparsityPattern",
    "StageSolver",
    "Unstructured",
    "WarmStart",
    "Within",
    "parse_pattern",
    "pattern_of",
    "prune_weight",
    "register",
]
