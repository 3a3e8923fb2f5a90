"""The interface of a probe, which measures something in an evaluation."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from jaxtyping import Array

from peerjax.data.tokenizer import Tokenizer
from peerjax.model import Decoder

# The name of all texts together, used beside names of domains.
ALL = "all"
# Results of probes, by text and then by probe.
Evaluation = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Adds something up over text. The sums stay on the device until the text has been read.

    Subclasses must be frozen dataclasses, so that equal probes share one compiled program.

    Class attributes:
        keeps: collections that the model keeps for the probe, such as "routing".
        of_model: whether the probe reads only the weights. It then has one result, for all texts
            together.
        by_text: whether tables show the figures of layers for each text. Otherwise they show them
            for all texts together.
        columns: label and format of the values that tables show. By default, tables show all
            numbers.

    Attributes:
        given: further collections that the model reads, such as experts to leave out. Probes with
            different `given` need separate forward passes.
    """

    keeps: ClassVar[tuple[str, ...]] = ()
    of_model: ClassVar[bool] = False
    by_text: ClassVar[bool] = False
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {}

    given: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, kw_only=True, compare=False, repr=False
    )

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Probe:
        """Returns the probe for text of a tokenizer."""
        return cls()

    def zeros(self, model: Decoder) -> Any:
        """Returns the sums before any text is read."""
        return ()

    def add(
        self, model: Decoder, sums: Any, logits_BLV: Array, kept: Any, batch: dict[str, Array]
    ) -> Any:
        """Returns the sums after a batch. This is called under `jax.jit`.

        Args:
            model: the decoder.
            sums: sums before the batch.
            logits_BLV: logits of the next token.
            kept: the collections that `keeps` names.
            batch: rows of text. `batch["weight"]` is 1 for each row, or 0 for padding.
        """
        return sums

    def result(self, model: Decoder, sums: Any, variables: dict[str, Any]) -> Mapping[str, Any]:
        """Returns the results on the host: numbers by name, or by row and name.

        Results may contain arrays. Files and tables omit these.
        """
        raise NotImplementedError

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> Mapping[str, float]:
        """Returns the metrics that training writes to `metrics.jsonl`, by name.

        Args:
            name: name of the probe.
            text: the domain, or "all".
            result: result of the probe for that text.
        """
        return {f"{name}/{text}/{path}": value for path, value in numbers_of(result)}


def columns_by_layer(
    probe: Probe, name: str, text: str, result: Mapping[str, Any]
) -> dict[str, float]:
    """Returns the columns of a probe's layers on all text, as `<name>/<layer>/<column>`."""
    if text != ALL:
        return {}
    return {
        f"{name}/{layer}/{column}": found[column]
        for layer, found in result.items()
        for column in probe.columns
    }


def figures_of(probes: Mapping[str, Probe], evaluation: Evaluation) -> dict[str, float]:
    """Returns the metrics of all probes, for `metrics.jsonl`."""
    figures: dict[str, float] = {}
    for text, found in evaluation.items():
        for name, result in found.items():
            figures |= probes[name].figures(name, text, result)
    return figures


def numbers_of(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of a nested mapping with their paths."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, numbers.Number):
            yield f"{prefix}{name}", float(value)  # type: ignore[arg-type]


def only_numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested mapping without values that are not numbers."""
    return {
        name: only_numbers(value) if isinstance(value, Mapping) else value
        for name, value in result.items()
        if isinstance(value, Mapping | numbers.Number)
    }
