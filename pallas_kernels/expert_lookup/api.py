"""The public lookup and its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import activation_by_name
from pallas_kernels.expert_lookup import xla
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from pallas_kernels.storage import ExpertPool


def lookup(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    *,
    activation: str,
    tap: Tap | None = None,
) -> Float[Array, "T D"]:
    """Sums the chosen experts of every token: `y_t = sum_k gates_tk * act(down_k . x_t) * up_k`.

    Nothing of size [T, K, D] is ever in memory, forward or backward.

    Differentiable with respect to `gates` and `x`, and to the pool in two ways:

    - `tap`: pass `Tap.zeros_for(ids, x)` and differentiate with respect to it. Its
      gradient, joined with `ids` by `FactoredGradient.from_tap`, is the exact gradient of the
      pool in T * (3 K + 2 D) numbers. The tap itself is never read: it costs nothing forward.
    - `pool`: the ordinary dense gradient, of the size of the pool. For stacks inside
      `lax.scan` prefer the tap: a dense cotangent is added to the whole stack every iteration.

    Args:
        pool: the experts.
        ids: expert numbers. N is the sentinel "nothing"; it and any number outside [0, N)
            contribute nothing, whatever their gates.
        gates: mixing weights, float32.
        x: inputs, float32 or bfloat16; products are accumulated in float32.
        activation: "gelu" (exact), "relu" or "relu2".
        tap: see above.

    Returns:
        y, in the dtype of x.

    Raises:
        ValueError: if shapes do not fit each other, or the activation is unknown.

    References:
        He, "Mixture of A Million Experts", arXiv:2407.04153, equation 2 and algorithm 1.
    """
    activation_by_name(activation)
    if ids.shape != gates.shape or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"ids {ids.shape}, gates {gates.shape} and x {x.shape} do not fit together"
        )
    if x.shape[1] != pool.width:
        raise ValueError(f"x has width {x.shape[1]} but the experts have width {pool.width}")
    if (pool.weights.ndim == 4) != (pool.layer is not None):
        raise ValueError("choose a layer of a stacked pool with `pool.at_layer(layer)`")
    if tap is None:
        tap = Tap.zeros_for(ids, x)
    return _lookup(activation, pool.weights, pool.layer, ids, gates, x, tap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(activation, weights, layer, ids, gates, x, tap):
    return xla.forward(ExpertPool(weights, layer), ids, gates, x, activation)


def _lookup_fwd(activation, weights, layer, ids, gates, x, tap):
    y = xla.forward(ExpertPool(weights, layer), ids, gates, x, activation)
    return y, (weights, layer, ids, gates, x)


def _lookup_bwd(activation, residuals, dy):
    weights, layer, ids, gates, x = residuals
    cotangents = xla.backward(ExpertPool(weights, layer), ids, gates, x, dy, activation)
    tap = Tap(cotangents.c_down, cotangents.c_up, x, dy)
    # Dead code, which XLA removes, unless the pool itself is differentiated.
    dense = FactoredGradient.from_tap(ids, tap).dense(weights.shape[-3]).astype(weights.dtype)
    if layer is not None:
        dense = jnp.zeros_like(weights).at[layer].set(dense)
    return dense, None, None, cotangents.gates, cotangents.x, tap


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
