"""Errors are told with their causes, and bugs as such."""

from __future__ import annotations

from typing import Any

import pytest

from fista_modifier import FASPPruningModifier
from fista_modifier.cli.errors import describe


def raised(*errors: BaseException, explicit: bool = True) -> BaseException:
    """The last error, raised while the others were handled."""
    cause = None
    for error in errors:
        if explicit:
            error.__cause__ = cause
        else:
            error.__context__ = cause
        cause = error
    return errors[-1]


@pytest.mark.parametrize("explicit", [True, False])
def test_the_cause_is_told(explicit: bool) -> None:
    error = raised(
        IndexError("index out of range"), RuntimeError("layer 3"), explicit=explicit
    )
    assert describe(error) == "layer 3 (caused by: IndexError: index out of range)"


def test_what_was_said_is_not_said_again() -> None:
    error = raised(ValueError("a is bad"), ValueError("file: a is bad"))
    assert describe(error) == "file: a is bad"
    assert describe(raised(KeyError("x"), OSError("y"), OSError("y"))) == (
        "y (caused by: KeyError: 'x')"
    )


def test_the_source_of_a_failed_forward_pass_is_not_shown() -> None:
    source = "--- <Autowrapped LlamaModel 140>:23 ---\n> x = 1\n\n\nout of range"
    error = raised(IndexError("out of range"), RuntimeError(source))
    assert describe(error) == (
        "LlamaModel could not be run on the calibration data "
        "(caused by: IndexError: out of range)"
    )


def test_a_cause_is_one_line() -> None:
    error = raised(OSError("no such id\nsee https://…"), ValueError("no model"))
    assert describe(error) == "no model (caused by: no such id)"
    error = raised(OSError("no such id\nsee …"), ValueError("no model (no such id)"))
    assert describe(error) == "no model (no such id)"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.5}, "sparsity: Input should be less than 1, not 1.5"),
        (
            {"sparsity": 0.2, "structures": ["mlp", "mlp"]},
            "structures: ['mlp', 'mlp'] names one of them twice: name each once",
        ),
    ],
    ids=str,
)
def test_fields_are_told_without_the_library_that_checks_them(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        FASPPruningModifier(**fields)
    assert describe(caught.value) == message


def test_a_hidden_context_stays_hidden() -> None:
    error = ValueError("outer")
    error.__context__ = KeyError("inner")
    error.__suppress_context__ = True
    assert describe(error) == "outer"


def test_a_circle_of_causes_ends() -> None:
    error = ValueError("x")
    error.__cause__ = error
    assert describe(error) == "x"


def test_a_bug_is_told_with_its_type_and_where_to_look() -> None:
    text = describe(KeyError("q_proj"))
    assert text.startswith("unexpected KeyError: 'q_proj'\n")
    assert "LLM_COMPRESSOR_LOG_LEVEL=DEBUG" in text


def test_an_error_without_a_message_has_a_name() -> None:
    assert describe(RuntimeError()) == "RuntimeError"
