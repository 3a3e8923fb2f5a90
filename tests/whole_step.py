"""What holds of the memory of a compiled training step, whatever it is compiled for."""

from benchmarks.recipes import config_of
from peerjax.planning.programs import Program

SMALL, LARGE = 1 << 14, 1 << 20
# A layer of experts alone: what is before and behind it has no part in what is asserted.
ONE_LAYER = {"model.layers": (("peer", 1),)}


def assert_cost_is_not_that_of_a_pool(small: Program, large: Program) -> None:
    """Compares steps of `with_experts`, whose pools have `SMALL` and `LARGE` experts."""
    config = config_of("peer_1m_cpu")
    tokens = config.data.batch_size * config.data.sequence_length
    # A larger pool adds router scores to the temporary memory, and nothing else.
    scores = 4 * tokens * config.peer.heads * 2 * round(LARGE**0.5) * 4
    assert large.temp - small.temp <= scores
    assert scores < large.pools / 4  # the bound is far below anything the size of the pool
    # No gathered experts and no float copy of a pool exist.
    chosen, width = config.peer.heads * config.peer.experts_per_head, config.model.width
    gathered = tokens * chosen * width
    assert gathered < LARGE * width
    assert large.largest_float < gathered
    assert large.largest_other < gathered
    assert_rewritten_in_place(large)


def assert_rewritten_in_place(program: Program) -> None:
    assert program.aliased >= program.pools
    assert program.pool_copies == 0
