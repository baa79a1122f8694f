"""
The distance of a pruned model's predictions from those of the dense model.

Perplexity measures how well a model predicts a text. Agreement measures whether two
models predict the same. It is the share of positions at which both hold the same token
for the most likely next one, and the Kullback–Leibler divergence of the pruned model's
distribution from the dense model's. Blocks and positions are those of the perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fista_modifier.evaluation.perplexity import (
    checked_batches,
    in_chunks,
    inference,
    predictions,
    token_blocks,
)

__all__ = [
    "DIVERGENCE",
    "SHARE",
    "Agreement",
    "agreement",
    "block_agreement",
    "divergences",
]

SHARE, DIVERGENCE = "same_token", "divergence"
"""The keys of an agreement's share and divergence in the rows of results."""


@dataclass(frozen=True)
class Agreement:
    """
    The agreement of two models' predictions on a text.

    :param share: share of predicted tokens for which both models hold the same token
        for the most likely
    :param divergence: mean KL(dense ‖ pruned), in nats per token
    :param tokens: number of predicted tokens
    """

    share: float
    divergence: float
    tokens: int


def divergences(dense: Tensor, pruned: Tensor) -> Tensor:
    """
    Return KL(dense ‖ pruned) = Σ_v p_v (log p_v − log q_v) for each token. The sums
    over the vocabulary are float64, as those of the perplexity are. The result can be
    differentiated.

    :param dense: logits of p, tokens×vocabulary, float32 or float64
    :param pruned: logits of q, of the same shape
    :return: nats, one for each token, float64
    """
    dense = dense - dense.amax(-1, keepdim=True)
    pruned = pruned - pruned.amax(-1, keepdim=True)
    weights = dense.exp()
    total = weights.sum(-1, dtype=torch.float64)
    difference = (weights * (dense - pruned)).sum(-1, dtype=torch.float64) / total
    return difference - total.log() + pruned.exp().sum(-1, dtype=torch.float64).log()


def agreement(
    model: Any,
    dense: Any,
    tokenizer: Any,
    text: str,
    *,
    seq_len: int,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Agreement:
    """
    Measure the agreement of a pruned and a dense model on a text.

    :param model: a pruned causal language model (Hugging Face); left in the mode it was
        in
    :param dense: the model that it was pruned from; also left in its mode
    :param tokenizer: the tokenizer of both
    :param text: the text to predict
    :param seq_len: tokens in a block
    :param max_tokens: use no more than this many tokens from the start of the text
    :param batch_size: blocks in a forward pass
    :param progress: whether to show a progress bar
    :return: the agreement of the two models
    :raises ValueError: if ``seq_len`` leaves nothing to predict, ``batch_size`` is not
        positive, the text is shorter than one block, or the models have different
        vocabularies
    """
    blocks = token_blocks(tokenizer, text, seq_len, max_tokens)
    return block_agreement(
        model, dense, blocks, batch_size=batch_size, progress=progress
    )


def block_agreement(
    model: Any,
    dense: Any,
    blocks: Tensor,
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> Agreement:
    """
    Measure the agreement of a pruned and a dense model on blocks of tokens.

    :param model: a pruned causal language model (Hugging Face); left in the mode it was
        in
    :param dense: the model that it was pruned from; also left in its mode
    :param blocks: token ids, blocks×seq_len, two tokens or more in each
    :param batch_size: blocks in a forward pass
    :param progress: whether to show a progress bar
    :return: the agreement of the two models
    :raises ValueError: if ``batch_size`` is not positive, a model does not have so many
        positions or such tokens, or the models have different vocabularies
    """
    same, total = 0, 0.0
    batches = checked_batches(blocks, batch_size, model, dense)
    with inference(model), inference(dense):
        for batch in tqdm(batches, desc="Agreement", disable=not progress):
            agreeing, divergence = _compared(
                predictions(dense, batch), predictions(model, batch)
            )
            same, total = same + agreeing, total + divergence
    tokens = len(blocks) * (blocks.shape[1] - 1)
    return Agreement(same / tokens, total / tokens, tokens)


def _compared(dense: Tensor, pruned: Tensor) -> tuple[int, float]:
    """
    Compare the predictions of two models.

    :param dense: logits of the dense model, blocks×positions×vocabulary
    :param pruned: logits of the pruned model, of the same shape
    :return: the number of positions at which both have the same greatest logit, and the
        sum of the divergences of all positions
    :raises ValueError: if the shapes differ
    """
    if dense.shape != pruned.shape:
        raise ValueError(
            f"the dense model has a vocabulary of {dense.shape[-1]} tokens, and the "
            f"pruned one of {pruned.shape[-1]}"
        )
    same = torch.zeros((), dtype=torch.int64, device=pruned.device)
    total = torch.zeros((), dtype=torch.float64, device=pruned.device)
    for one, other in in_chunks(dense, pruned):
        one = one.to(other.device)
        same += (one.argmax(-1) == other.argmax(-1)).sum()
        total += divergences(one.float(), other.float()).sum()
    return int(same), float(total)
