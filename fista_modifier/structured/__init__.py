"""
Structured pruning in tensors: which channels of a group stay, and with which weights.

The folder may import torch and the solver, whose Gram statistics it works on. It knows
no models. A selector chooses the channels of a :class:`ChannelProblem`, a restorer
finds the consumers' weights on them, and :func:`prune_channels` puts both together.
"""

from fista_modifier.structured.alternating import (
    AlternatedMLP,
    Alternation,
    MLPBatch,
    down_given_up,
    mlp_error,
    up_given_down,
)
from fista_modifier.structured.means import FeatureMeans
from fista_modifier.structured.penalty import PenaltyMethod
from fista_modifier.structured.problem import ChannelProblem
from fista_modifier.structured.prune import (
    PrunedChannels,
    prune_channels,
    rounded_change,
)
from fista_modifier.structured.restoration import (
    BiasCompensation,
    KeptWeights,
    LeastSquares,
    Restored,
    Restorer,
)
from fista_modifier.structured.search import GreedyElimination, LocalSearch
from fista_modifier.structured.selection import (
    FASPScore,
    Fluctuation,
    Magnitude,
    Selector,
)

__all__ = [
    "AlternatedMLP",
    "Alternation",
    "BiasCompensation",
    "ChannelProblem",
    "FASPScore",
    "FeatureMeans",
    "Fluctuation",
    "GreedyElimination",
    "KeptWeights",
    "LeastSquares",
    "LocalSearch",
    "MLPBatch",
    "Magnitude",
    "PenaltyMethod",
    "PrunedChannels",
    "Restored",
    "Restorer",
    "Selector",
    "down_given_up",
    "mlp_error",
    "prune_channels",
    "rounded_change",
    "up_given_down",
]
