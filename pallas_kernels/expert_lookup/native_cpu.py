"""The lookup by native kernels on a CPU. Experts that are not in the pool are not read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.codes import CODES
from pallas_kernels.expert_lookup.pairs import PairGradients
from pallas_kernels.expert_lookup.xla import Cotangents
from pallas_kernels.native_cpu.library import call
from pallas_kernels.storage import ExpertPool

# In the order of `Activation` in activations.h.
ACTIVATIONS = ("gelu", "relu", "relu2")


def cannot_look_up(pool: ExpertPool, ids: Int[Array, "T K"]) -> str | None:
    """Returns why the kernels do not support the arguments, or `None` if they do."""
    return None if pool.is_packed else f"it reads packed pools, not {pool.storage}"


def forward(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    hidden_bias: Float[Array, "T biases"],
    activation: str,
) -> Float[Array, "T D"]:
    """Computes what `pallas_kernels.expert_lookup.xla.forward` computes.

    `hidden_bias` may have no columns, which stands for zeros.
    """
    y = call(
        "peer_lookup_forward",
        jax.ShapeDtypeStruct(x.shape, jnp.float32),
        *_arrays(pool, ids, gates, x, hidden_bias),
        bits=CODES[pool.storage].bits,
        activation=ACTIVATIONS.index(activation),
    )
    return y.astype(x.dtype)


def backward(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    hidden_bias: Float[Array, "T biases"],
    dy: Float[Array, "T D"],
    activation: str,
) -> Cotangents:
    """Computes what `pallas_kernels.expert_lookup.xla.backward` computes. See `forward`."""
    of_pairs = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    dx, *pairs = call(
        "peer_lookup_backward",
        (jax.ShapeDtypeStruct(x.shape, jnp.float32), *[of_pairs] * len(PairGradients._fields)),
        *_arrays(pool, ids, gates, x, hidden_bias),
        dy.astype(jnp.float32),
        bits=CODES[pool.storage].bits,
        activation=ACTIVATIONS.index(activation),
    )
    return Cotangents(dx.astype(x.dtype), PairGradients(*pairs))


def _arrays(pool: ExpertPool, ids: Array, gates: Array, x: Array, bias: Array) -> tuple[Array, ...]:
    layer = jnp.int32(0) if pool.layer is None else jnp.asarray(pool.layer, jnp.int32)
    floats = (each.astype(jnp.float32) for each in (gates, x, bias))
    return (pool.weights, pool.scales, layer, ids, *floats)
