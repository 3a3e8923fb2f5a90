"""The transform that trains packed parameters: pools in place, other matrices by differences."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pallas_kernels.counter_hash import hash_words
from pallas_kernels.expert_update import (
    Hyperparameters,
    Statistics,
    UpdateState,
    accumulator_bits_of,
    check_state,
)
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.storage import ExpertPool
from peerjax.optim.overwrite import Overwrite
from peerjax.optim.packed_matrix import PackedMatrix, update_matrix, zero_state
from peerjax.sharding.updates import sharded_update


class AccumulationState(NamedTuple):
    """State of `int4_accumulation`.

    Attributes:
        count: number of updates made.
        pools: an `UpdateState` for each pool or matrix, with accumulators and second moments.
        statistics: `Statistics` of the last update, for each pool or matrix.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count, as in optax
    pools: Any
    statistics: Any


def int4_accumulation(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float | Array = 0.0,
    beta2: float | Array = 0.99,
    clip_norm: float | Array | None = None,
    seed: int | Array = 0,
    accumulator_bits: int | None = None,
    implementation: str | None = None,
    exchange: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains packed parameters by normalised steps of vectors, accumulated in a few more bits.

    A vector is `down` or `up` of an expert, or a row of a matrix. A packed weight is
    `(w + a / 2^b) s`. The model reads the code w. The accumulator a has b bits, by default as many
    as the code. The scale s belongs to the vector. Let `g` be the gradient of the vector, and `nu`
    the average of its mean square over the steps in which it was hit. Then

    .. math::
        \delta = \frac{g}{\sqrt{\nu}}, \quad
        u = -\eta \, \delta \, \frac{2^b}{s}, \quad
        2^b w + a \leftarrow \mathrm{clip}(2^b w + a + \mathrm{SR}(u)).

    Here SR is stochastic rounding, and the RMS of delta is at most 1. The scale of a vector follows
    the RMS of its codes in steps of a quarter of an octave. Float pools take the same steps without
    accumulators. In bfloat16 they round stochastically.

    Params are a tree of packed parameters of two kinds:

    - `ExpertPool`. Its gradient is a `FactoredGradient`. The transform returns an `Overwrite`.
      `peerjax.optim.apply_updates` puts this in place of the donated pool.
    - `PackedMatrix`, which `peerjax.optim.pack` makes from any matrix. Its gradient is an array,
      the ordinary gradient with respect to `peerjax.optim.dequantize(params)`. The transform
      returns the difference of words and scales, which `optax.apply_updates` adds exactly.

    The transform must come last in an `optax.chain`. Words become noise if a float is added to them
    or multiplied with their difference. `peerjax.optim.apply_updates` stops with an error if it can
    detect this. Give other parameters to other transforms with `optax.partition`, or hide them with
    `optax.masked`.

    `optax.MultiSteps` and `optax.apply_if_finite` cannot wrap the transform, because gradients and
    updates are different trees. Average or skip gradients before it.

    Args:
        learning_rate: RMS of a vector's step in units of the weights; a number or a schedule.
        weight_decay: decay of vectors that were hit; it is multiplied by the learning rate.
        beta2: decay of a vector's second moment each time the vector is hit.
        clip_norm: bound on the norm of the gradient of each pool, or stack of pools. The norm takes
            a second pass over the pairs. Without a bound, the step of every vector still has an RMS
            of at most 1. Any optax transform before this one can clip the gradients of matrices.
        seed: seed that determines every random bit, together with the number of the update and of
            the leaf in the tree. Give each transform of a partition its own seed.
        accumulator_bits: bits of each accumulator: 0, 2, 4 or 8. `None` means as many as a code
            has. With 0, steps are rounded directly to codes. Under `optax.inject_hyperparams`, name
            it in `static_args`.
        implementation: implementation of `pallas_kernels.expert_update.update`; `None` chooses by
            the platform.
        exchange: how devices that share a pool exchange its gradient: "gather", "dispatch", or
            `None` for the cheaper one. See `peerjax.sharding.exchange`.

    Returns:
        The transform. Its `init` and `update` raise a ValueError for parameters that are not
        packed. Its `update` also raises one without params, or for gradients or a state of another
        tree, kind or shape. A vector is skipped if its gradient, or the square, is not finite.

    Raises:
        ValueError: if `accumulator_bits` is an array.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from peerjax import optim
        >>> x, target = jnp.eye(16), jnp.ones((16, 8))
        >>> params = {"w": optim.pack(0.1 * jax.random.normal(jax.random.key(0), (16, 8)))}
        >>> def loss(floats):
        ...     return jnp.mean((x @ floats["w"] - target) ** 2)
        >>> transform = optax.chain(
        ...     optax.clip_by_global_norm(1.0), optim.int4_accumulation(0.1))
        >>> state = transform.init(params)
        >>> before = loss(optim.dequantize(params))
        >>> for _ in range(20):
        ...     gradients = jax.grad(loss)(optim.dequantize(params))
        ...     updates, state = transform.update(gradients, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(loss(optim.dequantize(params)) < before / 2)
        True

        This example updates a pool from its factored gradient:

        >>> from pallas_kernels.expert_lookup import lookup
        >>> from pallas_kernels.factored_gradient import FactoredGradient, Tap
        >>> from peerjax.pool import initialize_pool
        >>> pool = initialize_pool(
        ...     jax.random.key(0), 1, 64, 16, storage="int4")
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
    if isinstance(accumulator_bits, jax.Array):
        raise ValueError(
            "accumulator_bits must be a number, not an array, because shapes depend on it; under "
            'optax.inject_hyperparams give static_args=("accumulator_bits",)'
        )

    def bits_of(leaf: ExpertPool | PackedMatrix) -> int:
        return accumulator_bits_of(leaf.storage, accumulator_bits)

    def state_of(leaf: ExpertPool | PackedMatrix) -> UpdateState:
        if isinstance(leaf, ExpertPool):
            return UpdateState.zeros_for(leaf, accumulator_bits)
        return zero_state(leaf, bits_of(leaf))

    def init(params: Any) -> AccumulationState:
        leaves, structure = _packed_leaves(params)

        def statistics_of(leaf: ExpertPool | PackedMatrix) -> Statistics:
            layers = ()
            if isinstance(leaf, ExpertPool) and leaf.is_stack:
                layers = leaf.weights.shape[:1]
            # Each array is separate, because one array cannot be donated twice.
            return Statistics(*[jnp.zeros(layers, jnp.float32) for _ in Statistics._fields])

        return AccumulationState(
            count=jnp.zeros((), jnp.int32),
            pools=jax.tree.unflatten(structure, map(state_of, leaves)),
            statistics=jax.tree.unflatten(structure, map(statistics_of, leaves)),
        )

    def update_leaves(
        updates: Any, state: AccumulationState, params: Any = None, **extra: Any
    ) -> tuple[Any, AccumulationState]:
        del extra
        if params is None:
            raise ValueError(
                "int4_accumulation needs the params: call update(updates, state, params)"
            )
        hyperparameters = Hyperparameters(
            learning_rate=_at(learning_rate, state.count),
            weight_decay=weight_decay,
            beta2=beta2,
        )
        leaves, structure = _packed_leaves(params)
        gradients = _leaf_by_leaf(structure, updates, "gradients")
        old_states = _leaf_by_leaf(structure, state.pools, "a state")

        def update_leaf(number: int, leaf: Any, own: UpdateState, gradient: Any) -> Any:
            # The seed includes the number of the leaf, so that leaves draw different bits.
            options: dict[str, Any] = {"seed": hash_words(seed, number), "step": state.count}
            _check_gradient(leaf, gradient)
            if isinstance(leaf, PackedMatrix):
                check_state(own, jax.eval_shape(state_of, leaf))
                return update_matrix(
                    leaf, own, gradient, hyperparameters, accumulator_bits=bits_of(leaf), **options
                )
            pool, *rest = sharded_update(
                leaf,
                own,
                gradient,
                hyperparameters,
                clip_norm=clip_norm,
                accumulator_bits=accumulator_bits,
                implementation=implementation,
                exchange=exchange,
                **options,
            )
            return Overwrite(pool), *rest

        results = [
            update_leaf(number, *each)
            for number, each in enumerate(zip(leaves, old_states, gradients, strict=True))
        ]
        changes, states, statistics = zip(*results, strict=True) if results else ((), (), ())
        new_state = AccumulationState(
            count=optax.safe_increment(state.count),
            pools=jax.tree.unflatten(structure, states),
            statistics=jax.tree.unflatten(structure, statistics),
        )
        return jax.tree.unflatten(structure, changes), new_state

    return optax.GradientTransformationExtraArgs(init, update_leaves)


def _packed_leaves(params: Any) -> tuple[list[Any], Any]:
    """Returns the pools and packed matrices of a tree, which must contain nothing else."""
    found, structure = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, ExpertPool | PackedMatrix)
    )
    for path, leaf in found:
        if not isinstance(leaf, ExpertPool | PackedMatrix):
            raise ValueError(
                f"int4_accumulation trains packed parameters, but {jax.tree_util.keystr(path)} is "
                f"a {type(leaf).__name__}; pack it with peerjax.optim.pack, or give it to another "
                "transform with optax.partition"
            )
    return [leaf for _, leaf in found], structure


