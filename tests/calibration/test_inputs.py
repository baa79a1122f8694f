"""What the solver is given, against plain forward passes of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, LAYERS, SLIDING_WINDOW, tiny_model
from problems import normal
from runs import LENGTH, calibration, prune, samples, weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import fista_modifier.modifiers.base
from fista_modifier.calibration.activations import MAIN_MEMORY
from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.stream import PrunedStream
from fista_modifier.pruning.results import OperatorResult
from fista_modifier.solver import (
    FISTAPruner,
    GramStatistics,
    PrunedWeight,
    SolverOptions,
    SparsityPattern,
)

CORRECTIONS = ["none", "intra", "full"]


@dataclass
class Solver:
    """What the solver was given and returned, in the order of its calls."""

    statistics: list[GramStatistics] = field(default_factory=list)
    solutions: list[PrunedWeight] = field(default_factory=list)

    def by_name(
        self, results: list[OperatorResult]
    ) -> dict[str, tuple[GramStatistics, Tensor]]:
        assert len(results) == len(self.solutions)
        return {
            result.name: (statistics, solution.weight)
            for result, statistics, solution in zip(
                results, self.statistics, self.solutions, strict=True
            )
        }


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Solver:
    """The real solver, watched."""
    seen = Solver()

    class Watched(FISTAPruner):
        def __init__(self, statistics: GramStatistics, options: SolverOptions) -> None:
            super().__init__(statistics, options)
            self.given = copy.deepcopy(statistics)

        def prune(
            self, weights: Sequence[Tensor], patterns: Sequence[SparsityPattern]
        ) -> list[PrunedWeight]:
            solutions = super().prune(weights, patterns)
            seen.statistics += [self.given] * len(solutions)
            seen.solutions += solutions
            return solutions

    def made(options: SolverOptions, statistics: GramStatistics) -> Watched:
        return Watched(statistics, options)

    monkeypatch.setattr(SolverOptions, "__call__", made)
    return seen


def plain_inputs(
    model: PreTrainedModel, names: list[str], sequences: list[Tensor]
) -> dict[str, Tensor]:
    """The inputs of operators, tokens×n, when sequences are run one at a time."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, args: seen[name].append(args[0].flatten(0, -2))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch(name))
        for name in names
    ]
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values) for name, values in seen.items()}


