"""Recovery as a step of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from datasets import Dataset
from families import FAMILIES, tiny_model
from llmcompressor.modifiers.quantization import QuantizationModifier
from logs import logged
from runs import calibration, run, samples, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fista_modifier import (
    FASPPruningModifier,
    FISTAPruningModifier,
    RecoveryModifier,
    pipeline,
)
from fista_modifier.checkpoint.on_save import report_of
from fista_modifier.checkpoint.verification import verify
from fista_modifier.models import loading
from fista_modifier.models.loading import load_model
from fista_modifier.pruning.results import Calibration, PruningReport
from fista_modifier.recovery.distillation import DistillationTrainer
from fista_modifier.recovery.recover import recover
from fista_modifier.recovery.resume import last_state
from fista_modifier.recovery.training import Training

IGNORE = ["re:.*lm_head"]
DATA = {"dataset": calibration(samples(20, 12))}
SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "rate": 0.025,
    "batch_size": 2,
    "piece_length": 6,
}
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "fista-2of4-recovery.yaml"
PRUNERS: dict[str, Any] = {
    "sparse": lambda: FISTAPruningModifier(
        mask_structure="2:4", preset="fast", ignore=IGNORE
    ),
    "smaller": lambda: FASPPruningModifier(
        sparsity=0.3, multiple_of=4, preset="paper", ignore=IGNORE
    ),
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def pruned(dense: Path, *steps: Any) -> PreTrainedModel:
    model = load_model(str(dense))
    run(model, list(steps), **DATA)
    return model


@pytest.mark.parametrize("kind", PRUNERS)
def test_the_step_trains_as_the_command_does(kind: str, dense: Path) -> None:
    expected = pruned(dense, PRUNERS[kind]())
    report = report_of(expected)
    assert report is not None
    report = recover(
        expected,
        load_model(str(dense)),
        DATA["dataset"],
        report,
        Calibration("tokens", 20, 12, 0),
        Training(**SETTINGS),
    )
    found = pruned(dense, PRUNERS[kind](), RecoveryModifier(**SETTINGS))
    for name, weight in weights(expected).items():
        assert torch.equal(weights(found)[name], weight), name
    told = report_of(found)
    assert told is not None
    (recovery,) = told.recovery
    assert recovery.divergence == report.recovery[0].divergence
    assert [one.zeros for one in told.operators] == [
        one.zeros for one in report.operators
    ]


@pytest.mark.parametrize("again", [False, True], ids=["kept", "run again"])
def test_dropout_has_no_part_in_the_training(again: bool, tmp_path: Path) -> None:
    """Layers that keep no activations are run once more in each step."""
    settings = SETTINGS | {"gradient_checkpointing": again}
    found, calls = [], []
    for dropout in (0.0, 0.3):
        folder = tmp_path / str(dropout)
        drop = {"dropout": dropout, "attention_dropout": dropout, "layerdrop": dropout}
        tiny_model("opt", **drop).save_pretrained(folder)
        model = load_model(str(folder))
        counted = 0

        def count(*_given: Any) -> None:
            nonlocal counted
            counted += torch.is_grad_enabled()

        model.model.decoder.layers[0].fc1.register_forward_hook(count)
        run(model, [PRUNERS["sparse"](), RecoveryModifier(**settings)], **DATA)
        found.append(weights(model))
        calls.append(counted)
    report = report_of(model)
    assert report is not None
    assert calls[0] == calls[1]
    assert calls[0] // report.recovery[0].steps == 1 + again
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_model_in_float16_is_trained(family: str, tmp_path: Path) -> None:
    tiny_model(family, torch.float16).save_pretrained(tmp_path)
    for kind, pruner in PRUNERS.items():
        before = weights(pruned(tmp_path, pruner()))
        step = RecoveryModifier(**SETTINGS)
        after = weights(pruned(tmp_path, pruner(), step))
        assert step.failure is None, kind
        changed = [name for name in after if not torch.equal(after[name], before[name])]
        operators = FAMILIES[family].operators
        assert {*changed} == {f"{name}.weight" for name in operators}
        for name in changed:
            assert after[name].dtype == torch.float16
            assert after[name].isfinite().all(), name
            assert not after[name][before[name] == 0].any(), name


def test_a_model_is_trained_with_the_teachers_attention(tmp_path: Path) -> None:
    """Gemma 2's scores have a soft cap, which transformers' default leaves out."""
    tiny_model("gemma2").save_pretrained(tmp_path)
    expected = pruned(tmp_path, PRUNERS["sparse"](), RecoveryModifier(**SETTINGS))
    assert expected.config._attn_implementation == "eager"
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    run(found, [PRUNERS["sparse"](), RecoveryModifier(**SETTINGS)], **DATA)
    assert found.config._attn_implementation == "sdpa"
    for name, value in weights(expected).items():
        assert torch.equal(weights(found)[name], value), name


def test_what_is_pruned_after_a_recovery_is_told_apart(dense: Path) -> None:
    for later in ([], [PRUNERS["sparse"]()]):
        step = RecoveryModifier(**SETTINGS)
        report = report_of(pruned(dense, PRUNERS["smaller"](), step, *later))
        assert report is not None
        assert [one.pruned_after for one in report.recovery] == [bool(later)]
        assert report.is_recovered != bool(later)


def test_a_failed_training_leaves_no_hooks(dense: Path) -> None:
    """Nor does one that keeps no activations."""

    def failing(*_given: Any, **_more: Any) -> Any:
        raise torch.OutOfMemoryError("no room for 1 GiB")

    settings = SETTINGS | {"gradient_checkpointing": True}
    for fails in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if fails:
                patch.setattr(DistillationTrainer, "training_step", failing)
            model = pruned(dense, PRUNERS["sparse"](), RecoveryModifier(**settings))
        assert not model.is_gradient_checkpointing
        zeros = {name: one == 0 for name, one in model.named_parameters()}
        model.train().requires_grad_(True)
        model(samples(2, 12), labels=samples(2, 12)).loss.backward()
        weight = "model.layers.0.mlp.up_proj.weight"
        assert model.get_parameter(weight).grad[zeros[weight]].abs().max() > 0
        model.requires_grad_(False)
        assert not model(samples(2, 12)).logits.requires_grad


def test_what_is_quantised_afterwards_is_the_trained_model(
    dense: Path, tmp_path: Path
) -> None:
    scheme = {"targets": ["Linear"], "scheme": "W8A8", "ignore": IGNORE}
    trained = pruned(dense, PRUNERS["sparse"](), RecoveryModifier(**SETTINGS))
    model = pruned(
        dense,
        PRUNERS["sparse"](),
        RecoveryModifier(**SETTINGS),
        QuantizationModifier(**scheme),
    )
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            other = trained.get_submodule(name).weight
            step = module.weight_scale.expand_as(other)
            assert bool(((module.weight - other).abs() <= step).all()), name
            assert not module.weight[other == 0].any(), name
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    report = PruningReport.load(tmp_path / "out")
    assert report.recovery
    assert verify(tmp_path / "out").problems == []


def test_the_recipe_in_yaml_and_its_checkpoint(
    model: Path, text: Path, tmp_path: Path
) -> None:
    small = ("--dataset", text, "--samples", 4, "--seq-len", 16)
    output = tmp_path / "out"
    result = invoke("prune", model, "-o", output, "--recipe", RECIPE, *small)
    assert result.exit_code == 0, result.output
    report = PruningReport.load(output)
    assert report.recovery[0].teacher == str(model)
    assert report.sparsity == 0.5
    planned = invoke("plan", model, "--recipe", RECIPE)
    assert "The recovery takes about" in planned.output


@pytest.mark.parametrize(
    "options",
    [
        "--pattern 2:4 --preset fast",
        "--method fasp --sparsity 0.3 --multiple-of 4 --preset paper",
    ],
    ids=["sparse", "smaller"],
)
def test_prune_and_recover_in_one_command(
    options: str, model: Path, text: Path, tmp_path: Path
) -> None:
    """It gives what the two commands give, and goes on from what is finished."""
    small = ("--dataset", text, "--samples", 4, "--seq-len", 16)
    steps = tmp_path / "layers"
    for name, more in (
        ("pruned", ("--resume", steps)),
        ("both", ("--recover", "--resume", steps)),
    ):
        output = ("-o", tmp_path / name)
        with logged("INFO") as messages:
            result = invoke("prune", model, *output, *options.split(), *small, *more)
        assert result.exit_code == 0, result.output
    assert any("Resuming: 2 layers" in message for message in messages)
    assert "Recovery: mean KL to the teacher" in result.output
    assert not (steps / "recovery").exists()
    trained = ("--teacher", model, "-o", tmp_path / "trained")
    result = invoke("recover", tmp_path / "pruned", *trained, *small)
    assert result.exit_code == 0, result.output
    found, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("both", "trained")
    )
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_recover_belongs_into_a_recipe(model: Path, tmp_path: Path) -> None:
    result = invoke(
        "prune", model, "-o", tmp_path / "out", "--recipe", RECIPE, "--recover"
    )
    assert result.exit_code == 1
    assert "put a RecoveryModifier behind the step that prunes" in " ".join(
        result.output.split()
    )
    planned = invoke("plan", model, "--pattern", "2:4", "--recover")
    assert "The recovery takes about" in planned.output


def test_a_training_without_room_is_told_before_the_pruning(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = {"cpu": 1_000_000}
    monkeypatch.setattr(
        "fista_modifier.recovery.obstacles.get_max_memory", lambda: room
    )
    for free, warned in [(1_000_000_000, False), (10_000, True)]:
        room["cpu"] = free
        with logged() as messages:
            model = pruned(dense, PRUNERS["sparse"](), RecoveryModifier(**SETTINGS))
        assert any("would take about" in one for one in messages) == warned
        report = report_of(model)
        assert report is not None
        assert report.recovery


def test_a_killed_training_goes_on_with_shuffled_sequences(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {"num_calibration_samples": 10, "shuffle_calibration_samples": True}
    folder = tmp_path / "states"

    def trained() -> PreTrainedModel:
        torch.manual_seed(0)  # as a new process has
        model = load_model(str(dense))
        step = RecoveryModifier(**SETTINGS, resume_dir=str(folder))
        run(model, [PRUNERS["sparse"](), step], **DATA, **some)
        assert step.failure is None
        return model

    inner, calls = DistillationTrainer.compute_loss, 0

    def killed(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return inner(*given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillationTrainer, "compute_loss", killed)
        trained()
    assert last_state(folder) is not None
    report = report_of(trained())
    assert report is not None
    assert report.recovery


def test_a_killed_training_goes_on_before_a_quantisation(
    dense: Path, tmp_path: Path
) -> None:
    """The scales of the quantisation are there by then, with arbitrary values."""
    scheme = {"targets": ["Linear"], "scheme": "W8A8", "ignore": IGNORE}

    def steps(**fields: str) -> list[Any]:
        recovery = RecoveryModifier(**SETTINGS, **fields)
        return [PRUNERS["sparse"](), recovery, QuantizationModifier(**scheme)]

    inner, calls = DistillationTrainer.compute_loss, 0

    def killed(trainer: Any, model: PreTrainedModel, *given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        for name, value in model.named_parameters():
            if name.endswith("_scale"):
                value.data.fill_(calls)
        if calls == 20:
            raise KeyboardInterrupt
        return inner(trainer, model, *given, **more)

    folder = str(tmp_path / "states")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillationTrainer, "compute_loss", killed)
        pruned(dense, *steps(resume_dir=folder))
    with logged("INFO") as messages:
        found = pruned(dense, *steps(resume_dir=folder))
    assert any("Resuming the training" in one for one in messages)
    expected = pruned(dense, *steps())
    for name, weight in weights(expected).items():
        assert torch.equal(weights(found)[name], weight), name


@pytest.mark.parametrize("failure", ["no room", "divergence", "full disk"])
def test_a_training_that_fails_costs_nobody_the_pruning(
    failure: str, model: Path, text: Path, tmp_path: Path
) -> None:
    """The checkpoint is the one without --recover, and the command says that it is."""
    small = ("--dataset", text, "--samples", 4, "--seq-len", 16)
    options = ("--pattern", "2:4", "--preset", "fast", *small)
    assert invoke("prune", model, "-o", tmp_path / "a", *options).exit_code == 0
    inner = DistillationTrainer.compute_loss

    def failing(trainer: Any, *given: Any, **more: Any) -> Any:
        loss = inner(trainer, *given, **more)
        if trainer.state.global_step == 0:
            return loss
        if failure == "no room":
            raise torch.OutOfMemoryError("no room for 1 GiB")
        if failure == "full disk":
            raise OSError(28, "No space left on device")
        return loss * float("nan")

    with pytest.MonkeyPatch.context() as patch, logged("ERROR") as messages:
        patch.setattr(DistillationTrainer, "compute_loss", failing)
        options += ("--resume", tmp_path / "layers", "--recover")
        result = invoke("prune", model, "-o", tmp_path / "b", *options)
    assert result.exit_code == 1
    # a state is of use where there is room, and of none where it is not finite
    states = tmp_path / "layers" / "recovery"
    assert states.exists() == (failure != "divergence")
    assert "is pruned, and not recovered" in " ".join(result.output.split())
    (message,) = messages
    assert "The recovery has failed" in message
    found, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in "ba"
    )
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert not PruningReport.load(tmp_path / "b").recovery
    assert verify(tmp_path / "b").problems == []


@pytest.mark.parametrize(
    "steps, message",
    [
        (lambda: [RecoveryModifier()], "has none"),
        (lambda: [RecoveryModifier(), PRUNERS["sparse"]()], "has none"),
        (
            lambda: [
                PRUNERS["sparse"](),
                QuantizationModifier(targets=["Linear"], scheme="W8A8"),
                RecoveryModifier(),
            ],
            "quantise afterwards",
        ),
        (
            lambda: [PRUNERS["sparse"](), RecoveryModifier(epochs=0)],
            "train nothing",
        ),
        (
            lambda: [PRUNERS["sparse"](), RecoveryModifier(report_to="wand")],
            "take one of none",
        ),
        (
            lambda: [PRUNERS["sparse"](), RecoveryModifier(teacher="no/such/model")],
            "no/such/model",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_run(
    steps: Any, message: str, dense: Path
) -> None:
    model = load_model(str(dense))
    before, config = weights(model), vars(model.config).copy()
    with pytest.raises((ValueError, OSError), match=message):
        run(model, steps(), **DATA)
    assert all(torch.equal(weights(model)[name], before[name]) for name in before)
    assert vars(model.config) == config


def test_a_model_without_a_checkpoint_needs_a_teacher() -> None:
    model = tiny_model("llama")
    model.name_or_path = ""
    with pytest.raises(ValueError, match="name the dense model"):
        run(model, [PRUNERS["sparse"](), RecoveryModifier()], **DATA)


def test_a_model_that_was_trained_since_is_not_taught_by_what_it_was(
    dense: Path, tmp_path: Path
) -> None:
    def tuned() -> PreTrainedModel:
        model = load_model(str(dense))
        model.model.layers[1].self_attn.v_proj.weight.data += 0.01  # as of an adapter
        return model

    def steps(**fields: str) -> list[Any]:
        return [PRUNERS["sparse"](), RecoveryModifier(**SETTINGS, **fields)]

    with pytest.raises(ValueError, match="layers.1.self_attn.v_proj.weight differs"):
        run(tuned(), steps(), **DATA)
    tuned().save_pretrained(tmp_path / "tuned")
    model = run(tuned(), steps(teacher=str(tmp_path / "tuned")), **DATA)
    report = report_of(model)
    assert report is not None
    assert report.recovery[0].teacher == str(tmp_path / "tuned")


def test_a_teacher_of_another_vocabulary_is_refused_before_the_run(
    dense: Path, tmp_path: Path
) -> None:
    larger = tiny_model("llama")
    larger.resize_token_embeddings(larger.config.vocab_size + 8)
    larger.save_pretrained(tmp_path / "larger")
    model = load_model(str(dense))
    before = weights(model)
    step = RecoveryModifier(teacher=str(tmp_path / "larger"))
    with pytest.raises(ValueError, match="has a vocabulary of"):
        run(model, [PRUNERS["sparse"](), step], **DATA)
    assert all(torch.equal(weights(model)[name], before[name]) for name in before)


def test_weights_on_disk_are_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "get_max_memory", lambda: {"cpu": 20_000})
    model = loading.load_to_prune(str(dense), offload_folder=tmp_path)
    with pytest.raises(ValueError, match="weights are on a disk"):
        run(model, [PRUNERS["sparse"](), RecoveryModifier()], **DATA)


def test_sequences_of_different_lengths_are_refused(dense: Path) -> None:
    rows = [{"input_ids": [2] * n, "attention_mask": [1] * n} for n in (5, 7, 9)]
    with pytest.raises(ValueError, match="5 to 9 tokens"):
        run(
            load_model(str(dense)),
            [PRUNERS["sparse"](), RecoveryModifier()],
            dataset=Dataset.from_list(rows),
        )


def test_padded_sequences_are_refused(dense: Path) -> None:
    tokens = calibration(samples(6, 12))
    masks = [[1] * 12] * 5 + [[1] * 9 + [0] * 3]
    padded = tokens.remove_columns("attention_mask").add_column("attention_mask", masks)
    with pytest.raises(ValueError, match="1 of 6 calibration sequences are padded"):
        run(
            load_model(str(dense)),
            [PRUNERS["sparse"](), RecoveryModifier()],
            dataset=padded,
        )


def test_other_inputs_than_text_are_refused(dense: Path) -> None:
    tokens = calibration(samples(6, 12))
    placed = tokens.add_column("position_ids", [list(range(12))] * 6)
    with pytest.raises(ValueError, match="have position_ids, and RecoveryModifier"):
        run(
            load_model(str(dense)),
            [PRUNERS["sparse"](), RecoveryModifier()],
            dataset=placed,
        )


def test_sequences_are_cut_where_the_toolkit_cuts_them(dense: Path) -> None:
    tokens = samples(20, 12)
    found = []
    for data in (
        {"dataset": calibration(tokens), "max_seq_length": 8},
        {"dataset": calibration(tokens[:, :8])},
    ):
        model = load_model(str(dense))
        run(model, [PRUNERS["sparse"](), RecoveryModifier(**SETTINGS)], **data)
        report = report_of(model)
        assert report is not None
        assert report.recovery[0].calibration.seq_len == 8
        found.append(weights(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [("llama", (1, 12), "1 sequence is too little"), ("gpt2", (4, 65), "64 positions")],
)
def test_data_that_cannot_be_trained_on_are_refused_before_the_run(
    family: str, shape: tuple[int, int], message: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        run(
            model,
            [PRUNERS["sparse"](), RecoveryModifier()],
            dataset=calibration(samples(*shape)),
        )
    assert all(torch.equal(weights(model)[name], before[name]) for name in before)


def test_the_state_of_a_training_goes_when_its_model_is_saved(
    dense: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    states = tmp_path / "states"
    step = RecoveryModifier(**SETTINGS, resume_dir=str(states))
    model = pruned(dense, PRUNERS["sparse"](), step)
    state = last_state(states)
    assert state is not None, "the checkpoint is not written yet"
    again, faster = load_model(str(dense)), SETTINGS | {"rate": 0.1}
    before = weights(again)
    with pytest.raises(ValueError, match=r"recipe: rate was .* and is 0\.1"):
        run(
            again,
            [
                PRUNERS["sparse"](),
                RecoveryModifier(**faster, resume_dir=str(states)),
            ],
        )
    assert all(torch.equal(weights(again)[name], before[name]) for name in before)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        pipeline.save(model, tiny_tokenizer, tmp_path / "file" / "out")
    assert last_state(states) == state
    pipeline.save(model, tiny_tokenizer, tmp_path / "out")
    assert not states.exists()
