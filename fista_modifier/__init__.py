"""
FISTAPruner (Zhao et al., EMNLP 2025) for llm-compressor.

Importing the package makes its modifiers known to llm-compressor's recipes.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from fista_modifier.modifier import FISTAPruningModifier
from fista_modifier.quantization.gptq import MaskedGPTQModifier

__all__ = ["FISTAPruningModifier", "MaskedGPTQModifier", "__version__"]

__version__ = "0.1.0"

ModifierFactory.register("FISTAPruningModifier", FISTAPruningModifier)
ModifierFactory.register("MaskedGPTQModifier", MaskedGPTQModifier)
