"""The interface of a probe: what an evaluation looks at."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from jaxtyping import Array

from peerjax.data.tokenizer import Tokenizer
from peerjax.model import Decoder

# The name of all texts together, beside those of domains.
ALL = "all"
# By text, then by probe, what the probe found.
Evaluation = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Adds something up over text. Its sums stay on the device until the text has been read.

    Subclasses are frozen dataclasses: one compiled program serves probes that are equal.

    Class attributes:
        keeps: collections that the model keeps for it, such as "routing".
        of_model: whether it looks at the weights alone. It then has a result for all texts
            together only.
        columns: label and format of the figures that tables show; by default, of all figures.

    Attributes:
        given: collections that the model reads beside its own, such as experts to leave out.
            Probes of different `given` take a forward pass each.
    """

    keeps: ClassVar[tuple[str, ...]] = ()
    of_model: ClassVar[bool] = False
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {}

    given: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, kw_only=True, compare=False, repr=False
    )

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Probe:
        """The probe for text of a tokenizer."""
        return cls()

    def zeros(self, model: Decoder) -> Any:
        """The sums before any text is read."""
        return ()

    def add(
        self, model: Decoder, sums: Any, logits_BLV: Array, kept: Any, batch: dict[str, Array]
    ) -> Any:
        """The sums after a batch. Called under `jax.jit`.

        Args:
            model: the decoder.
            sums: before the batch.
            logits_BLV: of the next token.
            kept: the collections that `keeps` names.
            batch: rows of text. Each counts `batch["weight"]` times: 1, or 0 for padding.
        """
        return sums

    def result(self, model: Decoder, sums: Any, variables: dict[str, Any]) -> Mapping[str, Any]:
        """What was found, on the host: numbers by name, or by row and name.

        Arrays may be among them; files and tables leave them out.
        """
        raise NotImplementedError

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> Mapping[str, float]:
        """The figures that training writes to `metrics.jsonl`, by name.

        Args:
            name: of the probe.
            text: the domain, or "all".
            result: what was found there.
        """
        return {f"{name}/{text}/{path}": value for path, value in numbers_of(result)}


def figures_of(probes: Mapping[str, Probe], evaluation: Evaluation) -> dict[str, float]:
    """The figures of all probes, for `metrics.jsonl`."""
    figures: dict[str, float] = {}
    for text, found in evaluation.items():
        for name, result in found.items():
            figures |= probes[name].figures(name, text, result)
    return figures


def numbers_of(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested mapping, by their path."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, numbers.Number):
            yield f"{prefix}{name}", float(value)  # type: ignore[arg-type]


def only_numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same nested mapping without what is no number."""
    return {
        name: only_numbers(value) if isinstance(value, Mapping) else value
        for name, value in result.items()
        if isinstance(value, Mapping | numbers.Number)
    }
