"""The real model on real text: one of its thirty layers, to be quick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fista_modifier import FISTAPruningModifier, pipeline
from fista_modifier.data import calibration_dataset
from fista_modifier.evaluation.perplexity import perplexity
from fista_modifier.solver import (
    PAPER,
    GramStatistics,
    NofM,
    PrunedWeight,
    SolverOptions,
    SparsityPattern,
)


def test_pruned_smollm2_still_predicts_news(
    smollm2: Path, wikipedia: Path, news: Path, tmp_path: Path
) -> None:
    tokenizer = pipeline.load_tokenizer(str(smollm2))
    model = pipeline.load_model(str(smollm2))
    text = news.read_text()

    def measure(model: torch.nn.Module) -> float:
        result = perplexity(model, tokenizer, text, seq_len=256, max_tokens=1024)
        return result.value

    dense = measure(model)
    calibration = calibration_dataset(str(wikipedia), tokenizer, samples=4, seq_len=256)
    modifier = FISTAPruningModifier(mask_structure="2:4", targets=[r"re:.*layers\.15$"])
    run = pipeline.prune(model, tokenizer, calibration, modifier)
    pipeline.save(model, tokenizer, tmp_path / "pruned")
    assert len(run.results) == 7
    for result in run.results:
        assert result.sparsity == 0.5
        assert result.relative_error <= result.relative_start_error
        assert 0 < result.relative_error < 0.6

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for result in run.results:
        assert NofM(2, 4).holds(loaded.get_submodule(result.name).weight)
    layer = loaded.model.layers[16].self_attn.q_proj
    assert (layer.weight != 0).float().mean() > 0.9
    pruned = measure(loaded)
    # a thirtieth of the model pruned costs something, and far from everything
    assert 0 < math.log(pruned / dense) < 0.1
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    reply = loaded.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0])


@pytest.mark.parametrize("damping, mean_share", [(None, 0.79), (0.01, 0.72)])
def test_every_operator_beats_sparsegpt(
    smollm2: Path,
    wikipedia: Path,
    damping: float | None,
    mean_share: float,
) -> None:
    """On the same Gram matrices, those of a partly pruned layer."""
    shares: list[float] = []

    options = SolverOptions()
    if damping is not None:
        options = replace(options, dampening_frac=damping)

    class BesideSparseGPT:
        def __init__(self, statistics: GramStatistics) -> None:
            self.ours = options(statistics)
            self.sparsegpt = replace(PAPER, patience=0)(statistics)

        def prune(
            self, weights: Sequence[Tensor], patterns: Sequence[SparsityPattern]
        ) -> list[PrunedWeight]:
            ours = self.ours.prune(weights, patterns)
            theirs = self.sparsegpt.prune(weights, patterns)
            for one, other in zip(ours, theirs, strict=True):
                shares.append((one.error / other.error) ** 2)
            return ours

    tokenizer = pipeline.load_tokenizer(str(smollm2))
    pipeline.prune(
        pipeline.load_model(str(smollm2), "float32"),
        tokenizer,
        calibration_dataset(str(wikipedia), tokenizer, samples=8, seq_len=256),
        FISTAPruningModifier(
            mask_structure="2:4",
            targets=[r"re:.*layers\.(0|15)$"],
            reconstruction_epochs=0,
        ).with_solver(BesideSparseGPT),
    )
    assert len(shares) == 14
    assert max(shares) < 1
    assert fmean(shares) <= mean_share