def _leaf_by_leaf(structure: Any, tree: Any, what: str) -> list[Any]:
    """Returns the value of a tree for each packed parameter."""
    try:
        return structure.flatten_up_to(tree)
    except ValueError:
        raise ValueError(
            f"int4_accumulation was given params and {what} of different trees; labels of "
            "optax.partition and masks of optax.masked must be trees, not functions"
        ) from None


def _check_gradient(leaf: ExpertPool | PackedMatrix, gradient: Any) -> None:
    if isinstance(leaf, ExpertPool):
        if not isinstance(gradient, FactoredGradient):
            raise ValueError(
                "the gradient of a pool must be a FactoredGradient, not a "
                f"{type(gradient).__name__}"
            )
        return
    is_array = hasattr(gradient, "dtype") and jnp.issubdtype(gradient.dtype, jnp.floating)
    if not is_array or gradient.shape != leaf.shape:
        found = gradient.shape if is_array else f"a {type(gradient).__name__}"
        raise ValueError(
            f"the gradient of a packed matrix of shape {leaf.shape} must be a float array of that "
            f"shape, not {found}; differentiate with respect to peerjax.optim.dequantize(params)"
        )


def _at(rate: optax.ScalarOrSchedule, count: Array) -> Any:
    return rate(count) if callable(rate) else rate
