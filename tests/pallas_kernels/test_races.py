"""Kernels in the interpreters that see races and reads of memory that nothing was written to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.expert_lookup import mosaic_gpu as lookup_gpu
from pallas_kernels.expert_lookup import mosaic_tpu as lookup_tpu
from pallas_kernels.expert_lookup import xla as lookup_xla
from pallas_kernels.expert_update import Hyperparameters, Statistics, UpdateState
from pallas_kernels.expert_update import mosaic_gpu as update_gpu
from pallas_kernels.expert_update import mosaic_tpu as update_tpu
from pallas_kernels.expert_update import xla as update_xla
from pallas_kernels.expert_update.rows import SortedRows
from pallas_kernels.expert_update.xla import Carry, Part
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.sorted_pairs import sort_pairs
from tests.pallas_kernels.interpreters import no_races_on_gpu, no_races_on_tpu
from tests.pallas_kernels.test_kernels import (
    assert_equal_to_rounding,
    make_gradient,
    make_inputs,
    make_pool,
)


def make_masked_inputs(num_experts, tokens, chosen, width):
    """What `lookup` passes on: nothing beside ids that are no experts."""
    ids, gates, x, bias = make_inputs(num_experts, tokens, chosen, width)
    valid = (ids >= 0) & (ids < num_experts)
    return ids, jnp.where(valid, gates, 0), x, jnp.where(valid, bias, 0)


@pytest.mark.parametrize(("width", "tokens", "chosen"), [(256, 34, 8), (1024, 3, 16)])
def test_the_lookup_for_tpus(width, tokens, chosen):
    pool = make_pool("int4", width, 30).at_layer(jnp.int32(1))
    inputs = (pool, *make_masked_inputs(30, tokens, chosen, width))
    with no_races_on_tpu() as interpret:
        y = lookup_tpu.forward(*inputs, activation="gelu", interpret=interpret)
        y = jax.block_until_ready(y)
    assert_equal_to_rounding(y, lookup_xla.forward(*inputs, "gelu"))
    with no_races_on_tpu() as interpret:
        found = lookup_tpu.backward(*inputs, y, activation="gelu", interpret=interpret)
        found = jax.block_until_ready(found)
    assert_equal_to_rounding(found, lookup_xla.backward(*inputs, y, "gelu"))


def check_update(kernel, interpreter, tokens):
    """A kernel in a strict interpreter, against XLA."""
    num_experts, width = 30, 256
    pool = make_pool("int4", width, num_experts)
    gradient = make_gradient(num_experts, tokens, 4, width)
    rule = Hyperparameters(0.02)
    state = UpdateState.zeros_for(pool)
    zeros = jnp.zeros(2)
    carry = Carry(pool.weights, pool.scales, *state, Statistics(*[zeros] * 5))
    sizes = {"num_experts": num_experts, "storage": "int4", "accumulator_bits": 4}
    by_xla = functools.partial(update_xla.update_stack, chunk=16, **sizes)
    expected = by_xla(carry, gradient, rule, 1, 2, Part())
    with interpreter() as interpret:
        found = kernel.update_stack(
            carry, gradient, rule, 1, 2, Part(), interpret=interpret, **sizes
        )
        found = jax.block_until_ready(found)
    assert np.mean(np.asarray(found.weights) != np.asarray(expected.weights)) <= 1e-3
    assert_equal_to_rounding(found[1:2] + found[3:], expected[1:2] + expected[3:], 1e-4)


@pytest.mark.parametrize("resident", [True, False])
def test_the_update_for_tpus(resident, monkeypatch):
    if not resident:
        monkeypatch.setattr(update_tpu, "RESIDENT_BYTES", 0)
    check_update(update_tpu, no_races_on_tpu, tokens=40)


def test_the_lookup_for_gpus():
    pool = make_pool("int4", 256, 30).at_layer(jnp.int32(1))
    inputs = (pool, *make_masked_inputs(30, 5, 6, 256))
    with no_races_on_gpu() as interpret:
        y = lookup_gpu.forward(*inputs, activation="gelu", interpret=interpret)
        y = jax.block_until_ready(y)
    assert_equal_to_rounding(y, lookup_xla.forward(*inputs, "gelu"))
    with no_races_on_gpu() as interpret:
        found = lookup_gpu.backward(*inputs, y, activation="gelu", interpret=interpret)
        found = jax.block_until_ready(found)
    assert_equal_to_rounding(found, lookup_xla.backward(*inputs, y, "gelu"))


def test_the_update_for_gpus():
    check_update(update_gpu, no_races_on_gpu, tokens=10)


@pytest.mark.parametrize("width", [64, 256, 576, 1024])
def test_no_two_blocks_of_a_gpu_own_a_row(width):
    """Each rewrites the row of one last pair, and every row that is hit has one."""
    layout = RowLayout.of(width, "int4")
    gradient = make_gradient(101, 40, 8, width)
    pairs = sort_pairs(gradient.ids[0], gradient.c_down[0], gradient.c_up[0], 101)
    rows = SortedRows.of(pairs, layout)
    owned = np.asarray(rows.row)[np.asarray(rows.is_last)]
    hit = np.asarray(pairs.expert)[: int(pairs.num_hit)] // layout.experts
    assert len(owned) == len(set(owned))
    assert set(owned) == set(hit)


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
