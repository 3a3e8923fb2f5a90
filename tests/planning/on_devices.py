"""Prints the collectives of a program whose exchanges are known, on 8 devices.

python -m tests.planning.on_devices
"""

import json

import jax
import jax.numpy as jnp

from peerjax.planning.collectives import collectives
from peerjax.sharding import BATCH, make_mesh
from peerjax.sharding.over_mesh import over_mesh


def local(x):
    """Exchanges a device's [16, 32] floats, which are 2 KiB."""

    def gather_and_scatter(x, _):
        everywhere = jax.lax.all_gather(x, "expert", axis=0, tiled=True)
        return jax.lax.psum_scatter(jnp.sin(everywhere), "expert", tiled=True), None

    x, _ = jax.lax.scan(gather_and_scatter, x, length=5)
    x = jnp.cos(jax.lax.all_to_all(x, ("data", "expert"), 0, 0, tiled=True))
    ring = [(chip, (chip + 1) % 4) for chip in range(4)]

    def rarely(x):
        everywhere = jax.lax.all_gather(x, ("data", "expert"), axis=0, tiled=True)
        return jnp.sin(everywhere).reshape(8, *x.shape).sum(0)

    fits = jax.lax.pmax(jnp.max(x), "data") < 2
    return jax.lax.cond(fits, lambda x: jax.lax.ppermute(x, "expert", ring), rarely, x)


def main() -> None:
    mesh = make_mesh(data=2, fsdp=1, expert=4)
    x = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=jax.NamedSharding(mesh, BATCH))
    with jax.set_mesh(mesh):
        program = jax.jit(over_mesh(local, BATCH, BATCH)).lower(x).compile().as_text()
    found = collectives(program, dict(mesh.shape))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
