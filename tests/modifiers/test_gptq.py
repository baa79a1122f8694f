"""GPTQ that keeps zeros, on matrices and through ``oneshot()``."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from families import FAMILIES, tiny_model
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.transform.quip import QuIPModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from problems import normal
from runs import calibration, run
from torch import Tensor

from fista_modifier import (
    FASPPruningModifier,
    FISTAPruningModifier,
    MaskedGPTQModifier,
)
from fista_modifier.modifiers.forecast import forecasts
from fista_modifier.modifiers.gptq import quantize_kept
from fista_modifier.solver import parse_pattern

ROWS, COLUMNS = 6, 16
LAYOUTS = [
    {"strategy": "tensor"},
    {"strategy": "channel"},
    {"strategy": "group", "group_size": 8},
    {"strategy": "group", "group_size": 8, "actorder": "weight"},
    {"strategy": "group", "group_size": 4, "symmetric": False},
]


def problem(arguments: dict[str, object]) -> tuple[QuantizationArgs, dict[str, Tensor]]:
    """A weight, correlated inputs, and scales in the layout that is asked for."""
    layout = QuantizationArgs(num_bits=4, **arguments)
    shape = {"tensor": (1, 1), "channel": (ROWS, 1)}.get(
        str(arguments["strategy"]), (ROWS, COLUMNS // (layout.group_size or 1))
    )
    inputs = normal(COLUMNS, COLUMNS, seed=1) @ normal(COLUMNS, 64, seed=2)
    zero_points = torch.zeros(1, *shape, dtype=torch.int8)
    if not layout.symmetric:
        zero_points += torch.arange(shape[-1], dtype=torch.int8)
    return layout, {
        "weights": normal(1, ROWS, COLUMNS),
        "hessians": (inputs @ inputs.T)[None],
        "scale": 0.2 + 0.2 * normal(1, *shape, seed=3).abs(),
        "zero_point": zero_points,
    }


def half_pruned(weights: Tensor) -> Tensor:
    return weights * parse_pattern("2:4", None).support(weights[0].abs())


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The toolkit works in the buffers that it is given."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("arguments", LAYOUTS, ids=str)
def test_without_zeros_it_is_the_toolkits_gptq(arguments):
    layout, tensors = problem(arguments)
    expected = quantize_weight(
        **copies(tensors), global_scale=None, quant_args=layout, blocksize=8
    )
    actual = quantize_kept(
        **copies(tensors), global_scale=None, quant_args=layout, blocksize=8
    )
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_zeros_stay_and_what_follows_makes_up_for_them():
    """Against the recursion itself, column by column, in float64."""
    layout, tensors = problem({"strategy": "channel"})
    tensors["weights"] = half_pruned(tensors["weights"])
    [quantized], _, _ = quantize_kept(
        **copies(tensors),
        global_scale=None,
        quant_args=layout,
        blocksize=4,
        percdamp=0.01,
    )
    weight, pruned = tensors["weights"][0].double(), tensors["weights"][0] == 0
    hessian = tensors["hessians"][0].double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    factor = torch.linalg.cholesky(hessian.inverse(), upper=True)
    scale = tensors["scale"][0, :, 0].double()
    expected = torch.zeros_like(weight)
    for j in range(COLUMNS):
        rounded = (weight[:, j] / scale).round().clamp(-8, 7) * scale
        expected[:, j] = torch.where(pruned[:, j], 0, rounded)
        error = (weight[:, j] - expected[:, j]) / factor[j, j]
        weight[:, j:] -= error[:, None] * factor[j, j:]
    torch.testing.assert_close(quantized.double(), expected, rtol=0, atol=1e-5)
    assert bool(pruned.any())


@pytest.mark.parametrize("arguments", LAYOUTS, ids=str)
def test_it_beats_rounding_to_nearest(arguments):
    layout, tensors = problem(arguments)
    tensors["weights"] = weights = half_pruned(tensors["weights"])
    quantized, _, _ = quantize_kept(
        **copies(tensors), global_scale=None, quant_args=layout
    )
    assert bool((quantized[weights == 0] == 0).all())
    assert not bool(quantized.signbit()[weights == 0].any())
    nearest = fake_quantize(
        weights[0], tensors["scale"][0], tensors["zero_point"][0], layout
    )

    def error(candidate: Tensor) -> float:
        difference = candidate - weights[0]
        return float((difference @ tensors["hessians"][0] * difference).sum())

    assert error(quantized[0]) < error(nearest)


@pytest.mark.parametrize(
    "scheme",
    [
        {"scheme": "W8A8"},
        {"scheme": "FP8_DYNAMIC"},
        {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "strategy": "group",
                        "group_size": 16,
                        "symmetric": False,
                    },
                }
            }
        },
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("mask_structure", ["2:4", "0:0"])
def test_every_zero_of_the_pruning_is_one_of_the_quantised_model(
    scheme, mask_structure, tmp_path
):
    ignore = ["re:.*lm_head"]
    pruning = {"mask_structure": mask_structure, "sparsity": 0.5, "ignore": ignore}
    pruned = run(tiny_model("llama"), FISTAPruningModifier(**pruning))
    both = run(
        tiny_model("llama"),
        [
            FISTAPruningModifier(**pruning),
            MaskedGPTQModifier(targets=["Linear"], ignore=ignore, **scheme),
        ],
        dataset=calibration(),
    )
    for name in FAMILIES["llama"].operators:
        zeros = pruned.get_submodule(name).weight == 0
        quantized = both.get_submodule(name).weight
        assert bool((quantized[zeros] == 0).all()), name
        assert bool((quantized[~zeros] != 0).float().mean() > 0.5), name


@pytest.mark.parametrize(
    ("later", "advice"),
    [
        (GPTQModifier(targets=["Linear"], scheme="W8A8"), "use MaskedGPTQModifier"),
        (SpinQuantModifier(rotations=["R1"]), "put it before the pruning"),
        (QuIPModifier(), "put it before the pruning"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(
    "pruning",
    [
        FISTAPruningModifier(mask_structure="2:4", ignore=["re:.*lm_head"]),
        FASPPruningModifier(sparsity=0.05, structures=["value_dims"], multiple_of=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_steps_that_give_zeros_values_are_refused(pruning, later, advice):
    model = tiny_model("llama")
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=advice):
        list(forecasts([pruning, later], model.config, 12, lambda: model))
    with pytest.raises(ValueError, match=advice):
        run(model, [pruning, later], dataset=calibration())
    for name, value in dense.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_inference_mode_is_refused():
    pruning = FISTAPruningModifier(mask_structure="2:4", ignore=["re:.*lm_head"])
    model = tiny_model("llama")
    with torch.inference_mode(), pytest.raises(ValueError, match="leave it"):
        run(model, pruning, dataset=calibration())
