"""How far experts and metaexperts belong to domains of text, against a shuffled control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from peerjax.data.packages import GROUPS, TEXT_PACKAGES
from peerjax.data.packing import PackedRows
from peerjax.errors import ConfigError, DataError
from peerjax.evaluation.domains import mutual_information
from peerjax.evaluation.probe import ALL, Evaluation
from peerjax.evaluation.usage import GateSums, routers
from peerjax.model import Decoder
from peerjax.routing.auxiliary import METAEXPERTS

# Number of draws of shuffled rows. The mean over draws is the control.
DRAWS = 3
# Information in nats by layer ("layer_1"), then by what carries it ("experts" or "metaexperts"),
# then by group of domains: `domains`, `shuffled`, and `largest`, the most that is possible.
Information = dict[str, dict[str, dict[str, dict[str, float]]]]


def groups_of(domains: Sequence[str]) -> dict[str, list[str]]:
    """Returns the groups of domains that differ in one respect, such as the natural language.

    The group "all" has all domains. The others are those of the text packages with at least two of
    the domains.
    """
    groups = {ALL: list(domains)}
    for group in GROUPS:
        own = [
            domain
            for domain in domains
            if domain in TEXT_PACKAGES and group in TEXT_PACKAGES[domain].groups
        ]
        if 2 <= len(own) < len(domains):
            groups[group] = own
    return groups


def check_specialisation(model: Decoder, texts: Mapping[str, PackedRows]) -> None:
    """Checks that there is something to measure.

    Raises:
        ConfigError: if the model has no experts.
        DataError: if there are fewer than two domains.
    """
    if not routers(model):
        raise ConfigError("no layer of this model has experts that could belong to a domain")
    if len(texts) < 2:
        raise DataError(
            f"all text is of one domain, {', '.join(texts)}: specialisation is measured between "
            "domains; give several, as in --pattern='web=web/*.txt;code=code/*.py'"
        )


def specialisation(
    evaluate: Callable[..., Evaluation],
    model: Decoder,
    texts: Mapping[str, PackedRows],
    rows: Callable[[PackedRows], Sequence[int]],
    draws: int = DRAWS,
) -> Information:
    """Measures the mutual information of experts and domains, and of metaexperts and domains.

    The control has as many rows in each group as a domain has, drawn at random from all domains of
    the group. It shows how much information so few rows seem to have by chance.

    Args:
        evaluate: function of texts, probes, `rows` (the function that returns rows of a text to
            read) and `batch_size`.
        model: the decoder.
        texts: packed rows by domain.
        rows: function that returns the rows of a domain to use.
        draws: number of draws of the control.
    """
    chosen = [(name, text[number]) for name, text in texts.items() for number in rows(text)]
    numbers: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(chosen):
        numbers.setdefault(name, []).append(number)
    found = _sums_of_rows(evaluate, [row for _, row in chosen])
    result: Information = {}
    for group, domains in groups_of(list(texts)).items():
        own = {name: numbers[name] for name in domains}
        controls = [shuffled(own, rng) for rng in np.random.default_rng(0).spawn(draws)]
        for (layer, unit), sums in found.items():
            result.setdefault(layer, {}).setdefault(unit, {})[group] = {
                "domains": _information(sums, own),
                "shuffled": float(np.mean([_information(sums, each) for each in controls])),
                "largest": float(np.log(len(domains))),
            }
    return result


def shuffled(texts: Mapping[str, Sequence[Any]], rng: np.random.Generator) -> dict[str, list[Any]]:
    """Returns rows of all texts, drawn at random into groups of the sizes of the texts."""
    every = [row for text in texts.values() for row in text]
    order, begin, groups = rng.permutation(len(every)), 0, {}
    for name, text in texts.items():
        groups[name] = [every[place] for place in order[begin : begin + len(text)]]
        begin += len(text)
    return groups


def _sums_of_rows(
    evaluate: Callable[..., Evaluation], rows: Sequence[Any]
) -> dict[tuple[str, str], scipy.sparse.csr_array]:
    """Returns the sums of gates [rows, N] by layer and unit. A row uses few of the experts."""
    probes = {"experts": GateSums(), "metaexperts": GateSums(METAEXPERTS)}
    sums: dict[tuple[str, str], list[scipy.sparse.csr_array]] = {}
    for row in rows:
        found = evaluate({"row": [row]}, probes, rows=lambda text: [0], batch_size=1)[ALL]
        for unit, layers in found.items():
            for layer, of_row in layers.items():
                sums.setdefault((layer, unit), []).append(scipy.sparse.csr_array(of_row[None]))
    return {key: scipy.sparse.vstack(each, format="csr") for key, each in sums.items()}


def _information(sums: scipy.sparse.csr_array, groups: Mapping[str, Sequence[int]]) -> float:
    """Returns the mutual information of unit and group. A group has some of the rows of `sums`."""
    return mutual_information({name: sums[rows].sum(axis=0) for name, rows in groups.items()})
