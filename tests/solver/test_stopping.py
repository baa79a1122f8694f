from collections.abc import Callable

import pytest
import torch
from problems import gram_statistics, inputs, normal
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fista_modifier.solver import NofM, SparsityPattern, Unstructured
from fista_modifier.solver.admm import ADMM
from fista_modifier.solver.fista import fista
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.solver.stopping import INTERVAL, ended
from fista_modifier.solver.support import refit_
from fista_modifier.solver.tuning import lambda_unit

TOKENS, FEATURES, ROWS = 96, 24, 6


@pytest.fixture
def objective() -> LayerObjective:
    statistics = gram_statistics(inputs(TOKENS, FEATURES))
    return LayerObjective(normal(ROWS, FEATURES), Quadratic(statistics))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step looks, as on an accelerator between two looks."""
    for module in ("fista", "support"):
        monkeypatch.setattr(f"fista_modifier.solver.{module}.ended", lambda *_: False)


def run_fista(objective: LayerObjective, steps: int) -> Tensor:
    penalty = 0.1 * lambda_unit(objective)
    return fista(objective, penalty, objective.weight, steps, 1e-3).weight


def run_refit(objective: LayerObjective, steps: int) -> Tensor:
    free = objective.weight.abs() > 0.7
    tolerance = 1e-3 * objective.error(objective.weight * free) ** 2
    start = objective.weight * free
    return refit_(objective, start.clone(), free, iterations=steps, tolerance=tolerance)


def run_admm(pattern: SparsityPattern) -> Callable[[LayerObjective, int], Tensor]:
    return lambda objective, steps: ADMM(objective.quadratic, steps)(objective, pattern)


class Reads(TorchDispatchMode):
    """Counts the numbers that Python reads from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("run", [run_fista, run_refit])
def test_steps_behind_the_end_change_nothing(objective, run, request):
    looking = run(objective, 10**7)  # would take minutes if it did not stop
    assert not torch.equal(looking, run(objective, 2))
    request.getfixturevalue("blind")
    assert torch.equal(run(objective, 1000), looking)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize(
    "run",
    [run_fista, run_refit, run_admm(NofM(2, 4)), run_admm(Unstructured(0.5))],
    ids=["fista", "refit", "admm-2:4", "admm-50%"],
)
def test_a_step_reads_nothing_from_the_device(objective, run):
    run(objective, 1)  # what the objective keeps is there
    counts = []
    for steps in (2, 9):
        with Reads() as reads:
            run(objective, steps)
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_a_cpu_looks_at_every_step():
    assert ended(torch.tensor(True), 1)
    assert not ended(torch.tensor(False), INTERVAL)


def test_an_accelerator_looks_at_some_steps():
    """To read a fake tensor is an error."""
    with FakeTensorMode():
        done = torch.tensor(True, device="cuda")
        for step in range(1, INTERVAL):
            assert not ended(done, step)
        with pytest.raises(DataDependentOutputException):
            ended(done, INTERVAL)
