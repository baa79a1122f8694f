"""Which products may be those of TensorFloat-32, where a device has them."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from problems import gram_statistics, inputs, normal
from torch.utils._python_dispatch import TorchDispatchMode

from fista_modifier.solver import GramStatistics
from fista_modifier.solver.admm import ADMM
from fista_modifier.solver.fista import fista
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import NofM
from fista_modifier.solver.precision import bfloat16_on_cpu, matmul_precision
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.solver.support import refit_

TOKENS, FEATURES, ROWS = 64, 16, 8
GPU, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm_.default}


class Precisions(TorchDispatchMode):
    """Notes the precision at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            self.seen.append(GPU.fp32_precision)
            assert CPU.fp32_precision == "none"
        return func(*args, **(kwargs or {}))


def precisions(run: Callable[[], object]) -> set[str]:
    with Precisions() as noted:
        run()
    assert noted.seen
    return set(noted.seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_nothing_in_tensorfloat32(dtype):
    """Its mantissa has 10 of float32's 23 bits, its exponent all eight."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    lost = values.view(torch.int32) & (2**13 - 1)
    assert bool((lost == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_sixteen_bits_may_be_fast(dtype):
    tokens = inputs(TOKENS, FEATURES).to(dtype)
    statistics = GramStatistics.empty(FEATURES)
    assert precisions(lambda: statistics.accumulate(tokens)) == {"tf32"}
    weight = normal(ROWS, FEATURES).to(dtype)
    narrow = GramStatistics.empty(FEATURES, weights=[weight])
    outputs = tokens @ weight.T
    seen = precisions(lambda: narrow.accumulate(tokens, outputs=outputs))
    assert seen == {"tf32", "none"}  # a drift of outputs is no 16-bit number


def test_all_other_sums_are_exact():
    pruned, dense = inputs(TOKENS, FEATURES), inputs(TOKENS, FEATURES, seed=3)
    statistics = GramStatistics.empty(FEATURES)
    assert precisions(lambda: statistics.accumulate(pruned)) == {"none"}
    seen = precisions(lambda: statistics.accumulate(pruned.half(), dense.half()))
    assert seen == {"tf32", "none"}  # G, and the drift's sums


def test_searches_may_be_fast_and_what_is_kept_of_them_is_exact():
    quadratic = Quadratic(gram_statistics(inputs(TOKENS, FEATURES)))
    objective = LayerObjective(normal(ROWS, FEATURES), quadratic)
    start = objective.weight
    admm = ADMM(quadratic, steps=3)
    assert precisions(lambda: objective.target) == {"none"}
    assert precisions(lambda: admm(objective, NofM(2, 4))) == {"tf32"}
    quadratic.lipschitz  # noqa: B018
    assert precisions(lambda: fista(objective, 1.0, start, 3)) == {"tf32"}
    free = start.abs() > 0.7
    assert precisions(lambda: refit_(objective, start * free, free)) == {"none"}
    assert precisions(lambda: objective.error(start * free)) == {"none"}


@pytest.mark.parametrize(
    "lowest, gpu, cpu",
    [
        ("float32", "none", "none"),
        ("tf32", "tf32", "none"),
        ("bf16", "tf32", "bf16"),
    ],
)
def test_each_device_has_its_own_and_then_again_what_it_had(lowest, gpu, cpu):
    with pytest.raises(RuntimeError, match="inside"), matmul_precision(lowest):
        assert (GPU.fp32_precision, CPU.fp32_precision) == (gpu, cpu)
        raise RuntimeError("inside")
    assert (GPU.fp32_precision, CPU.fp32_precision) == ("none", "none")


def test_a_step_multiplies_in_bfloat16_where_that_is_fast_and_rounds_nothing_else():
    weight = normal(ROWS, FEATURES).requires_grad_()
    tokens = inputs(TOKENS, FEATURES)
    for _ in range(2):  # a rounded copy must not outlive the change of the weight
        # two factors and a result have each an error of 2⁻⁹
        bound = 2**-7 * (tokens.abs() @ weight.detach().abs().T)
        exact = tokens @ weight.detach().T
        with bfloat16_on_cpu():
            outputs = tokens @ weight.T
        assert outputs.dtype in (torch.bfloat16, torch.float32)
        assert bool(((outputs.float() - exact).abs() <= bound).all())
        outputs.sum().backward()
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        weight.data.mul_(-3)
    assert (tokens @ weight.T).dtype == torch.float32


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_the_users_choice_by_torchs_older_interface_holds(chosen):
    """In a process of its own: torch does not take both interfaces back to nothing."""
    script = f"""
import torch
from fista_modifier.solver.precision import matmul_precision
torch.set_float32_matmul_precision("{chosen}")
with matmul_precision("bf16"):
    pass
with matmul_precision("tf32"):
    print(torch.backends.cuda.matmul.fp32_precision, end=" ")
    print(torch.backends.mkldnn.matmul.fp32_precision, end=" ")
print(torch.get_float32_matmul_precision())
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    cpu = {"highest": "ieee", "high": "tf32", "medium": "bf16"}[chosen]
    assert output.split("\n")[-2].split() == ["tf32", cpu, chosen]
