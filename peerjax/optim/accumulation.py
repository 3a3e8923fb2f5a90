"""The transform that trains packed pools in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pallas_kernels.counter_hash import hash_words
from pallas_kernels.expert_update import Hyperparameters, Statistics, UpdateState
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.storage import ExpertPool
from peerjax.optim.overwrite import Overwrite
from peerjax.sharding.pools import replicated_update


class AccumulationState(NamedTuple):
    """State of `int4_accumulation`.

    Attributes:
        count: number of updates made.
        pools: an `UpdateState` for each pool: accumulators, second moments.
        statistics: `Statistics` of the last update, for each pool.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count, as in optax
    pools: Any
    statistics: Any


def int4_accumulation(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale_learning_rate: optax.ScalarOrSchedule = 0.0,
    weight_decay: float = 0.0,
    beta2: float = 0.99,
    clip_norm: float | None = None,
    grow_above: float = 0.02,
    seed: int = 0,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Row-wise steps of expert pools, accumulated in integers of the width of the codes.

    A packed weight is `(w + a / 2^b) s`: a code w, which the model reads, an accumulator a of b
    bits (4 for "int4", 8 for "int8") and a scale s of its row. With `g` the gradient of the row and
    `nu` the average of its mean square over the steps in which it was hit,

    .. math::
        \delta = \frac{g}{\sqrt{\nu}}, \quad
        u = -\eta \, \delta \, \frac{2^b}{s}, \quad
        2^b w + a \leftarrow \mathrm{clip}(2^b w + a + \mathrm{SR}(u)),

    with SR stochastic rounding and the RMS of delta at most 1. Scales take steps of their
    logarithm, and double where more than `grow_above` of the codes of a row would clip. Float pools
    take the same steps without accumulators (bfloat16 rounds stochastically).

    Params are trees of `ExpertPool`, updates trees of `FactoredGradient`. Use it last in a chain,
    and in `optax.partition` for the pools of a tree that has other parameters too; apply its
    updates with `peerjax.optim.apply_updates`. It cannot be wrapped in `optax.MultiSteps` or
    `optax.apply_if_finite`, because updates and params are different trees.

    Args:
        learning_rate: RMS of a row's step in units of the weights; a number or a schedule.
        scale_learning_rate: size of a step of a scale's logarithm; a number or a schedule.
        weight_decay: of rows that were hit, times the learning rate.
        beta2: decay of the second moments, each time a row is hit.
        clip_norm: bound on the norm of the gradient of each pool, or stack of pools. Finding the
            norm takes a second pass over the pairs; every row's step has an RMS of at most 1
            without it.
        grow_above: share of clipping codes above which a row doubles its scale.
        seed: with the number of the update, determines every random bit.
        implementation: of `pallas_kernels.expert_update.update`; `None` chooses by the platform.

    Returns:
        The transform.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_kernels.expert_lookup import lookup
        >>> from pallas_kernels.factored_gradient import FactoredGradient, Tap
        >>> from peerjax import optim
        >>> from peerjax.pool import initialize_pool
        >>> pool = initialize_pool(
        ...     jax.random.key(0), 1, 64, 16, heads=1, experts_per_head=4, storage="int4")
        >>> ids = jnp.array([[3, 5, 8, 9]])
        >>> x, gates = jnp.ones((1, 16)), jnp.full((1, 4), 0.25)
        >>> def loss(tap):
        ...     y = lookup(pool.at_layer(jnp.int32(0)), ids, gates, x, activation="gelu", tap=tap)
        ...     return jnp.sum(y**2)
        >>> tap = jax.grad(loss)(Tap.zeros_for(ids, x))
        >>> gradient = jax.tree.map(lambda a: a[None], FactoredGradient.from_tap(ids, tap))
        >>> transform = optim.int4_accumulation(1e-2)
        >>> updates, state = transform.update(gradient, transform.init(pool), pool)
        >>> pool = optim.apply_updates(pool, updates)

    References:
        Row-wise second moments: Gupta et al., "Training Recommender Systems at Scale", 2020.
        Stochastic rounding: Gupta et al., "Deep Learning with Limited Numerical Precision",
        arXiv:1502.02551.
    """

    def init(params: Any) -> AccumulationState:
        def statistics(pool: ExpertPool) -> Statistics:
            zeros = jnp.zeros(pool.weights.shape[:1] if pool.is_stack else (), jnp.float32)
            return Statistics(*[zeros] * len(Statistics._fields))

        return AccumulationState(
            count=jnp.zeros((), jnp.int32),
            pools=_map_pools(UpdateState.zeros_for, params),
            statistics=_map_pools(statistics, params),
        )

    def update_pools(
        updates: Any, state: AccumulationState, params: Any = None, **extra: Any
    ) -> tuple[Any, AccumulationState]:
        del extra
        if params is None:
            raise ValueError(
                "int4_accumulation needs the params: call update(updates, state, params)"
            )
        hyperparameters = Hyperparameters(
            learning_rate=_at(learning_rate, state.count),
            scale_learning_rate=_at(scale_learning_rate, state.count),
            weight_decay=weight_decay,
            beta2=beta2,
            grow_above=grow_above,
        )
        pools, structure = jax.tree.flatten(params, is_leaf=_is_pool)
        gradients = jax.tree.leaves(updates, is_leaf=_is_gradient)
        if clip_norm is not None:
            gradients = [
                gradient.clip(clip_norm, pool.num_experts)
                for pool, gradient in zip(pools, gradients, strict=True)
            ]
        states = jax.tree.leaves(state.pools, is_leaf=lambda node: isinstance(node, UpdateState))
        results = [
            # The number of the pool is a part of its seed: pools draw different bits.
            replicated_update(
                *each,
                hyperparameters,
                seed=hash_words(seed, number),
                step=state.count,
                implementation=implementation,
            )
            for number, each in enumerate(zip(pools, states, gradients, strict=True))
        ]
        new_pools, new_states, statistics = zip(*results, strict=True) if results else ((), (), ())
        new_state = AccumulationState(
            count=optax.safe_increment(state.count),
            pools=jax.tree.unflatten(structure, new_states),
            statistics=jax.tree.unflatten(structure, statistics),
        )
        return jax.tree.unflatten(structure, [Overwrite(pool) for pool in new_pools]), new_state

    return optax.GradientTransformationExtraArgs(init, update_pools)


def _is_pool(node: Any) -> bool:
    return isinstance(node, ExpertPool)


def _is_gradient(node: Any) -> bool:
    return isinstance(node, FactoredGradient)


def _map_pools(function: Any, tree: Any) -> Any:
    return jax.tree.map(function, tree, is_leaf=_is_pool)


def _at(rate: optax.ScalarOrSchedule, count: Array) -> Any:
    return rate(count) if callable(rate) else rate
