"""The lookup in plain XLA. It always works, and is the reference for every kernel.

Tokens are processed in chunks. Memory holds the gathered experts of one chunk, and never all
[T, K, D] of them. XLA on CPU does not fuse the gather with the products that follow it.
Materialising [T, K, D] makes the same lookup about ten times slower there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import activation_by_name
from pallas_kernels.chunking import map_tokens
from pallas_kernels.expert_lookup.pairs import PairGradients, Pairs
from pallas_kernels.storage import (
    ExpertPool,
    from_reading_order,
    read_experts,
    to_reading_order,
)


class Cotangents(NamedTuple):
    """Results of the backward pass of one lookup."""

    x: Float[Array, "T D"]
    pairs: PairGradients


def forward(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    hidden_bias: Float[Array, "T K"],
    activation: str,
) -> Float[Array, "T D"]:
    """Computes `sum_k gates[t, k] * act(down_k . x_t + hidden_bias[t, k]) * up_k` in float32."""
    act = activation_by_name(activation)

    def one_token(token: tuple[Array, Array, Array, Array]) -> Array:
        ids_K, gates_K, x_D, bias_K = token
        experts = read_experts(pool, ids_K)
        pairs = Pairs(gates_K, bias_K, experts.down_scale, experts.up_scale)
        mixing_K = pairs.mixing(_dot(experts.down, x_D), act)
        return _mix(mixing_K, experts.up).astype(x.dtype)

    x_in_order = to_reading_order(x, pool.storage)
    y_in_order = map_tokens(one_token, (ids, gates, x_in_order, hidden_bias), ids.shape[1])
    return from_reading_order(y_in_order, pool.storage)


def backward(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    hidden_bias: Float[Array, "T K"],
    dy: Float[Array, "T D"],
    activation: str,
) -> Cotangents:
    """Reads the experts once more. Returns cotangents and coefficients of the factored gradient."""
    act = activation_by_name(activation)

    def one_token(token: tuple[Array, Array, Array, Array, Array]) -> Cotangents:
        ids_K, gates_K, x_D, bias_K, dy_D = token
        experts = read_experts(pool, ids_K)
        pairs = Pairs(gates_K, bias_K, experts.down_scale, experts.up_scale)
        gradients = pairs.gradients(_dot(experts.down, x_D), _dot(experts.up, dy_D), act)
        dx_D = _mix(gradients.c_down * experts.down_scale, experts.down)
        return Cotangents(dx_D.astype(x.dtype), gradients)

    x_in_order, dy_in_order = (to_reading_order(each, pool.storage) for each in (x, dy))
    tokens = (ids, gates, x_in_order, hidden_bias, dy_in_order)
    cotangents = map_tokens(one_token, tokens, ids.shape[1])
    return cotangents._replace(x=from_reading_order(cotangents.x, pool.storage))


def _dot(rows: tuple[Float[Array, "K columns"], ...], vector: Float[Array, " D"]) -> Array:
    """Returns the float32 products of vectors of experts (`rows`) with another vector."""
    parts = jnp.split(vector.astype(jnp.float32), len(rows))
    products = [row @ part for row, part in zip(rows, parts, strict=True)]
    return jnp.sum(jnp.stack(products), axis=0)


def _mix(weights: Float[Array, " K"], rows: tuple[Float[Array, "K columns"], ...]) -> Array:
    """Returns the weighted sum of vectors of experts (`rows`)."""
    return jnp.concatenate([weights @ row for row in rows])
