"""Texts are joined and limited as the literature does it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fista_modifier.evaluation.texts import PAPER_TEXTS, Text, load_texts


def test_wikitext2_is_the_test_split_with_blank_lines_between(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "wikitext-2-raw-v1"
        folder.mkdir(exist_ok=True)
        data = Dataset.from_dict({"text": [f"{split} one", "", f"{split} two"]})
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: train\n    path: wikitext-2-raw-v1/train-*\n"
        "  - split: test\n    path: wikitext-2-raw-v1/test-*\n---\n"
    )
    text = replace(PAPER_TEXTS["wikitext2"], path=str(tmp_path)).read("wikitext2")
    assert text == Text("wikitext2", "test one\n\n\n\ntest two")


def test_c4_is_the_beginning_of_the_first_validation_shard(tmp_path: Path) -> None:
    corpus = PAPER_TEXTS["c4"]
    assert corpus.data_file is not None
    shard = tmp_path / corpus.data_file
    shard.parent.mkdir()
    with gzip.open(shard, "wt") as lines:
        for number in range(1200):
            lines.write(json.dumps({"text": f"document {number}"}) + "\n")
    text = replace(corpus, path=str(tmp_path)).read("c4")
    assert text.content.startswith("document 0 document 1 document 2")
    assert text.content.endswith("document 1099")
    assert text.token_limit(seq_len=2048, max_tokens=None) == 256 * 2048
    assert text.token_limit(seq_len=2048, max_tokens=4096) == 4096
    assert text.token_limit(seq_len=8, max_tokens=4096) == 2048


def test_a_protocol_has_no_more_blocks_with_a_token_at_their_beginning(
    starting_tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = Text("text", "The quick brown fox. " * 40, max_blocks=32)
    assert len(text.blocks(starting_tokenizer, 8)) == 32


def test_local_files_go_by_their_names(tmp_path: Path) -> None:
    plain, records = tmp_path / "plain.txt", tmp_path / "records.jsonl"
    plain.write_text("one\n")
    records.write_text('{"text": "two"}\n{"text": "three"}\n')
    assert load_texts([str(plain), str(records)]) == [
        Text("plain", "one\n"),
        Text("records", "two\n\nthree"),
    ]
    twin = tmp_path / "plain.jsonl"
    twin.write_text('{"text": "four"}\n')
    with pytest.raises(ValueError, match="2 texts are called 'plain'"):
        load_texts([str(plain), str(twin)])


@pytest.mark.parametrize(
    "sources", [["ptb", "ptb-text-only/ptb_text_only"], ["c4", "allenai/c4"]]
)
def test_a_hub_id_means_the_text_of_that_name(sources: list[str]) -> None:
    with pytest.raises(ValueError, match=f"2 texts are called '{sources[0]}'"):
        load_texts(sources)


def test_without_a_network_the_way_out_is_named() -> None:
    script = (
        "from fista_modifier.evaluation.texts import load_texts; load_texts(['ptb'])"
    )
    # Hugging Face reads its offline switch once, at import: hence a new process.
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: the data set ptb-text-only/")
    assert "such as FILE.txt" in last
