"""Conversations as the text that a model's chat template makes of them."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

__all__ = ["RefusedChatError", "check_template", "render"]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
"""ShareGPT's names, by which it calls the speakers that templates know"""
DATE = "26 Jul 2024"
"""for templates that tell the model today's date: each day would give another text"""


class RefusedChatError(ValueError):
    """A template has rules, such as that a user speaks first, and one is broken."""


def check_template(tokenizer: Any) -> None:
    """
    :param tokenizer: of the model; None if there is none
    :raises ValueError: if conversations cannot be rendered
    """
    if tokenizer is None:
        raise ValueError(
            "this is a chat, which only the chat template of a model makes into text: "
            "use it for calibration, or name a column of text"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this is a chat, and the tokenizer of the model has no chat template: save "
            "that of the model's chat version with it, or name a column of text by "
            "--text-column"
        )


def render(conversation: list[Any], tokenizer: Any) -> str:
    """
    :param conversation: messages with role and content, or ShareGPT's from and value
    :param tokenizer: of the model, with a chat template
    :return: the text
    :raises RefusedChatError: if the template does not take the conversation
    :raises ValueError: if it is no conversation
    """
    messages = [_message(message) for message in conversation]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, date_string=DATE
        )
    except (TemplateError, TypeError) as error:
        raise RefusedChatError(str(error)) from error
    return text


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{message!r} is no message with a role and content")
    # a table has every field in every row, and templates ask whether one is there
    given: dict[str, Any] = _without_nulls(message)
    if "from" in given:
        speaker = given["from"]
        return {"role": ROLES.get(speaker, speaker), "content": given.get("value", "")}
    if "role" not in given:
        raise ValueError(
            "a message needs role and content, or ShareGPT's from and value; found "
            f"{', '.join(map(str, given)) or 'nothing'}"
        )
    return {"content": ""} | given


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_nulls(part)
            for name, part in value.items()
            if part is not None
        }
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value
