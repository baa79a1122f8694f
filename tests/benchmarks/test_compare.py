"""Methods that only the benchmarks have."""

from __future__ import annotations

import pickle

import torch
from compare import method_pruner
from families import tiny_model
from runs import calibration
from transformers import PreTrainedTokenizerBase


def test_a_peer_has_its_own_solver_in_another_process_too(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    kept = []
    for method in ("fista-operators", "alps", "boza"):
        prune = pickle.loads(pickle.dumps(method_pruner(method, "2:4")))
        model = tiny_model("llama")
        prune(model, tiny_tokenizer, calibration())
        weight = model.model.layers[0].mlp.up_proj.weight
        assert float((weight == 0).float().mean()) == 0.5
        kept.append(weight.detach())
    own, alps, boza = kept
    assert not torch.equal(own, alps)
    assert not torch.equal(own, boza)
    assert not torch.equal(alps, boza)
