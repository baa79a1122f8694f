"""A tiny model with its tokenizer, as users have it: in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from families import checkpoint
from transformers import PreTrainedTokenizerBase


@pytest.fixture
def tiny_llama(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path / "llama"
    shutil.copytree(checkpoint("llama", vocab_size=len(tiny_tokenizer)), folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fox(tmp_path: Path) -> Path:
    file = tmp_path / "fox.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return file
