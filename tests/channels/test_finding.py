"""Groups of channels, compared with what each architecture is known to do."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from problems import normal
from runs import samples
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fista_modifier.calibration.calls import LayerCall, LayerInputs
from fista_modifier.calibration.contexts import calibration_runs
from fista_modifier.calibration.recording import Recording
from fista_modifier.channels.cuts import check_cut
from fista_modifier.channels.finding import find_groups
from fista_modifier.channels.groups import ChannelGroup, LayerGroups
from fista_modifier.channels.probing import Codes
from fista_modifier.models.experts import linearize
from fista_modifier.models.layers import (
    DecoderLayer,
    group_by_layer,
    layer_targets,
)
from fista_modifier.models.operators import Operator
from fista_modifier.models.targets import find_operators

ZOO = Path(__file__).parents[1] / "zoo" / "configurations.json"
MLP, HEADS, KEYS, SIZE = 48, 4, 2, 8
"""
The numbers of channels of an MLP, of query heads and of key/value heads, and the size
of a head.
"""
EACH = HEADS // KEYS

Channels = set[frozenset[tuple[str, str, int]]]
"""
A set of channels. Each channel is the set of its rows and columns, which are given as
the operator's name, "row" or "column", and the index.
"""


def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As in tests/families.py, or of the zoo's configurations."""
    if family in (*FAMILIES, "mixtral", "qwen3_moe"):
        model = tiny_model(family, dtype)
    else:
        case = json.loads(ZOO.read_text(encoding="utf-8"))[family]
        torch.manual_seed(0)
        config = AutoConfig.for_model(case["model_type"], **case["config"])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linearize(model)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases of zero would hide that they are left
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def search(model: PreTrainedModel) -> tuple[DecoderLayer, LayerInputs, LayerGroups]:
    """The first layer, what one run of the model calls it with, and its groups"""
    operators = find_operators(model, ["Linear"], ["re:.*lm_head$"])
    layer = group_by_layer(model, operators, layer_targets(model, operators))[0]
    recording = Recording(layer.module, layer.operators)
    for module, hook, _ in recording.hooks():
        module.register_forward_pre_hook(hook, with_kwargs=True)
    with calibration_runs(model):
        with torch.no_grad():
            model(samples(), use_cache=False)
        groups = find_groups(layer.operators, recording.inputs)
    return layer, recording.inputs, groups


def channels_of(group: ChannelGroup, prefix: str) -> Iterator[frozenset]:
    parts = [(*one, "row") for one in group.producers]
    parts += [(*one, "column") for one in group.consumers]
    for channel in range(group.size):
        yield frozenset(
            (operator.name.removeprefix(prefix), what, int(index))
            for operator, indices, what in parts
            for index in indices[channel]
        )


def found(layer: DecoderLayer, groups: LayerGroups, kind: str) -> Channels:
    return {
        channel
        for group in groups.of_kind(kind)
        for channel in channels_of(group, f"{layer.name}.")
    }


def rows(name: str, *indices: int) -> set[tuple[str, str, int]]:
    return {(name, "row", index) for index in indices}


def columns(name: str, *indices: int) -> set[tuple[str, str, int]]:
    return {(name, "column", index) for index in indices}


def mlp(producers: list[str], consumer: str, size: int = MLP) -> Channels:
    """Operators without a gate, or with; all have the channels in the same places."""
    return {
        frozenset(columns(consumer, j).union(*(rows(name, j) for name in producers)))
        for j in range(size)
    }


def fused_mlp(producer: str, consumer: str) -> Channels:
    return {
        frozenset(rows(producer, j, MLP + j) | columns(consumer, j)) for j in range(MLP)
    }


def values(v: str, o: str, first: list[int], each: int, size: int = SIZE) -> Channels:
    """
    :param first: the row of v in which each key/value head begins
    :param each: query heads of each of them
    """
    return {
        frozenset(
            rows(v, row + i)
            | columns(o, *((head * each + query) * size + i for query in range(each)))
        )
        for head, row in enumerate(first)
        for i in range(size)
    }


