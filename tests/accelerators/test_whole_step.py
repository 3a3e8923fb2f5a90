"""Training steps compiled for accelerators that are not there: memory, and kernels in use."""

import os

import pytest

from benchmarks.recipes import config_of, with_experts
from peerjax.planning.programs import Program, program_for
from peerjax.planning.targets import missing
from tests.whole_step import (
    LARGE,
    ONE_LAYER,
    SMALL,
    assert_cost_is_not_that_of_a_pool,
    assert_rewritten_in_place,
)

GIB = 1 << 30
# On TPUs, most of the time would go into compiling the sort of more pairs.
FEW_TOKENS = {"data.batch_size": 1, "data.sequence_length": 128}


def require(target: str) -> None:
    """Skips where a target's compiler is not installed, but not where it must be."""
    extra = missing(target)
    if extra and os.environ.get("PEERJAX_TARGETS"):
        pytest.fail(f"compiling for {target} needs 'peerjax[{extra}]'")
    if extra:
        pytest.skip(f"compiling for {target} needs 'peerjax[{extra}]'")


@pytest.fixture
def quickly(monkeypatch):
    """Has XLA spend little time on optimising, where it is enough that a program compiles."""
    monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")


def test_no_cost_grows_with_the_pool_on_a_gpu():
    require("h100")
    small, large = (
        program_for("h100", with_experts(count, **ONE_LAYER)) for count in (SMALL, LARGE)
    )
    assert_cost_is_not_that_of_a_pool(small, large)


@pytest.mark.parametrize(
    ("target", "recipe", "changes", "parameters", "memory"),
    [
        ("h100", "peer_60b_one_gpu", {}, 60e9, 75 * GIB),
        ("v5e", "peer_12b_one_v5e", FEW_TOKENS, 12e9, 14 * GIB),
    ],
)
def test_what_trains_on_one_accelerator(target, recipe, changes, parameters, memory):
    """Arguments, results and temporary memory, factored gradients included.

    `python -m benchmarks one_accelerator` compiles the recipes with all of their tokens.
    """
    require(target)
    program = program_for(target, config_of(recipe, **changes))
    assert program.expert_parameters >= parameters
    assert program.total <= memory
    assert_updated_in_place_by_kernels(program)


def test_a_step_compiles_for_the_newest_tpu(quickly):
    """Each kernel compiles for every target by itself: see `test_kernels`."""
    require("tpu7x")
    config = config_of("peer_12b_one_v5e", **ONE_LAYER, **FEW_TOKENS)
    program = program_for("tpu7x", config)
    assert_updated_in_place_by_kernels(program)


def assert_updated_in_place_by_kernels(program: Program) -> None:
    assert program.kernels >= 3  # lookup, its backward pass, update
    assert_rewritten_in_place(program)


def test_a_layer_of_the_papers_monet_compiles_for_a_pod(quickly):
    require("v5p")
    changes = {
        "model.layers": (("monet_vd", 1),), "monet.group": 1,
        "data.batch_size": 4, "data.sequence_length": 256,
    }  # fmt: skip
    found = program_for("v5p:2x2x1", config_of("monet_850m", **changes), vocabulary=32_000)
    assert (found.chips, found.rows) == (4, 1)
    # Weights, and a quarter of two moments, in float32 on every chip, rewritten in place.
    layer = 4 * 1536**2 + 2 * 1536 * 512 * 12
    parameters = layer + 2 * 1536 * 6 * 512 + 2 * 32_000 * 1536
    assert 6 * parameters <= found.aliased < 6.2 * parameters
    assert found.total <= 3 * GIB
