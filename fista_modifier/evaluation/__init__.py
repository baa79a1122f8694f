"""
How good a model still is: perplexity, zero-shot tasks, and methods compared.

``cli`` and the benchmarks import this folder. It may import everything but ``cli``.
"""

from fista_modifier.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