def heads(first: list[list[tuple[str, int, int]]], o: str, each: int) -> Channels:
    """
    :param first: for each key/value head, operator, first row and number of rows of all
        that it has
    """
    width = each * SIZE
    return {
        frozenset(
            columns(o, *range(head * width, (head + 1) * width)).union(
                *(rows(name, *range(row, row + size)) for name, row, size in parts)
            )
        )
        for head, parts in enumerate(first)
    }


def grouped_queries(attention: str = "self_attn") -> dict[str, Channels]:
    q, k, v, o = (f"{attention}.{name}_proj" for name in "qkvo")
    first = [head * SIZE for head in range(KEYS)]
    parts = [
        [(q, head * EACH * SIZE, EACH * SIZE), (k, row, SIZE), (v, row, SIZE)]
        for head, row in enumerate(first)
    ]
    return {"values": values(v, o, first, EACH), "heads": heads(parts, o, EACH)}


def separate(q: str, k: str, v: str, o: str) -> dict[str, Channels]:
    """Without grouped queries"""
    first = [head * SIZE for head in range(HEADS)]
    parts = [[(name, row, SIZE) for name in (q, k, v)] for row in first]
    return {"values": values(v, o, first, 1), "heads": heads(parts, o, 1)}


def interleaved(qkv: str, o: str) -> dict[str, Channels]:
    """Query, key and value of a head stand together."""
    first = [3 * head * SIZE for head in range(HEADS)]
    return {
        "values": values(qkv, o, [row + 2 * SIZE for row in first], 1),
        "heads": heads([[(qkv, row, 3 * SIZE)] for row in first], o, 1),
    }


