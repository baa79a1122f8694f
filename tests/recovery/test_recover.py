"""The recovery of a whole pruned model."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TWO_PROCESSES, invoke
from families import checkpoint, tiny_model
from logs import logged
from runs import calibration, samples
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from fista_modifier.models.loading import load_model
from fista_modifier.pruning.results import Calibration, PruningReport, RecoveryResult
from fista_modifier.recovery import training as module
from fista_modifier.recovery.recover import recover, with_recovery
from fista_modifier.recovery.resume import last_state
from fista_modifier.recovery.training import Training, held_out, in_pieces
from fista_modifier.solver import NofM

SEQUENCES, LENGTH = 20, 12
DATA = Calibration("text.txt", SEQUENCES, LENGTH, 0)
FAST = Training(epochs=3, rate=0.025, batch_size=2)
TWO_OF_FOUR = ("--pattern", "2:4", "--preset", "fast")
SMALLER = (
    "--method",
    "fasp",
    "--sparsity",
    "0.3",
    "--multiple-of",
    "4",
    "--no-recover",
)


@pytest.fixture
def pruned(model: Path, text: Path, tmp_path: Path) -> Callable[..., Path]:
    def prune(*arguments: object, of: Path = model) -> Path:
        output = tmp_path / "pruned"
        small = ("--dataset", text, "--samples", 4, "--seq-len", 16)
        result = invoke("prune", of, "-o", output, *small, *arguments)
        assert result.exit_code == 0, result.output
        return output

    return prune


def tokens(seed: int = 0) -> Any:
    return calibration(samples(SEQUENCES, LENGTH, seed))


def run(
    folder: Path, teacher: Path, training: Training = FAST, resume: Path | None = None
) -> tuple[PreTrainedModel, PruningReport]:
    model = load_model(str(folder))
    report = recover(
        model,
        load_model(str(teacher)),
        tokens(),
        PruningReport.load(folder),
        DATA,
        training,
        resume=resume,
        teacher_name=str(teacher),
    )
    return model, report


def divergence(dense: PreTrainedModel, pruned: PreTrainedModel, ids: Tensor) -> float:
    with torch.no_grad():
        one, other = (
            model(ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
            for model in (dense, pruned)
        )
    return float(kl_div(other, one, log_target=True, reduction="batchmean"))


def test_only_kept_weights_are_trained_and_they_come_nearer(
    model: Path, pruned: Callable[..., Path]
) -> None:
    folder = pruned(*TWO_OF_FOUR)
    before, dense = load_model(str(folder)), load_model(str(model))
    after, report = run(folder, model)
    train, held = (torch.tensor(part["input_ids"]) for part in held_out(tokens()))
    assert len(held) == 1
    assert divergence(dense, after, train) < 0.8 * divergence(dense, before, train)
    [recovery] = report.recovery
    assert recovery.start_divergence == pytest.approx(divergence(dense, before, held))
    assert recovery.divergence == pytest.approx(divergence(dense, after, held))
    assert recovery.steps == 30
    assert (recovery.tokens, recovery.held_out_tokens) == (19 * LENGTH, LENGTH - 1)
    names = {f"{operator.name}.weight" for operator in report.operators}
    assert len(names) == 14
    old = before.state_dict()
    for name, value in after.state_dict().items():
        assert torch.equal(value, old[name]) == (name not in names), name
        if name in names:
            assert torch.equal(value == 0, old[name] == 0)
            assert NofM(2, 4).holds(value)
    assert all(parameter.requires_grad for parameter in after.parameters())


def test_half_precision_is_trained_in_float32_and_stored_as_it_was(
    pruned: Callable[..., Path], model: Path
) -> None:
    """In bfloat16 steps this small would be lost."""
    folder = pruned(*TWO_OF_FOUR, "--dtype", "bfloat16")
    before = load_model(str(folder))
    after, report = run(folder, model, Training(rate=1e-3))
    old = before.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    value = after.state_dict()[name]
    assert value.dtype == torch.bfloat16
    changed = (value != old[name]) & (old[name] != 0)
    assert 0 < float(changed.float().mean()) < 0.5
    counted = {f"{one.name}.weight": one.zeros for one in report.operators}
    assert counted[name] == int((value == 0).sum())


def test_a_smaller_model_is_trained_as_it_is(
    pruned: Callable[..., Path], model: Path, text: Path, tmp_path: Path
) -> None:
    folder, output = pruned(*SMALLER), tmp_path / "recovered"
    result = recovered(folder, model, text, output)
    assert result.exit_code == 0, result.output
    report = PruningReport.load(output)
    before, after = load_model(str(folder)), load_model(str(output))
    assert after.config.intermediate_size == before.config.intermediate_size < 48
    old = before.state_dict()
    assert {one.name.rpartition(".")[2] for one in report.operators} == {"down_proj"}
    for name, value in after.state_dict().items():
        trained = name.endswith("_proj.weight")  # all of the layers, not only these
        assert torch.equal(value, old[name]) == (not trained), name
    [recovery] = report.recovery
    assert recovery.divergence < recovery.start_divergence
    assert invoke("verify", output).exit_code == 0


def test_a_training_of_one_step_trains(
    model: Path, pruned: Callable[..., Path]
) -> None:
    folder = pruned(*TWO_OF_FOUR)
    before = load_model(str(folder)).state_dict()
    after, report = run(folder, model, Training(batch_size=SEQUENCES))
    [recovery] = report.recovery
    assert recovery.steps == 1
    assert recovery.divergence < recovery.start_divergence
    for one in report.operators:
        name = f"{one.name}.weight"
        assert not torch.equal(after.state_dict()[name], before[name])


def test_a_tracker_gets_the_loss_and_changes_nothing(
    model: Path,
    pruned: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, training = pruned(*TWO_OF_FOUR), replace(FAST, epochs=1)
    plain, _ = run(folder, model, training)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tracked"))
    tracked, _ = run(folder, model, replace(training, report_to="tensorboard"))
    for name, value in plain.state_dict().items():
        assert torch.equal(tracked.state_dict()[name], value), name
    events = EventAccumulator(str(tmp_path / "tracked"))
    events.Reload()
    losses = [one.value for one in events.Scalars("train/loss")]
    assert len(losses) == 10
    assert all(0 < loss < 1 for loss in losses)


@pytest.mark.parametrize(("longest", "size"), [(4, 4), (5, 4), (7, 6), (11, 6)])
def test_pieces_are_of_one_length_and_in_order(longest: int, size: int) -> None:
    whole = tokens()
    pieces = in_pieces(whole, longest)
    assert pieces.column_names == whole.column_names
    for column in whole.column_names:
        expected = [row[:size] for row in whole[column]]
        assert list(pieces[column])[:: LENGTH // size] == expected
        assert sum(pieces[column], []) == sum(whole[column], [])


def test_what_does_not_make_a_piece_is_left_out() -> None:
    whole = calibration(samples(2, 11, 0))
    row, other = whole["input_ids"]
    assert row[0] != other[0]
    pieces = in_pieces(whole, 4)
    assert list(pieces["input_ids"])[:3] == [row[:3], row[3:6], row[6:9]]
    whole = tokens()
    assert in_pieces(whole, LENGTH)["input_ids"] == whole["input_ids"]


def test_a_token_that_begins_each_sequence_begins_each_piece() -> None:
    ids = samples(3, 12)
    ids[:, 0] = 7
    pieces = in_pieces(calibration(ids), 5)
    rows = ids.tolist()
    expected = [
        [7, *row[start : start + 3]] for row in rows for start in range(1, 10, 3)
    ]
    assert list(pieces["input_ids"]) == expected
    assert all(mask == [1] * 4 for mask in pieces["attention_mask"])


def test_a_training_on_pieces_is_that_on_shorter_sequences(
    model: Path, pruned: Callable[..., Path]
) -> None:
    folder, length = pruned(*TWO_OF_FOUR), LENGTH // 3
    training = replace(FAST, piece_length=length)
    after, report = run(folder, model, training)
    [recovery] = report.recovery
    assert recovery.sequence_length == length
    assert recovery.steps == 3 * len(range(0, 19 * 3, 2))
    assert (recovery.tokens, recovery.held_out_tokens) == (19 * LENGTH, LENGTH - 1)
    # those that are judged by are whole
    _, held = held_out(tokens())
    expected = divergence(
        load_model(str(model)), after, torch.tensor(held["input_ids"])
    )
    assert recovery.divergence == pytest.approx(expected)
    other, _ = run(folder, model)
    name = report.operators[0].name
    weights = (one.get_submodule(name).weight for one in (after, other))
    assert not torch.equal(*weights)


def test_one_command_does_what_two_do(
    model: Path, pruned: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    seed, output = ("--seed", 5), tmp_path / "recovered"
    folder = pruned(*TWO_OF_FOUR, *seed)
    small = ("--dataset", text, "--samples", 4, "--seq-len", 16, *seed)
    result = invoke("recover", folder, "--teacher", model, "-o", output, *small)
    assert result.exit_code == 0, result.output
    expected = (output / "model.safetensors").read_bytes()
    [told] = PruningReport.load(output).recovery
    shutil.rmtree(folder)
    folder = pruned(*TWO_OF_FOUR, *seed, "--recover")
    assert (folder / "model.safetensors").read_bytes() == expected
    [recovery] = PruningReport.load(folder).recovery
    assert recovery == replace(told, seconds=recovery.seconds)


def test_a_pruned_model_is_pruned_and_recovered_again(
    model: Path, pruned: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """The report is of all that became of the dense model."""
    folder = pruned("--method", "fasp", "--sparsity", "0.3", "--multiple-of", 4)
    first, output = PruningReport.load(folder), tmp_path / "again"
    small = ("--dataset", text, "--samples", 4, "--seq-len", 16, "--recover")
    with logged() as messages:
        result = invoke("prune", folder, "-o", output, *TWO_OF_FOUR, *small)
    assert result.exit_code == 0, result.output
    assert any("the teacher, is a pruned model itself" in one for one in messages)
    report = PruningReport.load(output)
    assert report.model == first.model
    assert report.removed_share == first.removed_share
    assert (report.smaller, len(report.sparse)) == (first.smaller, 14)
    assert [one.teacher for one in report.recovery] == [str(model), str(folder)]
    assert invoke("verify", output).exit_code == 0


def test_dimensions_of_values_that_are_zero_stay_zero(
    pruned: Callable[..., Path], model: Path, text: Path, tmp_path: Path
) -> None:
    folder = pruned(*SMALLER, "--structure", "mlp", "--structure", "value_dims")
    output = tmp_path / "recovered"
    result = recovered(folder, model, text, output)
    assert result.exit_code == 0, result.output
    before, after = (load_model(str(one)).state_dict() for one in (folder, output))
    for name in ("v_proj", "o_proj"):
        name = f"model.layers.1.self_attn.{name}.weight"
        assert not torch.equal(after[name], before[name])
        assert bool((before[name] == 0).any())
        assert torch.equal(after[name] == 0, before[name] == 0)
    assert invoke("verify", output).exit_code == 0


def test_experts_are_trained_too(
    pruned: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerBase,
    text: Path,
    tmp_path: Path,
) -> None:
    dense, output = tmp_path / "mixture", tmp_path / "recovered"
    shutil.copytree(checkpoint("mixtral", vocab_size=len(tiny_tokenizer)), dense)
    tiny_tokenizer.save_pretrained(dense)
    folder = pruned(*TWO_OF_FOUR, of=dense)
    result = recovered(folder, dense, text, output)
    assert result.exit_code == 0, result.output
    before, after = load_model(str(folder)), load_model(str(output))
    name = "model.layers.1.mlp.experts.down_proj"
    one, other = (model.get_parameter(name) for model in (before, after))
    assert torch.equal(one == 0, other == 0)
    assert not torch.equal(one, other)
    assert invoke("verify", output, "--pattern", "2:4").exit_code == 0


class Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 17:
            raise KeyboardInterrupt


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(
    pruned: Callable[..., Path],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, states = pruned(*TWO_OF_FOUR), tmp_path / "states"
    whole, _ = run(folder, model)
    with monkeypatch.context() as patch:
        trainer = module.DistillationTrainer

        def killed(*arguments: Any, callbacks: list[Any], **options: Any) -> Any:
            return trainer(*arguments, callbacks=[*callbacks, Killed()], **options)

        patch.setattr(module, "DistillationTrainer", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, model, resume=states)
    last = last_state(states)
    assert last is not None and last.name == "checkpoint-15"
    (states / "checkpoint-18").mkdir()  # of a process killed while it wrote
    again, report = run(folder, model, resume=states)
    assert report.recovery[0].steps == 30
    expected = whole.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name]), name
    finished, _ = run(folder, model, resume=states)  # as after a full disk
    assert all(
        torch.equal(value, expected[name])
        for name, value in finished.state_dict().items()
    )
    with pytest.raises(ValueError, match="rate was 0.025 and is 0.001"):
        run(folder, model, Training(3, 1e-3, 2), resume=states)


def test_a_folder_with_another_training_is_left_alone(
    pruned: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "states" / "checkpoint-500"
    foreign.mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoint-500 of some other training"):
        run(pruned(*TWO_OF_FOUR), model, resume=foreign.parent)
    assert foreign.exists()


def test_a_report_tells_of_operators_that_were_not_trained(
    pruned: Callable[..., Path],
) -> None:
    report = PruningReport.load(pruned(*TWO_OF_FOUR))
    first, *others = report.operators
    recovery = RecoveryResult("", DATA, 1, 1, 1.0, 0.1, 1, 1, 1.0, 0.5, 1.0)
    trained = with_recovery(report, recovery, {first.name: 7})
    assert trained.operators == [replace(first, zeros=7), *others]


def test_a_training_that_makes_it_worse_is_told(
    pruned: Callable[..., Path], model: Path
) -> None:
    with logged() as told:
        run(pruned(*TWO_OF_FOUR), model, Training(rate=3.0))
    assert any("rose from" in one and "a lower rate" in one for one in told)


def test_a_report_of_another_model_is_refused(
    pruned: Callable[..., Path], model: Path
) -> None:
    report = PruningReport.load(pruned(*TWO_OF_FOUR))
    other = tiny_model("opt")
    with pytest.raises(ValueError, match="OPTForCausalLM does not have"):
        recover(other, tiny_model("opt"), tokens(), report, DATA, FAST)


def recovered(folder: Path, teacher: Path, text: Path, output: Path, *more: object):
    common = ("--teacher", teacher, "-o", output, "--dataset", text)
    small = ("--samples", 18, "--seq-len", 16, "--rate", 0.01)
    return invoke("recover", folder, *common, *small, *more)


def test_the_command_writes_a_checkpoint_like_any_other(
    pruned: Callable[..., Path], model: Path, text: Path, tmp_path: Path
) -> None:
    folder, output = pruned(*TWO_OF_FOUR), tmp_path / "recovered"
    states = tmp_path / "states"
    options = ("--resume", states, "--gradient-checkpointing", "--piece-len", 8)
    result = recovered(folder, model, text, output, *options)
    assert result.exit_code == 0, result.output
    assert not states.exists()
    before, after = PruningReport.load(folder), PruningReport.load(output)
    assert after.operators == before.operators
    [recovery] = after.recovery
    assert recovery.teacher == str(model)
    assert recovery.calibration == Calibration(str(text), 18, 16, 0)
    assert (recovery.tokens, recovery.held_out_tokens) == (17 * 16, 15)
    assert (recovery.sequence_length, recovery.steps) == (8, 2 * 17)
    told = " ".join(result.output.split())
    values = f"{recovery.start_divergence:.4f} → {recovery.divergence:.4f}"
    assert f"mean KL to the teacher {values} nats per token" in told
    card = (output / "README.md").read_text()
    assert values in card and "towards the predictions of the dense model" in card
    assert "without retraining" not in card and str(tmp_path) not in card
    one, other = (
        json.loads((each / "config.json").read_text()) for each in (folder, output)
    )
    assert one == other
    dense, pruned_model, loaded = (
        AutoModelForCausalLM.from_pretrained(each) for each in (model, folder, output)
    )
    for operator in after.operators:
        weight = loaded.get_submodule(operator.name).weight
        groups = (weight.view(-1, 4) != 0).sum(-1)
        assert bool((groups == 2).all())
    ids = torch.randint(2, 258, (3, 16), generator=torch.Generator().manual_seed(5))
    assert divergence(dense, loaded, ids) != divergence(dense, pruned_model, ids)
    assert invoke("verify", output).exit_code == 0
    assert invoke("report", output).exit_code == 0

    again = recovered(output, model, text, output)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    again = recovered(output, model, text, output, "--overwrite")
    assert again.exit_code == 0, again.output
    first, second = PruningReport.load(output).recovery
    assert first == recovery
    assert second.start_divergence == pytest.approx(first.divergence, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_processes_that_hold_parts_train_what_those_with_wholes_do(
    family: str,
    pruned: Callable[..., Path],
    text: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """Tied embeddings, and weights that are in×out, too."""
    model = tmp_path / "dense"
    shutil.copytree(checkpoint(family, vocab_size=len(tiny_tokenizer)), model)
    tiny_tokenizer.save_pretrained(model)
    folder = pruned(*TWO_OF_FOUR, of=model)
    command = [*TWO_PROCESSES, "-m", "fista_modifier.cli", "recover", str(folder)]
    command += ["--teacher", str(model), "--dataset", str(text)]
    command += ["--samples", "9", "--seq-len", "16", "--rate", "0.02"]
    trained = []
    for name, options in (("wholes", []), ("parts", ["--shard"])):
        output = tmp_path / name
        arguments = [*command, "-o", str(output), *options]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        trained.append(load_file(output / "model.safetensors"))
    wholes, parts = trained
    before = load_file(folder / "model.safetensors")
    assert any(not torch.equal(wholes[name], before[name]) for name in before)
    torch.testing.assert_close(parts, wholes, rtol=0, atol=1e-6)
    for name, weight in parts.items():
        assert torch.equal(weight == 0, before[name] == 0), name


@pytest.mark.parametrize(
    "world, more, message",
    [("1", [], "there is one"), ("2", ["--resume", "states"], "leave one of them")],
)
def test_what_cannot_be_spread_is_refused(
    world: str,
    more: list[str],
    message: str,
    pruned: Callable[..., Path],
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = pruned(*TWO_OF_FOUR)
    monkeypatch.setenv("WORLD_SIZE", world)
    result = recovered(folder, model, text, tmp_path / "out", "--shard", *more)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_what_cannot_be_trained_is_refused_before_weights_are_read(
    pruned: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerBase,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mixture with --shard, and a report of another model."""
    dense, output = tmp_path / "mixture", tmp_path / "recovered"
    shutil.copytree(checkpoint("mixtral", vocab_size=len(tiny_tokenizer)), dense)
    tiny_tokenizer.save_pretrained(dense)
    folder = pruned(*TWO_OF_FOUR, of=dense)
    for weights in (dense, folder):
        (weights / "model.safetensors").write_bytes(b"nothing can be read here")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = recovered(folder, dense, text, output, "--shard")
    assert result.exit_code == 1
    assert "MixtralForCausalLM has experts" in " ".join(result.output.split())
    report = folder / "pruning_report.json"
    report.write_text(report.read_text().replace("self_attn", "attention"))
    result = recovered(folder, dense, text, output)
    assert result.exit_code == 1
    assert "the report of another model" in " ".join(result.output.split())


