"""
The measurements of a model: perplexity, agreement with the dense model, zero-shot
tasks, and methods compared.

``recovery``, ``cli`` and the benchmarks import this folder. It may import everything
but these.
"""

from fista_modifier.evaluation.agreement import Agreement, agreement
from fista_modifier.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Agreement", "Perplexity", "agreement", "perplexity"]
