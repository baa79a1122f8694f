import math
from importlib import import_module

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fista_modifier.evaluation import perplexity
from fista_modifier.evaluation.perplexity import Perplexity, token_blocks

TEXT = "The quick brown fox jumps over the lazy dog."  # 44 bytes, so 44 tokens


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
    )
    return LlamaForCausalLM(config)


def reference(model, tokenizer, text, seq_len, blocks):
    """The mean of transformers' own loss over the blocks."""
    ids = torch.tensor(tokenizer(text)["input_ids"][: seq_len * blocks])
    rows = ids.view(blocks, 1, seq_len)
    with torch.no_grad():
        return sum(model(row, labels=row).loss.item() for row in rows) / blocks


@pytest.mark.parametrize(
    ("losses", "value"), [([800.0, 2.0e4], math.inf), ([1.0, math.nan], math.nan)]
)
def test_a_broken_model_has_a_perplexity_too(losses, value):
    measured = Perplexity.of_blocks(losses, 8)
    assert measured.value == pytest.approx(value, nan_ok=True)
    assert measured.stderr is None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_the_exponential_of_transformers_loss(model, tiny_tokenizer, batch_size):
    measured = perplexity(
        model, tiny_tokenizer, TEXT, seq_len=10, batch_size=batch_size, progress=False
    )
    expected = reference(model, tiny_tokenizer, TEXT, seq_len=10, blocks=4)
    assert measured.blocks == 4
    assert measured.tokens == 36
    assert measured.nll == pytest.approx(expected, rel=1e-6)
    assert measured.value == pytest.approx(math.exp(expected), rel=1e-6)


def test_a_long_block_is_taken_in_chunks(model, tiny_tokenizer, monkeypatch):
    chunks = import_module("fista_modifier.evaluation.perplexity")
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 100 * len(tiny_tokenizer))
    text = TEXT * 14
    measured = perplexity(model, tiny_tokenizer, text, seq_len=600, progress=False)
    expected = reference(model, tiny_tokenizer, text, seq_len=600, blocks=1)
    assert measured.tokens == 599
    assert measured.nll == pytest.approx(expected, rel=1e-6)


def test_each_block_begins_as_the_tokenizer_begins_a_text(model, starting_tokenizer):
    own = torch.tensor(starting_tokenizer(TEXT)["input_ids"])[1:]
    rows = torch.cat([torch.ones(4, 1, dtype=torch.long), own[:36].view(4, 9)], 1)
    with torch.no_grad():
        expected = model(rows, labels=rows).loss.item()
    measured = perplexity(
        model, starting_tokenizer, TEXT, seq_len=10, max_tokens=36, progress=False
    )
    assert measured.tokens == 36
    assert measured.nll == pytest.approx(expected, rel=1e-6)


def test_only_the_text_begins_so_if_asked_for(starting_tokenizer):
    blocks = token_blocks(starting_tokenizer, TEXT, 10, bos=False)
    tokens = starting_tokenizer(TEXT)["input_ids"]
    assert blocks.flatten().tolist() == tokens[:40]
    assert (blocks[:, 0] == 1).tolist() == [True, False, False, False]


def test_max_tokens_limits_the_text(model, tiny_tokenizer):
    limited = perplexity(
        model, tiny_tokenizer, TEXT, seq_len=10, max_tokens=25, progress=False
    )
    assert limited.blocks == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(model, tiny_tokenizer, training):
    model.train(training)
    perplexity(model, tiny_tokenizer, TEXT, seq_len=10, progress=False)
    assert model.training is training
    assert all(weight.grad is None for weight in model.parameters())


def test_a_short_text_is_an_error_with_the_counts(model, tiny_tokenizer):
    with pytest.raises(ValueError, match="44 tokens, but one block needs 45"):
        perplexity(model, tiny_tokenizer, TEXT, seq_len=45)


@pytest.mark.parametrize("bad", [{"seq_len": 1}, {"seq_len": 8, "batch_size": 0}])
def test_sizes_that_measure_nothing_are_errors(model, tiny_tokenizer, bad):
    with pytest.raises(ValueError, match="at least"):
        perplexity(model, tiny_tokenizer, TEXT, **bad)


def test_the_standard_error_is_that_of_the_blocks_mean_by_the_delta_method(
    model, tiny_tokenizer
):
    text = "aaaaaaaaaaThe quick brown fox"  # an easy block and a hard one
    measured = perplexity(model, tiny_tokenizer, text, seq_len=10, progress=False)
    first, second = (
        reference(model, tiny_tokenizer, block, seq_len=10, blocks=1)
        for block in (text[:10], text[10:20])
    )
    mean = (first + second) / 2  # of two values, s/√2 is half their distance
    expected = math.exp(mean) * abs(first - second) / 2
    assert abs(first - second) > 0.1
    assert measured.stderr == pytest.approx(expected, rel=1e-5)


def test_one_block_has_no_standard_error(model, tiny_tokenizer):
    measured = perplexity(model, tiny_tokenizer, TEXT, seq_len=44, progress=False)
    assert measured.stderr is None


def test_a_large_vocabulary_costs_no_precision(tiny_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50_000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        initializer_range=1.0,
    )
    model = LlamaForCausalLM(config)
    measured = perplexity(model, tiny_tokenizer, TEXT, seq_len=44, progress=False)
    ids = torch.tensor([tiny_tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    expected = -logprobs.gather(1, ids[0, 1:, None]).mean().item()
    assert measured.nll == pytest.approx(expected, abs=5e-6)
