"""Saves a pool that lies on several devices: python -m tests.exchange.on_devices FOLDER."""

import sys

import jax

from peerjax import exchange
from peerjax.pool import initialize_pool
from peerjax.sharding import make_mesh, state_shardings


def tree():
    pool = initialize_pool(jax.random.key(0), 2, 1024, 16, storage="int4")
    return {"pools": pool, "bias": jax.numpy.arange(3.0)}


if __name__ == "__main__":
    placed = jax.device_put(tree(), state_shardings(make_mesh(expert=-1), tree()))
    shards = placed["pools"].scales.addressable_shards
    assert len({shard.index[-1].start for shard in shards}) == 4
    exchange.save(f"{sys.argv[1]}/packed.safetensors", placed)
    exchange.save_floats(f"{sys.argv[1]}/floats.safetensors", placed, experts_at_once=300)
