"""Scales that are searched for rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codes import CODES
from pallas_kernels.storage import ExpertPool, read_floats
from peerjax.distillation.rounding import (
    MULTIPLES,
    OF_LARGEST,
    OF_TRAINING,
    scales_of,
    search_scales,
)
from peerjax.pool import stored_as

N, D, LAYERS = 24, 16, 2


def floats_of(pools):
    pool = pools["run_1"]["pool"]
    return jnp.stack([read_floats(pool.at_layer(layer), jnp.arange(N)) for layer in range(LAYERS)])


def draw_pools():
    rng = np.random.default_rng(0)
    weights = rng.standard_t(4, (LAYERS, N, 2, D)).astype(np.float32)
    return {"run_1": {"pool": ExpertPool.of_floats(jnp.asarray(weights))}}, weights


@pytest.mark.parametrize("storage", ["int8", "int4", "int3", "ternary"])
def test_candidates_are_multiples_of_the_scale_of_training_and_the_largest(storage):
    _, weights = draw_pools()
    code, top = CODES[storage], CODES[storage].top
    chosen = jnp.array([OF_TRAINING, OF_LARGEST])
    down, up = np.asarray(scales_of(jnp.asarray(weights[0]), code, chosen)).T
    expected = stored_as(draw_pools()[0]["run_1"]["pool"], storage).scales[0]
    np.testing.assert_allclose(down, expected[0], rtol=1e-6)
    np.testing.assert_allclose(up, np.abs(weights[0, :, 1]).max(-1) / top, rtol=1e-6)


def test_the_search_finds_the_scales_of_least_loss():
    pools, _ = draw_pools()
    wanted = [[1, 3], [OF_LARGEST, OF_TRAINING]]
    aims = jnp.stack(
        [
            floats_of({"run_1": {"pool": stored_as(
                pools["run_1"]["pool"], "int4",
                lambda floats, layer: scales_of(floats, CODES["int4"], jnp.array(wanted)[layer]),
            )}})[layer]
            for layer in range(LAYERS)
        ]
    )  # fmt: skip
    distance = jax.jit(lambda pools: jnp.sum(jnp.square(floats_of(pools) - aims)))
    found, chosen = search_scales(pools, "int4", lambda pools: distance(pools).item())
    assert distance(found) < 1e-6
    (of_pool,) = chosen.values()
    names = [*MULTIPLES, "largest"]
    assert of_pool == [{"down": names[down], "up": names[up]} for down, up in wanted]
