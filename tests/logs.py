"""What is logged while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger


@contextmanager
def logged(level: str = "WARNING") -> Iterator[list[str]]:
    """
    :param level: the lowest level that counts
    :return: the messages, as they come
    """
    messages: list[str] = []
    sink = logger.add(
        lambda message: messages.append(message.record["message"]), level=level
    )
    try:
        yield messages
    finally:
        logger.remove(sink)
