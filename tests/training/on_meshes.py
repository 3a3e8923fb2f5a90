"""Trains some steps on several meshes, from one state.

python -m tests.training.on_meshes OUTPUT.npz KIND DATAxFSDPxEXPERT...
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from peerjax.sharding import make_mesh, state_shardings
from peerjax.sharding.batches import put_batch
from peerjax.training.step import make_train_step
from tests.training.test_step import make, make_batch

STEPS = 4
KINDS = {
    "peer": {"model.layers": (("dense", 1), ("peer", 2))},
    "shared": {
        "model.layers": (("dense", 1), ("peer", 1)), "peer.always_on": 4, "model.shared_mlp": 8,
        "peer.gate": "threshold", "peer.target": 5.0, "pool.clip_norm": 0.1,
    },
    "float": {
        "model.layers": (("peer", 1),), "pool.storage": "float32", "kernels.exchange": "dispatch",
    },
    "adamw": {
        "model.layers": (("peer", 1),), "pool.storage": "float32", "pool.rule": "adamw",
    },
    "monet": {
        "model.layers": (("monet_hd", 2),), "monet.num_experts": 16, "monet.top_k": 2,
        "monet.heads": 2, "monet.storage": "int4",
    },
    "moe": {"model.layers": (("moe", 1), ("peer", 1))},
}  # fmt: skip


def settings_of(kind):
    return {
        "peer.num_experts": (32, 32),  # eight parts of 128 experts
        "optimizer.warmup_steps": 1,
        "model.remat": kind == "peer",
        **KINDS[kind],
    }


def main(output: str, kind: str, *meshes: str) -> None:
    config, task, optimizer, start = make(**settings_of(kind))
    found = {"devices": jax.device_count()}
    for name in meshes:
        data, fsdp, expert = map(int, name.split("x"))
        mesh = make_mesh(data=data, fsdp=fsdp, expert=expert)
        shardings = state_shardings(mesh, jax.eval_shape(lambda: start))
        with jax.set_mesh(mesh):
            state = jax.device_put(start, shardings)
            step = jax.jit(make_train_step(config, task, optimizer), donate_argnums=0)
            state = jax.tree.map(jnp.copy, state)
            for number in range(STEPS):
                state, metrics = step(state, put_batch(mesh, make_batch(number)))
                found[f"{name}/loss/{number}"] = metrics["loss"]
                if number == 0:
                    for path, leaf in jax.tree_util.tree_leaves_with_path(
                        {"pools": state.pools, "opt_state": state.opt_state, "params": state.params}
                    ):
                        found[f"{name}/state{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
            # Arrays stay where they were put.
            for leaf, wanted in zip(
                jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.shape, wanted)
            embeddings = [
                leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(state)
                if "embedding" in jax.tree_util.keystr(path)
            ]
            assert len(embeddings) == 3  # with both moments, which are split over all axes
            parts = [leaf.size // leaf.addressable_shards[0].data.size for leaf in embeddings]
            assert sorted(parts) == sorted([fsdp, mesh.size, mesh.size])
            split = [leaf for leaf in jax.tree.leaves(state.pools) if leaf.size > 2048]
            for leaf in split:
                shards = leaf.size // leaf.addressable_shards[0].data.size
                assert shards == expert, (leaf.shape, shards)
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
