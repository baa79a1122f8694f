"""What a report calls a smaller weight, which nothing can be pruned to."""

from __future__ import annotations

import pytest
import torch

from fista_modifier.solver.patterns import pattern_of, reported_pattern
from fista_modifier.structured.patterns import Smaller


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_size_is_read_from_a_report_and_not_from_a_recipe(side) -> None:
    size = Smaller(3, 5, side)
    assert reported_pattern(str(size)) == size
    with pytest.raises(ValueError, match="a pattern is n:m"):
        pattern_of(str(size))


def test_a_size_holds_for_weights_of_it() -> None:
    assert Smaller(3, 5, "columns").holds(torch.ones(5, 3))
    assert not Smaller(3, 5, "rows").holds(torch.ones(5, 3))
