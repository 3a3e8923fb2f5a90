"""Compiles a whole training step for all chips of a TPU topology that need not be there.

    python -m benchmarks.compiled_pod v5p 4x4x4 RECIPE VOCABULARY [FIELD=VALUE ...]

prints JSON: bytes of a chip's memory. Fields are those of the configuration.
"""

import json
import sys

import jax

from benchmarks.compiled_step import config_of, step_of, total_bytes
from benchmarks.targets import mesh_of
from peerjax.sharding import BATCH, sharding_of, state_shardings
from peerjax.training.checkpoint import abstract


def main() -> None:
    """Compiles what the command line names."""
    kind, chips, recipe, vocabulary, *changes = sys.argv[1:]
    config = config_of(recipe, changes)
    mesh = mesh_of(f"{kind}:{chips}")
    step, state, batch = step_of(config, int(vocabulary))
    state = abstract(state, state_shardings(mesh, state))
    batch = abstract(batch, jax.tree.map(lambda _: sharding_of(mesh, BATCH), batch))
    with jax.set_mesh(mesh):
        memory = step.lower(state, batch).compile().memory_analysis()
    figures = {
        "chips": mesh.size,
        "rows": config.data.batch_size // mesh.size,
        "state": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "total": total_bytes(memory),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
