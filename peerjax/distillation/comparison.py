"""Compares a student with its teacher on text, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from peerjax.data.packing import PackedRows
from peerjax.data.pipeline import validation_rows
from peerjax.evaluation import ALL
from peerjax.evaluation.evaluate import whole_batches
from peerjax.model import Decoder
from peerjax.objectives.language import next_token_loss
from peerjax.objectives.soft_targets import divergence
from peerjax.objectives.task import inputs_of
from peerjax.optim import dequantize
from peerjax.sharding.batches import get_whole

DRAWS = 2000  # of the bootstrap


class Rows(NamedTuple):
    """Figures of n rows of text, floats [n]. Each is a mean over the tokens of a row.

    Attributes:
        teacher: loss of the teacher, in nats.
        student: loss of the student, in nats.
        divergence: KL(teacher || student) at temperature 1, in nats.
        agreement: share of tokens for which both models have the same most likely next token.
    """

    teacher: Any
    student: Any
    divergence: Any
    agreement: Any


def compare(
    teacher: tuple[Decoder, dict[str, Any]],
    student: tuple[Decoder, dict[str, Any]],
    texts: Mapping[str, PackedRows],
    mesh: Mesh,
    *,
    rows: int,
    batch_size: int,
) -> dict[str, Rows]:
    """Applies both models to text, and returns figures of every row by text.

    Args:
        teacher: the teacher and its variables.
        student: the student and its variables.
        texts: packed rows by domain.
        mesh: the current mesh, over which a batch is split.
        rows: number of rows to read of each domain, spread evenly.
        batch_size: rows that both models read at a time.
    """
    models = teacher[0], student[0]
    variables = [jax.jit(dequantize)(each) for _, each in (teacher, student)]
    found = {}
    for name, text in texts.items():
        parts = [
            [figure[:count] for figure in get_whole(_figures(*models, *variables, batch))]
            for batch, count in whole_batches(text, validation_rows(text, rows), batch_size, mesh)
        ]
        found[name] = Rows(*map(np.concatenate, zip(*parts, strict=True)))
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _figures(
    teacher: Decoder, student: Decoder, of_teacher: Any, of_student: Any, batch: dict[str, Array]
) -> Rows:
    one, other = _logits(teacher, of_teacher, batch), _logits(student, of_student, batch)
    same = jnp.argmax(one, axis=-1) == jnp.argmax(other, axis=-1)
    by_token = (
        next_token_loss(one, (), batch, (), 0),
        next_token_loss(other, (), batch, (), 0),
        divergence(one, other, jnp.float32(1)),
        same.astype(jnp.float32),
    )
    return Rows(*(jnp.mean(each, axis=-1) for each in by_token))


def _logits(model: Decoder, variables: Any, batch: dict[str, Array]) -> Array:
    logits: Any = model.apply(variables, *inputs_of(batch))
    return logits


def summary(found: Mapping[str, Rows]) -> dict[str, dict[str, float]]:
    """Returns means by text, and the gap with its interval.

    "all" is the mean over texts, as in reports of training. The interval of the gap is a bootstrap
    over rows, drawn within each text, which contains 95% of the means. A text has as many rows as
    were compared.
    """
    rng = np.random.default_rng(0)
    gaps = {name: rows.student - rows.teacher for name, rows in found.items()}
    drawn = {
        name: np.mean(rng.choice(gap, (DRAWS, len(gap))), axis=1) for name, gap in gaps.items()
    }
    result = {name: _summary([rows], drawn[name]) for name, rows in found.items()}
    whole = _summary(list(found.values()), np.mean(list(drawn.values()), axis=0))
    return {ALL: whole, **result}


def _summary(texts: Sequence[Rows], drawn: Float[np.ndarray, " draws"]) -> dict[str, float]:
    means = [[float(np.mean(figure)) for figure in rows] for rows in texts]
    teacher, student, apart, same = np.mean(means, axis=0).tolist()
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return {
        "teacher": teacher,
        "student": student,
        "gap": student - teacher,
        "gap_low": low,
        "gap_high": high,
        "divergence": apart,
        "agreement": same,
        "rows": sum(len(rows.teacher) for rows in texts),
    }
