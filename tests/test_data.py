import copy
import gzip
import json
import os
import subprocess
import sys
from functools import partial

import pytest
from datasets import Dataset, DatasetDict
from framing import framed
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


def test_samples_begin_as_the_tokenizer_begins_a_text(tmp_path, starting_tokenizer):
    source = write_lines(tmp_path / "text.txt", 10)
    data = calibration_dataset(
        source, starting_tokenizer, samples=10, seq_len=9, progress=False
    )
    assert all(row[0] == starting_tokenizer.bos_token_id for row in data["input_ids"])
    lines = [starting_tokenizer.decode(row[1:]) for row in data["input_ids"]]
    assert sorted(lines) == [f"{number:07}\n" for number in range(10)]
    with pytest.raises(ValueError, match="seq_len is 1; at least 2"):
        calibration_dataset(source, starting_tokenizer, samples=1, seq_len=1)


@pytest.mark.parametrize(
    "template, before, after",
    [
        ("<cls> $A <sep>", ["<cls>"], ["<sep>"]),
        ("<cls> <pad> $A <eos>", ["<cls>", "<pad>"], []),
    ],
    ids=["BERT's", "GLM's"],
)
def test_samples_are_framed_as_the_tokenizer_frames_a_text(
    template, before, after, tmp_path, tiny_tokenizer
):
    """Encoders read [CLS] and [SEP]; a text's end is no sample's end."""
    tokenizer = framed(tiny_tokenizer, template, cls_token="<cls>", sep_token="<sep>")
    source = write_lines(tmp_path / "text.txt", 10)
    length = 8 + len(before) + len(after)
    data = calibration_dataset(
        source, tokenizer, samples=10, seq_len=length, progress=False
    )
    first, last = len(before), length - len(after)
    for row in data["input_ids"]:
        assert tokenizer.convert_ids_to_tokens(row[:first]) == before
        assert tokenizer.convert_ids_to_tokens(row[last:]) == after
    lines = [tokenizer.decode(row[first:last]) for row in data["input_ids"]]
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
    script = (
        "from fista_modifier.data.calibration import C4, load_text; next(load_text(C4))"
    )
    # Hugging Face reads its offline switch once, at import: hence a new process.
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: the data set allenai/c4 could not be")
    assert "such as FILE.txt" in last


@pytest.mark.parametrize("longest, expected", [(1024, 1024), (8192, 2048)])
def test_the_length_is_the_models_up_to_a_cap(longest, expected):
    config = LlamaConfig(max_position_embeddings=longest)
    assert max_sequence_length(config) == expected


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') "
    "}}{% endif %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['calls'] is defined %}!{% endif %}{% endfor %}"
)
ROWS = ["one", "two\nlines", 'three, "quoted"', "007"]
"""The texts of a table that a careless reader would change."""


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_rows(folder, kind):
    """ROWS as a file or folder of the kind."""
    data = Dataset.from_dict({"text": ROWS, "number": range(len(ROWS))})
    path = folder / kind.removesuffix(".gz")
    splits = DatasetDict({"train": data, "test": data.select([0])})
    {
        ".parquet": data.to_parquet,
        ".csv": data.to_csv,
        ".tsv": partial(data.to_csv, sep="\t"),
        ".json": data.to_json,
        ".jsonl": data.to_json,
        ".saved": data.save_to_disk,
        ".splits": splits.save_to_disk,
    }[path.suffix](path)
    if path.name != kind:
        compressed = gzip.compress(path.read_bytes())
        path.unlink()
        path = folder / kind
        path.write_bytes(compressed)
    return str(path)


@pytest.mark.parametrize(
    "kind",
    ["data.jsonl", "data.jsonl.gz", "data.json.gz", "data.csv", "data.csv.gz"]
    + ["data.tsv", "data.parquet", "data.saved", "data.splits"],
)
def test_every_kind_of_file_has_the_same_documents(tmp_path, kind):
    assert list(load_text(write_rows(tmp_path, kind))) == ROWS


def test_a_changed_file_is_read_anew(tmp_path):
    for rows in (["old"], ["new"]):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": row} for row in rows])
        assert list(load_text(source)) == rows


def test_a_compressed_text_is_one_document(tmp_path):
    source = tmp_path / "text.txt.gz"
    source.write_bytes(gzip.compress(b"one\n\ntwo\n"))
    assert list(load_text(str(source))) == ["one\n\ntwo\n"]


def test_the_split_of_a_folder_is_chosen(tmp_path):
    assert list(load_text(write_rows(tmp_path, "data.splits"), split="test")) == ["one"]
    with pytest.raises(ValueError, match="splits train, test and none .* 'dev'"):
        load_text(str(tmp_path / "data.splits"), split="dev")


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in [
        ("a.txt", "one"),
        ("a.jsonl", '{"text": "one"}\n'),
        ("a.json", '[{"text": "one"}]'),
        ("a.csv", "text,number\none,1\n"),
    ]:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert list(load_text(str(tmp_path / name))) == ["one"]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_table_with_more_fields_than_names_is_refused(tmp_path, ending):
    """The first field of a row would be taken for its name."""
    source = tmp_path / f"a{ending}"
    rows = "text,x\na,1,2\nb,1,3\n"
    source.write_text(rows if ending == ".csv" else rows.replace(",", "\t"))
    with pytest.raises(ValueError, match="names 2 columns, .* has 3 fields"):
        list(load_text(str(source)))


