"""Mixes the rows of several domains of text by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from peerjax.data.packing import PackedRows, Row
from peerjax.errors import ConfigError


class MixedRows:
    """The rows of several sources, one source after the other, which are read by weight.

    Attributes:
        parts: the sources.
        weights: share of each source in what is read, up to a common factor.
    """

    def __init__(self, parts: Sequence[PackedRows], weights: Sequence[float]):
        self.parts, self.weights = tuple(parts), tuple(weights)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def mix(self) -> list[tuple[range, float]]:
        """Numbers of the rows of each source, and its weight."""
        numbers = map(range, [0, *self._ends[:-1]], self._ends)
        return list(zip(numbers, self.weights, strict=True))

    def __getitem__(self, index: int) -> Row:
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return {**self.parts[which][int(index) - before], "row": np.array(index, np.int32)}


Rows = PackedRows | MixedRows


def mixed_rows(
    weights: Sequence[Any], domains: Sequence[str], rows_of: Callable[[str], PackedRows]
) -> MixedRows:
    """Returns the rows of all domains, to be read by weight.

    Args:
        weights: the field `data.weights`.
        domains: all domains of the text.
        rows_of: function that returns the rows of a domain.

    Raises:
        ConfigError: in the cases of `checked_weights`.
    """
    checked = checked_weights(weights, domains)
    return MixedRows([rows_of(each) for each in domains], [checked[each] for each in domains])


def checked_weights(weights: Sequence[Any], domains: Sequence[str]) -> dict[str, float]:
    """Returns `data.weights` as a dictionary.

    Raises:
        ConfigError: if they are no pairs of a domain and a positive number, or a domain is unknown,
            missing or named twice.
    """
    form = "give pairs such as (('speeches', 2.0), ('drama', 1.0))"
    found: dict[str, float] = {}
    for pair in weights:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ConfigError(f"data.weights has {pair!r}; {form}")
        domain, weight = pair
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"data.weights has {pair!r}; {form}")
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"data.weights gives {domain!r} the weight {weight}, which is not positive; leave "
                "the domain out of the data instead"
            )
        if domain in found:
            raise ConfigError(f"data.weights names {domain!r} twice")
        if domain not in domains:
            raise ConfigError(
                f"data.weights names {domain!r}, which is none of the domains of the data: "
                f"{', '.join(domains)}"
            )
        found[domain] = float(weight)
    if missing := [domain for domain in domains if domain not in found]:
        raise ConfigError(f"data.weights has no weight for {', '.join(missing)}; {form}")
    return found
