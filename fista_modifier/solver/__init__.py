"""The solver: pure torch, knows tensors and not models."""

from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.interface import PrunedWeight, Solver, SolverFactory
from fista_modifier.solver.patterns import (
    NofM,
    SparsityPattern,
    Unstructured,
    Within,
    parse_pattern,
    pattern_of,
)
from fista_modifier.solver.prune import (
    FAST,
    PAPER,
    FISTAPruner,
    SolverOptions,
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
    "Solver",
    "SolverFactory",
    "FISTAPruner",
    "Unstructured",
    "WarmStart",
    "Within",
    "parse_pattern",
    "pattern_of",
    "prune_weight",
]
