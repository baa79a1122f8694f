import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "examples" / "bootstrap.py"
spec = importlib.util.spec_from_file_location("bootstrap", PATH)
bootstrap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bootstrap)


def report(*requirements):
    """What pip reports for torch alone; `metadata` lacks an empty list."""
    metadata = {"requires_dist": list(requirements)} if requirements else {}
    return {"install": [{"metadata": metadata}]}


@pytest.mark.parametrize(
    "requirement",
    [
        'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"',
        'cuda-bindings<14,>=13.0.3; platform_system == "Linux"',
        'triton==3.7.0; platform_system == "Linux"',
    ],
)
def test_a_gpu_library_means_a_gpu_build_on_linux_only(requirement):
    gpu = report("sympy>=1.13.3", requirement)
    assert not bootstrap.is_cpu_build(gpu, "Linux")
    assert bootstrap.is_cpu_build(gpu, "Darwin")
    assert bootstrap.is_cpu_build(gpu, "Windows")


@pytest.mark.parametrize("requirements", [[], ["sympy>=1.13.3", "networkx>=2.5.1"]])
def test_no_gpu_library_means_a_cpu_build(requirements):
    assert bootstrap.is_cpu_build(report(*requirements), "Linux")


@pytest.mark.parametrize("cpu_by_pip, backend", [(True, None), (False, "cpu")])
def test_without_a_gpu_only_a_cpu_build_is_taken(cpu_by_pip, backend):
    assert bootstrap.choose_backend(None, lambda: cpu_by_pip) == backend


@pytest.mark.parametrize("vendor, backend", [("nvidia", None), ("amd", "auto")])
def test_with_a_gpu_pip_is_not_asked(vendor, backend):
    def asked():
        pytest.fail("pip was asked")

    assert bootstrap.choose_backend(vendor, asked) == backend


def test_a_stamp_covers_the_same_project_with_fewer_extras():
    demo = bootstrap.stamp(b"[project]", ["demo"])
    both = bootstrap.stamp(b"[project]", ["demo", "test"])
    changed = bootstrap.stamp(b"[project] ", ["demo"])
    assert bootstrap.covers(demo, demo)
    assert bootstrap.covers(both, demo)
    assert not bootstrap.covers(demo, both)
    assert not bootstrap.covers(changed, demo)


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"source": 1}'])
def test_a_broken_stamp_covers_nothing(broken):
    assert not bootstrap.covers(broken, bootstrap.stamp(b"[project]", ["demo"]))


@pytest.mark.parametrize("arguments", [[], ["deploy"]])
def test_an_unknown_command_shows_the_usage(arguments, capsys):
    assert bootstrap.main(arguments) == 2
    assert "bootstrap.py demo" in capsys.readouterr().err
