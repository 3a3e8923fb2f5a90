"""How far experts and metaexperts belong to domains of text, against a shuffled control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peerjax.data.packages import GROUPS, TEXT_PACKAGES
from peerjax.data.packing import PackedRows
from peerjax.errors import ConfigError, DataError
from peerjax.evaluation.domains import mutual_information
from peerjax.evaluation.metaexperts import Metaexperts
from peerjax.evaluation.probe import ALL, Evaluation, Probe
from peerjax.evaluation.usage import GateSums, routers
from peerjax.model import Decoder

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
) -> Information:
    """Measures the mutual information of experts and domains, and of metaexperts and domains.

    The control has as many rows in each group as a domain has, drawn at random from all domains of
    the group. It shows how much information so few rows seem to have by chance.

    Args:
        evaluate: function of texts, probes, and `rows`, the function that returns rows of a text to
            read.
        model: the decoder.
        texts: packed rows by domain.
        rows: function that returns the rows of a domain to use.
    """
    kept = {name: [text[number] for number in rows(text)] for name, text in texts.items()}
    found = _information(evaluate, model, kept)
    result: Information = {}
    for group, domains in groups_of(list(texts)).items():
        controls = [
            _information(evaluate, model, shuffled({name: kept[name] for name in domains}, rng))
            for rng in np.random.default_rng(0).spawn(DRAWS)
        ]
        for layer, of_layer in found.items():
            for unit, sums in of_layer.items():
                of_domains = mutual_information({name: sums[name] for name in domains})
                by_chance = [mutual_information(each[layer][unit]) for each in controls]
                result.setdefault(layer, {}).setdefault(unit, {})[group] = {
                    "domains": of_domains,
                    "shuffled": float(np.mean(by_chance)),
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


def _information(
    evaluate: Callable[..., Evaluation], model: Decoder, texts: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Returns the sums of gates by layer, then by unit, then by text."""
    probes: dict[str, Probe] = {"experts": GateSums(), "metaexperts": Metaexperts()}
    found = evaluate(texts, probes, rows=lambda text: range(len(text)))
    sums: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name in texts:
        for layer, gates in found[name]["experts"].items():
            sums.setdefault(layer, {}).setdefault("experts", {})[name] = gates
        for layer, figures in found[name]["metaexperts"].items():
            of_layer = sums.setdefault(layer, {})
            of_layer.setdefault("metaexperts", {})[name] = figures["shares"]
    return sums
