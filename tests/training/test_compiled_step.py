"""The memory of the training step that users' CPUs run. `tests/accelerators` has other targets."""

import pytest

from benchmarks.recipes import config_of, with_experts
from peerjax.planning.programs import compile_step
from tests.conftest import compile_as_users_do
from tests.whole_step import LARGE, ONE_LAYER, SMALL, assert_cost_is_not_that_of_a_pool

pytestmark = pytest.mark.slow


def test_no_cost_grows_with_the_pool():
    small, large = (
        compile_step(with_experts(count, **ONE_LAYER), compile=compile_as_users_do)
        for count in (SMALL, LARGE)
    )
    assert_cost_is_not_that_of_a_pool(small, large)


def test_the_search_finds_what_it_looks_for():
    # float32 and AdamW
    config = config_of("peer_1m", **ONE_LAYER, **{"peer.num_experts": (128, 128)})
    dense = compile_step(config, compile=compile_as_users_do)
    assert dense.largest_float >= SMALL * 2 * config.model.width
