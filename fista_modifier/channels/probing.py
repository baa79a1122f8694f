"""Runs of a layer whose operators return chosen values, to see what reads them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, count, islice
from math import comb
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import context as moe
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.models.operators import Operator

__all__ = ["Codes", "Probe", "shortened"]

LINEAR = (-4096.0, 1 / 64)
"""
The factors by which constants are multiplied to see whether a value is linear in them.
They are powers of two, so that products are exact. One is large and negative and one is
small, so that an activation or a clamp does not let both pass unchanged.
"""
TOKENS = 3
"""
The most tokens that a probe runs with. A few are enough, because the same channels
reach each other in all tokens.
"""


class Codes:
    """
    A code of bits for each of n things. No code contains another (Sperner). If a value
    depends on one thing, it shows that thing's code. If it depends on several, it shows
    more bits than any code has.

    :param size: n
    """

    def __init__(self, size: int) -> None:
        self.length = next(m for m in count(1) if comb(m, (m + 1) // 2) >= size)
        chosen = combinations(range(self.length), (self.length + 1) // 2)
        # combinations() does not yield the codes in the order of their numbers
        keys = sorted(sum(1 << bit for bit in one) for one in islice(chosen, size))
        self._keys = torch.tensor(keys, dtype=torch.long)

    @property
    def bits(self) -> Tensor:
        """The codes, bool length×n: which of the n things have each bit."""
        return (self._keys >> torch.arange(self.length)[:, None]) & 1 == 1

    def decode(self, shown: Tensor) -> Tensor:
        """
        Find the things whose codes are shown.

        :param shown: bool length×…, the bits that something shows
        :return: the thing that has exactly these bits, -1 if there is none
        """
        powers = 1 << torch.arange(self.length)
        keys = (shown.long() * powers[:, None]).sum(0)
        place = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[place] == keys, place, -1)


def shortened(call: LayerCall) -> LayerCall:
    """
    Shorten a call of a layer to the first tokens of its first sequence.

    :param call: the call; only one whose input is batch×sequence×features is shortened
    :return: a call with these tokens, as far as the shapes of the arguments say which
        dimension is that of tokens
    """
    states = call.hidden_states
    if states.ndim != 3:
        return call
    batch, tokens = states.shape[:2]

    def cut(value: Tensor) -> Tensor:
        if value.ndim > 1 and value.shape[0] == batch:
            value = value[:1]
        along = [dim for dim, size in enumerate(value.shape) if size == tokens and dim]
        # a mask has tokens twice; anything else has them first and features after them
        both = along[-2:] == [value.ndim - 2, value.ndim - 1]
        for dim in along if both else along[:1]:
            value = value.narrow(dim, 0, min(tokens, TOKENS))
        return value

    args, kwargs = tree_map_only(Tensor, cut, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


@dataclass
class _Reading:
    """
    What was seen in one run of the layer.

    :param inputs: the inputs of each operator, one for each of its calls
    :param outputs: the outputs that each operator was made to return
    :param returned: tensors that the layer returned, or left in what it was given
    :param others: what else the layer computes with: parameters, buffers, arguments
    """

    inputs: dict[Operator, list[Tensor]] = field(default_factory=dict)
    outputs: dict[Operator, list[Tensor]] = field(default_factory=dict)
    returned: list[Tensor] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)


class Probe:
    """
    A layer in which operators do not multiply by their weights but return constants. So
    nothing that reaches an operator's input has passed another operator. A NaN shows
    what depends on what, because it survives all arithmetic, also a product with zero.
    A NaN in an output marks all inputs that this output reaches. A NaN in a gradient
    marks all outputs that an input depends on. No weight of an operator is read.

    The rows of all operators are one long vector, and their columns are another. Masks
    of these vectors say what is marked.

    :param call: a call of the layer; all experts of a linearised mixture get all its
        tokens
    :param operators: operators of the layer; those that it does not call are left out
    :raises Exception: whatever the layer raises if it cannot be run like this
    """

    def __init__(self, call: LayerCall, operators: Sequence[Operator]) -> None:
        self._call = call
        self.operators = list(operators)
        with torch.enable_grad():
            self._traced = self._run({}, 1.0, traced=True)
        self.operators = [one for one in operators if one in self._traced.inputs]
        shapes = [one.shape for one in self.operators]
        self.row_counts = [rows for rows, _ in shapes]
        self.column_counts = [columns for _, columns in shapes]
        self.returned = self._rows_before(self._traced.returned, None)
        """The mask of the rows that reach what the layer returns."""

    def columns_of(self, operator: Operator) -> Tensor:
        """
        Return the mask of an operator's columns.

        :param operator: one of the probe's operators
        :return: mask of its columns
        """
        return _block_mask(self.operators.index(operator), self.column_counts)

    def rows_before(self, columns: Tensor) -> Tensor:
        """
        Find the rows that some columns depend on.

        :param columns: mask of the columns
        :return: mask of the rows that at least one of these columns depends on
        """
        inputs, gradients = self._marked(columns)
        return self._rows_before(inputs, gradients)

    def others_before(self, columns: Tensor) -> dict[str, Tensor]:
        """
        Find the entries of the layer's other parameters, buffers and arguments that
        some columns depend on.

        :param columns: mask of the columns
        :return: mask of the entries of each, by its name
        """
        inputs, gradients = self._marked(columns)
        others = list(self._traced.others.values())
        with _requiring_gradients(others):
            found = _gradients(inputs, gradients, others)
        return {
            name: torch.isnan(one)
            for name, one in zip(self._traced.others, found, strict=True)
            if one is not None
        }

    def columns_behind(self, rows: Tensor) -> tuple[Tensor, bool]:
        """
        Find the columns that depend on some rows.

        :param rows: mask of the rows
        :return: mask of the columns that depend on some of these rows, and whether
            something that the layer returns does so, too
        """
        reading = self._outputs(rows, 1.0, float("nan"))
        columns = self._per_column(reading, torch.isnan)
        return columns, any(bool(one.isnan().any()) for one in reading.returned)

    def columns_left(self, rows: Tensor) -> Tensor:
        """
        Find the columns that are not zero if only some rows are zero.

        :param rows: mask of the rows
        :return: mask of the columns
        """
        return self._per_column(self._outputs(rows, 1.0, 0.0), lambda one: one != 0)

    def columns_changed(self, masks: Tensor) -> Tensor:
        """
        Find the columns that rows change if all other rows are zero. Ones then reach
        the sums that they enter, but not the products with other rows. So the values of
        attention show, and queries and keys do not.

        :param masks: several masks of rows, bool masks×rows
        :return: for each mask, the columns that change if its rows are one and all
            others zero, bool masks×columns
        """
        none = self._outputs(torch.zeros_like(masks[0]), 0.0, 1.0).inputs
        changed = []
        for mask in masks:
            reading = self._outputs(mask, 0.0, 1.0)
            reading.inputs = {
                operator: [a != b for a, b in zip(none[operator], some, strict=True)]
                for operator, some in reading.inputs.items()
            }
            changed.append(self._per_column(reading, lambda one: one))
        return torch.stack(changed)

    def columns_linear_in(self, rows: Tensor) -> Tensor:
        """
        Find the columns that are linear in some rows.

        :param rows: mask of the rows
        :return: mask of the columns that are not zero, and change by exactly the factor
            by which the constants of these rows do, while all others stay
        """
        ones = self._outputs(rows, 1.0, 1.0).inputs
        nonlinear = torch.zeros(sum(self.column_counts), dtype=torch.bool)
        for factor in LINEAR:
            reading = self._outputs(rows, 1.0, factor)
            reading.inputs = {
                operator: [
                    (a != factor * b) | (b == 0)
                    for a, b in zip(some, ones[operator], strict=True)
                ]
                for operator, some in reading.inputs.items()
            }
            nonlinear |= self._per_column(reading, lambda one: one)
        return ~nonlinear

    def _marked(self, columns: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """
        Return the inputs that have some of these columns, and gradients for them that
        are NaN in the columns.
        """
        inputs, gradients = [], []
        masks = torch.split(columns, self.column_counts)
        for operator, mask in zip(self.operators, masks, strict=True):
            if mask.any():
                for one in self._traced.inputs[operator]:
                    if one.requires_grad:
                        inputs.append(one)
                        gradients.append(_filled(one, mask, 0.0, float("nan")))
        return inputs, gradients

    def _rows_before(
        self, values: list[Tensor], gradients: list[Tensor] | None
    ) -> Tensor:
        values = [one for one in values if one.requires_grad]
        if gradients is None:
            gradients = [torch.full_like(one, float("nan")) for one in values]
        outputs = [
            (place, one)
            for place, operator in enumerate(self.operators)
            for one in self._traced.outputs[operator]
        ]
        found = _gradients(values, gradients, [one for _, one in outputs])
        masks = [torch.zeros(size, dtype=torch.bool) for size in self.row_counts]
        for (place, _), gradient in zip(outputs, found, strict=True):
            if gradient is not None:
                masks[place] |= _some(torch.isnan(gradient))
        return torch.cat(masks)

    def _outputs(self, rows: Tensor, base: float, value: float) -> _Reading:
        """
        Run the layer with one value in some rows of the outputs, and another in all
        others.
        """
        masks = dict(
            zip(self.operators, torch.split(rows, self.row_counts), strict=True)
        )
        with torch.no_grad():
            return self._run(masks, base, value)

    def _per_column(self, reading: _Reading, test: Any) -> Tensor:
        masks = []
        for operator, size in zip(self.operators, self.column_counts, strict=True):
            mask = torch.zeros(size, dtype=torch.bool)
            for one in reading.inputs.get(operator, []):
                mask |= _some(test(one))
            masks.append(mask)
        return torch.cat(masks)

    def _run(
        self,
        rows: Mapping[Operator, Tensor],
        base: float,
        value: float = 0.0,
        traced: bool = False,
    ) -> _Reading:
        reading = _Reading()
        layer = self._call.layer
        with ExitStack() as stack:
            stack.enter_context(patch_attr(moe, "_CALIBRATE_ALL_EXPERTS", True))
            for one in self.operators:
                put_out = _constant(reading, one, rows.get(one), base, value, traced)
                stack.enter_context(_forward(one.module, put_out))
            leaves, structure = tree_flatten((self._call.args, self._call.kwargs))
            if traced:
                operators = {one.module for one in self.operators}
                inside = _tensors_beside(layer, operators)
                stack.enter_context(_requiring_gradients(inside.values()))
                leaves = [_tracked_copy(one) for one in leaves]
                reading.others = inside | {
                    f"the argument {name}": one
                    for name, one in zip(self._names(), leaves, strict=True)
                    if isinstance(one, Tensor) and one.requires_grad
                }
            # a layer may write to arguments, and autograd allows that for copies only
            leaves = [one.clone() if isinstance(one, Tensor) else one for one in leaves]
            args, kwargs = tree_unflatten(leaves, structure)
            output = layer(*args, **kwargs)
        given = {id(one) for one in leaves}
        left = [one for one in tree_leaves((args, kwargs)) if id(one) not in given]
        reading.returned = [
            one
            for one in [*tree_leaves(output), *left]
            if isinstance(one, Tensor) and one.is_floating_point()
            if not self._is_attention(one)
        ]
        return reading

    def _names(self) -> list[str]:
        """
        Return, for each leaf of the call's arguments, the name of the argument it is
        in.
        """
        call = self._call
        parameters = [*inspect.signature(call.layer.forward).parameters]
        named = [*zip(parameters, call.args, strict=False), *call.kwargs.items()]
        return [name for name, value in named for _ in tree_leaves(value)]

    def _is_attention(self, value: Tensor) -> bool:
        """
        Say whether a value is attention's weights, which a layer returns only for
        inspection.
        """
        given = [self._call.hidden_states, *self._call.context]
        return value.ndim > 3 and value.shape[-1] in {one.shape[-2] for one in given}


def _constant(
    reading: _Reading,
    operator: Operator,
    mask: Tensor | None,
    base: float,
    value: float,
    traced: bool,
) -> Any:
    """Return a forward for an operator that notes its input and returns constants."""
    rows, _ = operator.shape

    def forward(states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        output = states.new_full((*states.shape[:-1], rows), base)
        if mask is not None:
            output = _filled(output, mask, base, value)
        output.requires_grad_(traced)
        if states.numel():  # an expert may be called without a token
            reading.inputs.setdefault(operator, []).append(states.clone())
            reading.outputs.setdefault(operator, []).append(output)
        # the layer may write to the output of an operator
        return output.clone()

    return forward


@contextmanager
def _forward(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    """Give one module another forward, for a while."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _tensors_beside(
    layer: torch.nn.Module, operators: Collection[Any]
) -> dict[str, Tensor]:
    """
    Return the parameters and buffers of a layer that are no operator's, by their names.
    """
    return {
        f"{prefix}.{name}".removeprefix("."): tensor
        for prefix, module in layer.named_modules()
        if module not in operators
        for name, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]
        if tensor.is_floating_point() and tensor.is_leaf
    }


