"""What ``prune`` and ``plan`` are asked for: a pattern, smaller sizes, or a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe

from fista_modifier.evaluation.methods import recipe as pruning_recipe
from fista_modifier.models.targets import IGNORE
from fista_modifier.modifiers.recipes import read_recipe
from fista_modifier.modifiers.steps import HOW_TO_RUN
from fista_modifier.modifiers.structured import (
    FASPPruningModifier,
    SPAPPruningModifier,
    StructuredModifier,
    StructuredPreset,
)
from fista_modifier.pruning.channels import Structure
from fista_modifier.recovery.modifier import RecoveryModifier
from fista_modifier.solver import pattern_of

__all__ = ["Method", "Request"]

Method = Literal["fista", "fasp", "spap"]
STRUCTURED: dict[Method, type[StructuredModifier]] = {
    "fasp": FASPPruningModifier,
    "spap": SPAPPruningModifier,
}
STATES = "recovery"
"""The folder, in that of the finished layers, of the states of the training."""


@dataclass(frozen=True)
class Request:
    """
    The options that say what is to be done to a model.

    :param method: the method that prunes, if there is no recipe
    :param pattern: "n:m" or a sparsity such as "0.5", for FISTAPruner
    :param recipe: a recipe's file, in place of all options but those in
        ``HOW_TO_RUN``
    :param sparsity: share of the decoder layers' parameters that is to leave
    :param structures: what leaves; None for the default
    :param multiple_of: the number of channels stays a multiple of this; None for the
        default
    :param recover: whether to train what pruning keeps; None for the default, which is
        to train smaller models where that can be, but with ``preset: paper``
    :param options: the modifier's fields that other options give; None for those that
        are left out
    :param seed: seed of the order of the sequences in a recovery
    """

    method: Method = "fista"
    pattern: str | None = None
    recipe: Path | None = None
    sparsity: float | None = None
    structures: Sequence[str] | None = None
    multiple_of: int | None = None
    recover: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """The modifier's fields that options give."""
        return {
            name: value for name, value in self.options.items() if value is not None
        }

    @property
    def is_open(self) -> bool:
        """True if no option says what is to be done to the model."""
        named = (self.pattern, self.recipe, *self._sizes.values())
        undecided = self.method == "fista" and not self.recover
        return undecided and all(value is None for value in named)

    @property
    def recovers(self) -> bool:
        """Whether what pruning keeps is trained, if it can be."""
        if self.recover is not None:
            return self.recover
        return self.method in STRUCTURED and self.fields.get("preset") != "paper"

    def without_recovery_if(self, check: Callable[[], None]) -> tuple[Request, str]:
        """
        Leave out a recovery that nobody has insisted on, if it cannot be. Then the
        layers are trained instead.

        :param check: raises a ``ValueError`` if the model cannot be trained
        :return: the request to go on with, and why there is no recovery; nothing if
            there is one, or nobody expects one
        """
        if self.recovers and self.recover is None:
            try:
                check()
            except ValueError as error:
                return replace(self, recover=False), (
                    "There is no recovery, and layers are trained as by --no-recover: "
                    f"{error}"
                )
        return self, ""

    def read(self) -> Recipe:
        """
        Return the recipe that the options ask for.

        :return: what is to be done to the model
        :raises ValueError: if options contradict one another, or if one of them makes
            no sense
        :raises FileNotFoundError: if there is no such recipe
        """
        pruning = self._pruning()
        if not self.recovers:
            return pruning
        if self.recipe is not None:
            raise ValueError(
                "--recover can be given only with --pattern or --method: put a "
                f"RecoveryModifier behind the step that prunes in {self.recipe}, as in "
                "recipes/fista-2of4-recovery.yaml"
            )
        layers = self.fields.get("resume_dir")
        states = layers and str(Path(layers) / STATES)
        recovery = RecoveryModifier(resume_dir=states, seed=self.seed)
        return read_recipe([*pruning.modifiers, recovery])

    def _pruning(self) -> Recipe:
        if self.method in STRUCTURED:
            return read_recipe(self._structured())
        given = [name for name, value in self._sizes.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} can be given only with --method fasp or spap, "
                "which take channels out of the model; for zeros in place, write "
                "--pattern (such as 2:4 or 0.5), and for a recipe set its fields"
            )
        if (self.pattern is None) == (self.recipe is None):
            raise ValueError(
                "give either --pattern (such as 2:4 or 0.5) or --recipe, or --method "
                "fasp or spap with --sparsity"
            )
        if self.pattern is not None:
            pattern = pattern_of(self.pattern)
            return read_recipe(pruning_recipe("fista", pattern, **self.fields))
        assert self.recipe is not None  # one of the two is given
        return self._of_file(self.recipe)

    @property
    def _sizes(self) -> dict[str, Any]:
        return {
            "--sparsity": self.sparsity,
            "--structure": self.structures or None,
            "--multiple-of": self.multiple_of,
        }

    def _structured(self) -> Modifier:
        option = f"--method {self.method}"
        for name, value in (("--pattern", self.pattern), ("--recipe", self.recipe)):
            if value is not None:
                raise ValueError(
                    f"{name} contradicts {option}: leave one of them out. To take "
                    "channels out and then prune to a pattern, write a recipe such as "
                    "recipes/fasp-2of4.yaml"
                )
        if self.sparsity is None:
            raise ValueError(
                f"{option} needs --sparsity, the share of the decoder layers' "
                "parameters that is to leave, such as 0.2"
            )
        if not 0 < self.sparsity < 1:
            raise ValueError(
                f"--sparsity {self.sparsity:g} is no share between 0 and 1, such as 0.2"
            )
        preset = self.fields.get("preset", "default")
        if preset not in get_args(StructuredPreset):
            raise ValueError(
                f"--preset {preset} is one of FISTAPruner's: with {option} it can be "
                f"{' or '.join(get_args(StructuredPreset))}"
            )
        if "warm_start" in self.fields:
            raise ValueError(
                f"--warm-start is where FISTA starts, and {option} has no FISTA: "
                "leave it out"
            )
        for name in self.structures or ():
            if name not in get_args(Structure):
                raise ValueError(
                    f"--structure {name} is none of {', '.join(get_args(Structure))}"
                )
        chosen: dict[str, Any] = {"sparsity": self.sparsity}
        if self.recovers and preset != "paper":  # layers need no training before it
            chosen["reconstruction_epochs"] = 0
        if self.structures:
            chosen["structures"] = list(dict.fromkeys(self.structures))
        if self.multiple_of is not None:
            chosen["multiple_of"] = self.multiple_of
        return STRUCTURED[self.method](ignore=IGNORE, **chosen, **self.fields)

    def _of_file(self, file: Path) -> Recipe:
        recipe = read_recipe(file)
        if method := [name for name in self.fields if name not in HOW_TO_RUN]:
            raise ValueError(
                f"{_options(method)} can be given only with --pattern or --method: set "
                f"{', '.join(method)} in {file}"
            )
        for name, value in self.fields.items():
            having = [one for one in recipe.modifiers if name in type(one).model_fields]
            if not having:
                raise ValueError(
                    f"{_options([name])} has no effect: no modifier of {file} has the "
                    f"field {name}"
                )
            if name == "layers" and len(having) > 1:
                raise ValueError(
                    f"--layers needs a recipe with one step that prunes, and {file} "
                    f"has {len(having)}: each step needs all layers of the one before"
                )
            for number, modifier in enumerate(having, 1):
                shared = name != "resume_dir" or len(having) == 1
                own = value if shared else _folder_of_step(value, number, modifier)
                setattr(modifier, name, own)
        return recipe


def _options(fields: Iterable[str]) -> str:
    """Return the options that give a modifier's fields."""
    return ", ".join(
        "--" + name.removesuffix("_dir").replace("_", "-") for name in fields
    )


def _folder_of_step(folder: str, number: int, modifier: Modifier) -> str:
    """Return the folder of finished work of one step of a recipe that has several."""
    return str(Path(folder) / f"{number}-{type(modifier).__name__}")
