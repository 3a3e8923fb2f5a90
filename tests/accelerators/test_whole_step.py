"""The memory of a compiled training step, for the CPU at hand and for a GPU that is not there."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks.compiled_step import Program, compile_step
from configs import peer_1m
from tests.conftest import REPOSITORY

SMALL, LARGE = 1 << 14, 1 << 20
PLUGINS = {"h100": "jax_cuda12_plugin"}


@functools.cache
def program_for(target: str, num_experts: int) -> Program:
    if target == "cpu":
        return compile_step(num_experts)
    if importlib.util.find_spec(PLUGINS[target]) is None:
        if os.environ.get("PEERJAX_TARGETS"):
            pytest.fail(f"{PLUGINS[target]} is not installed")
        pytest.skip("compiling for a GPU needs 'peerjax[compile-gpu]'")
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_step", target, str(num_experts)],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return Program(**json.loads(found.stdout.splitlines()[-1]))


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_a_larger_pool_adds_only_router_scores_to_the_temporary_memory(target):
    small, large = program_for(target, SMALL), program_for(target, LARGE)
    scores = 4 * large.tokens * large.heads * 2 * round(LARGE**0.5) * 4
    assert large.temp - small.temp <= scores
    assert scores < large.pools / 4  # the bound is far below anything the size of the pool


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_pools_and_their_accumulators_are_rewritten_in_place(target):
    large = program_for(target, LARGE)
    assert large.aliased >= large.pools


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_no_gathered_experts_and_no_float_copy_of_a_pool_exist(target):
    large = program_for(target, LARGE)
    gathered = large.tokens * large.chosen * large.width
    assert gathered < LARGE * large.width
    assert large.largest_float < gathered
    assert large.largest_other < gathered


def test_the_search_finds_what_it_looks_for():
    dense = compile_step(SMALL, recipe=peer_1m)  # float32 and AdamW
    assert dense.largest_float >= SMALL * 2 * dense.width
