"""``fista-prune prune``: prune a model and write its checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, get_args

import typer
from llmcompressor.modifiers import Modifier
from loguru import logger
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fista_modifier import pipeline
from fista_modifier.checkpoint.names import names_on_disk
from fista_modifier.checkpoint.packing import PackedFormat
from fista_modifier.checkpoint.storage import StorageFormat, check_storable
from fista_modifier.cli.console import console, errors_as_messages
from fista_modifier.cli.finish import finish
from fista_modifier.cli.method import Request
from fista_modifier.cli.options import (
    BatchSize,
    CalibrationText,
    DtypeName,
    ErrorCorrectionName,
    MethodName,
    ModelName,
    MultipleOf,
    PatternName,
    PresetName,
    RecipeFile,
    Recovers,
    RemovedShare,
    Samples,
    Seed,
    SequenceLength,
    Structures,
    TextColumn,
    WarmStartName,
)
from fista_modifier.cost import state_files
from fista_modifier.distributed import Ranks, join_ranks
from fista_modifier.files import scratch
from fista_modifier.models.classes import weightless_model
from fista_modifier.models.experts import linearize_weightless
from fista_modifier.models.limits import check_length, longest_sequence
from fista_modifier.models.loading import (
    check_not_packed,
    load_config,
    load_to_prune,
    load_tokenizer,
    weight_bytes,
)
from fista_modifier.models.operators import Operator
from fista_modifier.modifiers.fista import FISTAPruningModifier
from fista_modifier.modifiers.forecast import forecasts
from fista_modifier.pruning.results import Calibration
from fista_modifier.recovery.modifier import RecoveryModifier
from fista_modifier.recovery.obstacles import check_recoverable, free_memory
from fista_modifier.solver.patterns import reported_pattern

__all__ = ["prune"]


def prune(
    model: ModelName,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the pruned checkpoint")
    ],
    pattern: PatternName = None,
    recipe: RecipeFile = None,
    method: MethodName = "fista",
    sparsity: RemovedShare = None,
    structure: Structures = None,
    multiple_of: MultipleOf = None,
    dataset: CalibrationText = "allenai/c4",
    text_column: TextColumn = None,
    samples: Samples = 128,
    seq_len: SequenceLength = None,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    preset: PresetName = None,
    error_correction: ErrorCorrectionName = None,
    warm_start: WarmStartName = None,
    recover: Recovers = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="dtype to load and save the weights in")
    ] = "auto",
    storage_format: Annotated[
        StorageFormat,
        typer.Option(
            "--format",
            help="how the pruned weights are stored; anything but 'dense' is for "
            "engines of 2025, and current vLLM refuses it ('sparse-*' can be unpacked)",
        ),
    ] = "dense",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what is in the output folder")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="folder that keeps finished layers; the same command goes on from it"
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="prune only these decoder layers, such as 0-9, into the --resume "
            "folder; write the checkpoint when all are there"
        ),
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(
            help="folder on a fast disk where recorded activations wait instead of in "
            "main memory"
        ),
    ] = None,
    offload: Annotated[
        Path | None,
        typer.Option(
            help="folder on a fast disk for the weights of the model that half of the "
            "free main memory has no room for"
        ),
    ] = None,
) -> None:
    """
    Prune MODEL and write a checkpoint.

    The calibration is by default that of the paper: 128 sequences of the first shard of
    C4, each as long as the model allows (at most 2048 tokens). Under torchrun, the
    processes prune different layers at the same time (or, with 'best', parts of each).
    """
    with errors_as_messages(), ExitStack() as until_saved:
        ranks = join_ranks()
        kept = (resume, activations, offload, recipe, Path(dataset))
        pipeline.check_output(output, overwrite, kept, [model])
        weights = until_saved.enter_context(weights_on_disk(offload, ranks))
        fields = {
            "preset": preset,
            "error_correction": error_correction,
            "warm_start": warm_start,
            "resume_dir": resume and str(resume),
            "layers": layers,
            "activations_dir": activations and str(activations),
        }
        request = Request(
            method,
            pattern,
            recipe,
            sparsity,
            structure,
            multiple_of,
            recover,
            fields,
            seed,
        )
        wanted = request.read()
        check_format(storage_format, wanted.modifiers)
        tokenizer = load_tokenizer(model)
        config = load_config(model)
        check_not_packed(model, config)
        length = seq_len or longest_sequence(config)
        skeleton = weightless_model(config)
        check_length(skeleton, length)
        # only a run that recovers has to ask the devices for their memory
        request, no_recovery = request.without_recovery_if(
            lambda: check_recoverable(
                config,
                wanted.modifiers,
                processes=ranks.size,
                sequences=samples,
                length=length,
                memory=free_memory(),
                dtype=dtype,
                on_disk=offload is not None,
            )
        )
        if no_recovery and ranks.rank == 0:
            logger.warning(no_recovery)
        wanted = request.read()
        modifiers = wanted.modifiers
        check_packable(storage_format, modifiers, skeleton, length)
        size = weight_bytes(skeleton, dtype)
        written = {output: size}
        if resume is not None:
            trains = any(isinstance(one, RecoveryModifier) for one in modifiers)
            states = state_files(skeleton.num_parameters()) if trains else 0
            written[resume] = size + states
        warn_of_little_space(written)
        data = Calibration(dataset, samples, length, seed, text_column)
        calibration = pipeline.calibration_tokens(data, tokenizer)
        dense = load_to_prune(model, dtype, weights)
        for modifier in modifiers:
            if isinstance(modifier, RecoveryModifier):
                modifier.name_data(data)
        run = pipeline.prune(
            dense, tokenizer, calibration, wanted, batch_size=batch_size
        )
        if run.unfinished:
            console.print(
                f"{len(run.unfinished)} layers are not finished yet, so no checkpoint "
                "was written. When all are in the folder of finished layers, run this "
                "again without choosing layers."
            )
            return
        finish(run, tokenizer, data, output, storage_format)
        check_recovered(modifiers, output)


def check_recovered(modifiers: Iterable[Modifier], output: Path) -> None:
    """
    Say of a checkpoint that is pruned that it was not trained, if it should have been.

    :param modifiers: what was done to the model
    :param output: folder of the checkpoint
    :raises RuntimeError: if a recovery has failed
    """
    for modifier in modifiers:
        if isinstance(modifier, RecoveryModifier) and modifier.failure is not None:
            raise RuntimeError(
                f"{output} is pruned, and not recovered: {modifier.failure}. "
                f"'fista-prune recover {output} --teacher …' tries again"
            )


@contextmanager
def weights_on_disk(folder: Path | None, ranks: Ranks) -> Iterator[Path | None]:
    """
    Give weights an empty folder inside another one, and delete it with them afterwards.

    :param folder: the folder that the user named; None for none
    :param ranks: the processes of the run
    :raises ValueError: if there are several processes
    :raises OSError: if nothing can be written there
    """
    if folder is None:
        yield None
        return
    if ranks.size > 1:
        raise ValueError(
            "--offload is for one process: under torchrun all share one copy of the "
            "model in main memory"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with scratch(folder, "weights-") as weights:
        yield weights


def warn_of_little_space(written: Mapping[Path, int]) -> None:
    """
    Warn of folders that what is written to them may not fit into.

    :param written: the most bytes that are written to each folder
    """
    for folder, size in written.items():
        there = next(
            one for one in (folder, *folder.absolute().parents) if one.exists()
        )
        free = shutil.disk_usage(there).free
        if free < size:
            logger.warning(
                f"{folder} has {free / 1e9:.1f} GB free, and what is written there "
                f"takes up to {size / 1e9:.1f} GB: a full disk ends the run"
            )


def check_format(storage_format: StorageFormat, modifiers: Iterable[Modifier]) -> None:
    """
    Refuse a format that does not suit what is to be done to the model.

    :param storage_format: the format of the pruned weights
    :param modifiers: what is to be done to the model
    :raises ValueError: if the format cannot store the weights that the modifiers make
    """
    if storage_format == "dense":
        return
    for modifier in modifiers:
        if not isinstance(modifier, FISTAPruningModifier):
            raise ValueError(
                f"--format {storage_format} stores what was pruned and nothing else, "
                f"and the recipe has a {type(modifier).__name__}: use --format dense"
            )


def check_packable(
    storage_format: StorageFormat,
    modifiers: Sequence[Modifier],
    model: PreTrainedModel,
    length: int,
) -> None:
    """
    Refuse a format that does not suit the operators of the model or their patterns.

    :param storage_format: the format of the pruned weights
    :param modifiers: what is to be done to the model
    :param model: the model that is to be pruned, on the meta device; its experts become
        linear operators
    :param length: tokens of a calibration sequence
    :raises ValueError: if the format cannot store the model's operators
    """
    if storage_format not in get_args(PackedFormat):
        return
    stored = names_on_disk(model)
    linearize_weightless(model)  # a recipe may name experts, which are fused so far
    only_two_of_four = storage_format == "sparse-24-bitmask"
    if only_two_of_four:
        check_two_of_four(modifiers, model, length)
    for operator in operators_of(modifiers, model):
        check_storable(operator.name, stored, storage_format)
        if only_two_of_four and isinstance(operator.module, Conv1D):
            raise ValueError(
                "sparse-24-bitmask stores weights as out×in, and that of "
                f"{operator.name} ({type(operator.module).__name__}) is in×out: "
                "use --format sparse-bitmask or dense"
            )


def check_two_of_four(
    modifiers: Sequence[Modifier], model: PreTrainedModel, length: int
) -> None:
    """
    Refuse patterns other than 2:4.

    :raises ValueError: naming the first of them
    """
    for forecast in forecasts(modifiers, model.config, length, lambda: model):
        for planned in forecast.patterns:
            if reported_pattern(planned.name).group != (2, 4):
                raise ValueError(
                    f"sparse-24-bitmask stores 2:4 weights, not '{planned.name}': use "
                    "--format sparse-bitmask"
                )


def operators_of(
    modifiers: Iterable[Modifier], model: PreTrainedModel
) -> Iterator[Operator]:
    """Yield the operators that the modifiers of sparse pruning find."""
    for modifier in modifiers:
        if isinstance(modifier, FISTAPruningModifier):
            yield from modifier.find_operators(model)
