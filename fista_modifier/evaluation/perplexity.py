"""
Perplexity by the protocol of the pruning literature.

The text is tokenised once and cut into contiguous blocks that do not overlap; the
perplexity is the exponential of the mean negative log-likelihood of every token of a
block but its first, given the tokens before it in the block. What remains after the
last whole block is left out.

Where the tokenizer puts a token at the beginning of each text, each block begins with
it, and all tokens of the text are predicted (of several such tokens, all but the first
are, too). Published tables of LLaMA and OPT have that token in the first block only.

Its standard error takes the blocks as independent samples of the text: with losses
x_1 … x_B of mean x̄ and sample variance s², the standard error of x̄ is s/√B, and by the
delta method that of the perplexity exp(x̄) is exp(x̄)·s/√B. It says how far the text
decides the figure. Two models measured on the same blocks differ more surely than their
two errors suggest, because the same blocks are hard for both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor
from tqdm.auto import tqdm

from fista_modifier.data import cut_into_blocks, start_tokens
from fista_modifier.models.limits import check_length, check_tokens

__all__ = [
    "Perplexity",
    "block_losses",
    "checked_batches",
    "in_chunks",
    "inference",
    "perplexity",
    "predictions",
    "token_blocks",
]

CHUNK_ENTRIES = 2**21
"""
The number of logits that are held in float32 at a time. What is computed of so few
stays in a processor's cache, which makes it several times faster than of all at once.
"""
CHUNK_ENTRIES_OF_ACCELERATORS = 2**24
"""
The same on an accelerator, where time goes with the number of calls instead.
"""

MOST_NATS = math.log(sys.float_info.max)
"""The highest loss whose perplexity is a floating-point number."""


@dataclass(frozen=True)
class Perplexity:
    """
    The perplexity of a model on a text.

    :param value: the perplexity, ``exp(nll)``
    :param nll: mean negative log-likelihood, in nats per token
    :param tokens: number of predicted tokens
    :param blocks: number of blocks of text
    :param stderr: standard error of ``value``; None for a single block, or if the value
        is infinite or NaN
    """

    value: float
    nll: float
    tokens: int
    blocks: int
    stderr: float | None

    @classmethod
    def of_blocks(cls, losses: Sequence[float], seq_len: int) -> Perplexity:
        """
        Return the perplexity that follows from the losses of blocks.

        :param losses: mean negative log-likelihood of each block, in nats per token
        :param seq_len: tokens in a block
        :return: the perplexity of all blocks together
        """
        nll, count = fmean(losses), len(losses)
        value = math.inf if nll > MOST_NATS else math.exp(nll)
        known = count > 1 and math.isfinite(value)
        stderr = value * stdev(losses) / math.sqrt(count) if known else None
        return cls(value, nll, count * (seq_len - 1), count, stderr)


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    seq_len: int,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Perplexity:
    """
    Measure a causal language model's perplexity on a text.

    :param model: the model (Hugging Face); left in the mode it was in
    :param tokenizer: its tokenizer
    :param text: the text to predict
    :param seq_len: tokens in a block
    :param max_tokens: use no more than this many tokens from the start of the text
    :param batch_size: blocks in a forward pass
    :param progress: whether to show a progress bar
    :return: the perplexity and what it was measured on
    :raises ValueError: if ``seq_len`` leaves nothing to predict, ``batch_size`` is not
        positive, or the text is shorter than one block
    """
    blocks = token_blocks(tokenizer, text, seq_len, max_tokens)
    losses = block_losses(model, blocks, batch_size=batch_size, progress=progress)
    return Perplexity.of_blocks(losses, seq_len)


def token_blocks(
    tokenizer: Any,
    text: str,
    seq_len: int,
    max_tokens: int | None = None,
    *,
    bos: bool = True,
) -> Tensor:
    """
    Tokenise a text and cut it into blocks.

    :param tokenizer: the tokenizer of the model to measure
    :param text: the text to predict
    :param seq_len: tokens in a block
    :param max_tokens: use no more than this many tokens from the start of the text
    :param bos: whether each block begins with what the tokenizer puts at the beginning
        of a text; otherwise the first block alone does
    :return: token ids, blocks×seq_len
    :raises ValueError: if ``seq_len`` leaves nothing to predict, or the text is shorter
        than one block
    """
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; at least 2 tokens predict one")
    start = start_tokens(tokenizer) if bos else []
    # verbose=False: the text may well be longer than the model's maximum length.
    tokens = tokenizer(text, verbose=False)["input_ids"][len(start) :][:max_tokens]
    own = seq_len - len(start)
    if len(tokens) < own:
        raise ValueError(
            f"the text gives {len(tokens)} tokens, but one block needs {own}: use "
            "a longer text, more --max-tokens or a shorter --seq-len"
        )
    return cut_into_blocks(tokens, seq_len, start)


def block_losses(
    model: Any, blocks: Tensor, *, batch_size: int = 1, progress: bool = True
) -> list[float]:
    """
    Measure a model's losses on blocks of tokens.

    :param model: a causal language model (Hugging Face); left in the mode it was in
    :param blocks: token ids, blocks×seq_len
    :param batch_size: blocks in a forward pass
    :param progress: whether to show a progress bar
    :return: mean negative log-likelihood of each block, in nats per token
    :raises ValueError: if ``batch_size`` is not positive, or the model does not have so
        many positions or such tokens
    """
    losses: list[float] = []
    batches = checked_batches(blocks, batch_size, model)
    with inference(model):
        for batch in tqdm(batches, desc="Perplexity", disable=not progress):
            losses += _mean_losses(model, batch).tolist()
    return losses


def checked_batches(
    blocks: Tensor, batch_size: int, *models: Any
) -> tuple[Tensor, ...]:
    """
    Split blocks of tokens into batches, and check that models can run on them.

    :param blocks: token ids, blocks×seq_len
    :param batch_size: blocks in a forward pass
    :param models: the models that are to predict the blocks
    :return: the batches
    :raises ValueError: if ``batch_size`` is not positive, or a model does not have so
        many positions or such tokens
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    for model in models:
        check_tokens(model, blocks)
        check_length(model, blocks.shape[1])
    return torch.split(blocks, batch_size)


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """
    Put a model into the mode in which it predicts, without gradients.

    :param model: any model; left in the mode it was in
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def predictions(model: Any, batch: Tensor) -> Tensor:
    """
    Predict every token of each block but the first.

    :param model: a causal language model
    :param batch: token ids, blocks×seq_len
    :return: logits of these tokens, blocks×(seq_len−1)×vocabulary
    """
    # An offloaded model's own device is where its weights rest, not where it runs.
    device = get_execution_device(model.get_input_embeddings())
    if device.type != "meta":  # accelerate's hooks know where to move it
        batch = batch.to(device)
    logits: Tensor = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return logits


def in_chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """
    Split logits, and what belongs to them, into parts to work on one after the other.

    :param logits: …×positions×vocabulary
    :param others: tensors of the same positions, in the same dimension
    :return: views of a few positions of each tensor, at least one
    """
    on_cpu = logits.device.type == "cpu"
    entries = CHUNK_ENTRIES if on_cpu else CHUNK_ENTRIES_OF_ACCELERATORS
    size = max(1, entries * logits.shape[-2] // max(1, logits.numel()))
    positions = logits.ndim - 2
    return zip(
        *(torch.split(one, size, positions) for one in (logits, *others)), strict=True
    )


def _mean_losses(model: Any, batch: Tensor) -> Tensor:
    """Return the mean loss of each block of a batch (blocks×seq_len), nats, float64."""
    logits = predictions(model, batch)
    targets = batch[:, 1:].to(logits.device)
    totals = torch.zeros(len(batch), dtype=torch.float64, device=logits.device)
    for scores, expected in in_chunks(logits, targets):
        totals += _losses(scores.float(), expected).sum(dim=1)
    return totals / targets.shape[1]


def _losses(scores: Tensor, expected: Tensor) -> Tensor:
    """
    Return −log softmax of ``scores`` (…×vocabulary, float32) at ``expected``, float64.
    The sum of tens of thousands of exponentials is float64, because in float32 it is
    good to only five digits on some processors.
    """
    highest = scores.amax(-1, keepdim=True)
    totals = (scores - highest).exp().sum(-1, dtype=torch.float64)
    chosen = (scores - highest).gather(-1, expected.unsqueeze(-1)).squeeze(-1)
    return totals.log() - chosen
