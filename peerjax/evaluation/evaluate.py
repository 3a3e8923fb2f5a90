"""One pass over text, by domain, for any list of probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from peerjax.data.mixing import Rows
from peerjax.data.packing import PackedRows
from peerjax.evaluation.probe import ALL, Evaluation, Probe
from peerjax.model import Decoder
from peerjax.objectives.task import inputs_of
from peerjax.optim import dequantize
from peerjax.sharding.batches import put_whole


def evaluate(
    model: Decoder,
    variables: dict[str, Any],
    texts: Mapping[str, PackedRows],
    probes: Mapping[str, Probe],
    mesh: Mesh,
    *,
    rows: Callable[[PackedRows], Sequence[int]],
    batch_size: int,
) -> Evaluation:
    """Evaluates a model on text, by domain and on all text together.

    Args:
        model: the decoder.
        variables: collections "params", "pools" and "stats" of the decoder.
        texts: packed rows by domain.
        probes: probes by name.
        mesh: the current mesh, over which a batch is split.
        rows: function that returns the rows of a domain to read.
        batch_size: rows in a batch. It is rounded up, so that all devices have equally many.

    Returns:
        The results of probes, by text and then by probe.
    """
    of_text = {name: each for name, each in probes.items() if not each.of_model}
    groups = _by_given(of_text)
    total, found = _zeros(model, of_text), {}
    for domain, text in texts.items():
        sums = _zeros(model, of_text)
        for batch, _ in whole_batches(text, rows(text), batch_size, mesh):
            for names in groups:
                group = tuple(of_text[name] for name in names)
                both = tuple((total[name], sums[name]) for name in names)
                added = _add(model, group, both, {**variables, **group[0].given}, batch)
                for name, (of_all, of_domain) in zip(names, added, strict=True):
                    total[name], sums[name] = of_all, of_domain
        found[domain] = {
            name: probe.result(model, sums[name], variables) for name, probe in of_text.items()
        }
    whole = {
        name: probe.result(model, total.get(name, ()), variables) for name, probe in probes.items()
    }
    return {ALL: whole, **found}


def _by_given(probes: Mapping[str, Probe]) -> list[list[str]]:
    """Groups the names of probes that share a forward pass."""
    groups: dict[int, list[str]] = {}
    for name, probe in probes.items():
        groups.setdefault(id(probe.given) if probe.given else 0, []).append(name)
    return list(groups.values())


def _zeros(model: Decoder, probes: Mapping[str, Probe]) -> dict[str, Any]:
    return {name: _zeros_of(model, probe) for name, probe in probes.items()}


@partial(jax.jit, static_argnums=(0, 1))
def _zeros_of(model: Decoder, probe: Probe) -> Any:
    return probe.zeros(model)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add(
    model: Decoder,
    probes: tuple[Probe, ...],
    sums: tuple[Any, ...],
    variables: dict[str, Any],
    batch: dict[str, Array],
) -> tuple[Any, ...]:
    """Adds a batch to the sums of all text and to those of the current domain.

    The names of probes are no arguments, so that equal probes share one compiled program.
    """
    keeps = sorted({name for probe in probes for name in probe.keeps})
    logits, kept = model.apply(dequantize(variables), *inputs_of(batch), mutable=keeps)
    kept = {name: kept.get(name, {}) for name in keeps}
    return tuple(
        tuple(probe.add(model, each, logits, kept, batch) for each in both)
        for probe, both in zip(probes, sums, strict=True)
    )


def whole_batches(
    rows: Rows, chosen: Sequence[int], batch_size: int, mesh: Mesh
) -> Iterator[tuple[dict[str, Array], int]]:
    """Yields batches of chosen rows, and the number of rows in each that are not padding.

    Args:
        rows: packed rows.
        chosen: numbers of the rows to read.
        batch_size: rows in a batch. It is rounded up, so that all devices have equally many.
        mesh: the mesh over which a batch is split.

    Yields:
        A batch and its number of rows. The unused places of the last batch have copies of a row,
        with 0 in the field "weight". It is 1 for other rows.
    """
    size = -(-batch_size // mesh.size) * mesh.size
    for first in range(0, len(chosen), size):
        part = chosen[first : first + size]
        padded: list[dict[str, Any]] = [
            dict(rows[row]) for row in [*part, *[part[0]] * (size - len(part))]
        ]
        batch = {name: np.stack([row[name] for row in padded]) for name in padded[0]}
        weight = (np.arange(size) < len(part)).astype(np.float32)
        yield put_whole(mesh, {**batch, "weight": weight}), len(part)
