"""What a run says of weights that it does not prune."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from logs import logged
from model_kinds import KINDS
from peft import LoraConfig, get_peft_model
from runs import calibration, prune, run, samples, weights
from torch import Tensor
from transformers import DbrxForCausalLM

from fista_modifier import FISTAPruningModifier, pipeline
from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.padding import RealTokens
from fista_modifier.calibration.replays import Replays
from fista_modifier.calibration.stages import Stage, used_without_a_call
from fista_modifier.calibration.statistics import wave_statistics
from fista_modifier.checkpoint.on_save import report_of
from fista_modifier.models.loading import load_model
from fista_modifier.models.operators import Operator
from fista_modifier.models.targets import find_operators
from fista_modifier.pruning.results import PruningReport
from fista_modifier.solver import Unstructured
from fista_modifier.solver.patterns import project


@pytest.fixture
def messages() -> Iterator[list[str]]:
    with logged("INFO") as found:
        yield found


def said(messages: list[str], text: str) -> bool:
    return any(text in message for message in messages)


def test_a_run_ends_with_its_share_of_the_layers(messages: list[str]) -> None:
    modifier = prune(tiny_model("llama"), targets=["re:.*mlp.*"], preset="fast")
    entries = {
        name: parameter.numel()
        for name, parameter in tiny_model("llama").named_parameters()
        if ".layers." in name and parameter.ndim > 1
    }
    of_mlp = sum(size for name, size in entries.items() if "mlp" in name)
    share = of_mlp / sum(entries.values())
    assert modifier.share_of_weights == pytest.approx(share)
    assert said(messages, f"hold {100 * share:.1f} % of the decoder layers' weights")


def test_a_sparse_model_is_named_and_its_zeros_may_stay(messages: list[str]) -> None:
    sparse = tiny_model("llama")
    for module in sparse.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = project(module.weight.data, Unstructured(0.7))
    before = weights(sparse)
    prune(sparse, preserve_sparsity_mask=True)
    assert not said(messages, "sparse already")
    after = weights(sparse)
    for name, weight in before.items():
        assert not bool(after[name][weight == 0].any()), name
    prune(sparse)
    assert said(messages, "set preserve_sparsity_mask: true to keep them")


def test_sequential_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequential_targets \['Layer'\] match no"):
        prune(tiny_model("llama"), oneshot_arguments={"sequential_targets": ["Layer"]})


def test_a_layer_that_runs_several_times_stays_dense(messages: list[str]) -> None:
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    dense = weights(model)
    with pytest.raises(ValueError, match="leave no linear operator"):
        prune(model)
    assert said(messages, "14 operators stay dense") or said(messages, "share their")
    for name, weight in weights(model).items():
        assert torch.equal(weight, dense[name])


class Choosing(torch.nn.Module):
    """Gives its second operator the tokens that its first one chooses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8, bias=False)
        self.second = torch.nn.Linear(8, 8, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        first = self.first(hidden_states)
        return self.second(first[first[..., 0] > 0])


def test_where_other_tokens_arrive_x_is_that_of_the_dense_layer(
    messages: list[str],
) -> None:
    layer = Choosing()
    call = LayerInputs(layer)
    call.append((torch.randn(2, 9, 8),), {})
    pruned = {Operator("first", layer.first): -layer.first.weight.data}
    stage = Stage([Operator("second", layer.second)], wave=1, routed=True)
    with torch.no_grad():
        (found,) = wave_statistics(
            [stage], Replays(call, call, pruned, True), [RealTokens()]
        )
        (dense,) = wave_statistics(
            [stage], Replays(call, call, {}, False), [RealTokens()]
        )
    assert torch.equal(found.gram, dense.gram)
    assert found.drift is None
    assert said(messages, "tokens reach the operator in the dense layer and")


class Reading(torch.nn.Module):
    """Reads the weight of one of its operators, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called = torch.nn.Linear(8, 8)
        self.read = torch.nn.Linear(8, 8)
        self.unused = torch.nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.called(hidden_states) @ self.read.weight


def test_a_weight_that_is_read_is_told_from_one_that_is_not_used() -> None:
    layer = Reading()
    inputs = LayerInputs(layer)
    inputs.append((torch.randn(2, 5, 8),), {})
    operators = [Operator(name, one) for name, one in layer.named_children()]
    found = used_without_a_call(operators, inputs[0])
    assert [operator.name for operator in found] == ["read"]


@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_have_to_be_merged_first(wrapped: bool) -> None:
    model = tiny_model("llama")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters: merge them first"):
        prune(adapted if wrapped else model, preset="fast")
    assert len(prune(adapted.merge_and_unload(), preset="fast").results) == 14


def test_the_embeddings_of_an_encoder_are_no_layer(tmp_path: Path) -> None:
    """Though transformers names their class beside that of the layers."""
    KINDS["encoder"].model().save_pretrained(tmp_path / "dense")
    model = load_model(str(tmp_path / "dense"))
    assert "BertEmbeddings" in model._no_split_modules
    fields = {"preset": "fast", "mask_structure": "2:4", "ignore": ["re:cls.*"]}
    modifier = prune(model, **fields)
    assert modifier.share_of_weights == 1.0
    again, folder = load_model(str(tmp_path / "dense")), str(tmp_path / "layers")
    part = prune(again, layers="0", resume_dir=folder, **fields)
    names = {result.name for result in part.results}
    assert names == {
        result.name for result in modifier.results if ".layer.0." in result.name
    }


def test_data_that_reach_nothing_are_an_error() -> None:
    """All operators are in the vision tower, and there is text alone."""
    model = tiny_model("gemma3_vision")
    with pytest.raises(ValueError, match="nothing was pruned"):
        prune(model, targets=["re:.*vision_tower.*"])


def test_padding_alone_is_an_operator_without_data(messages: list[str]) -> None:
    tokens = samples()
    data = calibration(tokens).map(
        lambda row: {"attention_mask": [0] * (len(row["input_ids"]) - 1) + [1]}
    )
    modifier = FISTAPruningModifier(mask_structure="2:4", preset="fast")
    run(tiny_model("llama"), modifier, dataset=data)
    assert {result.tokens for result in modifier.results} == {len(tokens)}


def test_a_model_that_stays_dense_for_the_most_part_has_no_structure(
    tmp_path: Path,
) -> None:
    KINDS["dbrx"].model().save_pretrained(tmp_path / "dense")
    model = DbrxForCausalLM.from_pretrained(tmp_path / "dense")
    modifier = prune(model, preset="fast", mask_structure="2:4")
    assert modifier.share_of_weights < 0.5  # its experts are stacked
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sparsity_config"]["sparsity_structure"] == "unstructured"
    share = PruningReport.load(tmp_path).share_of_layers
    assert share == pytest.approx(modifier.share_of_weights)
    assert f"{100 * modifier.share_of_weights:.1f} % of the decoder" in (
        tmp_path / "README.md"
    ).read_text(encoding="utf-8")


def test_the_share_of_two_runs_counts_each_operator_once() -> None:
    model = tiny_model("llama")
    mlp = ["re:.*mlp.*"]
    first = prune(model, preset="fast", targets=mlp)
    prune(model, preset="fast", targets=[*mlp, "re:.*self_attn.*"])
    both = report_of(model)
    assert 0 < first.share_of_weights < 1
    assert both.share_of_layers == pytest.approx(1)


def test_an_error_of_zero_is_said(messages: list[str]) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[16:] = 0
    prune(model, preset="paper", patience=0, mask_structure="0:0", sparsity=0.4)
    assert said(messages, "q_proj is pruned without any error for all 72 tokens")
    assert not said(messages, "down_proj is pruned without any error")


def test_a_reward_is_pruned_only_if_named(tmp_path: Path) -> None:
    KINDS["reward"].save(tmp_path)

    def found(*targets: str) -> set[str]:
        model = pipeline.load_model(str(tmp_path))
        return {operator.name for operator in find_operators(model, [*targets], [])}

    assert "model.layers.0.mlp.down_proj" in found("Linear")
    assert "score" not in found("Linear") | found("__ALL_PRUNABLE__")
    assert found("score") == {"score"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mask_structure": "1:4"}, "write '3:4'"),
        ({"mask_structure": "1:4", "sparsity": 0.75}, ""),
        ({"mask_structure": "2:4"}, ""),
        ({"mask_structure": "2:4", "block_size": 128}, "block_size: 128 has no effect"),
        ({"mask_structure": "2:4", "block_size": 128, "preset": "paper"}, ""),
    ],
)
def test_what_sparsegpt_takes_in_another_way_is_said(
    fields: dict[str, Any], text: str, messages: list[str]
) -> None:
    prune(tiny_model("llama"), **{"preset": "fast", **fields})
    texts = ("llm-compressor's SparseGPTModifier would prune", "has no effect")
    assert any(said(messages, one) for one in texts) == bool(text)
    assert said(messages, text)
