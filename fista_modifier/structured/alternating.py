"""
Recovery of a pruned MLP as a whole: SPAP's alternating minimisation.

SPAP's abstract (Hu & Yuan 2025) has an alternating minimisation over the parts that the
MLP splits into. The steps here are ours. With the kept channels only, and a = act(gate
of x), the output of the MLP is D ((U x) ∘ a) + c. It is linear in D and c given U, and
linear in U given D, c and a. So each of the two steps is a least squares fit to the
dense MLP's output y:

    min over D, c  Σ ‖D ((U x) ∘ a) + c − y‖² + δ ‖D − D₀‖²    by a Gram matrix,
    min over U     Σ ‖D ((U x) ∘ a) + c − y‖² + δ ‖U − U₀‖²    by conjugate gradients.

D₀ and U₀ are the weights before the step, so no step can raise the error. c is a change
of the last operator's bias, and zero if it has none. Where U has a bias, the last
feature of x is 1. The gate itself stays. An MLP whose activation is applied to U x, as
in OPT, has no such U step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fista_modifier.solver.drift import inner
from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.precision import matmul_precision
from fista_modifier.structured.means import FeatureMeans
from fista_modifier.structured.problem import damped_quadratic
from fista_modifier.structured.restoration import DAMPENING, Restored, least_squares

__all__ = [
    "AlternatedMLP",
    "Alternation",
    "MLPBatch",
    "down_given_up",
    "mlp_error",
    "up_given_down",
]

RIDGE = 1e-3
"""
The damping of the step for U, as a share of a typical diagonal entry. It is small,
because conjugate gradients that end early damp as well.
"""

Sum = Callable[[Tensor], object]
"""A function that replaces a tensor by its sum over all processes that have tokens."""


def _alone(_tensor: Tensor) -> None:
    """Do nothing: a tensor is its own sum over one process."""


class MLPBatch(NamedTuple):
    """
    Tokens of an MLP with c kept channels, of any floating dtype, where the weights are.

    :param inputs: xᵀ, tokens×d
    :param activations: aᵀ = act(gate of x)ᵀ, tokens×c; None is 1, for an MLP without a
        gate
    :param outputs: yᵀ of the dense MLP less the biases of its last operator, tokens×m
    """

    inputs: Tensor
    activations: Tensor | None
    outputs: Tensor

    def gated(self, hidden: Tensor) -> Tensor:
        """
        Multiply hidden features by the activations of the gate.

        :param hidden: tokens×c
        :return: ``hidden`` ∘ aᵀ, tokens×c
        """
        if self.activations is None:
            return hidden
        return hidden * self.activations.float()

    def hidden(self, up: Tensor) -> Tensor:
        """
        Return the input of the last operator.

        :param up: U, float32 c×d
        :return: ((U x) ∘ a)ᵀ, tokens×c
        """
        return self.gated(self.inputs.float() @ up.T)


@dataclass(frozen=True, eq=False)
class AlternatedMLP:
    """
    The weights that alternating minimisation found.

    :param up: U, float32 c×d
    :param down: D, float32 m×c
    :param errors: ‖D ((U x) ∘ a) + c − y‖_F over all tokens: of the weights at the
        start, and after each half of each round
    :param bias: c, float32 m; None is zero
    """

    up: Tensor
    down: Tensor
    errors: list[float]
    bias: Tensor | None = None


@dataclass(frozen=True)
class Alternation:
    """
    Alternating minimisation, which solves for D and for U in turn.

    :param rounds: how often each of them is solved for
    :param dampening_frac: δ of the step for D, as a fraction of the features' typical
        power
    :param iterations: conjugate gradient steps of each step for U
    """

    rounds: int = 2
    dampening_frac: float = DAMPENING
    iterations: int = 20

    def __call__(
        self,
        batches: Iterable[MLPBatch],
        up: Tensor,
        down: Tensor,
        bias: Tensor | None = None,
        total: Sum = _alone,
    ) -> AlternatedMLP:
        """
        Alternate over D and U.

        :param batches: the tokens, gone through many times
        :param up: U of the kept channels, c×d
        :param down: D of the kept channels, m×c
        :param bias: c, m; None if it has to be zero
        :param total: sums over all processes that have tokens
        :return: the weights of the last round
        """
        up, down = up.float(), down.float()
        errors = [mlp_error(batches, up, down, bias, total)]
        for _ in range(self.rounds):
            down, bias = down_given_up(
                batches,
                up,
                down,
                self.dampening_frac,
                total,
                intercept=bias is not None,
            )
            errors.append(mlp_error(batches, up, down, bias, total))
            up = up_given_down(
                batches, up, down, bias, total, iterations=self.iterations
            )
            errors.append(mlp_error(batches, up, down, bias, total))
        return AlternatedMLP(up, down, errors, bias)


def mlp_error(
    batches: Iterable[MLPBatch],
    up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    total: Sum = _alone,
) -> float:
    """
    Return the output error of a pruned MLP.

    :param batches: the tokens
    :param up: U, float32 c×d
    :param down: D, float32 m×c
    :param bias: c, m; None is zero
    :param total: sums over all processes that have tokens
    :return: ‖D ((U x) ∘ a) + c − y‖_F over all tokens
    """
    residuals = (residual(batch, up, down, bias) for batch in batches)
    square = torch.tensor(
        sum(inner(part, part) for part in residuals), dtype=torch.float64
    )
    total(square)
    return math.sqrt(float(square))


def residual(
    batch: MLPBatch, up: Tensor, down: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return (y − D ((U x) ∘ a) − c)ᵀ of one batch, tokens×m."""
    found = batch.outputs.float() - batch.hidden(up) @ down.T
    return found if bias is None else found - bias


