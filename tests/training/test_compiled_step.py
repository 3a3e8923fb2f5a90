"""The memory of the training step that users' CPUs run. `tests/accelerators` has other targets."""

from benchmarks.compiled_step import compile_step, config_of
from tests.conftest import compile_as_users_do
from tests.whole_step import (
    LARGE,
    ONE_LAYER,
    SMALL,
    assert_cost_is_not_that_of_a_pool,
    with_experts,
)


def program(recipe, *changes):
    return compile_step(config_of(recipe, changes), compile=compile_as_users_do)


def test_no_cost_grows_with_the_pool():
    small, large = (program("peer_1m_cpu", *with_experts(count)) for count in (SMALL, LARGE))
    assert_cost_is_not_that_of_a_pool(small, large)


def test_the_search_finds_what_it_looks_for():
    dense = program("peer_1m", ONE_LAYER, "peer.num_experts=(128, 128)")  # float32 and AdamW
    assert dense.largest_float >= SMALL * 2 * dense.width
