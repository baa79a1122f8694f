import pytest
import torch
from families import FAMILIES, tiny_model
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from problems import normal
from runs import samples
from torch import Tensor

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.calibration.recording import Recorded, Recording
from fista_modifier.calibration.stages import find_stages
from fista_modifier.models.layers import DecoderLayer, group_by_layer
from fista_modifier.models.operators import Operator
from fista_modifier.models.targets import find_operators


def called_layers(family: str) -> dict[DecoderLayer, Recording]:
    """The decoder layers of a model, and what one run of it shows."""
    model = tiny_model(family)
    operators = find_operators(model, ["Linear"], [])
    layers = group_by_layer(model, operators, infer_sequential_targets(model))
    recordings = {layer: Recording(layer.module, layer.operators) for layer in layers}
    for recording in recordings.values():
        for module, hook, _ in recording.hooks():
            module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(samples(), use_cache=False)
    return recordings


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_follow_the_execution_and_share_an_input(family):
    prefix, expected = FAMILIES[family].layers, FAMILIES[family].stages
    layers = called_layers(family)
    assert [layer.name for layer in layers] == [f"{prefix}.0", f"{prefix}.1"]
    for layer, recording in layers.items():
        # the order in which operators are given must not matter
        stages = find_stages(layer.operators[::-1], recording.inputs)
        found = [{operator.name for operator in stage.operators} for stage in stages]
        assert found == [
            {f"{layer.name}.{name}" for name in operators} for operators in expected
        ]
        assert all(stage.calls == 1 for stage in stages)
        # OPT's MLP is no module of its own: its operators are blocks themselves
        assert [stage.returned for stage in stages] == (
            [False, True, family == "opt", True]
        )


def test_what_a_block_returned_is_kept_as_it_was():
    """Falcon's layer adds to it in place."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4, bias=False)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.linear(hidden_states)

    class Adding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, hidden_states: Tensor) -> Tensor:
            output = self.block(hidden_states)
            output += hidden_states
            return output

    layer = Adding()
    operators = [Operator("block.linear", layer.block.linear)]
    recording = Recording(layer, operators, Recorded(block_outputs=True))
    for module, hook, kind in recording.hooks():
        if kind == "forward":
            module.register_forward_hook(hook)
        else:
            module.register_forward_pre_hook(hook, with_kwargs=True)
    hidden_states = normal(1, 3, 4)
    with torch.no_grad():
        layer(hidden_states)
        (stage,) = find_stages(operators, recording.inputs)
        outputs = recording.take_outputs(stage)
        assert outputs is not None
        assert torch.equal(outputs[0], layer.block(hidden_states))


class Layer(torch.nn.Module):
    """What the usual families do not do: repeat, branch by value, leave out."""

    def __init__(self) -> None:
        super().__init__()
        names = ["twice", "equal", "view", "rare", "never", "last"]
        self.linear = torch.nn.ModuleDict(
            {name: torch.nn.Linear(4, 4) for name in names}
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        with torch.no_grad():
            first = self.linear["twice"](hidden_states)
            second = self.linear["twice"](first)
            # equal values, but not the same tensor
            third = self.linear["equal"](hidden_states.clone())
            fourth = self.linear["view"](hidden_states.view(hidden_states.shape))
            if hidden_states.mean() > 0:
                fourth = fourth + self.linear["rare"](second)
            return self.linear["last"](second + third + fourth)


def watch(*values: float) -> list[tuple[list[str], int]]:
    layer = Layer()
    operators = [Operator(name, module) for name, module in layer.linear.items()]
    calls = [LayerCall(layer, (torch.full((1, 3, 4), value),), {}) for value in values]
    return [
        ([operator.name for operator in stage.operators], stage.calls)
        for stage in find_stages(operators, calls)
    ]


def test_an_operator_called_twice_is_a_stage_of_its_own():
    stages = watch(-1.0)
    assert stages == [(["twice"], 2), (["equal"], 1), (["view"], 1), (["last"], 1)]


def test_operators_that_one_batch_does_not_reach_are_found_in_another():
    stages = watch(-1.0, 1.0)
    assert stages[-1] == (["rare"], 1)
    assert len(stages) == 5
    assert not any("never" in operators for operators, _ in stages)
    # reached by the first batch, an operator comes where it is executed
    assert watch(1.0)[3] == (["rare"], 1)
