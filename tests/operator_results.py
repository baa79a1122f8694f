"""What became of one operator, for tests of what is written about it."""

from __future__ import annotations

from fista_modifier.pruning.results import OperatorResult


def operator_result(name: str, zeros: int) -> OperatorResult:
    """Of a 32×32 operator at 2:4."""
    return OperatorResult(
        name=name,
        shape=(32, 32),
        pattern="2:4",
        zeros=zeros,
        relative_error=0.125,
        relative_start_error=0.2,
        penalty=0.0,
        trials=0,
        iterations=0,
        tokens=8,
        seconds=0.1,
    )