LLAMA = grouped_queries() | {
    "channels": mlp(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")
}


def experts(size: int) -> dict[str, Channels]:
    names = [f"mlp.experts.{expert}" for expert in range(4)]
    return grouped_queries() | {
        "channels": {
            channel
            for name in names
            for channel in mlp(
                [f"{name}.gate_proj", f"{name}.up_proj"], f"{name}.down_proj", size
            )
        }
    }


def phi3() -> dict[str, Channels]:
    qkv, o = "self_attn.qkv_proj", "self_attn.o_proj"
    keys, first = HEADS * SIZE, (HEADS + KEYS) * SIZE
    parts = [
        [
            (qkv, head * EACH * SIZE, EACH * SIZE),
            (qkv, keys + head * SIZE, SIZE),
            (qkv, first + head * SIZE, SIZE),
        ]
        for head in range(KEYS)
    ]
    return {
        "channels": fused_mlp("mlp.gate_up_proj", "mlp.down_proj"),
        "values": values(qkv, o, [first, first + SIZE], EACH),
        "heads": heads(parts, o, EACH),
    }


def gpt2() -> dict[str, Channels]:
    qkv, width = "attn.c_attn", HEADS * SIZE
    first = [head * SIZE for head in range(HEADS)]
    parts = [[(qkv, at * width + row, SIZE) for at in range(3)] for row in first]
    return {
        "channels": mlp(["mlp.c_fc"], "mlp.c_proj"),
        "values": values(qkv, "attn.c_proj", [2 * width + row for row in first], 1),
        "heads": heads(parts, "attn.c_proj", 1),
    }


EXPECTED: dict[str, dict[str, Channels]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"], LLAMA),
    "phi3": phi3(),
    "opt": separate(
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    )
    | {"channels": mlp(["fc1"], "fc2")},
    "gpt2": gpt2(),
    "gpt_neox": interleaved("attention.query_key_value", "attention.dense")
    | {"channels": mlp(["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h")},
    # slopes of positions are a head's own, and given to the layer
    "bloom": interleaved("self_attention.query_key_value", "self_attention.dense")
    | {
        "channels": mlp(["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h", 128),
        "heads": set(),
    },
    # one head of keys and values, which cannot leave
    "falcon": {
        "channels": mlp(["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h", 128),
        "values": values(
            "self_attention.query_key_value",
            "self_attention.dense",
            [(HEADS + 1) * SIZE],
            HEADS,
        ),
        "heads": set(),
    },
    # keys and queries are normalised over all heads
    "olmo2": LLAMA | {"heads": set()},
    "mixtral": experts(MLP),
    "qwen3_moe": experts(16),
}
CUT_BY_SHAPES = {"llama", "qwen2", "qwen3", "gemma3", "gpt_neox", "mixtral"}
"""
The families whose attention takes the number of heads from the shapes of the operators.
"""


@pytest.mark.parametrize("family", EXPECTED)
def test_groups_of_a_family(family: str) -> None:
    layer, _, groups = search(model_of(family))
    for kind, expected in EXPECTED[family].items():
        assert found(layer, groups, kind) == expected, kind
    for group in groups.groups:
        for _, indices in (*group.producers, *group.consumers):
            assert torch.equal(indices, indices.sort(-1).values)
            assert len(indices) == group.size


@pytest.mark.parametrize("family", EXPECTED)
def test_a_layer_without_channels_computes_what_it_does_unread(family: str) -> None:
    model = model_of(family)
    layer, calls, groups = search(model)
    before = {name: one.clone() for name, one in layer.module.state_dict().items()}
    for group in groups.groups:
        if group.kind == "heads" and family not in CUT_BY_SHAPES:
            continue
        kept = torch.randperm(group.size)[: group.size // 2].sort().values
        with calibration_runs(model):
            assert check_cut(group, calls[0], kept) is None
    after = layer.module.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("family", "operator", "first"),
    [
        ("llama", "mlp.up_proj", 0),
        ("gemma2", "mlp.up_proj", 0),
        ("phi3", "mlp.gate_up_proj", MLP),
        ("mixtral", "mlp.experts.0.up_proj", 0),
        ("opt", None, 0),
        ("gpt2", None, 0),
    ],
)
def test_what_the_consumer_reads_is_linear_in(
    family: str, operator: str | None, first: int, dtype: torch.dtype
) -> None:
    layer, _, groups = search(model_of(family, dtype))
    group = groups.of_kind("channels")[0]
    assert all(one.linear is None for one in groups.groups if one.kind != "channels")
    if operator is None:
        assert group.linear is None
        return
    assert group.linear is not None
    assert group.linear.operator.name == f"{layer.name}.{operator}"
    assert group.linear.indices.flatten().tolist() == [*range(first, first + MLP)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, _, groups = search(model_of("llama", dtype))
    for kind, expected in LLAMA.items():
        assert found(layer, groups, kind) == expected, kind


@pytest.mark.parametrize(
    ("family", "operator", "reason"),
    [
        ("bitnet", "mlp.down_proj", "depends on several channels"),
        ("bitnet", "mlp.gate_proj", "reaches several inputs of .*down_proj"),
        ("bitnet", "self_attn.o_proj", "reach inputs of other channels"),
        ("mamba", "mixer.in_proj", "not zero where their rows are"),
        ("mamba", "mixer.dt_proj", "does not call"),
        ("rwkv", "attention.value", "time_decay.* have to be cut with them"),
        ("bloom", "self_attention.dense", "argument alibi would have to be cut"),
        ("falcon", "self_attention.dense", "heads .* there is one"),
        ("olmo2", "self_attn.q_proj", "reaches several inputs of .*o_proj"),
        ("llama", "mlp.down_proj", "^$"),
    ],
)
def test_reasons(family: str, operator: str, reason: str) -> None:
    layer, _, groups = search(model_of(family))
    (one,) = [it for it in layer.operators if it.name.endswith(operator)]
    assert re.search(reason, groups.why_not(one))


class Toy(torch.nn.Module):
    """An MLP with a gate, in whose middle something else may happen."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.gate, self.up = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.down, self.rare = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.scale = torch.nn.Parameter(1 + torch.rand(8))
        self.change = change
        self.kept: list[Tensor] = []

    def forward(self, states: Tensor, kept: dict[str, Tensor]) -> Tensor:
        gate, up = self.gate(states), self.up(states)
        inside = torch.nn.functional.relu(gate) * up
        if self.change == "returned":
            states = states + gate
        if self.change == "returned in secret":
            states = states + gate.detach()
        if self.change == "kept":
            kept["gate"] = gate
        if self.change == "scaled":
            inside = inside * self.scale
        if self.change == "clamped":
            inside = inside.clamp(-100, 100)
        if self.change == "shifted":
            inside = inside + torch.nn.functional.relu(gate)
        if self.change == "mixed":
            inside = inside + inside.roll(1, -1)
        if states.mean() > 0:
            inside = inside + self.rare(states)
        return states + self.down(inside)

    def search(self, *values: float) -> tuple[list[Operator], LayerGroups]:
        names = ["gate", "up", "down", "rare"]
        operators = [Operator(name, getattr(self, name)) for name in names]
        calls = [
            LayerCall(self, (value + 0.1 * normal(2, 3, 8), {}), {}) for value in values
        ]
        return operators, find_groups(operators, calls)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("returned", "The layer returns the output of gate."),
        ("returned in secret", "something else in the layer reads them"),
        ("kept", "The layer returns the output of gate."),
        ("scaled", "scale would have to be cut with them"),
        ("mixed", "reach inputs of other channels"),
    ],
)
def test_channels_that_something_else_reads(change: str, reason: str) -> None:
    operators, groups = Toy(change).search(-1.0)
    assert not groups.of_kind("channels")
    assert reason in groups.why_not(operators[0])


@pytest.mark.parametrize(
    ("change", "linear"), [("", True), ("clamped", False), ("shifted", False)]
)
def test_a_linear_producer_is_one_for_all_values(change: str, linear: bool) -> None:
    operators, groups = Toy(change).search(-1.0)
    (group,) = groups.groups
    assert (group.linear is not None) == linear
    assert not group.linear or group.linear.operator is operators[1]


def test_a_layer_is_as_before() -> None:
    toy = Toy()
    flags = {name: one.requires_grad for name, one in toy.named_parameters()}
    _, groups = toy.search(-1.0)
    assert groups.groups
    assert flags == {name: one.requires_grad for name, one in toy.named_parameters()}
    assert all("forward" not in vars(module) for module in toy.modules())
    assert all(one.grad is None for one in toy.parameters())


def test_operators_that_one_call_does_not_reach() -> None:
    operators, groups = Toy().search(-1.0)
    assert groups.why_not(operators[3]) == "The layer does not call rare."
    (group,) = groups.groups
    assert {one.name for one in group.operators} == {"gate", "up", "down"}
    _, groups = Toy().search(-1.0, 1.0)
    (group,) = groups.groups
    assert {one.name for one in group.operators} == {"gate", "up", "down", "rare"}


class Experts(torch.nn.Module):
    """Two, of which a call reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(Toy() for _ in range(2))

    def forward(self, states: Tensor) -> Tensor:
        return self.experts[int(states.mean() > 0)](states, {})


def test_experts_are_found_in_several_calls() -> None:
    layer = Experts()
    operators = [
        Operator(name, module)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    calls = [LayerCall(layer, (at + normal(1, 3, 8),), {}) for at in (-9.0, -8.0, 9.0)]
    groups = find_groups(operators, calls).groups
    assert [len(group.producers) for group in groups] == [2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 20, 1000])
def test_codes_tell_one_from_several(size: int) -> None:
    codes = Codes(size)
    assert codes.bits.shape == (codes.length, size)
    assert torch.equal(codes.decode(codes.bits), torch.arange(size))
    both = codes.bits | codes.bits.roll(1, 1)
    assert bool((codes.decode(both) == (-1 if size > 1 else 0)).all())
    assert bool((codes.decode(torch.zeros_like(both)) == -1).all())
