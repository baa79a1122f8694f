"""Tokenizers that put tokens before and after a text."""

from __future__ import annotations

import re

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast


def framed(
    tokenizer: PreTrainedTokenizerFast, template: str, **names: str
) -> PreTrainedTokenizerFast:
    """
    :param tokenizer: the tokenizer of a text, with <pad> and <eos>
    :param template: a text, as $A, between special tokens such as <eos>
    :param names: further special tokens by their roles, such as bos_token
    :return: another tokenizer, which frames each text so
    """
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",
        eos_token="<eos>",
        **names,
    )
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[
            (token, found.convert_tokens_to_ids(token))
            for token in re.findall("<.*?>", template)
        ],
    )
    return found
