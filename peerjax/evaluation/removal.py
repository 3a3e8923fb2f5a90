"""Removal of the experts of a domain, and the losses on every domain without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Bool

from peerjax.data.packing import PackedRows
from peerjax.errors import ConfigError, DataError
from peerjax.evaluation.domains import domain_experts, random_experts
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.probe import ALL, Evaluation, Probe
from peerjax.evaluation.usage import GateSums, routers
from peerjax.model import Decoder
from peerjax.routing.auxiliary import CHOICE, EXPERTS, REMOVED

# Experts by layer name, such as "layer_1".
Experts = Mapping[str, Bool[np.ndarray, " N"]]
# Number of draws of random experts. The mean over draws is the control.
DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Removal:
    """The effect of removing the experts of a domain.

    Attributes:
        domain: the domain whose experts are removed.
        experts: number of removed experts in each layer, by layer name.
        gates: share of all gates that the removed experts have, by domain of text.
        changes: increase of the loss in nats a token, by domain of text.
        control: increase of the loss without equally many random experts in each layer. These are
            drawn from the experts in use. The values are means over draws, by domain of text.
    """

    domain: str
    experts: dict[str, int]
    gates: dict[str, float]
    changes: dict[str, float]
    control: dict[str, float]


def checked_domains(
    model: Decoder,
    texts: Mapping[str, PackedRows],
    domains: Sequence[str],
    rows: Callable[[PackedRows], Sequence[int]],
) -> list[str]:
    """Returns the domains whose experts `remove_domains` can remove.

    Args:
        model: the decoder.
        texts: packed rows by domain.
        domains: some of these domains, or "all".
        rows: function that returns the rows of a domain to use.

    Raises:
        ConfigError: if the model has no experts.
        DataError: if there are fewer than two domains, a domain is unknown, or a domain has fewer
            than two rows.
    """
    if not domains:
        return []
    if not routers(model):
        raise ConfigError("no layer of this model has experts that could be removed")
    there = ", ".join(texts)
    if len(texts) < 2:
        raise DataError(
            f"all text is of one domain, {there}: experts of a domain are found by comparison with "
            "other domains; give several, as in --pattern='web=web/*.txt;code=code/*.py'"
        )
    for domain in domains:
        if domain not in texts and domain != ALL:
            raise DataError(f"there is no text of domain {domain!r}; choose from {there}")
    for name, text in texts.items():
        if len(rows(text)) < 2:
            raise DataError(
                f"domain {name!r} has one row of text, and needs two: one to find its experts, and "
                "one to measure the loss; give more text of it"
            )
    return list(texts) if ALL in domains else list(dict.fromkeys(domains))


def remove_domains(
    evaluate: Callable[..., Evaluation],
    model: Decoder,
    loss: Loss,
    texts: Mapping[str, PackedRows],
    domains: Sequence[str],
    rows: Callable[[PackedRows], Sequence[int]],
) -> list[Removal]:
    """Removes the experts of one domain after the other, and measures the loss on all domains.

    Every second row is used to find the experts of a domain. Losses are measured on the other rows.

    Args:
        evaluate: function of texts, probes, and `rows`, the function that returns rows of a text to
            read.
        model: the decoder.
        loss: the probe of the loss.
        texts: packed rows by domain.
        domains: the domains whose experts to remove, a result of `checked_domains`.
        rows: function that returns the rows of a domain to use.
    """
    found = evaluate(texts, {"gates": GateSums(), "loss": loss}, rows=lambda text: rows(text)[::2])
    experts = _by_domain({name: found[name] for name in texts})
    used = {layer: sums > 0 for layer, sums in found[ALL]["gates"].items()}
    probes: dict[str, Probe] = {"loss": loss, "gates": GateSums()}

    def leave_out(name: str, removed: Experts) -> str:
        probes[name] = dataclasses.replace(loss, given=removed_collection(model, removed))
        return name

    without, controls = {}, {}
    for domain in domains:
        counts = {layer: int(which.sum()) for layer, which in experts[domain].items()}
        without[domain] = leave_out(f"without {domain}", experts[domain])
        controls[domain] = [
            leave_out(
                f"without as many as {domain}, {draw}",
                {layer: random_experts(used[layer], count, rng) for layer, count in counts.items()},
            )
            for draw, rng in enumerate(np.random.default_rng(0).spawn(DRAWS))
        ]
    measured = evaluate(texts, probes, rows=lambda text: rows(text)[1::2])

    def changes(name: str) -> dict[str, float]:
        return {
            text: measured[text][name]["nats_per_token"] - measured[text]["loss"]["nats_per_token"]
            for text in texts
        }

    removals = []
    for domain in domains:
        draws = [changes(name) for name in controls[domain]]
        removals.append(
            Removal(
                domain=domain,
                experts={layer: int(which.sum()) for layer, which in experts[domain].items()},
                gates={text: _share(measured[text]["gates"], experts[domain]) for text in texts},
                changes=changes(without[domain]),
                control={text: float(np.mean([draw[text] for draw in draws])) for text in texts},
            )
        )
    return removals


def removed_collection(model: Decoder, experts: Experts, name: str = CHOICE) -> dict[str, Any]:
    """Returns the collection with which a decoder omits experts; see `peerjax.routing.auxiliary`.

    Args:
        model: the decoder.
        experts: experts or metaexperts to omit by layer name, for all layers that route.
        name: which of them, as in `peerjax.evaluation.usage.routers`.
    """
    return {
        REMOVED: unflatten_dict(
            {
                (*router.path, EXPERTS): np.stack([experts[layer] for layer in router.names])
                for router in routers(model, name)
            }
        )
    }


def _by_domain(found: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Experts]:
    """Returns the experts of every domain, by layer name."""
    experts: dict[str, dict[str, Any]] = {name: {} for name in found}
    for layer in next(iter(found.values()))["gates"]:
        routing = {
            name: each["gates"][layer] / each["loss"]["tokens"] for name, each in found.items()
        }
        for name, which in domain_experts(routing).items():
            experts[name][layer] = which
    return experts


def _share(gate_sums: Mapping[str, np.ndarray], experts: Experts) -> float:
    """Returns the share of all gates that some experts have."""
    removed = sum(float(gate_sums[layer][which].sum()) for layer, which in experts.items())
    return removed / sum(float(each.sum()) for each in gate_sums.values())
