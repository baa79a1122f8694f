"""
FISTAPruner (Zhao et al., EMNLP 2025) for llm-compressor.

Importing the package makes its modifiers known to llm-compressor's recipes.
"""

from importlib.util import find_spec

from fista_modifier.version import __version__

__all__ = [
    "FASPPruningModifier",
    "FISTAPruningModifier",
    "KeepZeros",
    "MaskedGPTQModifier",
    "RecoveryModifier",
    "SPAPPruningModifier",
    "__version__",
    "apply_masks_",
    "masks_of",
]

# vLLM's environment, which needs nothing but the plugin, cannot have the toolkit
if find_spec("llmcompressor") is not None:
    from fista_modifier.host import check_host

    check_host()

    from llmcompressor.modifiers.factory import ModifierFactory

    from fista_modifier.models.masks import apply_masks_, masks_of
    from fista_modifier.models.norms import keep_norms_exact
    from fista_modifier.modifiers.fista import FISTAPruningModifier
    from fista_modifier.modifiers.gptq import MaskedGPTQModifier
    from fista_modifier.modifiers.recipes import notice_what_is_dropped
    from fista_modifier.modifiers.structured import (
        FASPPruningModifier,
        SPAPPruningModifier,
    )
    from fista_modifier.recovery.modifier import RecoveryModifier
    from fista_modifier.recovery.zeros import KeepZeros

    _modifiers = [
        FISTAPruningModifier,
        FASPPruningModifier,
        SPAPPruningModifier,
        MaskedGPTQModifier,
        RecoveryModifier,
    ]
    for _modifier in _modifiers:
        ModifierFactory.register(_modifier.__name__, _modifier)
    notice_what_is_dropped(_modifiers)
    keep_norms_exact()