def test_reloaded_logits_are_those_in_memory(
    pruned: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    after, _ = run(pruned(*TWO_OF_FOUR), model)
    after.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(samples()).logits, after(samples()).logits)


def test_what_cannot_be_recovered_is_a_message_and_leaves_nothing(
    pruned: Callable[..., Path],
    model: Path,
    text: Path,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    folder, output = pruned(*TWO_OF_FOUR), tmp_path / "recovered"
    other, opt = tmp_path / "other", tmp_path / "opt"
    shutil.copytree(checkpoint("llama"), other)
    shutil.copytree(checkpoint("opt", vocab_size=len(tiny_tokenizer)), opt)
    for each in (other, opt):
        tiny_tokenizer.save_pretrained(each)

    def refused(words: str, *more: object, of: Path = folder, by: Path = model) -> None:
        result = recovered(of, by, text, output, *more)
        assert result.exit_code == 1, result.output
        assert words in " ".join(result.output.split())
        assert not output.exists()

    refused("vocabulary of 64 tokens", by=other)
    refused("is a OPTForCausalLM and the pruned model a Llama", by=opt)
    refused("cannot teach itself", by=folder)
    refused("no model at", by=tmp_path / "missing")
    refused("has no pruning_report.json", of=model, by=other)
    refused("1 sequence is too little", "--samples", 1)
    refused("use a longer text", "--samples", 4000)
    refused("train nothing", "--epochs", 0)
    refused("take one of none, ", "--report-to", "wand")
    refused("set TENSORBOARD_LOGGING_DIR", "--report-to", "tensorboard")
    refused("is replaced in the end", "--resume", output / "states")
    refused("have no next token", "--seq-len", 1)
    over = recovered(folder, model, text, model, "--overwrite")
    assert over.exit_code == 1
    assert "is replaced in the end" in " ".join(over.output.split())

    report = PruningReport.load(folder)
    config = json.loads((folder / "config.json").read_text())
    quantisation = {"config_groups": {"group_0": {}}, "quant_method": "x"}
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantisation})
    )
    refused("is quantised")
    (folder / "config.json").write_text(json.dumps(config))
    for storage, fix in (
        ("sparse-24-bitmask", "fista-prune unpack"),
        ("dense-legacy", "prune with --format dense"),
    ):
        content = json.loads((folder / "pruning_report.json").read_text())
        content["storage_format"] = storage
        (folder / "pruning_report.json").write_text(json.dumps(content))
        refused(fix)
    report.save(folder)


def test_mixed_precision_ends_with_the_training(
    pruned: Callable[..., Path], model: Path
) -> None:
    """As where there is an accelerator: bfloat16 would be seen in the divergence."""

    class Mixed(Training):
        def arguments(self, folder: Path, kept: bool, bf16: bool) -> Any:
            return super().arguments(folder, kept, True)

    folder = pruned(*TWO_OF_FOUR)
    after, report = run(folder, model, Mixed(rate=0.01))
    held = torch.tensor(held_out(tokens())[1]["input_ids"])
    expected = divergence(load_model(str(model)), after, held)
    assert report.recovery[0].divergence == pytest.approx(expected, rel=1e-5)
