"""Prints the FLOPs that a device computes in a step, on one device and on a mesh of all.

python -m tests.sharding.on_flops
"""

import json

import jax

from peerjax.planning.programs import step_of, with_mesh
from peerjax.sharding import BATCH, make_mesh, sharding_of, state_shardings
from peerjax.training.checkpoint import abstract
from tests.training.tiny import tiny_config


def flops(mesh):
    config = tiny_config("unused")
    config.update_from_flattened_dict(
        {
            "model.width": 64,
            "model.layers": (("dense", 1), ("peer", 1)),
            "peer.num_experts": (32, 32),
            "data.batch_size": 64,
            "data.sequence_length": 64,
        }
    )
    step, state, batch = step_of(with_mesh(config, mesh), 128)
    state = abstract(state, state_shardings(mesh, state))
    batch = abstract(batch, jax.tree.map(lambda _: sharding_of(mesh, BATCH), batch))
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile().cost_analysis()["flops"]


if __name__ == "__main__":
    meshes = {"one": make_mesh(jax.devices()[:1]), "all": make_mesh(expert=jax.device_count())}
    print(json.dumps({name: flops(mesh) for name, mesh in meshes.items()}))
