"""Operations on pools over a mesh: every device computes its own tokens.

Under `jax.set_mesh` these run inside `jax.shard_map`. Without a mesh they are the plain operations,
so that a layer can be used on its own.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_lookup import lookup
from pallas_kernels.expert_update import Hyperparameters, Statistics, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from pallas_kernels.storage import ExpertPool
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import BATCH


def sharded_lookup(
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
    """Runs `pallas_kernels.expert_lookup.lookup` with tokens split over the `data` axis."""
    if tap is None:
        tap = Tap.zeros_for(ids, x)

    def local(pool, ids, gates, x, hidden_bias, tap):
        return lookup(
            pool,
            ids,
            gates,
            x,
            activation=activation,
            hidden_bias=hidden_bias,
            tap=tap,
            implementation=implementation,
        )

    specs = (P(), BATCH, BATCH, BATCH, BATCH, BATCH)
    return over_mesh(local, specs, BATCH)(pool, ids, gates, x, hidden_bias, tap)


def replicated_update(
    pool: ExpertPool,
    state: UpdateState,
    gradient: FactoredGradient,
    hyperparameters: Hyperparameters,
    *,
    seed: Any,
    step: Any,
    accumulator_bits: int | None = None,
    implementation: str | None = None,
) -> tuple[ExpertPool, UpdateState, Statistics]:
    """Runs the whole `pallas_kernels.expert_update.update` on every device of the mesh.

    All devices have the same pool and the same gradient, and draw the same random bits.
    """

    def local(seed: Any, step: Any, *operands: Any) -> tuple[ExpertPool, UpdateState, Statistics]:
        return update(
            *operands,
            seed=seed,
            step=step,
            accumulator_bits=accumulator_bits,
            implementation=implementation,
        )

    operands = (pool, state, gradient, hyperparameters)
    return over_mesh(local, P(), P())(seed, step, *operands)


def dense_pool_gradient(
    gradient: FactoredGradient, num_experts: int
) -> Float[Array, "layers N 2 D"]:
    """Returns the dense gradient of a stack of pools, summed over the mesh's `data` axis."""

    def local(gradient: FactoredGradient) -> Array:
        return jax.lax.psum(gradient.dense(num_experts), "data")

    if jax.sharding.get_abstract_mesh().empty:
        return gradient.dense(num_experts)
    return over_mesh(local, (P(None, *BATCH),), P())(gradient)


def gather_tokens(gradient: FactoredGradient) -> FactoredGradient:
    """Replicates the gradient of a stack of pools. Every device gets all tokens in order."""
    if jax.sharding.get_abstract_mesh().empty:
        return gradient
    return jax.lax.with_sharding_constraint(gradient, P())
