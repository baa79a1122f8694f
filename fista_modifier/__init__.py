"""
FISTAPruner (Zhao et al., EMNLP 2025) for llm-compressor.

Importing the package makes ``FISTAPruningModifier`` known to llm-compressor's recipes.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from fista_modifier.modifier import FISTAPruningModifier

__all__ = ["FISTAPruningModifier", "__version__"]

__version__ = "0.1.0"

ModifierFactory.register("FISTAPruningModifier", FISTAPruningModifier)
