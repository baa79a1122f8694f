"""How good a model still is."""

from fista_modifier.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
