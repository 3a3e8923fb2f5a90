"""What a model loses with the experts of a domain: losses on every domain without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from peerjax.analysis.domains import domain_experts, random_experts
from peerjax.data.packing import PackedRows
from peerjax.errors import ConfigError, DataError
from peerjax.model import Decoder
from peerjax.routing.auxiliary import REMOVED, ROUTING
from peerjax.training.evaluation import Evaluation

# By layer name, such as "run_1.0".
Experts = Mapping[str, Bool[np.ndarray, " N"]]
# Draws of random experts, whose mean is the control.
DRAWS = 3
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Removal:
    """What happens without the experts of a domain.

    Attributes:
        domain: whose experts are removed.
        experts: how many of each layer, by layer name.
        gates: by domain of text, the share of all gates that they have there.
        changes: by domain of text, how much the loss grows, in nats a token.
        control: the same with as many random experts of each layer, drawn from those in use; mean
            over draws.
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
    """The domains whose experts `remove_domains` can remove.

    Args:
        model: the decoder.
        texts: packed rows by domain.
        domains: some of them; or "all".
        rows: which of a domain's rows are to be used.

    Raises:
        ConfigError: if the model has no experts.
        DataError: if there are fewer than two domains, a domain is not known or has one row only.
    """
    if not domains:
        return []
    if not model.config.experts_by_run():
        raise ConfigError("no layer of this model has experts that could be removed")
    there = ", ".join(texts)
    if len(texts) < 2:
        raise DataError(
            f"all text is of one domain, {there}: experts of a domain are told by other domains; "
            "give several, as in --pattern='web=web/*.txt;code=code/*.py'"
        )
    for domain in domains:
        if domain not in texts and domain != ALL:
            raise DataError(f"there is no text of domain {domain!r}; there is some of {there}")
    for name, text in texts.items():
        if len(rows(text)) < 2:
            raise DataError(
                f"domain {name!r} has one row of text, and needs two: one to find its experts, "
                "one to measure the loss on"
            )
    return list(texts) if ALL in domains else list(dict.fromkeys(domains))


def remove_domains(
    evaluate: Callable[..., Evaluation],
    model: Decoder,
    variables: dict[str, Any],
    texts: Mapping[str, PackedRows],
    domains: Sequence[str],
    rows: Callable[[PackedRows], Sequence[int]],
) -> list[Removal]:
    """Removes the experts of one domain after the other, and measures the loss on all.

    Every second row says which experts belong to a domain; on the others losses are measured.

    Args:
        evaluate: called with variables, texts, and `rows`, which of a text's rows to read.
        model: the decoder.
        variables: its collections "params", "pools" and "stats".
        texts: packed rows by domain.
        domains: whose experts to remove, as `checked_domains` gives them.
        rows: which of a domain's rows to use.
    """

    def evaluate_half(number: int, variables: dict[str, Any]) -> dict[str, Evaluation]:
        return {
            name: evaluate(variables, {name: text}, rows=lambda text: rows(text)[number::2])
            for name, text in texts.items()
        }

    found = evaluate_half(0, variables)
    before = evaluate_half(1, variables)
    experts = _by_domain(found)
    sums = [each.gate_sums for each in found.values()]
    used = {layer: np.any([each[layer] > 0 for each in sums], axis=0) for layer in sums[0]}

    def changes(removed: Experts) -> dict[str, float]:
        without = evaluate_half(1, variables | removed_collection(model, removed))
        return {
            name: each.overall.nats_per_token - before[name].overall.nats_per_token
            for name, each in without.items()
        }

    removals = []
    for domain in domains:
        chosen = experts[domain]
        counts = {layer: int(which.sum()) for layer, which in chosen.items()}
        draws = [
            changes({layer: random_experts(used[layer], counts[layer], rng) for layer in chosen})
            for rng in np.random.default_rng(0).spawn(DRAWS)
        ]
        removals.append(
            Removal(
                domain=domain,
                experts=counts,
                gates={name: _share(each, chosen) for name, each in before.items()},
                changes=changes(chosen),
                control={name: float(np.mean([draw[name] for draw in draws])) for name in before},
            )
        )
    return removals


def removed_collection(model: Decoder, experts: Experts) -> dict[str, Any]:
    """The collection that has a decoder leave experts out; see `peerjax.routing.auxiliary`.

    Args:
        model: the decoder.
        experts: by layer name, which to leave out; all layers that route.
    """

    def routing() -> Any:
        # Shapes of weights do not depend on it: the smallest that splits over the devices.
        tokens = jnp.zeros((jax.device_count(), 1), jnp.int32)
        return model.init(jax.random.key(0), tokens, tokens).get(ROUTING, {})

    def in_place(tree: Any, run: str) -> Any:
        """`experts` where the run's layers leave their routing."""
        inner = next(iter(tree.values()))
        if isinstance(inner, dict):
            return {next(iter(tree)): in_place(inner, run)}
        stacked = [experts[f"{run}.{layer}"] for layer in range(inner.shape[0])]
        return {"experts": np.stack(stacked)}

    shapes = jax.eval_shape(routing)
    return {REMOVED: {run: in_place(tree, run) for run, tree in shapes.items()}}


def _by_domain(found: Mapping[str, Evaluation]) -> Mapping[str, Experts]:
    """The experts of every domain, by layer name."""
    experts: dict[str, dict[str, Any]] = {name: {} for name in found}
    for layer in next(iter(found.values())).gate_sums:
        routing = {
            name: each.gate_sums[layer] / each.overall.tokens for name, each in found.items()
        }
        for name, which in domain_experts(routing).items():
            experts[name][layer] = which
    return experts


def _share(evaluation: Evaluation, experts: Experts) -> float:
    """The share of all gates that some experts have."""
    sums = evaluation.gate_sums
    removed = sum(float(sums[layer][which].sum()) for layer, which in experts.items())
    return removed / sum(float(each.sum()) for each in sums.values())
