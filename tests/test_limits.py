"""Models are not given tokens or positions that they do not have."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY, tiny_model
from runs import calibration, prune
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fista_modifier import FISTAPruningModifier, pipeline
from fista_modifier.models.limits import (
    check_calibration,
    check_length,
    check_tokens,
    longest_sequence,
)

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 10,
    "max_position_embeddings": 16,
}


def roberta() -> PreTrainedModel:
    return RobertaForMaskedLM(RobertaConfig(**SMALL, pad_token_id=1))


def gptj() -> PreTrainedModel:
    config = GPTJConfig(
        n_embd=8, n_layer=1, n_head=2, rotary_dim=2, n_positions=16, vocab_size=10
    )
    return GPTJForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "longest"),
    [
        (lambda: tiny_model("gpt2"), 64),
        (lambda: tiny_model("opt"), 64),
        (lambda: BertModel(BertConfig(**SMALL)), 16),
        (roberta, 14),
        (gptj, 16),
    ],
    ids=["gpt2", "opt", "bert", "roberta", "gptj"],
)
def test_positions_end_where_the_model_fails(build, longest: int) -> None:
    model = build()
    check_length(model, longest)
    assert longest_sequence(model.config) == longest
    model(input_ids=torch.full((1, longest), 2))
    with pytest.raises(ValueError, match=f"{longest} positions: use --seq-len"):
        check_length(model, longest + 1)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 2))


def test_computed_positions_do_not_end() -> None:
    model = tiny_model("llama")
    check_length(model, 65)
    assert longest_sequence(model.config) == model.config.max_position_embeddings
    bloom = BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=10)
    check_length(BloomForCausalLM(bloom), 10_000)


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_a_token_beyond_the_vocabulary_is_named(token: int) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=rf"id {token} is not .* to {VOCABULARY - 1}:"):
        check_tokens(model, torch.tensor([1, token]))
    check_tokens(model, torch.tensor([0, VOCABULARY - 1]))


def test_what_stands_for_an_image_may_be_beyond_the_vocabulary() -> None:
    model = tiny_model("llama")
    model.config = LlamaConfig(**model.config.to_dict() | {"image_token_id": 99})
    check_tokens(model, torch.tensor([99, 1]))


def test_the_modifier_looks_at_the_tokens_first() -> None:
    tokens = torch.tensor([[1, 2, VOCABULARY + 3]])
    arguments = {"dataset": calibration(tokens)}
    with pytest.raises(ValueError, match=f"token id {VOCABULARY + 3} is not in the"):
        prune(tiny_model("llama"), oneshot_arguments=arguments)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.tensor([[1, VOCABULARY]]), f"token id {VOCABULARY}"),
        (torch.ones(1, 65, dtype=torch.int64), "sequences of 65 tokens"),
    ],
)
def test_a_run_begins_with_these_checks(tokens: torch.Tensor, words: str) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=words):
        check_calibration(model, calibration(tokens))
    with pytest.raises(ValueError, match=words):
        modifier = FISTAPruningModifier(mask_structure="2:4")
        pipeline.prune(model, None, calibration(tokens), modifier)


def test_a_decoder_needs_a_text_of_its_own_or_makes_one() -> None:
    small = {"vocab_size": 10, "d_model": 8, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(
        T5Config(**small, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    )
    data = calibration(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="T5For.* decoder .* 'labels' or 'decoder_in"):
        pipeline.prune(t5, None, data, FISTAPruningModifier(mask_structure="2:4"))
    check_calibration(t5, data.add_column("labels", data["input_ids"]))
    sizes = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in {"layers": 1, "ffn_dim": 8, "attention_heads": 2}.items()
    }
    bart = BartForConditionalGeneration(
        BartConfig(**small, **sizes, max_position_embeddings=16)
    )
    check_calibration(bart, data)


def test_datafree_is_told_that_calibration_is_needed() -> None:
    with pytest.raises(ValueError, match="needs calibration.*'independent'"):
        prune(tiny_model("llama"), oneshot_arguments={"pipeline": "datafree"})


@pytest.mark.parametrize("word", ["__ALL_PRUNABLE__", "__ALL_QUANTIZABLE__"])
def test_a_word_for_several_classes_needs_one_of_them(word: str) -> None:
    modifier = prune(tiny_model("llama"), targets=word, ignore=["lm_head"])
    assert len(modifier.results) == 14
    with pytest.raises(ValueError, match="'Conv2d' matches no module"):
        prune(tiny_model("llama"), targets=["Linear", "Conv2d"])
