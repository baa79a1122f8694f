"""Mixtures of experts: each expert is pruned with the tokens that it is given."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationScheme,
    preset_name_to_scheme,
)
from families import MIXTURES, checkpoint, tiny_model
from llmcompressor.modeling.moe.linearize import get_linearized_moes, linearize_moe
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from logs import logged
from runs import prune, run, samples, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fista_modifier import FISTAPruningModifier, pipeline
from fista_modifier.checkpoint.shards import locate, read
from fista_modifier.checkpoint.verification import verify
from fista_modifier.models.experts import linearize, native_experts
from fista_modifier.models.targets import find_operators
from fista_modifier.solver import NofM


def linearized(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    linearize_moe(model)
    return model


def inputs_of(model: PreTrainedModel, name: str) -> list[Tensor]:
    """What a module is called with in a plain run of the model, call by call."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad(), hook:
        for row in samples():
            model(row[None], use_cache=False)
    return seen


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_pruned_with_the_tokens_routed_to_them(family: str) -> None:
    dense = linearized(family)
    model = tiny_model(family)
    modifier = prune(model, preset="fast")
    of_experts = [result for result in modifier.results if ".experts." in result.name]
    assert len(of_experts) == 2 * 4 * 3
    given: Counter[str] = Counter()
    for result in modifier.results:
        assert NofM(2, 4).holds(model.get_submodule(result.name).weight)
        calls = inputs_of(dense, result.name)
        assert result.tokens == sum(call[..., 0].numel() for call in calls), result.name
        layer, _, operator = result.name.partition(".mlp.experts.")
        given[layer] += result.tokens * operator.endswith("up_proj")
    # two of four experts are given each token
    assert given["model.layers.0"] == given["model.layers.1"] == 2 * samples().numel()


def test_an_experts_error_is_that_of_its_tokens() -> None:
    """The first layer's inputs are the same in any run, so both sides can be had."""
    dense = linearized("mixtral")
    model = tiny_model("mixtral")
    results = {one.name: one for one in prune(model, preset="fast").results}
    expert = "model.layers.0.mlp.experts.2"
    gate, up, down = (f"{expert}.{name}_proj" for name in ("gate", "up", "down"))
    tokens = torch.cat(inputs_of(dense, gate))

    def hidden(of: PreTrainedModel) -> Tensor:
        part = of.get_submodule(expert)
        return silu(part.gate_proj(tokens)) * part.up_proj(tokens)

    with torch.no_grad():
        wanted = dense.get_submodule(down)(torch.cat(inputs_of(dense, down)))
        found = model.get_submodule(down)(hidden(model))
    error = float((found - wanted).norm() / wanted.norm())
    assert results[down].relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("correction", ["none", "intra", "full"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(correction: str) -> None:
    def model_of_five() -> PreTrainedModel:
        model = tiny_model("mixtral", num_local_experts=5)
        gate = model.model.layers[0].mlp.gate.weight.data
        # the two best of these multiples of one score never include the third
        gate[:] = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])[:, None] * gate[0]
        return model

    name = "model.layers.0.mlp.experts.2.down_proj"
    model, dense = model_of_five(), model_of_five()
    linearize_moe(dense)
    with logged() as messages:
        modifier = prune(model, error_correction=correction)
    result = next(one for one in modifier.results if one.name == name)
    assert result.tokens == 0
    weight = dense.get_submodule(name).weight
    expected = weight * NofM(2, 4).support(weight.abs())
    assert torch.equal(model.get_submodule(name).weight, expected)
    assert any(f"No calibration token reaches {name}" in text for text in messages)
    few = [one for one in modifier.results if 0 < one.tokens < one.shape[1]]
    told = f"{len(few)} of {len(modifier.results)} operators were reached by fewer"
    assert few and any(told in text for text in messages)


def test_routers_are_pruned_only_if_named() -> None:
    model = linearized("qwen2_moe")
    router = "model.layers.0.mlp.shared_expert_gate"
    assert isinstance(model.get_submodule(router), torch.nn.Linear)

    def names(*targets: str) -> set[str]:
        return {operator.name for operator in find_operators(model, [*targets], [])}

    assert router not in names("Linear")
    assert router in names("Linear", router)
    assert router in names("re:.*gate$")


