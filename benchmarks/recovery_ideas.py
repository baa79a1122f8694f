"""
What could be added to the recovery: sharpness-aware steps, the training of norms and
embeddings, masks that move once under the loss of the whole model, and longer or
shorter pieces of the sequences. The model is pruned to 2:4 by one method, and recovered
in one epoch on the same tokens.

    python benchmarks/recovery_ideas.py --model DIR --calibration FILE.txt \\
        --text FILE.txt FILE.txt --work FOLDER --out benchmarks/results/recovery-ideas

What OUT.json has already is not measured again.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import inputs
import torch
from compare import common_arguments, common_setup, measurement, resumed
from compressed_tensors.utils import patch_attr
from datasets import Dataset
from recovery import keep, train
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fista_modifier import pipeline
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import pruner
from fista_modifier.evaluation.results import Results, Row
from fista_modifier.models.loading import load_model
from fista_modifier.models.targets import IGNORE, TARGETS, find_operators
from fista_modifier.recovery import training
from fista_modifier.recovery.distillation import DistillationTrainer, mean_divergence
from fista_modifier.recovery.training import Training
from fista_modifier.solver import pattern_of

Weights = dict[str, Tensor]


class SharpnessAware(DistillationTrainer):
    """
    Steps from the gradient at a worse point near by (Foret et al., 2021): up the
    gradient, so far that the loss would rise by a share of itself.
    """

    share: float

    def training_step(self, model: Any, inputs: Any, num_items: Any = None) -> Tensor:
        """Take the gradient at the worse point. The loss is that of the better one."""
        loss = super().training_step(model, inputs, num_items)
        weights = [*self._trained().values()]
        squares = sum(float(one.grad.square().sum()) for one in weights)
        length = self.share * float(loss) / max(squares, 1e-30)
        with torch.no_grad():
            rise = [length * one.grad for one in weights]
            torch._foreach_add_(weights, rise)
        model.zero_grad()
        super().training_step(model, inputs, num_items)
        with torch.no_grad():
            torch._foreach_sub_(weights, rise)
        return loss


class Slightly(SharpnessAware):
    """The loss would rise by a twentieth."""

    share = 0.05


class Further(SharpnessAware):
    """The loss would rise by a fifth."""

    share = 0.2


class WithNorms(DistillationTrainer):
    """Norms are trained, too."""

    names: tuple[str, ...] = ("norm",)

    def __init__(self, model: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        for name, parameter in model.named_parameters():
            if any(one in name for one in self.names):
                parameter.requires_grad_(True)
        super().__init__(model, *arguments, **options)


class WithEmbeddings(WithNorms):
    """Norms and embeddings are trained, too."""

    names = ("norm", "embed")


PIECES = {
    "whole sequences": sys.maxsize,
    **{f"pieces of {length} tokens": length for length in (1024, 256, 128)},
}
TRAINERS: dict[str, type[DistillationTrainer] | None] = {
    "not recovered": None,
    "as it is": DistillationTrainer,
    "sharpness-aware, 5 %": Slightly,
    "sharpness-aware, 20 %": Further,
    "norms, too": WithNorms,
    "norms and embeddings, too": WithEmbeddings,
    "masks moved before": DistillationTrainer,
    **dict.fromkeys(PIECES, DistillationTrainer),
}
MOVED = "masks moved before"
MOST = 50
"""The masks of one group in so many move."""
SMALL = 0.01
"""The share of its minimum at which a new weight begins."""


def main() -> None:
    parser = common_arguments(__doc__ or "", 32, 4096)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", default="fista-fast")
    parser.add_argument("--ideas", nargs="+", default=[*TRAINERS], choices=TRAINERS)
    args = parser.parse_args()
    results = resumed(args, common_setup(args) | {"method": args.method})
    for idea in args.ideas:
        if not results.find(method=idea):
            results.add({"method": idea} | measured(args, idea))
        inputs.show(args.out.with_suffix(".md"), table(args, results))


def measured(args: argparse.Namespace, idea: str) -> Row:
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / f"{Path(args.model).name}-{args.method}"
    tokens = inputs.calibration(args)
    if not file.exists():
        prune = pruner(args.method, pattern_of("2:4"))
        dense = load_model(args.model, "float32")
        keep(dense, pipeline.load_tokenizer(args.model), tokens, prune=prune, file=file)
    again = partial(recovered, weights=load_file(file), idea=idea, teacher=args.model)
    return measurement(args).run(again, tokens)


def recovered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Dataset,
    *,
    weights: Weights,
    idea: str,
    teacher: str,
) -> pipeline.PruningRun:
    """Train the pruned weights with an idea."""
    operators = find_operators(model, TARGETS, IGNORE)
    for operator in operators:
        operator.save(weights[operator.name])
    if idea == MOVED:
        for name, weight in moved(model, calibration, weights, teacher).items():
            model.get_submodule(name).weight.data.copy_(weight)
    if (kind := TRAINERS[idea]) is None:
        return pipeline.PruningRun(model)
    settings = Training(piece_length=PIECES.get(idea, Training.piece_length))
    with patch_attr(training, "DistillationTrainer", kind):
        return train(model, calibration, teacher, settings)


def moved(
    model: PreTrainedModel, tokens: Dataset, weights: Weights, teacher: str
) -> Weights:
    """
    Let the cheapest kept weight of a group of four change places with its most wanted
    zero, in the fiftieth of the groups where a model of second order of the loss gains
    most. The slope along kept weights counts as zero, which training makes of it. The
    curvatures are the mean squared gradients of sequences, times their length (those of
    tokens, if they are independent). A new weight begins small, as many of them at
    their minima would be far too long a step together.
    """
    dense = load_model(teacher, "float32").eval()
    gradients = {name: torch.zeros_like(one) for name, one in weights.items()}
    curvatures = {name: torch.zeros_like(one) for name, one in weights.items()}
    modules = {name: model.get_submodule(name) for name in weights}
    for ids in tqdm(torch.tensor(tokens["input_ids"]).split(1), desc="Gradients"):
        with torch.no_grad():
            wanted = dense(ids, use_cache=False).logits
        mean_divergence(wanted, model(ids, use_cache=False).logits).backward()
        for name, module in modules.items():
            gradients[name] += module.weight.grad / len(tokens)
            curvatures[name] += module.weight.grad.square() * ids.numel() / len(tokens)
        model.zero_grad()
    found, changed = {}, 0
    for name, weight in weights.items():
        groups = weight.reshape(-1, 4).clone()
        slope = gradients[name].reshape(-1, 4)
        curvature = curvatures[name].reshape(-1, 4) + 1e-20
        zero = groups == 0
        price = curvature * groups.square() / 2
        price, leaves = price.masked_fill(zero, torch.inf).min(-1, keepdim=True)
        limit = groups.gather(-1, leaves).abs()
        step = (-slope / curvature).clamp(-limit, limit)
        gain = -(slope * step + curvature * step.square() / 2)
        gain, comes = gain.masked_fill(~zero, -torch.inf).max(-1, keepdim=True)
        net = gain - price
        least = net.flatten().kthvalue(len(net) - len(net) // MOST).values
        pays = net > least.clamp(min=0)
        value = SMALL * step.gather(-1, comes)
        value = torch.where(pays, value, groups.gather(-1, comes))
        groups.scatter_(-1, comes, value)
        stays = groups.gather(-1, leaves)
        groups.scatter_(-1, leaves, torch.where(pays, torch.zeros_like(stays), stays))
        changed += int(pays.sum())
        found[name] = groups.reshape(weight.shape)
    entries = sum(one.numel() for one in weights.values())
    print(f"{4 * changed / entries:.1%} of the groups have changed")
    return found


def table(args: argparse.Namespace, results: Results) -> str:
    header, rows = ["recovery"], []
    for text in results.rows[0]["perplexity"]:
        header += [text, *inputs.agreement_header(text)]
    for row in results.rows:
        cells, logs = [row["method"]], []
        for text, perplexity in row["perplexity"].items():
            logs.append(math.log(perplexity))
            cells += [f"{logs[-1]:.3f}", *inputs.agreement([row], text)]
        rows.append([*cells, f"{fmean(logs):.3f}"])
    return markdown_table([*header, "mean"], rows) + (
        f"\n\nLn perplexity of {Path(args.model).name} on {args.eval_tokens} tokens of "
        f"each text, and their mean. {inputs.AGREEMENT} The model is pruned to 2:4 by "
        f"{args.method} and recovered in one epoch on the same {args.samples} × "
        f"{args.seq_len} tokens of {Path(args.calibration).name}.\n"
    )


if __name__ == "__main__":
    main()
