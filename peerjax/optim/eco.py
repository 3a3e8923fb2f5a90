"""ECO: low-bit training that adds rounding errors to momentum, the alternative to accumulators."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pallas_kernels.codes import CODES
from pallas_kernels.counter_hash import Purpose, hash_words, round_stochastically
from pallas_kernels.storage import ExpertPool, is_pool, read_floats, write_codes
from peerjax.optim.overwrite import Overwrite


class EcoState(NamedTuple):
    """State of `eco`. Moments are float pools, as large as their pools.

    Attributes:
        count: number of updates made.
        first: first moments of AdamW, to which rounding errors are added.
        second: second moments of AdamW, without rounding errors.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count, as in optax
    first: Any
    second: Any


def eco(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW on packed pools, with the rounding error fed back through the first moment.

    .. math::
        \tilde w = (1 - \eta \lambda) \hat w - \eta \frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon}, \quad
        \hat w \leftarrow q(\tilde w), \quad e = \tilde w - \hat w, \\
        m \leftarrow m + \frac{1 - \beta_1^t}{\eta} \left(1 - \frac{1}{\beta_1}\right)
            \left(\sqrt{\frac{v}{1 - \beta_2^t}} + \epsilon\right) e.

    Here q rounds stochastically to the codes of a vector. The largest weight of the vector takes
    the largest code. ECO keeps 8 bytes a parameter beside the codes, and its gradient is dense. Use
    it for comparison with `int4_accumulation`, not for large pools.

    Args:
        learning_rate: a number or a schedule. A step with rate 0 changes only moments.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: number that is added to the root of the second moment.
        weight_decay: weight decay; it is multiplied by the learning rate.
        seed: seed that determines every random bit, together with the number of the update.

    Returns:
        A transform for trees of packed stacks of pools. Gradients are float pools of the same
        sizes, and updates are `Overwrite`s.

    References:
        "ECO: Quantized Training without Full-Precision Master Weights", arXiv:2601.22101.
    """

    def init(params: Any) -> EcoState:
        # Each tree is separate, because one array cannot be donated twice.
        first, second = (jax.tree.map(_zeros, params, is_leaf=is_pool) for _ in range(2))
        return EcoState(jnp.zeros((), jnp.int32), first, second)

    def update(
        updates: Any, state: EcoState, params: Any = None, **extra: Any
    ) -> tuple[Any, EcoState]:
        del extra
        if params is None:
            raise ValueError("eco needs the params: call update(updates, state, params)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        step = state.count + 1
        pools, structure = jax.tree.flatten(params, is_leaf=is_pool)
        gradients, first, second = (
            jax.tree.leaves(tree, is_leaf=is_pool) for tree in (updates, state.first, state.second)
        )

        def move(number: int, pool: ExpertPool, g: Array, m: Array, v: Array) -> Any:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            correction = 1 - b1**step
            root = jnp.sqrt(v / (1 - b2**step)) + eps
            wanted = (1 - rate * weight_decay) * _floats(pool) - rate * m / correction / root
            words = hash_words(
                hash_words(seed, number), Purpose.ECO, state.count, *_counters(wanted)
            )
            new = jax.tree.map(
                lambda moved, old: jnp.where(rate > 0, moved, old), _pack(pool, wanted, words), pool
            )
            error = jnp.where(rate > 0, wanted - _floats(new), 0.0)
            back = correction / jnp.where(rate > 0, rate, 1.0) * (1 - 1 / b1) * root
            return Overwrite(new), m + back * error, v

        moved = [
            move(number, pool, *(each.weights for each in leaves))
            for number, (pool, *leaves) in enumerate(
                zip(pools, gradients, first, second, strict=True)
            )
        ]
        return jax.tree.unflatten(structure, [new for new, _, _ in moved]), EcoState(
            count=optax.safe_increment(state.count),
            first=jax.tree.unflatten(structure, [ExpertPool.of_floats(m) for _, m, _ in moved]),
            second=jax.tree.unflatten(structure, [ExpertPool.of_floats(v) for _, _, v in moved]),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(pool: ExpertPool) -> ExpertPool:
    shape = (pool.weights.shape[0], pool.num_experts, 2, pool.width)
    return ExpertPool.of_floats(jnp.zeros(shape, jnp.float32))


def _floats(pool: ExpertPool) -> Array:
    """Returns the weights of all layers, [layers, N, 2, D]."""
    ids = jnp.arange(pool.num_experts)
    layers = jnp.arange(pool.weights.shape[0])
    return jax.lax.map(lambda layer: read_floats(pool.at_layer(layer), ids), layers)


def _counters(weights: Array) -> list[Array]:
    """Returns layer, expert, matrix and column of each weight."""
    return [jax.lax.broadcasted_iota(jnp.int32, weights.shape, axis) for axis in range(4)]


def _pack(pool: ExpertPool, weights: Array, words: Array) -> ExpertPool:
    """Rounds weights stochastically; a vector's largest weight takes the largest code."""
    top = CODES[pool.storage].top
    scales = jnp.maximum(jnp.max(jnp.abs(weights), axis=-1) / top, 1e-12)
    codes = round_stochastically(weights / scales[..., None], words).astype(jnp.int32)
    codes, ids = jnp.clip(codes, -top, top), jnp.arange(pool.num_experts)

    def write(layer: Array, packed: Array) -> Array:
        return write_codes(packed, layer, ids, codes[layer], pool.storage)

    packed = jax.lax.fori_loop(0, codes.shape[0], write, pool.weights)
    return dataclasses.replace(pool, weights=packed, scales=scales.swapaxes(1, 2))