SETTINGS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        # a Linear beside the experts, and one in a module beside them
        PhimoeConfig(**SETTINGS, intermediate_size=48, num_local_experts=4),
        AfmoeConfig(**SETTINGS, num_experts=4, moe_intermediate_size=16),
    ],
    ids=lambda config: config.model_type,
)
def test_a_linear_operator_may_be_a_router(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    linearize(model)
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    routers = {name for name in linears if "router" in name}
    assert routers
    found = {operator.name for operator in find_operators(model, ["Linear"], [])}
    assert found == linears - routers


@pytest.mark.parametrize("through", ["save_pretrained", "pipeline"])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_pruned_mixture_is_saved_as_the_checkpoint_that_it_came_from(
    family: str,
    through: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    model = tiny_model(family)
    modifier = prune(model, preset="fast")
    before = weights(model)
    for folder in (tmp_path / "once", tmp_path / "again"):
        if through == "pipeline":
            pipeline.save(model, tiny_tokenizer, folder)
        else:
            model.save_pretrained(folder)
        after = weights(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

        files, problems = locate(folder)
        assert files.keys() == locate(checkpoint(family))[0].keys()
        experts = [
            tensor for _, name, tensor in read(files, problems) if ".experts." in name
        ]
        assert not problems and len(experts) == 2 * 4 * 3
        assert all(NofM(2, 4).holds(tensor) for tensor in experts)
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(loading.values())
        with torch.no_grad():
            logits = [one(samples()).logits for one in (loaded, model)]
        torch.testing.assert_close(*logits)
        for verification in (verify(folder), verify(folder, NofM(2, 4))):
            assert verification.passed
            names = {check.name for check in verification.operators}
            assert names == {result.name for result in modifier.results}


def test_what_other_modifiers_pruned_is_saved_so_too(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    run(model, WandaPruningModifier(sparsity=0.5, mask_structure="2:4"))
    pipeline.save(model, tiny_tokenizer, tmp_path / "saved")
    assert verify(tmp_path / "saved", NofM(2, 4)).passed


def test_a_mixture_on_disk_is_saved_and_stays_there(tmp_path: Path) -> None:
    offloaded = tmp_path / "offloaded"
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("mixtral"),
        device_map=dict.fromkeys(parts, "cpu") | {"model.layers": "disk"},
        offload_folder=offloaded,
    )
    prune(model, preset="fast")
    before, files = weights(model), len(list(offloaded.iterdir()))
    model.save_pretrained(tmp_path / "saved")
    assert len(list(offloaded.iterdir())) == files
    assert all(
        torch.equal(value, before[name]) for name, value in weights(model).items()
    )
    assert verify(tmp_path / "saved").passed


def test_weights_are_not_kept_by_those_who_refer_to_an_expert() -> None:
    model = linearized("mixtral")
    held = [experts for _, experts in get_linearized_moes(model)]
    with native_experts(model):
        assert not get_linearized_moes(model)
        assert not any(list(experts.parameters()) for experts in held)
    assert len(get_linearized_moes(model)) == len(held)


def test_quantised_experts_are_saved_as_the_toolkit_does(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    scheme = {"scheme": "W8A8", "targets": ["Linear"], "ignore": ["lm_head"]}
    pruning = FISTAPruningModifier(mask_structure="2:4", preset="fast")
    run(model, [pruning, QuantizationModifier(**scheme)])
    experts = get_linearized_moes(model)
    with logged() as messages:
        model.save_pretrained(tmp_path)
    assert any("names that transformers cannot load" in one for one in messages)
    assert [one for _, one in get_linearized_moes(model)] == [one for _, one in experts]
    assert "model.layers.1.mlp.experts.3.up_proj.weight_scale" in locate(tmp_path)[0]


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize("family", MIXTURES)
def test_quantised_experts_are_verified(
    family: str, scheme: str, tmp_path: Path
) -> None:
    """Transformers cannot load them."""
    model = tiny_model(family, tie_word_embeddings=scheme == "W8A8")
    quantisation = QuantizationModifier(
        targets=["Linear"], ignore=["lm_head"], config_groups=groups(scheme)
    )
    modifier = FISTAPruningModifier(mask_structure="2:4", preset="fast")
    run(model, [modifier, quantisation])
    model.save_pretrained(tmp_path)
    verification = verify(tmp_path)
    assert verification.passed, verification
    assert {one.name for one in verification.operators} == {
        result.name for result in modifier.results
    }
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    name = next(
        one for one in tensors if one.endswith("experts.3.up_proj.weight_scale")
    )
    scales = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    assert any("up_proj.weight_scale" in one for one in verify(tmp_path).problems)
    save_file(tensors | {name: scales, "more": scales.clone()}, file, {"format": "pt"})
    assert any("more is no part" in one for one in verify(tmp_path).problems)


def groups(scheme: str) -> dict[str, QuantizationScheme]:
    """Return a preset whose groups of columns, if it has some, fit tiny experts."""
    found = preset_name_to_scheme(scheme, ["Linear"])
    if found.weights is not None and found.weights.group_size:
        found.weights.group_size = 16
    return {"group_0": found}


def gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(**SETTINGS, intermediate_size=48, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "bias" in name:  # transformers begins with zeros
            parameter.data.normal_(0, 0.1)
    return model


def test_experts_whose_gate_and_up_alternate_are_fused_in_that_order() -> None:
    model = gpt_oss()
    before = weights(model)
    linearize(model)
    operators = weights(model)
    with native_experts(model):
        within = weights(model)
    after = weights(model)
    assert within.keys() == before.keys()
    assert all(torch.equal(within[name], before[name]) for name in before)
    assert all(torch.equal(after[name], operators[name]) for name in operators)


def test_experts_that_the_toolkit_would_fuse_wrongly_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of a class that copies in an order of its own, and not back."""
    model = gpt_oss()
    linearize(model)
    before = weights(model)
    monkeypatch.setattr("fista_modifier.models.experts._gpt_oss_fused", nullcontext)
    with logged() as messages, native_experts(model):
        within = weights(model)
    assert within.keys() == before.keys()
    assert all(torch.equal(within[name], before[name]) for name in before)
    assert any("cannot fuse GptOssExpertMLP" in message for message in messages)
