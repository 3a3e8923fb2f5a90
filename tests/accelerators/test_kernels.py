"""Kernels compiled for accelerators that are not there: memory, aliasing, and what is refused."""

import functools
import re
import subprocess
import sys

import pytest

from benchmarks.compiled_kernels import Compiled
from benchmarks.kernels_aot import cycles_per_copy, moved
from pallas_kernels.row_layout import RowLayout
from peerjax.planning.targets import MEMORY, TARGETS, TPUS, environment, run_for
from tests.accelerators.test_whole_step import require
from tests.conftest import REPOSITORY

VMEM_LIMIT = 48 << 20  # less than any of these has


@functools.cache
def compiled_for(target: str) -> list[Compiled]:
    require(target)
    # Every path through a kernel on one TPU and one GPU; on other TPUs, a row of each kind.
    return compile_kernels(target, "--quick" if target in ("v5e", "h100") else "--quick=2")


def compile_kernels(target: str, *options: str) -> list[Compiled]:
    found = run_for(target, "benchmarks.compiled_kernels", *options)
    return [Compiled.of_json(each) for each in found]


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_needs_memory_of_the_size_of_the_pool(target):
    for each in compiled_for(target):
        assert each.temp - each.images < 0.02 * each.pool, each
        assert each.pool_copies == 0, each
        assert 2 * each.pool < MEMORY[target]


@pytest.mark.parametrize("target", TARGETS)
def test_codes_and_accumulators_are_rewritten_in_place(target):
    updates = [each for each in compiled_for(target) if each.kernel == "update"]
    assert updates
    for each in updates:
        assert each.aliased >= 2 * each.pool, each


@pytest.mark.parametrize("target", [*TPUS])
def test_what_is_on_chip_fits(target):
    assert all(0 < each.on_chip <= VMEM_LIMIT for each in compiled_for(target))


@pytest.mark.parametrize("target", [*TPUS])
def test_traffic_is_near_the_least_where_an_expert_fills_its_units(target):
    for each in compiled_for(target):
        assert each.row_bytes >= each.least_bytes / 2  # the count is of the right size
        # At D = 256 the other half of a unit is another expert.
        bound = 2.5 if each.shape.width == 256 else 1.3
        assert moved(each) <= bound * each.least_bytes, each


def test_rows_are_copied_whole_and_started_fast():
    require("v5e")
    for each in compile_kernels("v5e", "--quick=1", "--loops"):
        row = RowLayout.of(each.shape.width, each.shape.storage).lanes * 4
        assert {loop.copy_bytes for loop in each.loops if loop.copies} == {row}
        # Bandwidth allows a row of 512 bytes in 0.9 cycles on a v5e: copies are the bound.
        assert cycles_per_copy(each) <= 8


BAD = {
    # A row of 64 words is half a unit: refused, or fetched from a copy of the pool.
    "half a unit": """
pool = S((1 << 20, 64), jnp.int32)
def kernel(ids, pool, out, sem):
    copy = pltpu.make_async_copy(pool.at[ids[0]], out.at[0], sem)
    copy.start(); copy.wait()
call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 64), jnp.int32),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)],
    scratch_shapes=[pltpu.SemaphoreType.DMA])
memory = jax.jit(call).lower(S((8,), jnp.int32), pool).compile().memory_analysis()
assert memory.temp_size_in_bytes < 0.02 * (1 << 28), "copies the pool"
""",
    "too much VMEM": """
def kernel(ids, out, scratch):
    scratch[...] = jnp.zeros_like(scratch)
    out[...] = scratch[:8]
call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.int32),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)],
    scratch_shapes=[pltpu.VMEM((1 << 19, 128), jnp.int32)])
jax.jit(call).lower(S((8,), jnp.int32)).compile()
""",
    "too much shared memory": """
def kernel(x, out, scratch):
    scratch[pl.ds(0, 128)] = x[...]
    out[...] = scratch[pl.ds(0, 128)]
call = plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), grid=(1,),
    grid_names=("i",), scratch_types=[plgpu.SMEM((300 * 256,), jnp.float32)])
jax.jit(call).lower(S((128,), jnp.float32)).compile()
""",
}
PREAMBLE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu, tpu as pltpu
from peerjax.planning.targets import device_of, on
device = device_of(sys.argv[1])
S = lambda shape, dtype: on(device, jax.ShapeDtypeStruct(shape, dtype))
"""


@pytest.mark.parametrize(
    ("target", "bad", "reason"),
    [
        ("v5e", "half a unit", "copies the pool|aligned to til"),
        ("v5e", "too much VMEM", "vmem"),
        ("h100", "too much shared memory", "(?i)shared memory|smem"),
    ],
)
def test_a_bad_kernel_is_found(target, bad, reason):
    """The checks above can fail."""
    require(target)
    found = subprocess.run(
        [sys.executable, "-c", PREAMBLE + BAD[bad], target],
        cwd=REPOSITORY,
        env=environment(target),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode
    assert re.search(reason, found.stderr)
