"""How much of the dense model's predictions a pruned model has kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import invoke
from families import checkpoint, tiny_model
from runs import prune, samples
from torch.nn.functional import kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fista_modifier.evaluation import agreement
from fista_modifier.evaluation.agreement import block_agreement, divergences
from fista_modifier.evaluation.evaluate import Evaluation

BLOCKS = samples(3, 10, seed=1)


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pruned() -> PreTrainedModel:
    model = tiny_model("llama")
    prune(model, preset="fast")
    return model


def expected(
    dense: PreTrainedModel, pruned: PreTrainedModel, blocks: torch.Tensor
) -> tuple[float, float]:
    """Both values, by torch's own functions on the whole logits in float64."""
    with torch.no_grad():
        one, other = (
            model(blocks).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
            for model in (dense, pruned)
        )
    divergence = kl_div(other, one, log_target=True, reduction="batchmean")
    return float((one.argmax(-1) == other.argmax(-1)).double().mean()), float(
        divergence
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_it_is_what_torch_says_of_the_whole_logits(
    dense: PreTrainedModel, pruned: PreTrainedModel, batch_size: int
) -> None:
    found = block_agreement(
        pruned, dense, BLOCKS, batch_size=batch_size, progress=False
    )
    share, divergence = expected(dense, pruned, BLOCKS)
    assert 0 < share < 1
    assert found.share == pytest.approx(share)
    assert found.divergence == pytest.approx(divergence, rel=1e-5)
    assert found.tokens == 27


def test_a_block_longer_than_a_chunk_is_counted_whole(
    dense: PreTrainedModel, pruned: PreTrainedModel
) -> None:
    long = samples(1, 600)
    found = block_agreement(pruned, dense, long, progress=False)
    share, divergence = expected(dense, pruned, long)
    assert found.share == pytest.approx(share)
    assert found.divergence == pytest.approx(divergence, rel=1e-5)
    assert found.tokens == 599


def test_a_model_agrees_with_itself(
    dense: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    found = block_agreement(dense, dense, BLOCKS, progress=False)
    assert (found.share, found.tokens) == (1, 27)
    assert found.divergence == pytest.approx(0, abs=1e-12)


def test_divergences_of_a_large_vocabulary_keep_their_digits() -> None:
    """Also where they are small, and sums in float32 would hide them."""
    generator = torch.Generator().manual_seed(0)
    dense = 5 * torch.randn(4, 100_000, generator=generator)
    pruned = dense + 0.01 * torch.randn(4, 100_000, generator=generator)
    exact = kl_div(
        pruned.double().log_softmax(-1),
        dense.double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    assert exact.max() < 1e-4
    assert torch.allclose(divergences(dense, pruned), exact, rtol=1e-2)


def test_another_vocabulary_is_refused(
    dense: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    larger = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    with pytest.raises(ValueError, match="vocabulary of 64 tokens, and the pruned one"):
        block_agreement(larger, dense, BLOCKS, progress=False)
    with pytest.raises(ValueError, match="batch_size is 0"):
        block_agreement(dense, dense, BLOCKS, batch_size=0)


def test_eval_shows_it_beside_the_perplexity(
    model: Path, text: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    file, table, output = (tmp_path / name for name in ("e.json", "e.md", "pruned"))
    small = ("--dataset", text, "--samples", 4, "--seq-len", 16)
    made = invoke("prune", model, "-o", output, "--pattern", "2:4", *small)
    assert made.exit_code == 0, made.output
    arguments = ("--text", text, "--seq-len", 16, "--json", file, "--markdown", table)
    result = invoke("eval", model, output, "--reference", model, *arguments)
    assert result.exit_code == 0, result.output
    of_dense, of_pruned = json.loads(file.read_text())["rows"]
    one, other = (
        tiny_model("llama").from_pretrained(folder) for folder in (model, output)
    )
    found = agreement(other, one, tiny_tokenizer, text.read_text(), seq_len=16)
    assert "divergence" not in of_dense
    assert of_pruned["divergence"] == pytest.approx(found.divergence)
    assert of_pruned["same_token"] == pytest.approx(found.share)
    [header, _, _, line] = table.read_text().splitlines()[:4]
    assert "text, same" in header and "text, KL" in header
    assert f"{100 * found.share:.2f} %" in line and f"{found.divergence:.4f}" in line
    refused = invoke("eval", output, *arguments)
    assert refused.exit_code == 1
    assert "reference" in refused.output


def test_what_cannot_be_compared_is_refused_at_once(model: Path, text: Path) -> None:
    result = invoke(
        "eval", model, "--reference", model, "--text", text, "--backend", "vllm"
    )
    assert result.exit_code == 1
    assert "--reference compares whole distributions" in " ".join(result.output.split())
    with pytest.raises(ValueError, match="--reference needs a text"):
        Evaluation(texts=[], reference=str(model)).run([str(model)])


def test_a_reference_of_other_tokens_is_refused_before_anything_runs(
    model: Path, text: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = checkpoint("llama")  # of 64 tokens
    tiny_tokenizer.save_pretrained(other)
    result = invoke("eval", model, "--reference", other, "--text", text)
    assert result.exit_code == 1
    assert "has a vocabulary of 64 tokens" in " ".join(result.output.split())

    renamed = tmp_path / "renamed"
    tiny_model("llama", vocab_size=len(tiny_tokenizer)).save_pretrained(renamed)
    tiny_tokenizer.save_pretrained(renamed)
    file = renamed / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    result = invoke("eval", model, "--reference", renamed, "--text", text)
    assert result.exit_code == 1
    assert "the tokenizer of" in " ".join(result.output.split())