def test_words_of_a_table_stay_words(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("text\nNA\nNone\n1.50\nTrue\n")
    assert list(load_text(str(source))) == ["NA", "None", "1.50", "True"]


def test_rows_without_text_are_left_out_and_counted(tmp_path, warnings):
    rows = [{"text": "one"}, {"text": None}, {"text": ""}, {"other": 1}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    assert list(load_text(source)) == ["one"]
    (warning,) = warnings
    assert "3 of 4 records" in warning and "3 empty" in warning


def test_an_empty_text_may_be_asked_for(tmp_path):
    rows = [{"text": "one"}, {"text": None}, {"text": ""}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    assert list(load_text(source, keep_empty=True)) == ["one", ""]


def test_no_row_with_text_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": ""}])
    with pytest.raises(ValueError, match=r"none of the 2 records .*a.jsonl.*'text'"):
        list(load_text(source))


def test_what_is_no_text_is_named_with_its_record(tmp_path):
    rows = [{"text": "one"}, {"text": 5}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"record 2 of .*a.jsonl.*'text'.* 5"):
        list(load_text(source))


def test_records_may_differ_in_their_fields(tmp_path):
    rows = [{"text": "x" * 1000}] * 11_000 + [{"text": "last", "new": 1}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)  # more than datasets' 10 MB
    assert list(load_text(source))[-1] == "last"


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_bad_line_is_named(tmp_path, ending):
    source = tmp_path / f"a.{ending}"
    source.write_text('{"text": "good"}\n\n' * 15 + '{"text": bad}\n{"text": "x"}\n')
    with pytest.raises(ValueError, match=rf"a.{ending} .* line 31: Expecting value"):
        load_text(str(source))


def test_a_bad_line_of_a_list_is_named(tmp_path):
    source = tmp_path / "a.json"
    source.write_text('[\n{"text": "good"},\n{"text": bad}\n]\n')
    with pytest.raises(ValueError, match=r"a.json .* line 3: Expecting value"):
        load_text(str(source))


CUT_SHORT = gzip.compress(b"x" * 99, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,n\nx,1\ny,1,2\n", "line 3"),
        ("a.parquet", b"no parquet", "a.parquet cannot be read"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read: Not a gzipped"),
        ("a.txt.gz", CUT_SHORT, "a.txt.gz is not UTF-8 text"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "a.jsonl is not UTF-8"),
        ("a.csv", "text\né\n".encode("latin-1"), "a.csv is not UTF-8"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_text(str(tmp_path / name))


OPENAI = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "calls": "x"},
]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize(
    ("column", "chat", "expected"),
    [
        ("messages", OPENAI, "[user]hi[assistant]!"),
        ("conversations", OPENAI, "[user]hi[assistant]!"),
        ("conversations", SHAREGPT, "[user]hi[assistant]ho"),
        ("messages", SHAREGPT, "[user]hi[assistant]ho"),
        ("chosen", OPENAI[:1], "[user]hi"),
    ],
)
@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
def test_chats_are_rendered_by_the_template(
    tmp_path, chat_tokenizer, column, chat, expected, kind
):
    source = tmp_path / kind
    data = Dataset.from_list([{column: chat}, {column: chat[:1]}])
    data.to_parquet(source) if kind == "a.parquet" else data.to_json(source)
    data = calibration_dataset(
        str(source),
        chat_tokenizer,
        samples=1,
        seq_len=len(expected) + len("<[user]hi"),
        text_column=column if column == "chosen" else None,
        progress=False,
    )
    text = chat_tokenizer.decode(data["input_ids"][0])
    assert text == f"{expected}<eos>[user]hi"


def test_a_chat_does_not_begin_with_what_each_sample_begins_with(
    tmp_path, starting_tokenizer
):
    tokenizer = copy.deepcopy(starting_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    data = Dataset.from_list([{"messages": [{"role": "user", "content": "hi"}]}])
    data.to_json(str(tmp_path / "a.jsonl"))
    source = str(tmp_path / "a.jsonl")
    assert list(load_text(source, tokenizer=tokenizer)) == ["[user]hi"]


def test_a_chat_is_rendered_as_on_one_day(tmp_path, chat_tokenizer):
    """Else the tokens of a run that is resumed on another day would be others."""
    chat_tokenizer.chat_template = (
        "{{ date_string }}, {{ strftime_now('%Y-%m-%d') }}: "
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": OPENAI}])
    (text,) = load_text(source, tokenizer=chat_tokenizer)
    assert text.startswith("26 Jul 2024, 2024-07-26: ")


def test_a_chat_that_the_template_refuses_is_left_out(
    tmp_path, chat_tokenizer, warnings
):
    rows = [{"messages": OPENAI[:1]}, {"messages": [{"role": "tool", "content": "x"}]}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    assert list(load_text(source, tokenizer=chat_tokenizer)) == ["[user]hi"]
    assert "1 of 2 records" in warnings[0] and "no tools" in warnings[0]
    source = write_jsonl(tmp_path / "a.jsonl", rows[1:])
    with pytest.raises(ValueError, match="none of the 1 records.*no tools"):
        list(load_text(source, tokenizer=chat_tokenizer))


def test_chats_without_a_template_are_an_error(tmp_path, tiny_tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": OPENAI}])
    with pytest.raises(ValueError, match="no chat template.*--text-column"):
        list(load_text(source, tokenizer=tiny_tokenizer))
    with pytest.raises(ValueError, match="record 1 of .*a.jsonl: this is a chat"):
        list(load_text(source))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"text": "x"}], "record 1 of .* role and content.*found text"),
        (["x"], "record 1 of .*'x' is no message"),
        ("[]", "'messages' of .* holds text in place of a list"),
    ],
)
def test_what_is_no_chat_is_named(tmp_path, chat_tokenizer, value, words):
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": value}])
    with pytest.raises(ValueError, match=words):
        list(load_text(source, tokenizer=chat_tokenizer))


def test_text_comes_before_chats(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": [], "text": "one"}])
    assert list(load_text(source)) == ["one"]