@contextmanager
def _requiring_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    flags = [(one, one.requires_grad) for one in tensors]
    try:
        for one, _ in flags:
            one.requires_grad_(True)
        yield
    finally:
        for one, flag in flags:
            one.requires_grad_(flag)


def _tracked_copy(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_(True)
    return value


def _gradients(
    values: list[Tensor], gradients: list[Tensor], of: list[Tensor]
) -> list[Tensor | None]:
    if not values or not of:
        return [None] * len(of)
    return list(
        torch.autograd.grad(values, of, gradients, retain_graph=True, allow_unused=True)
    )


def _filled(like: Tensor, mask: Tensor, base: float, value: float) -> Tensor:
    """
    Return a tensor that has one value where a mask of the last dimension is True, and
    another elsewhere.
    """
    row = torch.where(mask, value, base).to(like)
    return row.expand_as(like).clone()


def _some(marked: Tensor) -> Tensor:
    """Return the mask of the channels that are marked for at least one token."""
    return marked.reshape(-1, marked.shape[-1]).any(0).cpu()


def _block_mask(place: int, counts: Sequence[int]) -> Tensor:
    """Return the mask of one operator's entries among those of all."""
    masks = [torch.zeros(size, dtype=torch.bool) for size in counts]
    masks[place].fill_(True)
    return torch.cat(masks)
