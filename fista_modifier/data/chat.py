"""The text that a model's chat template makes of conversations."""

from __future__ import annotations

from datetime import datetime
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
"""
The roles that chat templates know, by the names that ShareGPT gives to the speakers.
"""
DATE = datetime(2024, 7, 26)
"""
The date that is given to templates which tell the model today's date. The true date
would make another text each day.
"""


class RefusedChatError(ValueError):
    """The error of a chat that breaks a template's rule, such as who speaks first."""


def check_template(tokenizer: Any) -> None:
    """
    Refuse a tokenizer that cannot render conversations.

    :param tokenizer: the model's tokenizer; None if there is none
    :raises ValueError: if there is no tokenizer, or it has no chat template
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
    Render a conversation by the chat template of a tokenizer.

    :param conversation: messages with role and content, or ShareGPT's from and value
    :param tokenizer: the model's tokenizer, with a chat template
    :return: the text
    :raises RefusedChatError: if the template does not take the conversation
    :raises ValueError: if it is no conversation
    """
    messages = [_message(message) for message in conversation]
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            date_string=DATE.strftime("%d %b %Y"),
            strftime_now=DATE.strftime,
        )
    except (TemplateError, TypeError) as error:
        raise RefusedChatError(str(error)) from error
    return text


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{message!r} is no message with a role and content")
    # A table has every field in every row, and templates ask whether a field is there.
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
