"""Calibration data as users have them: files, chats and hub data sets, as tokens.

Imports nothing else of the package.
"""

from fista_modifier.data.calibration import (
    calibration_dataset,
    load_text,
    max_sequence_length,
)

__all__ = ["calibration_dataset", "load_text", "max_sequence_length"]
