"""
The processes of a distributed run. They are forked from a server that has imported
everything, because imports would take longer than most of these runs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
TIMEOUT = 180
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["rank_main"])


@dataclass
class Rank:
    """
    :param process: the process
    :param log: the file of what it prints
    """

    process: ForkServerProcess
    log: Path

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


def start(
    size: int, output: Path, family: str, fields: dict[str, Any], dies: str = ""
) -> list[Rank]:
    """The ranks of a run; the arguments are those of ``rank_main.main``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for number in range(size):
        descriptor, log = tempfile.mkstemp(suffix=".log")
        os.close(descriptor)
        environment = {
            "RANK": str(number),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        arguments = (str(output), family, json.dumps(fields), dies)
        process = CONTEXT.Process(target=_rank, args=(log, environment, arguments))
        with pytest.MonkeyPatch.context() as patch:
            # the server looks for what it is to import there, and not in sys.path
            patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
            process.start()
        ranks.append(Rank(process, Path(log)))
    return ranks


def outputs(ranks: list[Rank]) -> list[str]:
    """What the ranks printed, once all have ended."""
    for rank in ranks:
        rank.process.join(TIMEOUT)
    late = [rank.process for rank in ranks if rank.returncode is None]
    for process in late:
        process.kill()
        process.join()
    texts = [rank.log.read_text() for rank in ranks]
    for rank in ranks:
        rank.log.unlink()
    assert not late, texts
    return texts


def _rank(log: str, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ.update(environment)

    from rank_main import main

    main(*arguments)
