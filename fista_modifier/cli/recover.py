"""``fista-prune recover``: train a pruned checkpoint towards the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fista_modifier import pipeline
from fista_modifier.checkpoint.verification import verify as verify_checkpoint
from fista_modifier.cli.console import console, errors_as_messages
from fista_modifier.cli.options import (
    BatchSize,
    CalibrationText,
    Samples,
    Seed,
    SequenceLength,
    TextColumn,
)
from fista_modifier.cli.tables import trained_sentence
from fista_modifier.cli.verify import check
from fista_modifier.distributed import leave_ranks
from fista_modifier.models.classes import weightless_model
from fista_modifier.models.experts import linearize_weightless
from fista_modifier.models.limits import check_length, longest_sequence
from fista_modifier.models.loading import load_config, load_model, load_tokenizer
from fista_modifier.pruning.results import Calibration
from fista_modifier.recovery.checks import check_pruned, check_teacher
from fista_modifier.recovery.recover import pruned_operators
from fista_modifier.recovery.recover import recover as train
from fista_modifier.recovery.resume import forget
from fista_modifier.recovery.sharding import check_shardable
from fista_modifier.recovery.training import Training

__all__ = ["recover"]


def recover(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a pruned checkpoint")],
    teacher: Annotated[
        str,
        typer.Option(help="the dense model that was pruned, a folder or a hub id"),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="folder for the trained checkpoint; with --overwrite it may be "
            "CHECKPOINT",
        ),
    ],
    dataset: CalibrationText = "allenai/c4",
    text_column: TextColumn = None,
    samples: Samples = 128,
    seq_len: SequenceLength = None,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    epochs: Annotated[
        float, typer.Option(min=0, help="how often each sequence is seen")
    ] = Training.epochs,
    rate: Annotated[
        float,
        typer.Option(
            min=0,
            help="the highest learning rate, as a share of an operator's mean kept "
            "weight; it rises at first, then falls",
        ),
    ] = Training.rate,
    piece_len: Annotated[
        int,
        typer.Option(
            min=2,
            help="tokens of the longest sequence that is trained on; longer ones are "
            "cut into equal pieces, for more steps",
        ),
    ] = Training.piece_length,
    report_to: Annotated[
        str,
        typer.Option(help="the tracker that is sent the loss: wandb, tensorboard, …"),
    ] = Training.report_to,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="keep no activations for the backward pass: less memory, more time",
        ),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="under torchrun, let each process hold a part of the weights (FSDP), "
            "for models that one device has no room for",
        ),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="folder that keeps the state of the training until it is finished; "
            "the same command goes on from it"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what is in the output folder")
    ] = False,
) -> None:
    """
    Train what pruning kept in CHECKPOINT towards the dense model's predictions.

    Zeros stay zeros, and smaller models stay as small as they are. The result is a
    checkpoint like any other. One of sixteen sequences is not trained on, to see
    whether the training helped. Under torchrun, the processes share the sequences.
    """
    with errors_as_messages():
        kept = [resume, Path(teacher), Path(dataset)]
        pipeline.check_output(output, overwrite, kept, [str(checkpoint)])
        training = Training(
            epochs,
            rate,
            batch_size,
            gradient_checkpointing,
            seed,
            piece_len,
            report_to,
        )
        report = check_pruned(checkpoint)
        check_teacher(checkpoint, teacher)
        tokenizer = load_tokenizer(str(checkpoint))
        config = load_config(str(checkpoint))
        length = seq_len or longest_sequence(config)
        skeleton = weightless_model(config)
        check_length(skeleton, length)
        pruned_operators(skeleton, report.operators, linearize_weightless)
        if shard:
            check_shardable(skeleton, resume)
        data = Calibration(dataset, samples, length, seed, text_column)
        tokens = pipeline.calibration_tokens(data, tokenizer)
        model = load_model(str(checkpoint))
        report = train(
            model,
            load_model(teacher),
            tokens,
            report,
            data,
            training,
            resume=resume,
            sharded=shard,
            teacher_name=teacher,
        )
        if leave_ranks().rank:
            return  # the first rank has all weights, and writes them
        model.to("cpu")
        pipeline.save(model, tokenizer, output, report)
        check(verify_checkpoint(output), output)
        if resume is not None:
            forget(resume)
        console.print(f"Wrote [bold]{escape(str(output))}[/].")
        console.print(trained_sentence(report.recovery[-1]))
