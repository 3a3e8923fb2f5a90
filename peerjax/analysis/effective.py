"""The number of experts that make up the output of a layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.storage import ExpertPool, read_floats
from peerjax.layers.look_up import TAP, TAPS
from peerjax.model import Decoder, zero_taps
from peerjax.objectives.task import inputs_of
from peerjax.routing.auxiliary import CHOICE, ROUTING, by_module
from peerjax.stacks import BLOCK


def effective_experts(
    model: Decoder, variables: dict[str, Any], batch: dict[str, Array]
) -> dict[str, Float[Array, ""]]:
    """Returns the effective number of experts a token, by layer.

    The output of a pool is a sum over experts. The share of an expert is the norm of its term over
    the sum of the norms of all terms. The effective number is the inverse of the sum of squared
    shares. It is 1 if one expert makes the whole output, and K if all K terms are equally large.

    Args:
        model: the decoder.
        variables: collections "params", "pools" and "stats" of the decoder, with packed matrices as
            floats.
        batch: rows of text.

    Returns:
        Means over the tokens for which some expert has an output. The key is "layer_1", or
        "layer_1.pool" if a layer has several pools.
    """

    def any_loss(taps: Any) -> tuple[Array, Any]:
        y, kept = model.apply(
            {**variables, TAPS: taps}, *inputs_of(batch), mutable=[ROUTING], with_head=False
        )
        return jnp.sum(y), kept[ROUTING]

    # The coefficient of `up`, gate * act(h), does not depend on the loss.
    taps = zero_taps(model, batch["inputs"].size)
    gradients, routing = jax.grad(any_loss, has_aux=True)(taps)
    choices, found = by_module(routing), {}
    for path, tap in by_module(gradients).items():
        if not choices[path][CHOICE].is_routed:
            continue
        pool, ids = variables["pools"][path[0]][path[-1]], choices[path][CHOICE].ids
        for index, layer in enumerate(model.config.place(path).layers):
            in_stack = layer - model.config.place((path[0], BLOCK)).layers[0]
            own = pool.at_layer(jnp.int32(in_stack))
            sizes = jnp.abs(tap[TAP].c_up[index]) * _norms_of_up(own, ids[index])
            name = f"layer_{layer}{model.config.pool_name(path[0], path[-1])}"
            found[name] = mean_effective_number(sizes)
    return found


def mean_effective_number(sizes: Float[Array, "T K"]) -> Float[Array, ""]:
    """Returns the mean of `(sum_k s_k)^2 / sum_k s_k^2` over the rows that are not all zero."""
    squares = jnp.sum(sizes**2, axis=-1)
    numbers = jnp.sum(sizes, axis=-1) ** 2 / jnp.where(squares > 0, squares, 1)
    return jnp.sum(numbers) / jnp.maximum(jnp.sum(squares > 0), 1)


def _norms_of_up(pool: ExpertPool, ids: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """Returns the norms of the chosen `up` vectors, token by token to save memory."""
    return jax.lax.map(lambda ids: jnp.linalg.norm(read_floats(pool, ids)[:, 1], axis=-1), ids)
