"""The public lookup and its gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import activation_by_name
from pallas_kernels.dispatch import Kernel, check_implementation, dispatch
from pallas_kernels.expert_lookup import mosaic_gpu, mosaic_tpu, native_cpu, xla
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from pallas_kernels.storage import ExpertPool

KERNELS: dict[str, Any] = {
    "native_cpu": native_cpu,
    "mosaic_tpu": mosaic_tpu,
    "mosaic_gpu": mosaic_gpu,
}


def lookup(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    *,
    activation: str,
    hidden_bias: Float[Array, "T K"] | None = None,
    tap: Tap | None = None,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Sums the chosen experts: `y_t = sum_k gates_tk * act(down_k . x_t + hidden_bias_tk) * up_k`.

    No array of size [T, K, D] is ever in memory, forward or backward. Differentiate the lookup
    under `jax.jit`, which leaves out unused gradients, such as that of all weights.

    The lookup is differentiable with respect to `gates`, `x` and `hidden_bias`, and with respect to
    the pool in two ways:

    - `tap`: pass `Tap.zeros_for(ids, x)` and differentiate with respect to it. Its gradient, joined
      with `ids` by `FactoredGradient.from_tap`, is the exact gradient of the pool in
      T * (3 K + 2 D) numbers. The tap itself is never read, so it costs nothing forward.
    - `pool`: the ordinary dense gradient of float weights, or of the scales of packed weights.
      Prefer the tap for stacks inside `lax.scan`. There, a dense cotangent is added to the whole
      stack in every iteration.

    Args:
        pool: the experts.
        ids: expert numbers. N is the sentinel for "no expert". The sentinel and all other numbers
            outside [0, N) contribute nothing, whatever their gates and biases.
        gates: mixing weights, float32.
        x: inputs, float32 or bfloat16. Products are accumulated in float32.
        activation: "gelu" (exact), "relu" or "relu2".
        hidden_bias: float32 numbers that are added before the activation; `None` adds nothing.
        tap: zeros from `Tap.zeros_for`, see above.
        implementation: "xla", "native_cpu", "mosaic_tpu" or "mosaic_gpu". `None` selects the
            fastest that is known to work on the platform and shapes. A Mosaic kernel that is named
            on another platform than its own is interpreted.

    Returns:
        y, in the dtype of x.

    Raises:
        ValueError: if shapes do not match, the activation or implementation is unknown, or the
            implementation does not support the arguments.

    References:
        He, "Mixture of A Million Experts", arXiv:2407.04153, equation 2 and algorithm 1.
    """
    activation_by_name(activation)
    check_implementation(implementation)
    if (ids.ndim, x.ndim) != (2, 2) or ids.shape != gates.shape or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"ids {ids.shape}, gates {gates.shape} and x {x.shape} are not [T, K], [T, K], [T, D]"
        )
    if x.shape[1] != pool.width:
        raise ValueError(f"x has width {x.shape[1]} but the experts have width {pool.width}")
    if pool.is_stack != (pool.layer is not None):
        raise ValueError(
            "choose a layer with `pool.at_layer(layer)` if the pool is a stack, and only then"
        )
    if hidden_bias is None:
        hidden_bias = jnp.zeros((len(ids), 0), jnp.float32)
    elif hidden_bias.shape != ids.shape:
        raise ValueError(f"hidden_bias has shape {hidden_bias.shape}, but ids have {ids.shape}")
    ids = ids.astype(jnp.int32)  # indices of units and words may be much larger
    if tap is None:
        tap = Tap.zeros_for(ids, x)
    static = _Static(activation, pool.storage, pool.num_experts, pool.width, implementation)
    return _lookup(static, pool.weights, pool.scales, pool.layer, ids, gates, x, hidden_bias, tap)


class _Static(NamedTuple):
    """Arguments that are known before tracing."""

    activation: str
    storage: str
    num_experts: int
    width: int
    implementation: str | None

    def pool(self, weights: Array, scales: Array | None, layer: Array | None) -> ExpertPool:
        return ExpertPool(weights, scales, layer, self.storage, self.num_experts, self.width)


def _dispatch(static: _Static, direction: str, operands: tuple[Any, ...]) -> Any:
    def of_module(module: Any) -> Callable[..., Any]:
        function = partial(getattr(module, direction), activation=static.activation)
        # The native kernels skip the sentinel, and take a bias without numbers as zeros.
        return function if module is native_cpu else _with_zeros(function)

    kernels = {
        name: Kernel(of_module(module), module.cannot_look_up(*operands[:2]))
        for name, module in KERNELS.items()
    }
    return dispatch("look experts up", static.implementation, of_module(xla), kernels, *operands)


def _with_zeros(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with zeros for a missing bias and for all numbers of the sentinel.

    A product with 0 would keep NaN.
    """

    def of_operands(
        pool: ExpertPool, ids: Array, gates: Array, x: Array, bias: Array, *dy: Array, **how: Any
    ) -> Any:
        def or_zero(values: Array) -> Array:
            return jnp.where((ids >= 0) & (ids < pool.num_experts), values, 0)

        bias = or_zero(bias) if bias.size else jnp.zeros(ids.shape, jnp.float32)
        found = function(pool, ids, or_zero(gates), x, bias, *dy, **how)
        if not dy:
            return found
        return found._replace(pairs=found.pairs._replace(gates=or_zero(found.pairs.gates)))

    return of_operands


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(static, weights, scales, layer, ids, gates, x, hidden_bias, tap):
    pool = static.pool(weights, scales, layer)
    operands = (pool, ids, gates, x, hidden_bias)
    return _dispatch(static, "forward", operands)


def _lookup_fwd(static, weights, scales, layer, ids, gates, x, hidden_bias, tap):
    y = _lookup(static, weights, scales, layer, ids, gates, x, hidden_bias, tap)
    return y, (weights, scales, layer, ids, gates, x, hidden_bias)


def _lookup_bwd(static, residuals, dy):
    weights, scales, layer, ids, gates, x, hidden_bias = residuals
    pool = static.pool(weights, scales, layer)
    cotangents = _dispatch(static, "backward", (pool, ids, gates, x, hidden_bias, dy))
    pairs = cotangents.pairs
    tap = Tap(pairs.c_down, pairs.c_up, x, dy)
    # XLA removes unused gradients of weights and scales, which are dead code.
    if pool.is_packed:
        d_weights = None
        d_scales = jnp.stack(
            [
                jnp.zeros(pool.num_experts).at[ids].add(per_token, mode="drop")
                for per_token in (pairs.down_scale, pairs.up_scale)
            ]
        )
        if layer is not None:
            d_scales = jnp.zeros_like(scales).at[layer].set(d_scales)
    else:
        d_weights = FactoredGradient.from_tap(ids, tap).dense(pool.num_experts)
        d_weights = d_weights.astype(weights.dtype)
        d_scales = None
        if layer is not None:
            d_weights = jnp.zeros_like(weights).at[layer].set(d_weights)
    # The hidden value is the bias plus a product, so the gradient of the bias is c_down.
    d_bias = pairs.c_down if hidden_bias.size else hidden_bias
    return d_weights, d_scales, None, None, pairs.gates, cotangents.x, d_bias, tap


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
