"""
Calibration data as users have them: files, chats and hub data sets, as tokens.

Use the names below; ``records`` also says which names are local files. The folder may
import nothing else of the package but the modules at the root.
"""

from fista_modifier.data.calibration import (
    calibration_dataset,
    cut_into_blocks,
    load_text,
    max_sequence_length,
    start_tokens,
)

__all__ = [
    "calibration_dataset",
    "cut_into_blocks",
    "load_text",
    "max_sequence_length",
    "start_tokens",
]
