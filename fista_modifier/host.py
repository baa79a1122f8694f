"""The releases of llm-compressor that this package works with, and installed ones."""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version

from fista_modifier.version import __version__

__all__ = ["OLDEST", "TESTED", "check_host", "package_versions"]

OLDEST = "0.14"
TESTED = "0.14"


def check_host(installed: str | None = None) -> None:
    """
    Refuse an llm-compressor that is too old, and warn of one newer than was tested.

    :param installed: version of llmcompressor; that of the environment if left out
    :raises ImportError: if it is older than ``OLDEST``
    """
    host = Version(installed or version("llmcompressor"))
    if host < Version(OLDEST):
        raise ImportError(
            f"fista_modifier needs llmcompressor {OLDEST} or newer, and {host} is "
            f"installed: pip install --upgrade 'llmcompressor>={OLDEST}'"
        )
    if host.release[:2] > Version(TESTED).release[:2]:
        warnings.warn(
            f"fista_modifier was tested with llmcompressor {TESTED}, and {host} is "
            "installed. If something fails, look for a newer fista_modifier, or "
            f"pip install 'llmcompressor=={TESTED}.*'",
            stacklevel=2,
        )


def package_versions(*packages: str) -> dict[str, str]:
    """
    Return the versions of packages.

    :param packages: names of installed distributions, or the name of this package,
        which may also run from its source folder
    :return: the version of each
    :raises PackageNotFoundError: if one other than this package is not installed
    """
    own = {"fista-modifier": __version__}
    return {name: own.get(name) or version(name) for name in packages}
