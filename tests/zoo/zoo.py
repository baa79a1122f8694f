"""
Tiny models of many families, and what becomes of each.
``PYTHONPATH=tests python tests/zoo/zoo.py`` writes docs/families.md.

``configurations.json`` has for each the arguments of ``AutoConfig.for_model``, its auto
class, and where text alone will not do a batch: shapes, or values, of its arguments.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from logs import logged
from runs import calibration, run
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, PreTrainedModel

from fista_modifier import FISTAPruningModifier

HERE = Path(__file__).resolve().parent
SAMPLES, LENGTH, VOCABULARY = 6, 16, 60
IMAGE_SAMPLES = 4
TABLE = HERE.parents[1] / "docs" / "families.md"
CASES: dict[str, dict[str, Any]] = json.loads(
    (HERE / "configurations.json").read_text(encoding="utf-8")
)
NOTES = {
    r"(\d+) % of the decoder layers' weights belong": "{} % in no linear operator",
    r"(\d+) operators stay dense, as several layers share": "{} operators are shared",
    r"(\S+) stays dense: its weight is read by": "weights read by another module",
    r"(\S+) stays dense: the model runs it several": "layers that run several times",
    r"(\S+) stays dense: the calibration data do not": "operators that no data reach",
    r"The calibration data do not reach (\d+) layers": "{} layers that no data reach",
}
"""
The notes in the table of families on weights that stay dense, by patterns of the
warnings. A {} in a note stands for what the pattern's group matches.
"""


@dataclass
class Specimen:
    """
    A tiny model of a family.

    :param name: in ``configurations.json``
    """

    name: str

    @cached_property
    def case(self) -> dict[str, Any]:
        return CASES[self.name]

    @cached_property
    def checkpoint(self) -> tempfile.TemporaryDirectory[str]:
        """Weights so large that attention is not uniform"""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                self.case["model_type"], **self.case["config"]
            )
            model = self.auto_class.from_config(config)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
                else:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        folder = tempfile.TemporaryDirectory(prefix=f"{self.name}-")
        model.save_pretrained(folder.name)
        return folder

    @property
    def auto_class(self) -> Any:
        return getattr(transformers, self.case["auto_class"])

    def load(self, folder: Path | None = None) -> PreTrainedModel:
        """
        :param folder: of a checkpoint; that of the dense model if left out

        "eager" in its entry is for a family of which transformers' other kernels
        compute something else (Doge's see later tokens).
        """
        eager = {"attn_implementation": "eager"} if self.case.get("eager") else {}
        return self.auto_class.from_pretrained(
            folder or self.checkpoint.name, **eager
        ).eval()

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """arguments of the model, one sequence each"""
        if "batch" not in self.case:
            generator = torch.Generator().manual_seed(0)
            shape = (SAMPLES, LENGTH)
            tokens = torch.randint(2, VOCABULARY, shape, generator=generator)
            ones = torch.ones(1, LENGTH, dtype=torch.long)
            return [{"input_ids": row[None], "attention_mask": ones} for row in tokens]
        return [
            {
                name: _tensor(name, value, torch.Generator().manual_seed(seed))
                for name, value in self.case["batch"].items()
            }
            for seed in range(IMAGE_SAMPLES)
        ]

    @property
    def together(self) -> list[dict[str, Tensor]]:
        """The same sequences in as few batches as can be."""
        if "batch" in self.case:
            return self.batches
        names = self.batches[0]
        return [
            {name: torch.cat([one[name] for one in self.batches]) for name in names}
        ]

    @property
    def dataset(self) -> Dataset | DataLoader[Any]:
        if "batch" not in self.case:
            return calibration(torch.cat([one["input_ids"] for one in self.batches]))
        loader: DataLoader[Any] = DataLoader(
            self.batches,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=lambda batch: batch,
        )
        return loader

    @property
    def tokens(self) -> int | None:
        """of all batches, if they are text"""
        if "input_ids" not in self.batches[0]:
            return None
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def pruned(self, **fields: Any) -> Pruned:
        """The model after a run that may take the pipeline that the family needs."""
        model = self.load()
        modifier = FISTAPruningModifier(
            **{"mask_structure": "2:4", "ignore": ["re:.*lm_head$"]} | fields
        )
        pipeline = {"pipeline": "basic"} if self.case.get("basic") else {}
        with logged() as messages:
            run(model, modifier, dataset=self.dataset, **pipeline)
        return Pruned(self, model, modifier, messages)


@dataclass
class Pruned:
    """A specimen after pruning, and what was said of it."""

    specimen: Specimen
    model: PreTrainedModel
    modifier: FISTAPruningModifier
    messages: list[str]

    @property
    def row(self) -> str:
        """of the table of families"""
        case = self.specimen.case
        given = "text" if "batch" not in case else ", ".join(_kinds(case["batch"]))
        how = "`basic`" if case.get("basic") else ""
        share = f"{100 * self.modifier.share_of_weights:.0f} %"
        count = str(len(self.modifier.results))
        name = type(self.model).__name__
        cells = [self.specimen.name, name, given, how, count, share, self.notes]
        return f"| {' | '.join(cells)} |"

    @property
    def notes(self) -> str:
        found: Counter[str] = Counter()
        for message in self.messages:
            for pattern, note in NOTES.items():
                if match := re.search(pattern, message):
                    found[note.format(match[1])] += 1
        dense = ", ".join(found)
        no_data = sum(not result.tokens for result in self.modifier.results)
        magnitude = f"{no_data} operators without data, by magnitude" if no_data else ""
        return "; ".join(note for note in (dense, magnitude) if note)


def refusal(name: str) -> str:
    """:return: the row of a family that cannot be pruned, with the reason"""
    case = CASES[name]
    reason = case["refused"]["reason"]
    return f"| {name} | {case['auto_class']} | {reason} |"


def _tensor(name: str, value: Any, generator: torch.Generator) -> Tensor:
    """By a description: a shape and what fills it, or the values themselves"""
    if not isinstance(value, dict):
        return torch.tensor(value)
    shape = value["shape"]
    if "image_token_id" in value:
        image = value["image_token_id"]
        tokens = torch.randint(2, min(58, image), shape, generator=generator)
        tokens[:, 1 : 1 + value["image_tokens"]] = image
        return tokens
    if value.get("fill") in ("ones", "zeros"):
        filled: Tensor = getattr(torch, value["fill"])(shape, dtype=torch.long)
        return filled
    if "input_ids" in name:
        return torch.randint(2, VOCABULARY, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _kinds(batch: dict[str, Any]) -> list[str]:
    names = " ".join(batch)
    kinds = {"text": "input_ids", "images": "pixel", "sound": "input_features"}
    found = [kind for kind, part in kinds.items() if part in names]
    return found + (["sound"] if "input_values" in names else [])


HEAD = """# Families

This page says what happens to tiny models of {count} families in the tests
(`tests/zoo`). Each model is pruned to 2:4. The tests check that it has exactly that
pattern, that every operator was given all of its data, and that the errors are those of
plain runs of the model. Then the model is saved, read back with the same outputs, and
verified.

"Share" is what the pruned operators hold of all matrices in the model's layers. A
pipeline is named where llm-compressor cannot trace the family: it then needs
`oneshot(pipeline="basic")`, which runs the model as a whole. The last column says what
stays dense, and why.

| family | class | data | pipeline | operators | share | what is left |
|---|---|---|---|---|---|---|
"""
REFUSED = """
## Refused

| family | class | reason |
|---|---|---|
"""


def main() -> None:
    rows, refused = [], []
    for name, case in CASES.items():
        if "refused" in case:
            refused.append(refusal(name))
        else:
            rows.append(Specimen(name).pruned(preset="fast").row)
    table = HEAD.format(count=len(rows)) + "\n".join(rows) + "\n"
    TABLE.write_text(table + REFUSED + "\n".join(refused) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
