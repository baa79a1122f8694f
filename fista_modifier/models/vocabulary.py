"""The check that two models have the same tokens."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["check_same_vocabulary", "check_vocabulary_size"]


def check_vocabulary_size(
    config: PretrainedConfig, other_config: PretrainedConfig, other: str
) -> None:
    """
    Refuse two models whose predictions are over different numbers of tokens.

    :param config: configuration of a model
    :param other_config: configuration of the model that its predictions are to be
        compared with
    :param other: what messages call that model
    :raises ValueError: if the numbers differ
    """
    size = config.get_text_config().vocab_size
    other_size = other_config.get_text_config().vocab_size
    if size != other_size:
        raise ValueError(
            f"{other} has a vocabulary of {other_size} tokens, and the model one of "
            f"{size}: name the dense model that it was pruned from"
        )


def check_same_vocabulary(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    other_config: PretrainedConfig,
    other_tokenizer: PreTrainedTokenizerBase,
    other: str,
) -> None:
    """
    Refuse two models whose predictions are not about the same tokens.

    :param config: configuration of a model
    :param tokenizer: its tokenizer
    :param other_config: configuration of the model that its predictions are to be
        compared with
    :param other_tokenizer: the tokenizer of that model
    :param other: what messages call that model
    :raises ValueError: if a prediction of one model means another token in the other
    """
    check_vocabulary_size(config, other_config, other)
    tokens, others = tokenizer.get_vocab(), other_tokenizer.get_vocab()
    if tokens != others:
        changed = min(
            token
            for token in tokens.keys() | others.keys()
            if tokens.get(token) != others.get(token)
        )
        raise ValueError(
            f"the tokenizer of {other} is another one: {changed!r} is "
            f"{others.get(changed)} there and {tokens.get(changed)} in the model. Name "
            "the dense model that it was pruned from"
        )
