"""The options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "BatchSize",
    "CalibrationText",
    "DtypeName",
    "LoadDtype",
    "ModelName",
    "ResultsFile",
    "Samples",
    "Seed",
    "SequenceLength",
    "TableFile",
    "TextColumn",
    "TokenLimit",
    "comma_separated",
]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

ModelName = Annotated[str, typer.Argument(help="folder of a checkpoint, or hub id")]
LoadDtype = Annotated[DtypeName, typer.Option(help="dtype to load the weights in")]
BatchSize = Annotated[int, typer.Option(min=1, help="sequences in a forward pass")]

# of the commands that calibrate
CalibrationText = Annotated[
    str,
    typer.Option(
        help="calibration data: a .txt, .jsonl, .json, .csv or .parquet file (also "
        ".gz), a folder of save_to_disk, or a hub id"
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        help="column of --dataset that holds text or chats (default: text, messages "
        "or conversations)"
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="calibration sequences")]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        min=1, help="tokens in a sequence (default: the model's maximum, at most 2048)"
    ),
]
Seed = Annotated[int, typer.Option(help="seed of the choice of sequences")]

# of the commands that evaluate
TokenLimit = Annotated[
    int | None, typer.Option(min=1, help="use only so many tokens of each text")
]
ResultsFile = Annotated[
    Path | None,
    typer.Option("--json", help="keep results here, and continue what is there"),
]
TableFile = Annotated[Path | None, typer.Option(help="write the table here, too")]


def comma_separated(names: str) -> list[str]:
    """
    :param names: with commas between
    :return: the names
    """
    return [name.strip() for name in names.split(",") if name.strip()]
