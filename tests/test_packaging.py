"""What is published: a wheel and a source distribution that work without the extras."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tarfile
import warnings
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import fista_modifier
import fista_modifier.solver
from fista_modifier.host import TESTED, check_host

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ["lm_eval", "matplotlib", "gguf", "mwparserfromhell", "mkdocs"]
IMPORT = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None
import fista_modifier, fista_modifier.cli
print(fista_modifier.__file__)
print(fista_modifier.__version__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "fista_modifier").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert "fista_modifier/py.typed" in sources
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_can_be_built_from(built: Path) -> None:
    [source] = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_it_imports_without_the_extras(built: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", tmp_path, wheel], check=True)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    origin, found = done.stdout.split()[-2:]
    assert Path(origin).is_relative_to(tmp_path)
    assert found == fista_modifier.__version__


def test_the_version_is_that_of_the_metadata() -> None:
    assert version("fista-modifier") == fista_modifier.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog


@pytest.mark.parametrize("module", [fista_modifier, fista_modifier.solver])
def test_the_public_names_exist_and_are_documented(module) -> None:
    assert module.__doc__
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, name


def test_an_older_host_is_refused_and_a_newer_one_warns() -> None:
    with pytest.raises(ImportError, match=r"0\.14 or newer, and 0\.13\.2"):
        check_host("0.13.2")
    with pytest.warns(UserWarning, match=r"tested with llmcompressor 0\.14, and 0\.15"):
        check_host("0.15.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_host(f"{TESTED}.9")
        check_host()


def test_it_runs_from_its_source_folder() -> None:
    """As with PYTHONPATH, where there is no distribution of the package"""
    script = (
        "import importlib.metadata as metadata\n"
        "installed = metadata.version\n"
        "def version(name):\n"
        "    if name == 'fista-modifier':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return installed(name)\n"
        "metadata.version = version\n"
        "import fista_modifier\n"
        "from fista_modifier.pruning.results import PruningReport\n"
        "report = PruningReport('a model', None, 0.0, [])\n"
        "assert report.versions['fista-modifier'] == fista_modifier.__version__\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