def down_given_up(
    batches: Iterable[MLPBatch],
    up: Tensor,
    down: Tensor,
    dampening_frac: float = DAMPENING,
    total: Sum = _alone,
    *,
    intercept: bool = False,
) -> Restored:
    """
    Solve for D, and for c if there is one, given U.

    :param batches: the tokens
    :param up: U, float32 c×d
    :param down: D₀, float32 m×c
    :param dampening_frac: δ, as a fraction of the hidden features' typical power
    :param total: sums over all processes that have tokens
    :param intercept: whether c may be other than zero
    :return: the damped least squares D, m×c, and the c that goes with it
    """
    # What the statistics call drift is the error of D₀, whatever the shape of D is.
    gram = down.new_zeros(down.shape[1], down.shape[1])
    statistics = GramStatistics(gram, weight=down)
    for batch in batches:
        statistics.accumulate(batch.hidden(up), outputs=batch.outputs)
    tokens = torch.tensor(statistics.tokens)
    for one in [tokens, *statistics.sums()]:
        total(one)
    statistics.tokens = int(tokens)
    columns = torch.arange(down.shape[1], device=down.device)
    if not intercept:
        objective = LayerObjective(down, damped_quadratic(statistics, dampening_frac))
        return Restored(least_squares(objective, columns), None)
    means = FeatureMeans.of(statistics, down)
    centred = means.centred(down, statistics)
    quadratic = damped_quadratic(centred, dampening_frac, statistics)
    objective = LayerObjective(down, quadratic)
    weight = least_squares(objective, columns)
    return Restored(weight, means.best_bias(down, weight))


def up_given_down(
    batches: Iterable[MLPBatch],
    up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    total: Sum = _alone,
    *,
    dampening_frac: float = RIDGE,
    iterations: int = 20,
    tolerance: float = 1e-6,
) -> Tensor:
    """
    Solve for U given D, by conjugate gradients with a Jacobi preconditioner. A step
    costs as much as a forward and a backward pass of the batches. No matrix larger than
    U is made. The factors of the steps' products are rounded to bfloat16 (on a GPU to
    TensorFloat-32) where that is faster. On 8192 tokens of a random MLP, rounding to
    bfloat16 changes the error after two rounds by less than a millionth of it.

    :param batches: the tokens
    :param up: U₀, float32 c×d
    :param down: D, float32 m×c
    :param bias: c, m; None is zero
    :param total: sums over all processes that have tokens
    :param dampening_frac: δ, as a fraction of the typical diagonal entry of the normal
        equations' matrix
    :param iterations: steps at most
    :param tolerance: the steps end where the preconditioned norm of the gradient is
        below this share of what it was
    :return: U, c×d, with an error not above that of U₀
    """
    diagonal = _diagonal(batches, up, down)
    total(diagonal)
    positive = diagonal[diagonal > 0].double()
    if not len(positive):
        return up
    ridge = dampening_frac * float(positive.log().mean().exp())
    inverse = torch.where(diagonal > 0, 1 / (diagonal + ridge), 0)
    gradient = torch.zeros_like(up)
    for batch in batches:
        gradient += _adjoint(batch, residual(batch, up, down, bias), down)
    total(gradient)
    change = torch.zeros_like(up)
    direction = gradient * inverse
    power = first = inner(gradient, direction)
    for _ in range(iterations):
        if power <= tolerance**2 * first:
            break
        curved = torch.zeros_like(up)
        for batch in batches:
            with matmul_precision("bf16"):
                curved += _adjoint(batch, batch.hidden(direction) @ down.T, down)
        total(curved)
        curved.add_(direction, alpha=ridge)
        length = power / inner(direction, curved)
        change.add_(direction, alpha=length)
        gradient.sub_(curved, alpha=length)
        scaled = gradient * inverse
        previous, power = power, inner(gradient, scaled)
        direction.mul_(power / previous).add_(scaled)
    return up + change


def _adjoint(batch: MLPBatch, outputs: Tensor, down: Tensor) -> Tensor:
    """
    Apply the transpose of U ↦ D ((U x) ∘ a) to outputs, and return the result, c×d.
    """
    return batch.gated(outputs @ down).T @ batch.inputs.float()


def _diagonal(batches: Iterable[MLPBatch], up: Tensor, down: Tensor) -> Tensor:
    """Return the diagonal of the normal equations, c×d: ‖D_i‖² Σ a_i² x_j²."""
    total = torch.zeros_like(up)
    for batch in batches:
        squares = batch.inputs.float().square()
        ones = up.new_ones(len(squares), up.shape[0])
        total += batch.gated(batch.gated(ones)).T @ squares
    return total * down.square().sum(0)[:, None]
