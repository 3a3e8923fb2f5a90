"""The update by native kernels on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.codes import CODES, Code
from pallas_kernels.counter_hash import Purpose
from pallas_kernels.expert_update import integer_step
from pallas_kernels.expert_update.rule import EPSILON, Hyperparameters, Statistics
from pallas_kernels.expert_update.xla import Carry, Part
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.native_cpu.library import call
from pallas_kernels.storage import ExpertPool


def cannot_update(
    pool: ExpertPool, gradient: FactoredGradient, accumulator_bits: int
) -> str | None:
    """Returns why the kernels do not support the arguments, or `None` if they do."""
    del gradient, accumulator_bits
    return None if pool.is_packed else f"it rewrites packed pools, not {pool.storage}"


def update_stack(
    carry: Carry,
    gradient: FactoredGradient,
    rule: Hyperparameters,
    seed: Any,
    step: Any,
    part: Part,
    *,
    num_experts: int,
    storage: str,
    accumulator_bits: int,
) -> Carry:
    """Computes what `pallas_kernels.expert_update.xla.update_stack` computes, in place."""
    kept = (carry.weights, carry.scales, carry.accumulators, carry.moments)
    if not accumulator_bits:
        kept = (*kept[:2], jnp.zeros(0, jnp.int32), kept[3])
    counts = jax.ShapeDtypeStruct((len(Statistics._fields), gradient.ids.shape[0]), jnp.float32)
    code, width = CODES[storage], gradient.x.shape[-1]
    *new, more = call(
        "peer_update",
        (*(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in kept), counts),
        *kept,
        gradient.ids,
        gradient.c_down,
        gradient.c_up,
        gradient.x.astype(jnp.float32),
        gradient.dy.astype(jnp.float32),
        jnp.stack([jnp.asarray(each, jnp.float32) for each in rule]),
        jnp.stack([_word(each) for each in (seed, step, *part)]),
        aliases={number: number for number in range(len(kept))},
        bits=code.bits,
        accumulator_bits=accumulator_bits,
        purpose=Purpose.POOL_STEP,
        numbers=_numbers(code, accumulator_bits, width),
    )
    weights, scales, accumulators, moments = new
    at = part.first_layer + jnp.arange(gradient.ids.shape[0])
    return Carry(
        weights,
        scales,
        accumulators if accumulator_bits else carry.accumulators,
        moments,
        Statistics(
            *[total.at[at].add(one) for total, one in zip(carry.statistics, more, strict=True)]
        ),
    )


def _numbers(code: Code, bits: int, width: int) -> tuple[float, ...]:
    """Returns the numbers of `Rule` in update.h, in its order."""
    low, high = integer_step.limits(code, bits)
    wanted = width * integer_step.spread(code, bits) ** 2
    rung = integer_step.RUNG
    small, large = wanted / rung**2, wanted * rung**2
    limits = float(low), float(high)
    outer = (high / rung**2) ** 2
    bounds = integer_step.LARGEST_STEP, EPSILON
    return (*limits, small, large, outer, rung, integer_step.HELD, *bounds)


def _word(counter: Any) -> Array:
    """Returns the lowest 32 bits of an integer, as `counter_hash.absorb` takes them."""
    if isinstance(counter, int):
        counter = counter & 0xFFFFFFFF
    return jnp.asarray(counter).astype(jnp.uint32)
