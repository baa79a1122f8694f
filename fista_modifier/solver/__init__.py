"""
Zeros in one operator: the solver works on tensors and knows no models.

Use the names below. Other methods may also use the modules. The folder needs no toolkit
(llm-compressor). It may import nothing else of the package but the modules at the root.
"""

from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.interface import PrunedWeight, Solver, SolverFactory
from fista_modifier.solver.patterns import (
    NofM,
    Reordered,
    SparsityPattern,
    Unstructured,
    Within,
    parse_pattern,
    pattern_of,
    project,
    register,
)
from fista_modifier.solver.prune import (
    FAST,
    PAPER,
    FISTAPruner,
    SolverOptions,
    WarmStart,
    prune_weight,
)
from fista_modifier.solver.stage import StageProblem

__all__ = [
    "GramStatistics",
    "FAST",
    "PAPER",
    "NofM",
    "PrunedWeight",
    "Reordered",
    "SolverOptions",
    "SparsityPattern",
    "Solver",
    "SolverFactory",
    "StageProblem",
    "FISTAPruner",
    "Unstructured",
    "WarmStart",
    "Within",
    "parse_pattern",
    "pattern_of",
    "project",
    "prune_weight",
    "register",
]
