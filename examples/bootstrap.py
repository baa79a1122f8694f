#!/usr/bin/env python3
"""Install the project into .venv and run its demo or its tests there.

    python3 examples/bootstrap.py demo [ARGUMENTS OF THE DEMO]
    python3 examples/bootstrap.py test [ARGUMENTS OF PYTEST]

It needs Python 3.10 or newer and nothing else. Everything it installs is in .venv; to
start anew, delete that folder. Without an NVIDIA or AMD GPU it installs a CPU build of
torch, which spares gigabytes of GPU libraries.
"""

from __future__ import annotations  # so that an old Python reaches its message

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0"

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed.json"

EXTRAS = {"demo": ["demo"], "test": ["demo", "test"]}
MODULES = {
    "demo": ["fista_modifier.cli", "demo"],
    "test": ["pytest", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"],
}
GPU_LIBRARY = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b")

Report = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Install what is missing, then run the command.

    :param arguments: ``demo`` or ``test`` and the arguments to pass on.
    :return: the exit status of the command.
    """
    if sys.version_info < (3, 10):  # noqa: UP036
        return fail(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    if not arguments or arguments[0] not in MODULES:
        return fail((__doc__ or "").strip())
    command, *rest = arguments
    try:
        install(EXTRAS[command])
    except subprocess.CalledProcessError as error:
        return fail(
            f"bootstrap: failed with status {error.returncode}: {join(error.cmd)}\n"
            f"bootstrap: if {VENV} is broken, delete it and run again"
        )
    return subprocess.run([PYTHON, "-m", *MODULES[command], *rest], cwd=ROOT).returncode


def install(extras: list[str]) -> None:
    """Install torch and the project with its extras, unless that is done already.

    :param extras: the project's optional dependencies that are needed.
    :raises CalledProcessError: if a step fails.
    """
    wanted = stamp((ROOT / "pyproject.toml").read_bytes(), extras)
    if STAMP.is_file() and covers(STAMP.read_text(), wanted):
        return
    if not succeeds([PYTHON, "-m", "pip", "--version"]):
        say(f"creating {VENV}")
        run([sys.executable, "-m", "venv", "--upgrade-deps", VENV])
    STAMP.unlink(missing_ok=True)  # an interrupted install must not look finished
    install_torch()
    say(f"installing the project with [{','.join(extras)}]")
    pip("install", "--quiet", "--editable", f".[{','.join(extras)}]")
    STAMP.write_text(wanted)


def stamp(pyproject: bytes, extras: list[str]) -> str:
    """Describe an installation: what it was made from, and its extras."""
    digest = hashlib.sha256(pyproject + TORCH.encode()).hexdigest()
    return json.dumps({"source": digest, "extras": extras})


def covers(installed: str, wanted: str) -> bool:
    """Say whether one stamp is of the same project with all the extras of another."""
    try:
        old, new = json.loads(installed), json.loads(wanted)
        return old["source"] == new["source"] and {*new["extras"]} <= {*old["extras"]}
    except (ValueError, KeyError, TypeError):
        return False


def install_torch() -> None:
    """Install the build of torch that suits the machine, unless one is installed.

    :raises CalledProcessError: if no way works.
    """
    version = TORCH.partition("==")[2]
    same = f"import torch; assert torch.__version__.split('+')[0] == '{version}'"
    if succeeds([PYTHON, "-c", same]):
        return
    backend = choose_backend(gpu_vendor(), pip_offers_cpu_build)
    if backend is None:
        say(f"installing {TORCH}")
        pip("install", "--quiet", TORCH)
        return
    # uv knows where the builds for each kind of machine are.
    say(f"installing {TORCH} for {backend}, by uv")
    try:
        pip("install", "--quiet", "uv")
        uv = [PYTHON, "-m", "uv", "pip", "install", "--quiet", "--python", PYTHON]
        run([*uv, "--torch-backend", backend, TORCH])
    except subprocess.CalledProcessError:
        say(f"could not find a build of {TORCH} that suits this machine ({backend});")
        say(f"install one yourself: {PYTHON} -m pip install ..., then run again")
        raise


def choose_backend(vendor: str | None, cpu_by_pip: Callable[[], bool]) -> str | None:
    """Choose the build of torch.

    :param vendor: the vendor of the GPU: ``"nvidia"``, ``"amd"`` or ``None``.
    :param cpu_by_pip: tells whether pip by itself would install a build without GPU
        libraries; it is called only if that matters.
    :return: uv's name of the build, or ``None`` to leave the choice to pip.
    """
    if vendor == "nvidia":
        return None
    if vendor == "amd":
        return "auto"
    return None if cpu_by_pip() else "cpu"


def gpu_vendor() -> str | None:
    """Return the vendor of a GPU that torch has builds for, or ``None``."""
    if succeeds(["nvidia-smi", "--list-gpus"]):
        return "nvidia"
    return "amd" if Path("/dev/kfd").exists() else None


def pip_offers_cpu_build() -> bool:
    """Ask pip whether it would install a CPU build, from the metadata alone."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        dry_run = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
        try:
            pip("install", *dry_run, "--report", str(report), TORCH)
        except subprocess.CalledProcessError:
            return False
        content = json.loads(report.read_text(encoding="utf-8"))
    return is_cpu_build(content, platform.system())


def is_cpu_build(report: Report, system: str) -> bool:
    """Say whether a build of torch is for the CPU and needs no GPU libraries.

    The builds of one version share a list of requirements, in which the GPU libraries
    are marked as for Linux.

    :param report: pip's installation report, of torch alone.
    :param system: ``platform.system()``.
    :return: whether the build is for the CPU.
    """
    (torch,) = report["install"]
    requirements = torch["metadata"].get("requires_dist", [])
    return system != "Linux" or not any(map(GPU_LIBRARY.match, requirements))


def pip(*arguments: str) -> None:
    run([PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments])


def run(command: list[Any]) -> None:
    subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)


def succeeds(command: list[Any]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def join(command: list[Any]) -> str:
    return " ".join(map(str, command))


def say(message: str) -> None:
    print(f"bootstrap: {message}", flush=True)


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
