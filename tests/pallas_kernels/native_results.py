"""Prints a digest of what all native kernels compute, on as many processors as it is told."""

import hashlib
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.expert_update import Hyperparameters
from pallas_kernels.product_keys import scores_at, top_k_pairs
from tests.pallas_kernels.test_kernels import (
    after_steps,
    make_gradient,
    make_inputs,
    make_pool,
    value_and_gradients,
)

if __name__ == "__main__":
    # XLA makes its threads when JAX is first used.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
    pool = make_pool("int4", 256, 3000)
    rng = np.random.default_rng(0)
    scores = [jnp.asarray(rng.standard_normal((500, 200)), jnp.float32) for _ in range(2)]
    query, keys = (jnp.asarray(rng.standard_normal((60, 4, 8)), jnp.float32) for _ in range(2))
    index = jnp.asarray(rng.integers(0, 4, (4, 60, 5)), jnp.int32)
    keys = keys.swapaxes(0, 1)[:, :4]

    def sum_of_scores(query, keys):
        products = jnp.einsum("thd,hnd->htn", query, keys)
        chosen = scores_at(query, keys, jax.lax.stop_gradient(products), index, "native_cpu")
        return jnp.sum(jnp.sin(chosen))

    everything = (
        value_and_gradients(
            "native_cpu", pool.at_layer(jnp.int32(1)), *make_inputs(3000, 150, 30, 256)
        ),
        after_steps("native_cpu", pool, make_gradient(3000, 150, 30, 256), Hyperparameters(0.02)),
        top_k_pairs(*scores, 16, "native_cpu"),
        jax.grad(sum_of_scores, (0, 1))(query, keys),
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(everything):
        digest.update(np.asarray(leaf).tobytes())
    print(digest.hexdigest())
