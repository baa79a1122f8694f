"""Every family: exact pattern, all data used, true errors, reload, verification."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from zoo import CASES, TABLE, Pruned, Specimen, refusal

from fista_modifier.checkpoint.verification import verify
from fista_modifier.models.experts import linearize

WORKING = [name for name, case in CASES.items() if "refused" not in case]
NUMBERED = r"(.*?\.\d+\.)"
REFUSED = [name for name in CASES if name not in WORKING]


def oriented(model: PreTrainedModel, name: str) -> Tensor:
    """The weight of an operator, out×in."""
    module = model.get_submodule(name)
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def inputs_of(
    model: PreTrainedModel, names: list[str], batches: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What operators are given in plain runs of the model, each tokens×n."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items() if inputs}


def check_pattern(pruned: Pruned) -> None:
    for result in pruned.modifier.results:
        weight = oriented(pruned.model, result.name)
        groups = weight.reshape(weight.shape[0], -1, 4)
        assert int((groups != 0).sum(-1).max()) <= 2, result.name
        assert int((weight == 0).sum()) == result.zeros, result.name


def check_tokens(pruned: Pruned) -> None:
    """Somewhere all of them arrive, and only experts are given a choice of them."""
    tokens = pruned.specimen.tokens
    if tokens is not None:
        assert tokens in {result.tokens for result in pruned.modifier.results}


def check_errors(pruned: Pruned) -> None:
    """
    By plain runs of the dense model, and of one in which those operators are pruned
    that X* follows: all that were pruned before in the layer or, in a block that routes
    its tokens, in the block. An operator that is called again later is left out. Where
    channels have changed places, so have rows of what makes them.
    """
    specimen, results = pruned.specimen, pruned.modifier.results
    dense = specimen.load()
    linearize(dense)
    layers = Layers(dense, specimen.case.get("layers", NUMBERED))
    routing = {
        layers.block_of(f"{name}.0")
        for name, module in dense.named_modules()
        if isinstance(module, LinearExperts2D)
        or type(module).__name__ == "SwitchTransformersExperts"
    }
    batches = specimen.together
    inputs = inputs_of(dense, [result.name for result in results], batches)
    compared = 0
    for index, result in enumerate(results):
        if not 0 < result.tokens <= (specimen.tokens or 0):
            continue
        block = layers.block_of(result.name)
        part = layers.block_of if block in routing else layers.layer_of
        before = [
            other.name
            for other in results[:index]
            if part(other.name) == part(result.name) is not None
        ]
        x = inputs[result.name]
        with weights_of(pruned.model, dense, before):
            x_star = inputs_of(dense, [result.name], batches)[result.name]
        assert len(x) == result.tokens, result.name
        weight = oriented(dense, result.name)
        pruned_weight = oriented(pruned.model, result.name)
        outputs, sparse = x @ weight.T, x_star @ pruned_weight.T
        expected = pytest.approx(relative_error(outputs, sparse), rel=1e-3, abs=1e-5)
        if (
            pruned.modifier.permute_channels is None
            and result.relative_error != expected
        ):
            outputs = outputs[:, rows_in_order(weight, pruned_weight)]
            error = relative_error(outputs, sparse)
            expected = pytest.approx(error, rel=1e-3, abs=1e-5)
        assert result.relative_error == expected, result.name
        compared += 1
    assert compared or specimen.tokens is None


def relative_error(outputs: Tensor, found: Tensor) -> float:
    """In one family, an operator is given zeros alone."""
    size = outputs.norm()
    return float((found - outputs).norm() / size) if size else 0.0


def rows_in_order(dense: Tensor, pruned: Tensor) -> Tensor:
    """The dense row that each pruned row was made of: the one most like it"""
    likeness = normalize(pruned) @ normalize(dense).T
    return torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])


@contextmanager
def weights_of(
    source: PreTrainedModel, target: PreTrainedModel, names: list[str]
) -> Iterator[None]:
    """Give one model the weights and biases of another, for a while."""
    pairs = [
        (to.data, of.data)
        for name in names
        for to, of in zip(
            target.get_submodule(name).parameters(),
            source.get_submodule(name).parameters(),
            strict=True,
        )
    ]
    own = [to.clone() for to, _ in pairs]
    for to, of in pairs:
        to.copy_(of)
    yield
    for (to, _), value in zip(pairs, own, strict=True):
        to.copy_(value)


class Layers:
    """
    Of a model, by the names of their operators: what transformers says is not to be
    split or, where it says nothing, what has a number. "layers" in an entry says what
    has one, for a family of which transformers names a part of the layers.
    """

    def __init__(self, model: PreTrainedModel, numbered: str) -> None:
        self._numbered = numbered
        classes = set(model._no_split_modules or [])
        self._names = [
            f"{name}."
            for name, module in model.named_modules()
            if type(module).__name__ in classes
        ]
        self._lists = {
            name
            for name, module in model.named_modules()
            if type(module) is torch.nn.ModuleList
        }

    def layer_of(self, name: str) -> str | None:
        around = [layer for layer in self._names if name.startswith(layer)]
        if around or (self._names and self._numbered == NUMBERED):
            return around[0] if around else None
        numbered = re.match(self._numbered, name)
        return numbered[1] if numbered else None

    def block_of(self, name: str) -> str | None:
        """A part of the layer, such as its MLP, or an entry of a list of parts"""
        layer = self.layer_of(name)
        if layer is None:
            return None
        child, _, rest = name.removeprefix(layer).partition(".")
        if layer + child in self._lists:
            child += "." + rest.partition(".")[0]
        return layer + child


def check_checkpoint(pruned: Pruned, folder: Path) -> None:
    specimen = pruned.specimen
    pruned.model.save_pretrained(folder)
    reloaded = specimen.load(folder)
    with torch.no_grad():
        expected = first(pruned.model(**specimen.batches[0]))
        found = first(reloaded(**specimen.batches[0]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    verification = verify(folder)
    assert not verification.problems and not verification.failures


def first(output: object) -> Tensor:
    """Logits, or hidden states."""
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits  # type: ignore[index]


@pytest.mark.parametrize("name", WORKING)
def test_a_family(name: str, tmp_path: Path) -> None:
    pruned = Specimen(name).pruned(preset="fast")
    check_pattern(pruned)
    check_tokens(pruned)
    check_errors(pruned)
    check_checkpoint(pruned, tmp_path)
    assert pruned.row in TABLE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    "name", ["bert", "falcon", "gpt2", "gpt_oss", "llava", "mixtral", "phi3", "t5_s2s"]
)
def test_a_family_whose_channels_keep_their_places(name: str, tmp_path: Path) -> None:
    pruned = Specimen(name).pruned(preset="fast", permute_channels=False)
    check_pattern(pruned)
    check_tokens(pruned)
    check_errors(pruned)
    check_checkpoint(pruned, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_refused(name: str) -> None:
    case = CASES[name]
    with pytest.raises(Exception, match=case["refused"]["match"]):
        Specimen(name).pruned(preset="fast")
    assert refusal(name) in TABLE.read_text(encoding="utf-8").splitlines()


def test_there_are_enough() -> None:
    assert len(CASES) >= 120
