"""One pass over text, by domain, for any list of probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from peerjax.data.packing import PackedRows
from peerjax.evaluation.probe import ALL, Evaluation, Probe
from peerjax.model import Decoder
from peerjax.objectives.task import inputs_of
from peerjax.optim import dequantize
from peerjax.sharding import BATCH, sharding_of

Probes = tuple[tuple[str, Probe], ...]


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
    batch_size = -(-batch_size // mesh.size) * mesh.size
    groups = _by_given({name: each for name, each in probes.items() if not each.of_model})
    zeros = jax.jit(lambda: {name: each.zeros(model) for name, each in probes.items()})
    total, found = zeros(), {}
    for domain, text in texts.items():
        sums, chosen = zeros(), rows(text)
        for first in range(0, len(chosen), batch_size):
            batch = put_whole(mesh, _padded(text, chosen[first : first + batch_size], batch_size))
            for group in groups:
                names = [name for name, _ in group]
                both = {name: (total[name], sums[name]) for name in names}
                given = {**variables, **group[0][1].given}
                for name, (of_all, of_text) in _add(model, group, both, given, batch).items():
                    total[name], sums[name] = of_all, of_text
        found[domain] = {
            name: probe.result(model, sums[name], variables)
            for name, probe in probes.items()
            if not probe.of_model
        }
    whole = {name: probe.result(model, total[name], variables) for name, probe in probes.items()}
    return {ALL: whole, **found}


def _by_given(probes: Mapping[str, Probe]) -> list[Probes]:
    """Groups probes that share a forward pass."""
    groups: dict[int, list[tuple[str, Probe]]] = {}
    for name, probe in probes.items():
        groups.setdefault(id(probe.given) if probe.given else 0, []).append((name, probe))
    return [tuple(group) for group in groups.values()]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add(
    model: Decoder,
    probes: Probes,
    sums: dict[str, Any],
    variables: dict[str, Any],
    batch: dict[str, Array],
) -> dict[str, Any]:
    """Adds a batch to the sums of all text and to those of the current domain."""
    keeps = sorted({name for _, probe in probes for name in probe.keeps})
    logits, kept = model.apply(dequantize(variables), *inputs_of(batch), mutable=keeps)
    kept = {name: kept.get(name, {}) for name in keeps}
    return {
        name: tuple(probe.add(model, each, logits, kept, batch) for each in sums[name])
        for name, probe in probes
    }


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places a process's rows on the mesh as its part of the global batch."""
    sharding = sharding_of(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in batch.items()
    }


def put_whole(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places a batch on the mesh. Every process must have the whole batch."""
    sharding = sharding_of(mesh, BATCH)
    return {
        name: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)
        for name, leaf in batch.items()
    }


def _padded(rows: PackedRows, chosen: Sequence[int], size: int) -> dict[str, np.ndarray]:
    """Makes a batch of rows, with copies of weight 0 in unused places."""
    padded = [*chosen, *[chosen[0]] * (size - len(chosen))]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(dict(rows[row]) for row in padded))
    weight = np.arange(size) < len(chosen)
    return {**batch, "weight": weight.astype(np.float32)}
