"""The options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fista_modifier.cli.method import Method
from fista_modifier.pruning.corrected import ErrorCorrection
from fista_modifier.pruning.presets import Preset
from fista_modifier.solver import WarmStart

__all__ = [
    "BatchSize",
    "CalibrationText",
    "DtypeName",
    "ErrorCorrectionName",
    "LoadDtype",
    "MethodName",
    "ModelName",
    "MultipleOf",
    "PatternName",
    "PresetName",
    "RecipeFile",
    "Recovers",
    "RemovedShare",
    "ResultsFile",
    "Samples",
    "Seed",
    "SequenceLength",
    "Structures",
    "TableFile",
    "TextColumn",
    "TokenLimit",
    "WarmStartName",
    "comma_separated",
]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

ModelName = Annotated[str, typer.Argument(help="folder of a checkpoint, or hub id")]
LoadDtype = Annotated[DtypeName, typer.Option(help="dtype to load the weights in")]
BatchSize = Annotated[int, typer.Option(min=1, help="sequences in a forward pass")]

# Options of the commands that say what is to be done to a model.
PatternName = Annotated[
    str | None,
    typer.Option(help="'2:4' keeps 2 of every 4 weights; '0.5' zeroes any half"),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(help="llm-compressor recipe (YAML), in place of --pattern"),
]
MethodName = Annotated[
    Method,
    typer.Option(
        help="'fista' sets weights to zero, as --pattern says; 'fasp' and 'spap' "
        "take channels out of the model, which becomes smaller"
    ),
]
RemovedShare = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        help="for 'fasp' and 'spap': share of the decoder layers' parameters that "
        "is to leave, such as 0.2",
    ),
]
Structures = Annotated[
    list[str] | None,
    typer.Option(
        "--structure",
        help="for 'fasp' and 'spap': what leaves, 'mlp' (channels of MLPs) or "
        "'heads' (whole ones), and for 'fasp' 'value_dims' (dimensions of values, as "
        "zeros in place); once for each (default: 'mlp')",
    ),
]
MultipleOf = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="for 'fasp' and 'spap': an MLP's number of channels stays a multiple of "
        "this (default: 64)",
    ),
]
Recovers = Annotated[
    bool | None,
    typer.Option(
        "--recover/--no-recover",
        help="after pruning, train what is left towards the dense model, for one epoch "
        "on the calibration data; the device needs room for training the whole model "
        "(default: with 'fasp' and 'spap', where that can be, but with 'paper'; "
        "otherwise they train what is left of each layer)",
    ),
]
PresetName = Annotated[
    Preset | None,
    typer.Option(
        help="'best' is more accurate, 'fast' is faster, 'paper' is the method as "
        "published; 'fasp' and 'spap' have 'default' and 'paper' (default: 'default')"
    ),
]
ErrorCorrectionName = Annotated[
    ErrorCorrection | None,
    typer.Option(
        "--error-correction",
        help="whose errors an operator makes up for, if not as in the preset: "
        "nobody's, those inside its layer, or those of the whole model",
    ),
]
WarmStartName = Annotated[
    WarmStart | None,
    typer.Option("--warm-start", help="where FISTA starts, if not as in the preset"),
]

# Options of the commands that calibrate.
CalibrationText = Annotated[
    str,
    typer.Option(
        help="calibration data: a .txt, .jsonl, .json, .csv, .tsv or .parquet file "
        "(also .gz), a folder of save_to_disk, or a hub id"
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

# Options of the commands that evaluate.
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
    Split names that are separated by commas.

    :param names: the names in one string
    :return: the names, without empty ones
    """
    return [name.strip() for name in names.split(",") if name.strip()]
