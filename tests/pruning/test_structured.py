"""FASP and SPAP through ``oneshot()``: smaller models that load, and their errors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, tiny_model
from runs import run, samples
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fista_modifier import FASPPruningModifier, SPAPPruningModifier
from fista_modifier.checkpoint.verification import verify
from fista_modifier.models.experts import linearize

METHODS = {"fasp": FASPPruningModifier, "spap": SPAPPruningModifier}
WIDTHS = {"opt": "ffn_dim", "gpt2": "n_inner", "qwen3_moe": "moe_intermediate_size"}
"""where the configuration has the number of an MLP's channels"""
SIZES = {"qwen3_moe": (16, 12)}
"""of channels, dense and at a sparsity of 0.2"""
TESTED = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt2"),
    *("mixtral", "qwen3_moe"),
]
EXACT = {"restorer": "none", "reconstruction_epochs": 0}
UNTRAINED = {"preset": "paper"}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
"""of a model of which some can leave"""


def shrink(
    model: PreTrainedModel,
    method: str = "fasp",
    oneshot_arguments: dict[str, Any] | None = None,
    **fields: Any,
) -> FASPPruningModifier | SPAPPruningModifier:
    """
    :param model: pruned in place
    :param method: a key of ``METHODS``
    :param oneshot_arguments: further arguments of ``oneshot()``
    :param fields: of the modifier
    :return: the modifier, with its results
    """
    modifier = METHODS[method](**({"sparsity": 0.2, "multiple_of": 4} | fields))
    run(model, modifier, **(oneshot_arguments or {}))
    return modifier


def decoder_layers(model: PreTrainedModel, family: str) -> torch.nn.ModuleList:
    return model.get_submodule((FAMILIES | MIXTURES)[family].layers)


def size_of_layers(model: PreTrainedModel, family: str) -> int:
    return sum(one.numel() for one in decoder_layers(model, family).parameters())


def logits(model: PreTrainedModel, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(samples() if tokens is None else tokens).logits


def seen(
    model: PreTrainedModel, names: Iterable[str], tokens: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of operators in a plain run, tokens×features."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    handles = []
    for name in names:

        def hook(_: Any, args: Any, output: Tensor, name: str = name) -> None:
            inputs.setdefault(name, []).append(args[0].flatten(0, -2))
            outputs.setdefault(name, []).append(output.flatten(0, -2))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    for row in samples() if tokens is None else tokens:
        logits(model, row[None])
    for handle in handles:
        handle.remove()
    return (
        {name: torch.cat(some) for name, some in inputs.items()},
        {name: torch.cat(some) for name, some in outputs.items()},
    )


def oriented(model: PreTrainedModel, name: str) -> Tensor:
    """The weight of an operator, out×in."""
    module = model.get_submodule(name)
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def relative_errors(
    small: PreTrainedModel, dense: PreTrainedModel, family: str, names: list[str]
) -> dict[str, tuple[float, int]]:
    """
    Of each operator, and its tokens, in plain runs of the dense model and of one that
    has one layer of the small one.
    """
    _, expected = seen(dense, names)
    layers, smaller = decoder_layers(dense, family), decoder_layers(small, family)
    found = {}
    for index, own in enumerate(list(layers)):
        start = f"{(FAMILIES | MIXTURES)[family].layers}.{index}."
        here = [name for name in names if name.startswith(start)]
        layers[index] = smaller[index]
        _, outputs = seen(dense, here)
        layers[index] = own
        for name in here:
            bias = dense.get_submodule(name).bias
            without = expected[name] - (0 if bias is None else bias)
            error = (outputs[name] - expected[name]).norm() / without.norm()
            found[name] = float(error), len(without)
    return found


def layer_errors(
    small: PreTrainedModel, dense: PreTrainedModel, family: str
) -> list[float]:
    """The mean of ‖o* − o‖² / ‖o‖² over tokens, of each layer by itself"""
    layers, smaller = decoder_layers(dense, family), decoder_layers(small, family)
    errors = []
    for index, own in enumerate(list(layers)):
        outputs = []
        for layer in (own, smaller[index]):
            layers[index] = layer
            got: list[Tensor] = []
            handle = layer.register_forward_hook(
                lambda _module, _args, output, got=got: got.append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
            logits(dense)
            handle.remove()
            outputs.append(got[0])
        layers[index] = own
        before, after = outputs
        squares = (after - before).square().sum(-1) / before.square().sum(-1)
        errors.append(float(squares.mean()))
    return errors


def check_loads(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """:return: config.json"""
    model.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert reloaded.dtype == model.dtype
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-4)
    verification = verify(folder)
    assert verification.passed, (verification.problems, verification.failures)
    assert verification.operators
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("correction", ["none", "intra"])
@pytest.mark.parametrize("family", TESTED)
def test_a_family_as_published(
    family: str, correction: str, method: str, tmp_path: Path
) -> None:
    dense, small = tiny_model(family), tiny_model(family)
    linearize(dense)
    modifier = shrink(small, method, **UNTRAINED, error_correction=correction)
    before, after = size_of_layers(dense, family), size_of_layers(small, family)
    assert modifier.removed == pytest.approx(1 - after / before, rel=1e-12)
    assert modifier.removed == pytest.approx(0.2, abs=0.05)
    width, kept = SIZES.get(family, (48, 32))
    names = [result.name for result in modifier.results]
    assert names and modifier.share_of_weights > 0
    for result in modifier.results:
        assert result.shape == (32, kept)
        assert result.pattern == f"{kept} of {width} columns"
        assert result.zeros == 0
    errors = relative_errors(small, dense, family, names)
    for result in modifier.results:
        error, tokens = errors[result.name]
        assert result.tokens == tokens
        assert result.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)
    assert check_loads(small, tmp_path)[WIDTHS.get(family, "intermediate_size")] == kept
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report["removed_share"] == modifier.removed
    assert list(report["sizes"].values()) == [kept]


@pytest.mark.parametrize("family", TESTED)
def test_training_makes_no_layer_worse(family: str, tmp_path: Path) -> None:
    dense, small, untrained = (tiny_model(family) for _ in range(3))
    linearize(dense)
    modifier = shrink(small)
    shrink(untrained, reconstruction_epochs=0)
    assert len(modifier.reconstructions) == 2
    for outcome in modifier.reconstructions.values():
        assert outcome.error <= outcome.start_error
    assert any(outcome.steps for outcome in modifier.reconstructions.values())
    first = next(iter(modifier.reconstructions.values()))
    with_training, without = (
        layer_errors(one, dense, family) for one in (small, untrained)
    )
    # measured on one batch of six, and these are all of them
    if first.steps:
        assert with_training[0] < 1.1 * without[0]
    check_loads(small, tmp_path)


@pytest.mark.parametrize("family", TESTED)
def test_a_cut_layer_is_the_one_whose_channels_nobody_reads(family: str) -> None:
    dense, small = tiny_model(family), tiny_model(family)
    linearize(dense)
    modifier = shrink(small, **EXACT)
    for result in modifier.results:
        weight = oriented(dense, result.name)
        columns = oriented(small, result.name)
        # of random weights no two columns are equal
        kept = (weight[:, :, None] == columns[:, None]).all(0)
        assert int(kept.sum()) == columns.shape[1]
        assert bool(kept.any(0).all())
        weight[:, ~kept.any(1)] = 0
    torch.testing.assert_close(logits(small), logits(dense))
