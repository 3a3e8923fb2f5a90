"""The public update: one optimizer step of a pool, in place."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.chunking import HIT_EXPERTS, with_chunk_size
from pallas_kernels.codes import accumulator_bits_of
from pallas_kernels.dispatch import Kernel, check_implementation, dispatch
from pallas_kernels.expert_update import mosaic_gpu, mosaic_tpu, native_cpu, xla
from pallas_kernels.expert_update.rule import Hyperparameters, Statistics
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.storage import ExpertPool, accumulators_of, packed_shape

KERNELS: dict[str, Any] = {
    "native_cpu": native_cpu,
    "mosaic_tpu": mosaic_tpu,
    "mosaic_gpu": mosaic_gpu,
}


class UpdateState(NamedTuple):
    """State that the update keeps beside the pool.

    Attributes:
        accumulators: int32 words, laid out like those of a pool with codes of as many bits; `None`
            for float pools and for accumulators of 0 bits.
        moments: float32 [*layers, 2, N]: second moment of each `down` and `up`; 0 means never hit.
    """

    accumulators: Any
    moments: Float[Array, "*layers 2 N"]

    @staticmethod
    def zeros_for(pool: ExpertPool, accumulator_bits: int | None = None) -> UpdateState:
        """Returns the state of a pool that has never been updated; see `update` for the bits."""
        layers = pool.weights.shape[:1] if pool.is_stack else ()
        moments = jnp.zeros((*layers, 2, pool.num_experts), jnp.float32)
        if not pool.is_packed:
            return UpdateState(None, moments)
        bits = accumulator_bits_of(pool.storage, accumulator_bits)
        accumulators = None
        if bits:
            shape = packed_shape(pool.num_experts, pool.width, accumulators_of(bits))
            accumulators = jnp.zeros((*layers, *shape), jnp.int32)
        return UpdateState(accumulators, moments)


def update(
    pool: ExpertPool,
    state: UpdateState,
    gradient: FactoredGradient,
    hyperparameters: Hyperparameters,
    *,
    seed: Integer[Array, ""] | int,
    step: Integer[Array, ""] | int,
    first_layer: Integer[Array, ""] | int | None = None,
    first_expert: Integer[Array, ""] | int = 0,
    accumulator_bits: int | None = None,
    implementation: str | None = None,
) -> tuple[ExpertPool, UpdateState, Statistics]:
    """Applies one optimizer step to a pool, or to a stack of pools, from its factored gradient.

    For each expert that is hit, the gradients of `down` and `up` are summed in float32, and the
    expert is rewritten once. A vector with gradient g has the step `delta = g / sqrt(nu)`. Here nu
    is the lazy second moment of the vector. The RMS of delta is at most 1.

    In packed pools, `(code + accumulator / 2^b) * scale` moves by `-learning_rate * delta`, rounded
    stochastically to units of the accumulator. Scales follow the RMS of their vector's codes, a
    quarter of an octave at a time. Float pools move by the same delta.

    The update skips a vector if its gradient, or the square of its gradient, is not finite. If x or
    dy of a token is not finite, kernels skip further experts. These share a line
    (`pallas_kernels.row_layout`) with an expert that the token hits.

    Donate `pool` and `state` to rewrite them in place. The cost then depends on the number of
    pairs, whatever N is. Experts that are not hit stay bit-identical.

    Args:
        pool: pool of any storage. Its `layer` is ignored.
        state: state after the last update; `UpdateState.zeros_for(pool)` at first.
        gradient: gradient of the pool, with a leading axis of layers exactly if the pool is a
            stack.
        hyperparameters: numbers of the rule.
        seed: seed of the run. Together, `seed` and `step` determine all random bits.
        step: number of the update, different every time.
        first_layer: layer of the stack that the first layer of the gradient is of. The gradient may
            then have fewer layers than the stack. `None` means that it has all of them.
        first_expert: number of the pool's first expert, if the pool is a part of a larger one. It
            must begin a line. Random bits are those of the larger pool.
        accumulator_bits: 0, 2, 4 or 8, the same as in `UpdateState.zeros_for`. `None` means as many
            as a code has. Mosaic kernels support only that number.
        implementation: "xla", "native_cpu", "mosaic_tpu" or "mosaic_gpu". `None` selects the
            fastest that is known to work on the platform. A Mosaic kernel that is named on another
            platform than its own is interpreted.

    Returns:
        The new pool, the new state, and counts by layer.

    Raises:
        ValueError: if gradient or state do not match the pool, or the implementation is unknown or
            does not support the arguments.
    """
    check_implementation(implementation)
    _check_gradient(pool, gradient, any_layers=first_layer is not None)
    check_state(state, jax.eval_shape(lambda: UpdateState.zeros_for(pool, accumulator_bits)))
    if not pool.is_stack:
        stacks = jax.tree.map(lambda leaf: leaf[None], (pool, state, gradient))
        pool, state, gradient = stacks
        result = update(
            pool,
            state,
            gradient,
            hyperparameters,
            seed=seed,
            step=step,
            first_expert=first_expert,
            accumulator_bits=accumulator_bits,
            implementation=implementation,
        )
        return jax.tree.map(lambda leaf: leaf[0], result)

    zeros = jnp.zeros(pool.weights.shape[0], jnp.float32)
    carry = xla.Carry(pool.weights, pool.scales, *state, Statistics(*[zeros] * 5))
    bits = accumulator_bits_of(pool.storage, accumulator_bits)
    sizes: dict[str, Any] = {
        "num_experts": pool.num_experts,
        "storage": pool.storage,
        "accumulator_bits": bits,
    }

    def in_chunks(*operands: Any) -> xla.Carry:
        return with_chunk_size(partial(xla.update_stack, **sizes), HIT_EXPERTS, *operands)

    kernels = {
        name: Kernel(
            partial(module.update_stack, **sizes),
            module.cannot_update(pool, gradient, bits),
        )
        for name, module in KERNELS.items()
    }
    part = xla.Part(0 if first_layer is None else first_layer, first_expert)
    operands = (carry, gradient, hyperparameters, seed, step, part)
    carry = dispatch("update experts", implementation, in_chunks, kernels, *operands)
    new_pool = dataclasses.replace(pool, weights=carry.weights, scales=carry.scales)
    new_state = UpdateState(carry.accumulators, carry.moments)
    return new_pool, new_state, carry.statistics


def _check_gradient(pool: ExpertPool, gradient: FactoredGradient, any_layers: bool) -> None:
    """Checks the shapes of a gradient, because kernels do not check where they read and write.

    Raises:
        ValueError: if the gradient does not match the pool.
    """
    layers = pool.weights.shape[:1] if pool.is_stack else ()
    if any_layers and pool.is_stack:
        layers = gradient.ids.shape[:1]
    pairs = (*layers, *gradient.ids.shape[-2:])
    vectors = (*pairs[:-1], pool.width)
    expected = {"ids": pairs, "c_down": pairs, "c_up": pairs, "x": vectors, "dy": vectors}
    for name, shape in expected.items():
        if (found := getattr(gradient, name).shape) != shape:
            raise ValueError(f"{name} of the gradient has shape {found}; the pool needs {shape}")


def check_state(state: UpdateState, expected: UpdateState) -> None:
    """Checks that a state has the expected shapes.

    Args:
        state: arrays, or their shapes and dtypes.
        expected: a state with the right shapes, as arrays or as shapes and dtypes.

    Raises:
        ValueError: if shapes differ.
    """
    found, wanted = (jax.tree.map(jnp.shape, each) for each in (state, expected))
    if found != wanted:
        raise ValueError(
            f"the state has accumulators and moments of shapes {tuple(found)}, but the params need "
            f"{tuple(wanted)}; it was made for other params or another accumulator_bits"
        )
