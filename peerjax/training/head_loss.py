"""The mean loss of a batch from the input of the head.

On CPUs, the logits of only a few rows are in memory at a time, and stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.platforms import by_platform
from peerjax.model import head_of
from peerjax.objectives.task import Batch, Task
from peerjax.sharding.batches import split_rows
from peerjax.sharding.over_mesh import size_of_mesh

# Logits of one part, in numbers. Parts of this size and of half of it were fastest on CPUs.
LARGEST_PART = 1 << 21
# (head, x_BLD, rows, fixed) -> nats_BL
LossOfRows = Callable[[Any, Array, Any, Any], Array]


def mean_loss(
    task: Task,
    head: Any,
    x_BLD: Float[Array, "B L D"],
    kept: Any,
    batch: Batch,
    frozen: Any,
    step: Any,
) -> Float[Array, ""]:
    """Returns the mean of the task's loss over a batch.

    Args:
        task: task with the model and the loss.
        head: parameters of the model's head.
        x_BLD: input of the head.
        kept: the collections that the task's loss reads.
        batch: rows of text.
        frozen: arrays that the loss reads.
        step: number of the step.
    """

    def loss_of_rows(head: Any, x_BLD: Array, rows: Batch, fixed: Any) -> Array:
        logits: Any = head_of(task.model.config).apply({"params": head}, x_BLD)
        kept, frozen, step = fixed
        return task.loss(logits, kept, rows, frozen, step)

    def whole(*operands: Any) -> Array:
        return jnp.mean(loss_of_rows(*operands))

    operands = (head, x_BLD, batch, (kept, frozen, step))
    parts = number_of_parts(x_BLD.shape[0], x_BLD[..., 0].size * task.model.config.vocab_size)
    if task.keeps or parts == 1:  # the collections have an axis of all tokens
        return whole(*operands)
    in_parts = partial(mean_loss_in_parts, loss_of_rows, parts)
    return by_platform(*operands, cpu=in_parts, default=whole)


def number_of_parts(rows: int, numbers: int) -> int:
    """Returns into how many parts to split rows whose logits are `numbers` numbers together."""
    per_device = rows // size_of_mesh()
    return next(
        (
            parts
            for parts in range(1, per_device + 1)
            if per_device % parts == 0 and numbers <= parts * LARGEST_PART
        ),
        max(per_device, 1),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mean_loss_in_parts(
    loss_of_rows: LossOfRows,
    parts: int,
    head: Any,
    x_BLD: Float[Array, "B L D"],
    rows: Any,
    fixed: Any,
) -> Float[Array, ""]:
    """Returns the mean loss of a batch, whose logits are never in memory together.

    A forward pass under differentiation computes the gradient of each part right after its loss. So
    nothing of the size of the logits is kept for the backward pass, or computed twice.

    Args:
        loss_of_rows: function that returns the loss of every token of some rows.
        parts: number of parts. It must divide the rows of each device.
        head: parameters of the head, which get a gradient.
        x_BLD: input of the head, which gets a gradient.
        rows: arrays that are split like x. They get no gradient.
        fixed: arrays that every part reads. They get no gradient.
    """
    return _forward(loss_of_rows, parts, head, x_BLD, rows, fixed)[0]


def _forward(loss_of_rows, parts, head, x_BLD, rows, fixed):
    def mean_of_part(head: Any, x: Array, rows: Any) -> Array:
        return jnp.mean(loss_of_rows(head, x, rows, fixed)) / parts

    def add_part(total: Any, part: Any) -> tuple[Any, Array]:
        x, rows = part
        loss, (d_head, d_x) = jax.value_and_grad(mean_of_part, (0, 1))(head, x, rows)
        return jax.tree.map(jnp.add, total, (loss, d_head)), d_x

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, head))
    (loss, d_head), d_x = jax.lax.scan(add_part, zeros, split_rows((x_BLD, rows), parts))
    return loss, (d_head, d_x.reshape(x_BLD.shape))


def _backward(loss_of_rows, parts, gradients, d_loss):
    d_head, d_x = jax.tree.map(lambda leaf: (d_loss * leaf).astype(leaf.dtype), gradients)
    return d_head, d_x, None, None


mean_loss_in_parts.defvjp(_forward, _backward)
