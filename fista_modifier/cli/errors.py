"""The message of the command line for an error: what is wrong, and what caused it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jinja2
import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

__all__ = ["describe"]

USERS_OWN = (
    ValueError,
    OSError,
    RuntimeError,
    ImportError,
    EOFError,
    yaml.YAMLError,
    jinja2.TemplateError,
)
"""
The types of errors whose messages already say what is wrong with the user's input.
"""
# The toolkit puts the source of the forward pass before the message of its error.
LISTING = re.compile(r"--- <Autowrapped (\w+) \d+>:\d+ ---\n")


def describe(error: BaseException) -> str:
    """
    Return the message of an error for the user.

    :param error: the error that ended a command
    :return: its message, and those of its causes that say more; for an error that no
        user can mend also its type, and how to see where it came from
    """
    message = _text(error)
    told = message
    for cause in _causes(error):
        text = _first_line(_text(cause))
        if (_first_line(str(cause).strip()) or text) not in told:
            message += f" (caused by: {text})"
            told += text
    if isinstance(error, USERS_OWN):
        return message
    return (
        f"unexpected {message}\nThis should not happen, please report it. "
        "LLM_COMPRESSOR_LOG_LEVEL=DEBUG in the environment shows where it came from."
    )


def _text(error: BaseException) -> str:
    """Return the message, with the type if it says little alone, as with KeyError."""
    if isinstance(error, ValidationError):
        return "; ".join(_of_field(one) for one in error.errors())
    text = str(error).strip()
    if listing := LISTING.match(text):
        return f"{listing[1]} could not be run on the calibration data"
    if text and isinstance(error, USERS_OWN):
        return text
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _of_field(error: ErrorDetails) -> str:
    """Return what is wrong with a field, or with several together."""
    if cause := error.get("ctx", {}).get("error"):  # our own words
        return str(cause)
    path = ".".join(map(str, error["loc"]))
    return f"{path}: {error['msg']}, not {error['input']!r}"


def _first_line(text: str) -> str:
    """Return the first line. Later lines are hints of other libraries on their use."""
    return text.partition("\n")[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen = {id(error)}
    cause = _cause(error)
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = _cause(cause)


def _cause(error: BaseException) -> BaseException | None:
    hidden = error.__suppress_context__
    return error.__cause__ or (None if hidden else error.__context__)
