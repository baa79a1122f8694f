import json
import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from fista_modifier.data import calibration_dataset, load_text, max_sequence_length


def write_lines(path, count):
    """A text in which each line, of eight bytes, occurs once."""
    path.write_text("".join(f"{number:07}\n" for number in range(count)))
    return str(path)


def test_samples_have_the_asked_shape(tmp_path, tiny_tokenizer):
    source = write_lines(tmp_path / "text.txt", 10)
    data = calibration_dataset(
        source, tiny_tokenizer, samples=3, seq_len=16, progress=False
    )
    assert data.column_names == ["input_ids", "attention_mask"]
    assert [len(row) for row in data["input_ids"]] == [16, 16, 16]
    assert data["attention_mask"][:] == [[1] * 16] * 3


def test_samples_are_distinct_pieces_of_the_text(tmp_path, tiny_tokenizer):
    source = write_lines(tmp_path / "text.txt", 10)
    data = calibration_dataset(
        source, tiny_tokenizer, samples=10, seq_len=8, progress=False
    )
    lines = [tiny_tokenizer.decode(row) for row in data["input_ids"]]
    assert sorted(lines) == [f"{number:07}\n" for number in range(10)]


def test_the_seed_decides_the_samples(tmp_path, tiny_tokenizer):
    source = write_lines(tmp_path / "text.txt", 50)

    def chosen(seed):
        data = calibration_dataset(
            source, tiny_tokenizer, samples=5, seq_len=8, seed=seed, progress=False
        )
        return data["input_ids"][:]

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


def test_documents_are_joined_by_the_end_token(tmp_path, tiny_tokenizer):
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "ab"}\n{"text": "cd"}\n')
    data = calibration_dataset(
        str(source), tiny_tokenizer, samples=1, seq_len=5, progress=False
    )
    assert tiny_tokenizer.decode(data["input_ids"][0]) == "ab<eos>cd"


def test_a_long_text_is_tokenised_whole(tmp_path, tiny_tokenizer):
    lines = 20_000  # more than one chunk
    source = write_lines(tmp_path / "text.txt", lines)
    data = calibration_dataset(
        source, tiny_tokenizer, samples=1, seq_len=8 * lines, progress=False
    )
    whole = tiny_tokenizer.decode(data["input_ids"][0])
    assert whole == (tmp_path / "text.txt").read_text()


@pytest.mark.parametrize("samples, seq_len", [(0, 8), (1, 0)])
def test_nothing_asked_for_is_an_error(tmp_path, tiny_tokenizer, samples, seq_len):
    source = write_lines(tmp_path / "text.txt", 10)
    with pytest.raises(ValueError, match="is 0; at least 1"):
        calibration_dataset(source, tiny_tokenizer, samples=samples, seq_len=seq_len)


@pytest.mark.parametrize("text, tokens", [("", 0), ("1234567", 7)])
def test_a_short_text_is_an_error_with_the_counts(
    tmp_path, tiny_tokenizer, text, tokens
):
    source = tmp_path / "text.txt"
    source.write_text(text)
    with pytest.raises(ValueError, match=rf"{tokens} tokens.* need 8: .*--samples"):
        calibration_dataset(
            str(source), tiny_tokenizer, samples=2, seq_len=4, progress=False
        )


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match=name):
        load_text(name)


def test_json_lines_and_a_json_list_are_the_same(tmp_path):
    records = [{"text": "one\u2028line"}, {"text": "two"}]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(records, indent=1))
    assert list(load_text(str(lines))) == ["one\u2028line", "two"]
    assert list(load_text(str(whole))) == ["one\u2028line", "two"]


def test_another_field_can_hold_the_text(tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text('{"body": "one"}\n')
    assert list(load_text(str(source), text_column="body")) == ["one"]
    with pytest.raises(ValueError, match=r"record 1 .*'text'.*\['body'\]"):
        list(load_text(str(source)))


def test_broken_files_are_named(tmp_path):
    source = tmp_path / "broken.jsonl"
    source.write_text("{")
    with pytest.raises(ValueError, match="broken.jsonl"):
        load_text(str(source))
    source = tmp_path / "latin1.txt"
    source.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="latin1.txt is not UTF-8"):
        load_text(str(source))


def test_without_a_network_the_way_out_is_named():
    script = "from fista_modifier.data import C4, load_text; next(load_text(C4))"
    # Hugging Face reads its offline switch once, at import: hence a new process.
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: the data set allenai/c4 could not be")
    assert "--dataset FILE.txt" in last


@pytest.mark.parametrize("longest, expected", [(1024, 1024), (8192, 2048)])
def test_the_length_is_the_models_up_to_a_cap(longest, expected):
    config = LlamaConfig(max_position_embeddings=longest)
    assert max_sequence_length(config) == expected
