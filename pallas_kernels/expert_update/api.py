"""The public update: one optimizer step of a pool, in place."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.chunking import HIT_EXPERTS, with_chunk_size
from pallas_kernels.codes import accumulator_bits_of, why_no_kernel_updates
from pallas_kernels.dispatch import Kernel, check_implementation, dispatch
from pallas_kernels.expert_update import mosaic_gpu, mosaic_tpu, xla
from pallas_kernels.expert_update.rule import Hyperparameters, Statistics
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.storage import ExpertPool, accumulators_of, packed_shape

KERNELS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}


class UpdateState(NamedTuple):
    """What an update keeps beside the pool.

    Attributes:
        accumulators: int32 words, laid out like those of a pool of their width; `None` for float
            pools, and for accumulators of no bits.
        moments: second moment of each row of `down` and of `up`; 0 means never hit.
    """

    accumulators: Any
    moments: Float[Array, "*layers 2 N"]

    @staticmethod
    def zeros_for(pool: ExpertPool, accumulator_bits: int | None = None) -> UpdateState:
        """The state of a pool that has never been updated; see `update` for the bits."""
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
    accumulator_bits: int | None = None,
    implementation: str | None = None,
) -> tuple[ExpertPool, UpdateState, Statistics]:
    """One step of a pool, or of a stack of pools, from its factored gradient.

    For each expert that was hit, its gradient rows are summed in float32 and it is rewritten once.
    Row-wise: `delta = g / sqrt(nu)`, nu the lazy second moment of the row, the RMS of delta at most
    1. Packed pools then move `(code + accumulator / 2^b) * scale` by `-learning_rate * delta`,
    rounded stochastically to units of the accumulator; scales follow the RMS of their row's codes,
    a quarter of an octave at a time. Float pools move by the same delta.

    A row whose gradient is not finite, or its square, is passed over; where a token's x or dy is
    not, kernels pass over experts that lie in one row with those it hits, too.

    Donate `pool` and `state` to have them rewritten in place: the cost is that of the pairs,
    whatever N is. Experts that are not hit stay bit-identical.

    Args:
        pool: any storage; its `layer` is ignored.
        state: `UpdateState.zeros_for(pool)` at first.
        gradient: with a leading axis of layers exactly if the pool is a stack.
        hyperparameters: see there.
        seed: of the run; with `step`, it determines all random bits.
        step: number of the update, different every time.
        accumulator_bits: 0, 2, 4 or 8, the same as in `UpdateState.zeros_for`; `None` means as many
            as a code has. Kernels know only that.
        implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; `None` takes the fastest that is known
            to work on the platform. A kernel named on another platform than its own is interpreted.

    Returns:
        The new pool, the new state, and counts by layer.

    Raises:
        ValueError: if gradient or state do not fit the pool, or the implementation is unknown or
            cannot do it.
    """
    check_implementation(implementation)
    _check_gradient(pool, gradient)
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
            accumulator_bits=accumulator_bits,
            implementation=implementation,
        )
        return jax.tree.map(lambda leaf: leaf[0], result)

    zeros = jnp.zeros(gradient.ids.shape[0], jnp.float32)
    carry = xla.Carry(pool.weights, pool.scales, *state, Statistics(*[zeros] * 5))
    sizes: dict[str, Any] = {"num_experts": pool.num_experts, "storage": pool.storage}
    bits = accumulator_bits_of(pool.storage, accumulator_bits)

    def in_chunks(*operands: Any) -> xla.Carry:
        walk = partial(xla.update_stack, **sizes, accumulator_bits=bits)
        return with_chunk_size(walk, HIT_EXPERTS, *operands)

    kernels = {
        name: Kernel(
            partial(module.update_stack, **sizes),
            module.cannot_update(pool, gradient)
            or (why_no_kernel_updates(pool.storage, bits) if pool.is_packed else None),
        )
        for name, module in KERNELS.items()
    }
    operands = (carry, gradient, hyperparameters, seed, step)
    carry = dispatch("update experts", implementation, in_chunks, kernels, *operands)
    new_pool = dataclasses.replace(pool, weights=carry.weights, scales=carry.scales)
    new_state = UpdateState(carry.accumulators, carry.moments)
    return new_pool, new_state, carry.statistics


def _check_gradient(pool: ExpertPool, gradient: FactoredGradient) -> None:
    """Kernels read and write wherever they are told to."""
    layers = pool.weights.shape[:1] if pool.is_stack else ()
    pairs = (*layers, *gradient.ids.shape[-2:])
    vectors = (*pairs[:-1], pool.width)
    expected = {"ids": pairs, "c_down": pairs, "c_up": pairs, "x": vectors, "dy": vectors}
    for name, shape in expected.items():
        if (found := getattr(gradient, name).shape) != shape:
            raise ValueError(f"{name} of the gradient has shape {found}, the pool wants {shape}")


def check_state(state: UpdateState, expected: UpdateState) -> None:
    """Refuses the state of something else.

    Args:
        state: arrays, or their shapes and dtypes.
        expected: a state as it should be, likewise.

    Raises:
        ValueError: if shapes differ.
    """
    found, wanted = (jax.tree.map(jnp.shape, each) for each in (state, expected))
    if found != wanted:
        raise ValueError(
            f"the state has accumulators and moments of shapes {tuple(found)}, the params want "
            f"{tuple(wanted)}: it was made for other params or another accumulator_bits"
        )
