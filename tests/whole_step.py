"""What holds of the memory of a compiled training step, whatever it is compiled for."""

from benchmarks.compiled_step import Program

SMALL, LARGE = 1 << 14, 1 << 20
# A layer of experts alone: what is before and behind it has no part in what is asserted.
ONE_LAYER = "model.layers=(('peer', 1),)"


def with_experts(num_experts: int) -> tuple[str, str]:
    """Changes of `peer_1m_cpu`, as the command line of `benchmarks.compiled_step` takes them."""
    root = round(num_experts**0.5)
    return ONE_LAYER, f"peer.num_experts=({root}, {root})"


def assert_cost_is_not_that_of_a_pool(small: Program, large: Program) -> None:
    """Compares steps whose pools have `SMALL` and `LARGE` experts."""
    # A larger pool adds router scores to the temporary memory, and nothing else.
    scores = 4 * large.tokens * large.heads * 2 * round(LARGE**0.5) * 4
    assert large.temp - small.temp <= scores
    assert scores < large.pools / 4  # the bound is far below anything the size of the pool
    # No gathered experts and no float copy of a pool exist.
    gathered = large.tokens * large.chosen * large.width
    assert gathered < LARGE * large.width
    assert large.largest_float < gathered
    assert large.largest_other < gathered
    assert_rewritten_in_place(large)


def assert_rewritten_in_place(program: Program) -> None:
    assert program.aliased >= program.pools
    assert program.pool_copies == 0
