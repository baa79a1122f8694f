"""The fields of a recipe that say how sparse each operator becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from fista_modifier.distributed import ALONE, Ranks
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.targets import names_matched
from fista_modifier.pruning.owl import Owl
from fista_modifier.solver import SparsityPattern, parse_pattern, pattern_of

__all__ = ["DENSE", "PatternFields"]

DENSE = "dense"
"""The name in ``patterns`` for the pattern of an operator that is not pruned."""


@dataclass(frozen=True)
class PatternFields:
    """
    The fields of a recipe that say how sparse each operator becomes. An operator has
    the pattern of the last entry of ``patterns`` that matches it. If none does, it has
    the default pattern, that of the other fields.

    :param sparsity: sparsity of the default pattern; a list has one for each decoder
        layer
    :param mask_structure: name of the default pattern, or "0:0"
    :param patterns: names of patterns, or "dense", by targets
    :param owl: OWL, which spreads the sparsity over the layers; None spreads it evenly
    :raises ValueError: if the fields contradict one another, or name no pattern
    """

    sparsity: float | list[float] | None
    mask_structure: str = "0:0"
    patterns: Mapping[str, str] | None = None
    owl: Owl | None = None

    def __post_init__(self) -> None:
        for target, name in (self.patterns or {}).items():
            try:
                _named(name)
            except ValueError as error:
                raise ValueError(f"patterns: '{target}': {error}") from None
        if isinstance(self.sparsity, list) and not self.sparsity:
            raise ValueError("sparsity is a list without a value")
        if self.owl is not None:
            self._check_owl()
        if self._has_default:
            for sparsity in self._sparsities:
                if sparsity != 0 or not isinstance(self.sparsity, list):
                    parse_pattern(self.mask_structure, sparsity)

    @property
    def _sparsities(self) -> Sequence[float | None]:
        return self.sparsity if isinstance(self.sparsity, list) else [self.sparsity]

    @property
    def _has_default(self) -> bool:
        given = self.sparsity is not None or self.mask_structure != "0:0"
        return given or not self.patterns

    def _check_owl(self) -> None:
        if not isinstance(self.sparsity, float):
            raise ValueError(
                "sparsity_profile: owl chooses the sparsity of each layer: write the "
                "mean of all layers, for example sparsity: 0.5"
            )
        if self.mask_structure != "0:0":
            raise ValueError(
                "sparsity_profile: owl gives the layers different sparsities, and "
                f"mask_structure '{self.mask_structure}' fixes one: leave out either"
            )

    def before_data(
        self, model: PreTrainedModel, layers: Sequence[DecoderLayer]
    ) -> dict[str, SparsityPattern]:
        """
        Return the pattern of each operator as far as it is known without data.

        :param model: the model that is to be pruned; its weights are not looked at
        :param layers: its layers, with the operators that targets and ignore leave
        :return: the patterns as in :meth:`of_operators`; where OWL chooses, they have
            the mean of its sparsities
        :raises ValueError: as :meth:`of_operators`, apart from what OWL finds in the
            data
        """
        return _sparse(layers, *self._fields_for(model, layers))

    def chosen_by_data(
        self, model: PreTrainedModel, layers: Sequence[DecoderLayer]
    ) -> set[str]:
        """
        Return the names of the operators whose sparsity OWL chooses.

        :param model: the model that is to be pruned
        :param layers: its layers, with the operators that targets and ignore leave
        :return: the names; none without OWL
        """
        if self.owl is None:
            return set()
        names = {operator.name for layer in layers for operator in layer.operators}
        return names - set(self._entries(model, sorted(names)))

    def of_operators(
        self,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        data: Iterable[dict[str, Any]],
        ranks: Ranks = ALONE,
    ) -> dict[str, SparsityPattern]:
        """
        Return the pattern of each operator.

        :param model: the model that is to be pruned
        :param layers: its layers, with the operators that targets and ignore leave
        :param data: calibration batches, for OWL
        :param ranks: the processes of the run, each with batches of its own
        :return: the patterns by the operators' names; operators that stay dense are
            left out
        :raises ValueError: if an entry of ``patterns`` decides on no operator, if an
            operator has no pattern, if there are more or fewer sparsities than layers,
            or if all operators stay dense
        """
        entries, defaults = self._fields_for(model, layers)
        if self.owl is not None:
            defaults = self._by_owl(self.owl, model, layers, data, ranks)
        return _sparse(layers, entries, defaults)

    def _fields_for(
        self, model: PreTrainedModel, layers: Sequence[DecoderLayer]
    ) -> tuple[dict[str, str], dict[str, SparsityPattern | None]]:
        """
        Return the entries of ``patterns`` by the operators' names, and the default
        patterns by the layers' names.

        :raises ValueError: if an operator has neither
        """
        names = [operator.name for layer in layers for operator in layer.operators]
        entries = self._entries(model, names)
        defaults = self._defaults(layers)
        if missing := [
            operator.name
            for layer in layers
            for operator in layer.operators
            if operator.name not in entries and layer.name not in defaults
        ]:
            raise ValueError(self._without_pattern(missing[0]))
        return entries, defaults

    def _entries(self, model: PreTrainedModel, names: list[str]) -> dict[str, str]:
        """
        Return the pattern's name for each operator that an entry of ``patterns``
        matches, by the operators' names.

        :raises ValueError: if an entry decides on no operator
        """
        deciding: dict[str, str] = {}
        entries = self.patterns or {}
        for target in entries:
            targets = ["Linear", "Conv1D"] if target == "Linear" else [target]
            matched = names_matched(model, targets, names)
            if not matched:
                raise ValueError(
                    f"patterns: '{target}' matches none of the operators that targets "
                    "and ignore leave; use a class name, a module name, or 're:' and a "
                    "pattern"
                )
            deciding |= dict.fromkeys(matched, target)
        if idle := [target for target in entries if target not in deciding.values()]:
            raise ValueError(
                f"patterns: '{idle[0]}' has no effect, as each of its operators is "
                "matched by a later entry, and the last one counts: write it after "
                "those, or leave it out"
            )
        return {name: entries[target] for name, target in deciding.items()}

    def _defaults(
        self, layers: Sequence[DecoderLayer]
    ) -> dict[str, SparsityPattern | None]:
        """
        Return the default pattern of each layer that has one, by the layer's name. None
        stands for a layer that stays dense.
        """
        if not self._has_default:
            return {}
        if isinstance(self.sparsity, list):
            numbered = self._numbered(layers, len(self.sparsity))
            return {
                layer.name: parse_pattern(self.mask_structure, sparsity)
                if sparsity
                else None
                for layer, sparsity in zip(numbered, self.sparsity, strict=True)
            }
        pattern = parse_pattern(self.mask_structure, self.sparsity)
        chosen = layers if self.owl is None else _decoder_layers(layers)
        return {layer.name: pattern for layer in chosen}

    def _numbered(
        self, layers: Sequence[DecoderLayer], count: int
    ) -> Sequence[DecoderLayer]:
        """
        Return the layers that the values of a list of sparsities belong to.

        :raises ValueError: if there are more or fewer values than layers
        """
        decoder_layers = [layer for layer in layers if layer.in_sequence]
        to_prune = _decoder_layers(layers)
        for numbered in (to_prune, decoder_layers):
            if len(numbered) == count:
                return numbered
        raise ValueError(
            f"sparsity has {count} values, and the model has {len(decoder_layers)} "
            f"decoder layers, of which {len(to_prune)} are to be pruned: give one "
            "value for each"
        )

    def _by_owl(
        self,
        owl: Owl,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        data: Iterable[dict[str, Any]],
        ranks: Ranks,
    ) -> dict[str, SparsityPattern | None]:
        assert isinstance(self.sparsity, float)
        chosen = _decoder_layers(layers)
        sparsities = owl.sparsities(self.sparsity, model, chosen, data, ranks)
        return {
            name: parse_pattern(self.mask_structure, sparsity)
            for name, sparsity in sparsities.items()
        }

    def _without_pattern(self, name: str) -> str:
        if self._has_default:
            return (
                f"{name} is in no decoder layer, and sparsity has values for those "
                "only: name its pattern in patterns, or put it on the ignore list"
            )
        return (
            f"patterns has no entry that matches {name}: add one ('{DENSE}' if it is "
            "not to be pruned), or sparsity or mask_structure for all such operators"
        )


def _sparse(
    layers: Sequence[DecoderLayer],
    entries: Mapping[str, str],
    defaults: Mapping[str, SparsityPattern | None],
) -> dict[str, SparsityPattern]:
    """
    Return the patterns of the operators that do not stay dense.

    :raises ValueError: if all of them stay dense
    """
    chosen = {
        operator.name: (
            _named(entries[operator.name])
            if operator.name in entries
            else defaults[layer.name]
        )
        for layer in layers
        for operator in layer.operators
    }
    sparse = {name: pattern for name, pattern in chosen.items() if pattern}
    if not sparse:
        raise ValueError("patterns and sparsity leave all operators dense")
    return sparse


def _named(name: str) -> SparsityPattern | None:
    """Return the pattern that has a name; None for "dense"."""
    return None if name == DENSE else pattern_of(name)


def _decoder_layers(layers: Sequence[DecoderLayer]) -> list[DecoderLayer]:
    """Return the decoder layers that have operators to prune."""
    return [layer for layer in layers if layer.in_sequence and layer.operators]
