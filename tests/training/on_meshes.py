"""Trains on several meshes of all devices, and compares each with training on one device.

python -m tests.training.on_meshes KIND DATAxFSDPxEXPERT... [PORT PROCESSES PROCESS]

The first process prints a JSON object. By mesh, it has the losses of some steps from the first
state, and by step, what differs after one step from the same state.
"""

import json
import sys
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils

from peerjax.processes import Place, join
from peerjax.sharding import make_mesh, state_shardings
from peerjax.sharding.batches import put_whole
from peerjax.training.step import make_train_step
from tests.training.test_step import make, make_batch

STEPS, COMPARED = 20, (0, 10, 20)
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
        "model.layers": (("monet_hd", 2), ("monet_vd", 2)),
        "monet.num_experts": 16, "monet.top_k": 2,
        "monet.heads": 2, "monet.storage": "int4",
    },
    # 2,000 experts get room for 2,048 on four devices.
    "padded": {
        "model.layers": (("peer", 1),), "peer.num_experts": (40, 50), "mesh.expert": 4,
    },
    "metapeer": {
        "model.layers": (("metapeer", 2),), "metapeer.choice": "sequence", "metapeer.chunk": 8,
        "metapeer.metaexperts": 4, "peer.num_experts": (16, 16), "peer.spread": 4,
    },
    "moe": {"model.layers": (("moe", 1), ("peer", 1))},
}  # fmt: skip


def settings_of(kind):
    return {
        "peer.num_experts": (32, 32),  # eight parts of 128 experts
        "optimizer.warmup_steps": 1,
        "steps": STEPS,
        "model.remat": kind == "peer",
        **KINDS[kind],
    }


def trained(state):
    return {"pools": state.pools, "opt_state": state.opt_state, "params": state.params}


def whole(leaf):
    """Returns an array of any mesh, which other processes may hold in part."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def differences(found, expected):
    """Returns, by name, the share of differing integers, or the largest error of floats."""
    result = {}
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(trained(found)),
        jax.tree.leaves(trained(expected)),
        strict=True,
    ):
        leaf, other = whole(leaf), np.asarray(other)
        if other.dtype.kind in "iu":
            by = float(np.mean(leaf != other))
        else:
            by = float(np.abs(leaf - other).max() / (np.abs(other).max() + 1e-3))
        result[jax.tree_util.keystr(path)] = (other.dtype.kind, by)
    return result


def assert_placed(state, shardings, mesh):
    """Checks that arrays are where the rules put them, and split as the axes say."""
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.shape, wanted)

    def parts(leaf):
        return leaf.size // leaf.addressable_shards[0].data.size

    embeddings = [
        parts(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "embedding" in jax.tree_util.keystr(path)
    ]
    # The table, and both moments, which are split over all axes.
    assert sorted(embeddings) == sorted([mesh.shape["fsdp"], mesh.size, mesh.size])
    for leaf in jax.tree.leaves(state.pools):
        assert leaf.size <= 2048 or parts(leaf) == mesh.shape["expert"], leaf.shape


def main(kind, *meshes):
    one = make_mesh(jax.local_devices()[:1])
    with jax.set_mesh(one):
        config, task, optimizer, state = make(**settings_of(kind))
        step = jax.jit(make_train_step(config, task, optimizer))
        states, losses = [], []
        for number in range(STEPS + 1):
            states.append(jax.device_get(state))
            state, metrics = step(state, make_batch(number))
            losses.append(float(metrics["loss"]))
        states.append(jax.device_get(state))
    results = {"devices": jax.device_count(), "losses": losses}
    for name in meshes:
        data, fsdp, expert = map(int, name.split("x"))
        mesh = make_mesh(data=data, fsdp=fsdp, expert=expert)
        shardings = state_shardings(mesh, jax.eval_shape(lambda: states[0]))
        put = partial(jax.tree.map, lambda leaf, place: jax.device_put(leaf, place))
        with jax.set_mesh(mesh):
            step = jax.jit(make_train_step(config, task, optimizer), donate_argnums=0)

            def run(state, number, step=step, mesh=mesh):
                batch = jax.tree.map(np.asarray, make_batch(number))
                return step(state, put_whole(mesh, batch))

            found = results[name] = {"losses": [], "differences": {}}
            state = put(states[0], shardings)
            for number in range(STEPS):
                state, metrics = run(state, number)
                found["losses"].append(float(metrics["loss"]))
            assert_placed(state, shardings, mesh)
            for number in COMPARED:
                state, _ = run(put(states[number], shardings), number)
                found["differences"][number] = differences(state, states[number + 1])
    if jax.process_index() == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if len(arguments) > 3 and arguments[-1].isdigit():
        port, processes, process = map(int, arguments[-3:])
        join(Place(f"127.0.0.1:{port}", processes, process))
        arguments = arguments[:-3]
    main(*arguments)
