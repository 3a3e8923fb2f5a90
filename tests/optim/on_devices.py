"""Updates a packed pool from a gradient whose tokens are spread over all devices, and a matrix.

python -m tests.optim.on_devices OUTPUT.npz
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels.counter_hash import hash_words, round_stochastically
from peerjax import optim
from peerjax.sharding import BATCH, make_mesh, sharding_of
from peerjax.sharding.updates import gather_tokens
from tests.pallas_kernels.test_expert_update import make_gradient, make_pool

TOKENS, STEPS = 24, 5


def matrix_steps(axis_type: jax.sharding.AxisType) -> list[np.ndarray]:
    """Three steps of a packed matrix whose rows lie on the devices, as optax tests optimizers."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (axis_type,))
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    gradient = jax.device_put(jax.random.normal(jax.random.key(1), (16, 20)), by_row)
    transform = optim.int4_accumulation(0.05)

    @jax.jit
    def step(gradient, state, params):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = jax.device_put(optim.pack(jax.random.normal(jax.random.key(0), (16, 20))), by_row)
        state = transform.init(params)
        for leaf in jax.tree.leaves(state.pools):  # lies where its rows lie
            assert leaf.sharding.is_equivalent_to(by_row, leaf.ndim), leaf.sharding
        for _ in range(3):
            types = jax.tree.map(jax.typeof, (params, state))
            params, state = step(gradient, state, params)
            assert jax.tree.map(jax.typeof, (params, state)) == types
    return [np.asarray(leaf) for leaf in jax.tree.leaves((params, state.pools))]


def main(output: str) -> None:
    mesh = make_mesh()
    by_token = sharding_of(mesh, jax.sharding.PartitionSpec(None, *BATCH))
    pool = make_pool("int4")
    transform = optim.int4_accumulation(0.02, seed=4)
    state = transform.init(pool)

    @jax.jit
    def step(pool, state, gradient):
        updates, state = transform.update(gather_tokens(gradient), state, pool)
        return optim.apply_updates(pool, updates), state

    # The random bits and the rounding alone, computed where the rows of a batch would be.
    values = jax.device_put(jnp.linspace(-3, 3, 8 * 512).reshape(8, 512), sharding_of(mesh, BATCH))

    @jax.jit
    def rounded(values):
        words = hash_words(1, 2, jnp.arange(8)[:, None], jnp.arange(512))
        return words, round_stochastically(values, words)

    with jax.set_mesh(mesh):
        for number in range(STEPS):
            gradient = jax.device_put(make_gradient(number, tokens=TOKENS), by_token)
            pool, state = step(pool, state, gradient)
        words, integers = rounded(values)
    leaves = jax.tree.leaves((pool, state))
    for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        leaves += matrix_steps(axis_type)
    named = {f"leaf_{number}": np.asarray(leaf) for number, leaf in enumerate(leaves)}
    np.savez(output, devices=jax.device_count(), words=words, integers=integers, **named)


if __name__ == "__main__":
    main(sys.argv[1])