def reference(
    model: PreTrainedModel,
    family: str,
    correction: str,
    pruned: dict[str, Tensor],
    sequences: list[Tensor],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """
    The two passes of section 3.1: the name of each operator, X* and X.

    :param model: the dense model
    :param pruned: the weight of each operator after pruning, out×in
    """
    prefix, stages = FAMILIES[family].layers, FAMILIES[family].stages
    partly_pruned = copy.deepcopy(model)
    for layer, stage in product(range(LAYERS), stages):
        if stage is stages[0] and correction == "intra":
            partly_pruned = copy.deepcopy(model)
        names = [f"{prefix}.{layer}.{operator}" for operator in stage]
        dense_inputs = plain_inputs(model, names, sequences)
        pruned_inputs = plain_inputs(partly_pruned, names, sequences)
        for name in names:
            yield name, pruned_inputs[name], dense_inputs[name]
        if correction != "none":
            for name in names:
                module = partly_pruned.get_submodule(name)
                is_transposed = isinstance(module, Conv1D)
                module.weight.data = pruned[name].T if is_transposed else pruned[name]


def check_inputs(
    family: str,
    solver: Solver,
    sequences: list[Tensor],
    correction: str = "intra",
    **oneshot_arguments: Any,
) -> None:
    """
    Prune a model and compare. Two ways to compute the same activations differ by some
    hundred roundings in float32, about 1e-5, and a product of two by twice that.
    """
    model = tiny_model(family)
    model.set_attn_implementation("eager")  # others leave out Gemma 2's soft caps
    modifier = prune(
        tiny_model(family),
        error_correction=correction,
        reconstruction_epochs=0,
        oneshot_arguments=oneshot_arguments,
    )
    seen = solver.by_name(modifier.results)
    assert set(seen) == FAMILIES[family].operators
    pruned = {name: weight for name, (_, weight) in seen.items()}
    names = []
    for name, x_star, x in reference(model, family, correction, pruned, sequences):
        names.append(name)
        statistics, _ = seen[name]
        x_star, drift = x_star.double(), (x_star - x).double()
        gram = x_star.T @ x_star
        tolerance = 1e-4 * float(gram.diagonal().max())

        def close(
            actual: Tensor | None, expected: Tensor, tolerance: float = tolerance
        ) -> bool:
            actual = torch.zeros_like(expected) if actual is None else actual
            return float((actual - expected).abs().max()) <= tolerance

        assert statistics.tokens == sum(map(len, sequences)), name
        assert close(statistics.gram, gram), name
        dense = model.get_submodule(name).weight.double()
        dense = dense.T if isinstance(model.get_submodule(name), Conv1D) else dense
        cross, power = torch.zeros_like(dense), 0.0
        if statistics.drift is not None:
            cross, power = statistics.drift.of(dense.float())
        rows = dense.abs().sum(1).max()
        assert close(cross, dense @ drift.T @ x_star, tolerance * rows), name
        expected = float((drift @ dense.T).square().sum())
        assert power == pytest.approx(expected, rel=1e-3, abs=tolerance), name
    assert set(names) == set(seen)


@pytest.mark.parametrize(
    "family, correction",
    [(family, "intra") for family in FAMILIES]
    + list(product(["llama", "gpt2"], ["none", "full"]))
    + [("opt", "full"), ("gemma3", "full")],
)
def test_the_solver_sees_the_inputs_of_a_plain_run(family, correction, solver):
    assert LENGTH > 2 * SLIDING_WINDOW
    check_inputs(family, solver, list(samples()), correction)


@pytest.mark.parametrize("family", ["mistral", "opt"])
def test_sequences_may_differ_in_length(family, solver):
    sequences = [sequence[: 5 + 2 * i] for i, sequence in enumerate(samples()[:4])]
    data = Dataset.from_dict(
        {
            "input_ids": [sequence.tolist() for sequence in sequences],
            "attention_mask": [[1] * len(sequence) for sequence in sequences],
        }
    )
    check_inputs(family, solver, sequences, dataset=data)


def padded(side: str, *, with_positions: bool) -> Callable[..., dict[str, Tensor]]:
    """
    A collator that pads. Rotary and OPT's positions do not need to be told of the
    padding, GPT-2's do.
    """

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(feature["input_ids"]) for feature in features)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
        for feature in features:
            real = len(feature["input_ids"])
            padding, ones = [0] * (length - real), [1] * real
            ids = feature["input_ids"]
            left = side == "left"
            batch["input_ids"].append(padding + ids if left else ids + padding)
            batch["attention_mask"].append(padding + ones if left else ones + padding)
        tensors = {name: torch.tensor(rows) for name, rows in batch.items()}
        if with_positions:
            positions = tensors["attention_mask"].cumsum(1) - 1
            tensors["position_ids"] = positions.clamp_min(0)
        return tensors

    return collate


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_reach_the_solver(family, side, solver):
    """Batches of three: of 12, 9 and 3 tokens, and of 11, 10 and 1."""
    lengths = [12, 9, 3, 11, 10, 1]
    sequences = [
        sequence[:length] for sequence, length in zip(samples(), lengths, strict=True)
    ]
    data = Dataset.from_dict(
        {
            "input_ids": [sequence.tolist() for sequence in sequences],
            "attention_mask": [[1] * length for length in lengths],
        }
    )
    check_inputs(
        family,
        solver,
        sequences,
        dataset=data,
        batch_size=3,
        data_collator=padded(side, with_positions=family == "gpt2"),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_padding_reaches_no_expert(family, side):
    """Sequences in one padded batch give the weights of sequences one by one."""
    lengths = [12, 9, 3, 11, 10, 7]
    data = Dataset.from_dict(
        {
            "input_ids": [
                sequence[:length].tolist()
                for sequence, length in zip(samples(), lengths, strict=True)
            ],
            "attention_mask": [[1] * length for length in lengths],
        }
    )
    batches = {
        "batch_size": 3,
        "data_collator": padded(side, with_positions=False),
    }
    found = {}
    for name, arguments in {"one by one": {}, "padded": batches}.items():
        model = tiny_model(family)
        modifier = prune(
            model,
            reconstruction_epochs=0,
            oneshot_arguments={"dataset": data} | arguments,
        )
        found[name] = {one.name: one for one in modifier.results}
    for name, alone in found["one by one"].items():
        together = found["padded"][name]
        assert together.tokens == alone.tokens, name
        assert together.relative_error == pytest.approx(
            alone.relative_error, rel=1e-3, abs=1e-5
        ), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_whole_batches_need_no_mask(family, solver):
    data = Dataset.from_dict({"input_ids": samples().tolist()})
    check_inputs(family, solver, list(samples()), dataset=data, batch_size=2)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_propagation_by_the_toolkit_changes_nothing(correction):
    with_it, without = tiny_model("llama"), tiny_model("llama")
    for model, propagate in [(with_it, True), (without, False)]:
        prune(
            model,
            error_correction=correction,
            oneshot_arguments={"propagate_error": propagate},
        )
    expected = weights(without)
    for name, weight in weights(with_it).items():
        assert torch.equal(weight, expected[name]), name


def test_corrections_differ():
    """So that a test that compares them with a reference can fail."""
    pruned = {}
    for correction in CORRECTIONS:
        model = tiny_model("llama")
        prune(model, error_correction=correction, reconstruction_epochs=0)
        pruned[correction] = weights(model)
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp"
    for correction in CORRECTIONS:
        assert torch.equal(pruned[correction][first], pruned["none"][first])
    last += ".down_proj.weight"
    assert not torch.equal(pruned["intra"][last], pruned["none"][last])
    assert not torch.equal(pruned["intra"][last], pruned["full"][last])


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_layer_that_the_toolkit_runs_without_mask_is_refused(family, monkeypatch):
    """llm-compressor's tracer loses these masks; the modifier mends that by default."""
    monkeypatch.setattr(
        fista_modifier.modifiers.base,
        "traced_with_masks",
        lambda _model: nullcontext(),
    )
    model = tiny_model(family)
    with pytest.raises(
        RuntimeError, match=r"model\.layers\.0 \(\w*Attention\) comp"
    ) as e:
        prune(model)
    assert "pipeline='basic'" in str(e.value)
    dense = weights(tiny_model(family))
    for name, weight in weights(model).items():
        assert torch.equal(weight, dense[name]), name


@pytest.mark.parametrize("family, fused", [("llama", True), ("gemma2", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_fused_only_where_it_is_the_same(family, fused, dtype):
    """
    transformers' fused attention leaves out Gemma 2's soft caps. They are seen even
    where attention adds little to the hidden states.
    """
    implementations = []

    def look(module: torch.nn.Module, _args: Any) -> None:
        implementations.append(module.config._attn_implementation)

    model = tiny_model(family, dtype)
    if family == "gemma2":  # whose norms multiply by 1 + weight
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.data.fill_(-0.99)
    last = model.model.layers[-1].self_attn
    last.register_forward_pre_hook(look)
    own = model.config._attn_implementation
    prune(model)
    assert model.config._attn_implementation == own
    # runs of the model itself, one of which the pipeline's are held against
    as_loaded, of_model, *of_pipeline = implementations
    assert (as_loaded, of_model) == (own, "eager")
    assert set(of_pipeline) == ({"sdpa"} if fused else {"eager"})


class Mean(torch.nn.Module):
    """Adds to each token the mean of all, or of those up to it."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.causal:
            return hidden_states + hidden_states.mean(1, keepdim=True)
        counts = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states + hidden_states.cumsum(1) / counts


@pytest.mark.parametrize("change, refused", [(1e-6, False), (1e-1, True)])
def test_the_pruned_stream_passes_from_layer_to_layer(change, refused):
    """The toolkit may compute an expert's output otherwise, and round otherwise."""
    layer, stream = Mean(causal=True), PrunedStream(MAIN_MEMORY)
    first, second = LayerInputs(layer), LayerInputs(layer)
    first.append((normal(2, 5, 4),), {})
    stream.advance(first, first, {})
    second.append((first[0].run() * (1 + change),), {})
    if refused:
        with pytest.raises(ValueError, match=r"layers\.1 is not called with the out"):
            stream.inputs_of(second, "layers.1")
    else:
        inputs = stream.inputs_of(second, "layers.1")
        assert torch.equal(inputs[0].hidden_states, first[0].run())


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_takes_little_more_than_two_passes(family):
    """Multiplications in the layers' operators, the toolkit's pass included."""
    # OPT's MLP is no module of its own; it is as wide as in the real ones
    changes = {"ffn_dim": 128} if family == "opt" else {}
    model, work, size = tiny_model(family, **changes), 0, 0
    operators = [model.get_submodule(name) for name in FAMILIES[family].operators]

    def count(module: torch.nn.Module, _args: Any, _output: Any) -> None:
        nonlocal work
        work += module.weight.numel()

    for operator in operators:
        size += operator.weight.numel()
        operator.register_forward_hook(count)
    prune(
        model,
        reconstruction_epochs=0,
        permute_channels=False,
        oneshot_arguments={"propagate_error": False},
    )
    # and looks at the first batch: two at attention, three at its mask, one at stages
    assert work <= 2.1 * len(samples()) * size + 6 * size


def test_channels_are_looked_for_in_as_many_runs_whatever_the_data() -> None:
    def runs(count: int, permute: bool) -> int:
        model, seen = tiny_model("llama"), []
        for name in FAMILIES["llama"].operators:
            model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
        data = {"dataset": calibration(samples(count, 12))}
        fields = {"reconstruction_epochs": 0, "permute_channels": permute}
        prune(model, oneshot_arguments=data, **fields)
        return len(seen)

    looks = [runs(count, True) - runs(count, False) for count in (6, 12)]
    assert looks[0] == looks[1] > 0
