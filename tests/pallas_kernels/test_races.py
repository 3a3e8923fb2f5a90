"""Kernels in the interpreters that see races and reads of memory that nothing was written to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.expert_lookup import mosaic_tpu as lookup_tpu
from pallas_kernels.expert_lookup import xla as lookup_xla
from tests.pallas_kernels.interpreters import no_races_on_tpu
from tests.pallas_kernels.test_kernels import assert_equal_to_rounding, make_inputs, make_pool


@pytest.mark.parametrize(("width", "tokens", "chosen"), [(256, 70, 8), (1024, 3, 16)])
def test_the_lookup_for_tpus(width, tokens, chosen):
    pool = make_pool("int4", width, 30).at_layer(jnp.int32(1))
    ids, gates, x, bias = make_inputs(30, tokens, chosen, width)
    gates = jnp.where((ids >= 0) & (ids < 30), gates, 0)  # as `lookup` passes them on
    inputs = (pool, ids, gates, x, bias)
    with no_races_on_tpu() as interpret:
        y = lookup_tpu.forward(*inputs, activation="gelu", interpret=interpret)
        y = jax.block_until_ready(y)
    assert_equal_to_rounding(y, lookup_xla.forward(*inputs, "gelu"))
    with no_races_on_tpu() as interpret:
        found = lookup_tpu.backward(*inputs, y, activation="gelu", interpret=interpret)
        found = jax.block_until_ready(found)
    assert_equal_to_rounding(found, lookup_xla.backward(*inputs, y, "gelu"))


def test_a_race_is_seen():
    def kernel(source, out, arrived):
        copy = pltpu.make_async_copy(source, out, arrived)
        copy.start()
        out[...] = out[...] + 1.0  # before it has arrived
        copy.wait()

    def run():
        with no_races_on_tpu() as interpret:
            result = pl.pallas_call(
                kernel,
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
                scratch_shapes=[pltpu.SemaphoreType.DMA],
                interpret=interpret,
            )(jnp.ones((8, 128)))
            np.asarray(result)

    with pytest.raises(AssertionError):
        run()
