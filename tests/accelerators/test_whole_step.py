"""The memory of a compiled training step, for the CPU at hand and for accelerators that are not."""

import functools
import os

import pytest

from benchmarks.compiled_step import Program, compile_step, million
from benchmarks.targets import missing, run_for
from configs import peer_1m

SMALL, LARGE = 1 << 14, 1 << 20
GIB = 1 << 30


def require(target: str) -> None:
    """Skips where a target's compiler is not installed, but not where it must be."""
    extra = missing(target)
    if extra and os.environ.get("PEERJAX_TARGETS"):
        pytest.fail(f"compiling for {target} needs 'peerjax[{extra}]'")
    if extra:
        pytest.skip(f"compiling for {target} needs 'peerjax[{extra}]'")


@functools.cache
def program_for(target: str, recipe: str, *changes: str) -> Program:
    require(target)
    return Program(**run_for(target, "benchmarks.compiled_step", recipe, *changes))


@functools.cache
def million_for(target: str, num_experts: int) -> Program:
    if target == "cpu":
        return compile_step(million(num_experts))
    root = round(num_experts**0.5)
    return program_for(target, "peer_1m_cpu", f"peer.num_experts=({root}, {root})")


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_a_larger_pool_adds_only_router_scores_to_the_temporary_memory(target):
    small, large = million_for(target, SMALL), million_for(target, LARGE)
    scores = 4 * large.tokens * large.heads * 2 * round(LARGE**0.5) * 4
    assert large.temp - small.temp <= scores
    assert scores < large.pools / 4  # the bound is far below anything the size of the pool


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_no_gathered_experts_and_no_float_copy_of_a_pool_exist(target):
    large = million_for(target, LARGE)
    gathered = large.tokens * large.chosen * large.width
    assert gathered < LARGE * large.width
    assert large.largest_float < gathered
    assert large.largest_other < gathered


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_pools_and_their_accumulators_are_rewritten_in_place(target):
    large = million_for(target, LARGE)
    assert large.aliased >= large.pools
    assert large.pool_copies == 0


def test_the_search_finds_what_it_looks_for():
    config = peer_1m.get_config()  # float32 and AdamW
    config.peer.num_experts = (128, 128)
    dense = compile_step(config)
    assert dense.largest_float >= SMALL * 2 * dense.width


@pytest.mark.parametrize(
    ("target", "recipe", "parameters", "memory"),
    [("h100", "peer_60b_one_gpu", 60e9, 75 * GIB), ("v5e", "peer_12b_one_v5e", 12e9, 15 * GIB)],
)
def test_what_trains_on_one_accelerator(target, recipe, parameters, memory):
    """Arguments, results and temporary memory, factored gradients included."""
    program = program_for(target, recipe)
    assert program.expert_parameters >= parameters
    assert program.total <= memory
    assert_updated_in_place_by_kernels(program)


def test_a_step_compiles_for_the_newest_tpu():
    """Each kernel compiles for every target by itself: see `test_kernels`."""
    program = program_for("tpu7x", "peer_12b_one_v5e", "peer.num_experts=(256, 256)")
    assert_updated_in_place_by_kernels(program)


def assert_updated_in_place_by_kernels(program: Program) -> None:
    assert program.kernels >= 3  # lookup, its backward pass, update
    assert program.aliased >= program.pools
    assert program.pool_copies == 0


def test_a_group_of_layers_of_the_papers_monet_compiles_for_a_pod():
    require("v5p")
    layers = "model.layers=(('monet_vd', 4),)"
    found = run_for(
        "v5p", "benchmarks.compiled_pod", "2x2x1", "monet_850m", "32000", layers,
        "data.batch_size=4",
    )  # fmt: skip
    assert (found["chips"], found["rows"]) == (4, 1)
    # Weights and two moments, in float32 on every chip, rewritten in place.
    layer = 4 * 1536**2 + 2 * 1536 * 512 * 12
    parameters = 4 * layer + 2 * 1536 * 6 * 512 + 2 * 32_000 * 1536
    assert 12 * parameters <= found["state"] < 12.2 * parameters
    assert found["total"] <= 12 * GIB
