"""Tables and sentences that the commands print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from operator import attrgetter
from typing import Any

from rich.markup import escape
from rich.table import Table

from fista_modifier.channels.groups import Members
from fista_modifier.checkpoint.verification import OperatorCheck, Verification
from fista_modifier.cost import (
    KEPT,
    Device,
    LayerShape,
    finished_memory,
    layer_cost,
    peak_device_memory,
    peak_host_memory,
    recorded_memory,
    recovery_memory,
    seconds,
)
from fista_modifier.evaluation.formatting import with_error
from fista_modifier.evaluation.perplexity import Perplexity
from fista_modifier.modifiers.forecast import Forecast
from fista_modifier.pruning.channels import ChannelPlan
from fista_modifier.pruning.corrected import CorrectedProcedure
from fista_modifier.pruning.results import (
    OperatorResult,
    PruningReport,
    ReconstructionResult,
    RecoveryResult,
    mean_error,
)

__all__ = [
    "channel_table",
    "cost_table",
    "layer_table",
    "memory_sentence",
    "operator_table",
    "pattern_table",
    "perplexity_table",
    "recovery_sentence",
    "removal_sentence",
    "removal_table",
    "trained_sentence",
    "verification_table",
]


def operator_table(results: Sequence[OperatorResult]) -> Table:
    """
    Return the table of pruned operators.

    :param results: the results of all operators of a model
    :return: one line for each kind of operator (q_proj, up_proj, …), and a total
    """
    table = Table(title="Pruned operators")
    table.add_column("operator")
    for heading in (
        "count",
        "weights",
        "zeros",
        "error, warm start",
        "error",
        "solver, s",
    ):
        table.add_column(heading, justify="right")
    by_kind = sorted(results, key=lambda result: result.kind)
    for kind, group in groupby(by_kind, key=lambda result: result.kind):
        table.add_row(kind, *_summary(list(group)))
    table.add_section()
    table.add_row("all", *_summary(results))
    table.caption = "error of the solver: mean over operators of ‖W*X* − WX‖ / ‖WX‖"
    return table


def _summary(results: Sequence[OperatorResult]) -> list[str]:
    weights = sum(result.shape[0] * result.shape[1] for result in results)
    zeros = sum(result.zeros for result in results)
    return [
        str(len(results)),
        f"{weights / 1e6:.2f} M",
        f"{100 * zeros / weights:.2f} %",
        f"{mean_error(results, attrgetter('relative_start_error')):.4f}",
        f"{mean_error(results, attrgetter('relative_error')):.4f}",
        f"{sum(result.seconds for result in results):.1f}",
    ]


def removal_table(results: Sequence[OperatorResult]) -> Table:
    """
    Return the table of operators that lost channels.

    :param results: the results of the operators that read the channels that left
    :return: one line for each kind of operator and size, and a total
    """
    table = Table(title="Operators that lost channels")
    table.add_column("operator")
    table.add_column("size", no_wrap=True)
    for heading in ("count", "weights", "error, not restored", "error", "s"):
        table.add_column(heading, justify="right")

    def kind(result: OperatorResult) -> tuple[str, str]:
        return result.kind, result.pattern

    by_kind = sorted(results, key=kind)
    for (name, size), group in groupby(by_kind, key=kind):
        table.add_row(escape(name), size, *_removal_summary(list(group)))
    table.add_section()
    table.add_row("all", "", *_removal_summary(results))
    table.caption = (
        "of the operators that read what left; error: mean over them of "
        "‖W*X* − WX‖ / ‖WX‖"
    )
    return table


def _removal_summary(results: Sequence[OperatorResult]) -> list[str]:
    summary = _summary(results)
    return summary[:2] + summary[3:]


def removal_sentence(report: PruningReport) -> str:
    """
    Say how many parameters have left a model.

    :param report: the report of the model
    :return: the shares that have left and that are zeros in place, and the sizes that
        the configuration has now
    """
    assert report.removed_share is not None
    sentence = (
        f"{100 * report.removed_share:.2f} % of the decoder layers' parameters have "
        "left the model"
    )
    if report.sizes:
        sentence += f"; its configuration now has {escape(_listed(report.sizes))}"
    if report.zeroed_share:
        sentence += (
            f"; {100 * report.zeroed_share:.2f} % are zeros in place, which make it no "
            "smaller"
        )
    return f"{sentence}."


def layer_table(results: dict[str, ReconstructionResult]) -> Table:
    """
    Return the table of reconstructed layers.

    :param results: the results of the layers, by their names
    :return: one line for each layer
    """
    table = Table(title="Reconstructed layers")
    table.add_column("layer")
    for heading in ("steps", "rate", "error before", "error", "s"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            str(result.steps),
            "" if result.rate is None else f"{result.rate:.3g}",
            f"{result.start_error:.4f}",
            f"{result.error:.4f}",
            f"{result.seconds:.1f}",
        )
    table.caption = (
        "error: of the layer's output, relative to each token and feature, over every "
        "sixteenth batch"
    )
    return table


def perplexity_table(measured: Sequence[tuple[str, Perplexity]], text: str) -> Table:
    """
    Return the table of the perplexities of models.

    :param measured: name and perplexity of each model
    :param text: name of the text that they were measured on
    :return: one line for each model
    """
    table = Table(title=f"Perplexity on {text}")
    table.add_column("model")
    for heading in ("perplexity", "nats/token", "tokens"):
        table.add_column(heading, justify="right")
    for name, result in measured:
        value = with_error(result.value, result.stderr)
        table.add_row(name, value, f"{result.nll:.4f}", str(result.tokens))
    return table


def verification_table(verification: Verification) -> Table:
    """
    Return the table of verified operators.

    :param verification: what was found in a checkpoint
    :return: one line for each kind of operator and pattern, and a total
    """
    table = Table(title="Verified operators")
    table.add_column("operator")
    for heading in ("pattern", "count", "weights", "zeros", "failed"):
        table.add_column(heading, justify="right")

    def kind(check: OperatorCheck) -> tuple[str, str]:
        return check.name.rpartition(".")[2], check.pattern

    by_kind = sorted(verification.operators, key=kind)
    for (name, pattern), group in groupby(by_kind, key=kind):
        checks = list(group)
        entries = sum(check.entries for check in checks)
        zeros = sum(check.zeros for check in checks)
        table.add_row(
            escape(name),
            escape(pattern),
            str(len(checks)),
            f"{entries / 1e6:.2f} M",
            f"{100 * zeros / entries:.2f} %" if entries else "",
            str(sum(check.problem is not None for check in checks)),
        )
    entries = sum(check.entries for check in by_kind)
    zeros = sum(check.zeros for check in by_kind)
    table.add_section()
    table.add_row(
        "all",
        "",
        str(len(by_kind)),
        f"{entries / 1e6:.2f} M",
        f"{100 * zeros / entries:.2f} %" if entries else "",
        str(len(verification.failures)),
    )
    return table


def pattern_table(forecast: Forecast) -> Table:
    """
    Return the table of the patterns that operators will have.

    :param forecast: the forecast of a modifier that sets weights to zero
    :return: one line for each pattern, and a total
    """
    table = Table(title="Patterns")
    table.add_column("pattern")
    for heading in ("operators", "weights", "share", "zeros"):
        table.add_column(heading, justify="right")
    total = sum(pattern.weights for pattern in forecast.patterns)
    for pattern in forecast.patterns:
        name, about = pattern.name, ""
        if pattern.by_data:
            name, about = f"from the data, around {name}", "about "
        table.add_row(
            escape(name),
            str(pattern.operators),
            f"{pattern.weights / 1e6:.2f} M",
            f"{100 * pattern.weights / total:.1f} %",
            f"{about}{100 * pattern.zeros / pattern.weights:.2f} %",
        )
    table.add_section()
    about = "about " if any(one.by_data for one in forecast.patterns) else ""
    table.add_row(
        "all",
        str(sum(pattern.operators for pattern in forecast.patterns)),
        f"{total / 1e6:.2f} M",
        "100.0 %",
        f"{about}{100 * forecast.sparsity:.2f} %",
    )
    table.caption = (
        f"these operators hold {100 * forecast.share_of_layers:.1f} % of the decoder "
        "layers' weights"
    )
    return table


def channel_table(plan: ChannelPlan) -> Table:
    """
    Return the table of the channels that will leave.

    :param plan: the plan of the channels that leave
    :return: one line for each kind of group and number of channels
    """
    table = Table(title="Channels that leave")
    table.add_column("of")
    table.add_column("read by")
    for heading in ("groups", "before", "after"):
        table.add_column(heading, justify="right")
    counts = Counter(
        (
            f"{', '.join(_kinds(one.group.producers))}: {one.group.kind}",
            ", ".join(_kinds(one.group.consumers)),
            one.group.size,
            one.keep,
        )
        for plans in plan.groups.values()
        for one in plans
    )
    for (producers, consumers, before, after), count in counts.items():
        table.add_row(
            escape(producers), escape(consumers), str(count), str(before), str(after)
        )
    sizes = {".".join(path): value for path, value in plan.changes}
    caption = (
        f"{100 * plan.removed:.2f} % of the decoder layers' parameters leave the model"
    )
    if sizes:
        caption += f"; its configuration then has {_listed(sizes)}"
    if plan.zeroed:
        caption += f"; {100 * plan.zeroed:.2f} % become zeros in place"
    table.caption = escape(caption)
    return table


def _kinds(members: Sequence[Members]) -> list[str]:
    return [operator.name.rpartition(".")[2] for operator, _ in members]


def _listed(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def cost_table(
    shape: LayerShape,
    samples: int,
    procedure: CorrectedProcedure,
    device: Device,
    devices: int,
) -> Table:
    """
    Return the table of the predicted operations.

    :param shape: the shape of the model's layers
    :param samples: number of calibration sequences
    :param procedure: what is done to a layer
    :param device: the kind of device that prunes
    :param devices: number of such devices
    :return: one line for each phase, and the predicted time of the whole run
    """
    table = Table(
        title=f"{shape.layers} layers, {shape.parameters / 1e9:.2f} G weights"
    )
    table.add_column("phase")
    table.add_column("Tflop in a layer", justify="right")
    table.add_column("share", justify="right")
    cost = layer_cost(shape, samples, procedure)
    for field in fields(cost):
        value = getattr(cost, field.name)
        share = f"{100 * value / cost.total:.0f} %"
        table.add_row(field.name, f"{value / 1e12:.3f}", share)
    hours = seconds(cost, shape, procedure, device, devices) / 3600
    time = f"{hours:.2f} hours" if hours > 0.1 else f"{60 * hours:.2f} minutes"
    table.caption = (
        f"at least {time} on {devices} such device"
        + ("s" if devices > 1 else "")
        + ", at half of its published peak"
    )
    if shape.estimate:
        table.caption += escape(
            f". Coarser than usual: the layer could not be watched ({shape.estimate}), "
            "so each operator is taken for a stage of its own, and attention for full"
        )
    return table


def memory_sentence(
    shape: LayerShape,
    samples: int,
    procedure: CorrectedProcedure,
    device: Device,
    kept: float = KEPT,
    *,
    offload_hessians: bool = False,
) -> str:
    """
    Say how much memory a run is predicted to take, and whether the device has it.

    :param shape: the shape of the model's layers
    :param samples: number of calibration sequences
    :param procedure: what is done to a layer
    :param device: the kind of device that prunes
    :param kept: share of the weights that pruning leaves
    :param offload_hessians: the modifier's field
    :return: the sentence
    """
    on_device = peak_device_memory(
        shape, procedure, offload_hessians=offload_hessians, kept=kept
    )
    fits = "which fits" if on_device < device.memory else "which does [bold]not[/] fit"
    less = peak_device_memory(shape, procedure, offload_hessians=True, kept=kept)
    if on_device >= device.memory > less:
        fits += f" ({less / 1e9:.1f} GB with offload_hessians: true, which does)"
    return (
        f"About {on_device / 1e9:.1f} GB on a device of {device.memory / 1e9:.0f} GB, "
        f"{fits}, and {peak_host_memory(shape, samples, procedure) / 1e9:.1f} GB of "
        f"main memory ({recorded_memory(shape, samples, procedure) / 1e9:.1f} GB of it "
        "activations, which activations_dir keeps on disk), weights and activations "
        f"being 16 bits wide. On disk resume_dir takes up to "
        f"{finished_memory(shape) / 1e9:.1f} GB, and the checkpoint up to "
        f"{2 * shape.parameters / 1e9:.1f} GB."
    )


def recovery_sentence(shape: LayerShape, device: Device) -> str:
    """
    Say how much memory a recovery is predicted to take, and whether the device has it.

    :param shape: the shape of the model's layers
    :param device: the kind of device that trains
    :return: the sentence
    """
    needed = recovery_memory(shape)
    fits = "which fits" if needed < device.memory else "which does [bold]not[/] fit"
    return (
        f"The recovery takes about {needed / 1e9:.1f} GB on a device of "
        f"{device.memory / 1e9:.0f} GB, {fits}, beside the activations and logits of a "
        "batch. Its time is not predicted."
    )


def trained_sentence(recovery: RecoveryResult) -> str:
    """
    Say what a recovery came to.

    :param recovery: the result
    :return: the sentence
    """
    when = " before more was pruned" if recovery.pruned_after else ""
    return (
        f"Recovery{when}: mean KL to the teacher {recovery.start_divergence:.4f} → "
        f"{recovery.divergence:.4f} nats per token, on {recovery.held_out_tokens} "
        f"tokens that it was not trained on, after {recovery.seconds:.0f} s and "
        f"{recovery.steps} steps."
    )
