"""Lookups and updates of a split pool, by both exchanges, with inputs whose sums are exact.

python -m tests.sharding.on_exchange OUTPUT.npz DATAxFSDPxEXPERT...
"""

import dataclasses
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.expert_update import Hyperparameters, UpdateState
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from peerjax.pool import initialize_pool
from peerjax.sharding import BATCH, make_mesh, sharding_of, state_shardings, updates
from peerjax.sharding.lookups import overflows, sharded_lookup
from peerjax.sharding.updates import sharded_update

LAYERS, TOKENS, CHOSEN, EXPERTS, WIDTH = 2, 1024, 4, 1024, 16
# "few" are experts of the first device only, which overflows its capacity.
CHOICES = {"all": EXPERTS, "few": EXPERTS // 8}
EXCHANGES = ("gather", "dispatch")


def integers(key, shape, low=-2, high=3):
    return jax.random.randint(jax.random.key(key), shape, low, high).astype(jnp.float32)


def ids_of(choice):
    scores = jax.random.uniform(jax.random.key(0), (LAYERS, TOKENS, CHOICES[choice]))
    ids = jax.lax.top_k(scores, CHOSEN)[1]
    ids = ids.at[:, ::3, 1].set(ids[:, ::3, 0])  # some tokens choose an expert twice
    # Some places have "no expert".
    return jnp.where(integers(1, ids.shape, 0, 5) == 0, EXPERTS, ids).astype(jnp.int32)


def pool_and_state():
    pool = initialize_pool(jax.random.key(2), LAYERS, EXPERTS, WIDTH, storage="int4")
    # Scales that are powers of two, so that products with integers are exact.
    scales = 2.0 ** jnp.round(jnp.log2(pool.scales))
    pool = dataclasses.replace(pool, scales=scales)
    return pool, UpdateState.zeros_for(pool)


def of_lookup(pool, ids, exchange):
    """Returns a lookup of both layers and its gradients, which are all sums of integers."""
    gates, x, bias = (
        integers(3, ids.shape),
        integers(4, (LAYERS, TOKENS, WIDTH)),
        integers(5, ids.shape),
    )

    def total(operands, taps):
        gates, x, bias = operands
        y = [
            sharded_lookup(
                pool.at_layer(jnp.int32(layer)), ids[layer], gates[layer], x[layer],
                hidden_bias=bias[layer], activation="relu", tap=taps[layer], exchange=exchange,
            )
            for layer in range(LAYERS)
        ]  # fmt: skip
        y = jnp.stack(y)
        return jnp.sum(y * integers(6, y.shape)), y

    taps = [Tap.zeros_for(ids[layer], x[layer]) for layer in range(LAYERS)]
    differentiate = jax.grad(total, argnums=(0, 1), has_aux=True)
    (gradients, taps), y = differentiate((gates, x, bias), taps)
    taps = jax.tree.map(lambda *leaves: jnp.stack(leaves), *taps)
    return {"y": y, "gates": gradients[0], "x": gradients[1], "bias": gradients[2], "tap": taps}


def of_update(pool, state, ids, exchange, **options):
    pairs, vectors = ids.shape, (LAYERS, TOKENS, WIDTH)
    gradient = FactoredGradient(
        ids, integers(7, pairs), integers(8, pairs), integers(9, vectors), integers(10, vectors)
    )
    rule = Hyperparameters(jnp.float32(0.25), jnp.float32(0), jnp.float32(0.5))
    pool, state, counts = sharded_update(
        pool, state, gradient, rule, seed=1, step=0, exchange=exchange, **options
    )
    return {"pool": pool, "state": state, "counts": counts}


def main(output: str, *meshes: str) -> None:
    # Pairs of other devices are always left out before sorting, and many tokens need two passes.
    updates.MANY_PAIRS = 0
    updates._columns_for = lambda *_: 2
    found = {"devices": jax.device_count()}

    def keep(prefix, tree):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{prefix}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)

    for name in meshes:
        data, fsdp, expert = map(int, name.split("x"))
        mesh = make_mesh(data=data, fsdp=fsdp, expert=expert)
        with jax.set_mesh(mesh):
            trees = dict(zip(("pools", "state"), pool_and_state(), strict=True))
            placed = {
                "pools": trees["pools"],
                "opt_state": {"pools": trees["state"]},
            }
            placed = jax.device_put(placed, state_shardings(mesh, placed))
            pool, state = placed["pools"], placed["opt_state"]["pools"]
            by_token = sharding_of(mesh, jax.P(None, *BATCH))
            ids = {choice: jax.device_put(ids_of(choice), by_token) for choice in CHOICES}
            x = integers(4, (LAYERS, TOKENS, WIDTH))
            for exchange in EXCHANGES:
                look_up = jax.jit(partial(of_lookup, exchange=exchange))
                steps = {
                    clip: jax.jit(partial(of_update, exchange=exchange, clip_norm=clip))
                    for clip in (None, 8.0)
                }
                for choice in CHOICES:
                    prefix = f"{name}/{choice}/{exchange}/"
                    keep(prefix, look_up(pool, ids[choice]))
                    for clip, step in steps.items():
                        keep(f"{prefix}{clip}/", step(pool, state, ids[choice]))
                    share = overflows(ids[choice], x, EXPERTS, exchange)
                    assert (share is None) == (exchange == "gather" or expert == 1)
                    if share is not None:
                        found[f"{prefix}overflows"] = np.asarray(share)
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
