"""First weights of a student that starts from its teacher, and how good each stage of them is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array

from pallas_kernels.codes import CODES
from peerjax.config import ROUNDED, SEARCHED
from peerjax.data.packing import PackedRows
from peerjax.data.pipeline import row_order
from peerjax.distillation.rounding import search_scales
from peerjax.evaluation.evaluate import whole_batches
from peerjax.model import Decoder
from peerjax.objectives.language import next_token_loss
from peerjax.objectives.task import inputs_of
from peerjax.optim import dequantize
from peerjax.training.start import as_stored


class Stage(NamedTuple):
    """A stage of the conversion of a teacher.

    Attributes:
        name: the value of `distill.start` with which training starts here, or another name.
        title: what the report calls it.
        variables: variables of the model.
        facts: facts for the report.
    """

    name: str
    title: str
    variables: dict[str, Any]
    facts: dict[str, Any]


def stages_of(
    config: ml_collections.ConfigDict,
    teacher: Decoder,
    variables: dict[str, Any],
    student: Decoder,
    rows: PackedRows,
    mesh: Mesh,
) -> Iterator[Stage]:
    """Yields the stages of a conversion, at least the one that `distill.start` names.

    Args:
        config: configuration of the student.
        teacher: the teacher.
        variables: its variables.
        student: the student.
        rows: its training text. The first rows that training reads are the calibration text.
        mesh: the current mesh.
    """
    rounded = jax.jit(partial(as_stored, old=teacher, new=student))(variables)
    yield Stage(ROUNDED, "rounded, scales of training", rounded, {})
    storage = student.config.pool_storage
    if storage not in CODES or not variables["pools"]:
        if config.distill.start == SEARCHED:
            yield Stage(SEARCHED, "nothing to search", rounded, {})
        return
    loss_of = calibration_loss(config, student, rows, mesh)
    print("searching scales on calibration text", flush=True)
    pools, found = search_scales(
        variables["pools"], storage, lambda pools: loss_of({**rounded, "pools": pools})
    )
    yield Stage(SEARCHED, "rounded, searched scales", {**rounded, "pools": pools}, found)


def calibration_loss(
    config: ml_collections.ConfigDict, model: Decoder, rows: PackedRows, mesh: Mesh
) -> Callable[[dict[str, Any]], float]:
    """Returns a function from a model's variables to its mean loss on calibration text, in nats."""
    count = min(config.distill.calibration_rows, len(rows))
    chosen = row_order(config, rows, count)
    batches = list(whole_batches(rows, chosen, config.data.batch_size, mesh))

    @jax.jit
    def total(variables: dict[str, Any], batch: dict[str, Array]) -> Array:
        logits: Any = model.apply(dequantize(variables), *inputs_of(batch))
        of_rows = jnp.mean(next_token_loss(logits, (), batch, (), 0), axis=-1)
        return jnp.sum(of_rows * batch["weight"])

    def loss_of(variables: dict[str, Any]) -> float:
        return sum(total(variables, batch).item() for batch, _ in batches) / count

    return loss_of
