"""Steps on many chips that are not there, compiled whole."""

import pytest

from benchmarks.recipes import config_of
from peerjax.planning.programs import program_for
from tests.accelerators.test_whole_step import GIB, assert_updated_in_place_by_kernels, require

VOCABULARY = 32_000


@pytest.mark.parametrize(
    ("target", "recipe", "parameters", "memory"),
    [
        ("v5p:2x2x2", "peer_16m_pod", 12 * 2**24 * 2048, 60 * GIB),
        ("v5p:4x4x8", "peer_10t_v5p_256", 10e12, 90 * GIB),
    ],
)
def test_pools_over_all_chips_of_a_pod(target, recipe, parameters, memory):
    """No chip exchanges, copies or computes anything of the size of a pool.

    The largest arrays are of one layer and all tokens: x and dy, or the numbers of their experts.
    """
    require(target)
    config = config_of(recipe)
    program = program_for(target, config, VOCABULARY)
    assert program.expert_parameters >= parameters
    assert program.total <= memory
    assert_updated_in_place_by_kernels(program)
    tokens = config.data.batch_size * config.data.sequence_length
    chosen = config.peer.heads * config.peer.experts_per_head
    of_vectors, of_pairs = 2 * tokens * config.model.width, tokens * chosen
    of_table = VOCABULARY * config.model.width
    depth = config.model.layers[0][1]
    of_blocks = depth * config.model.width * config.model.width
    assert program.largest_float <= max(of_vectors, of_blocks, of_table)
    assert program.largest_other <= max(of_pairs, of_vectors)
    for each in program.collectives:
        assert each.largest <= 4 * max(of_vectors, of_table, of_pairs), each
        assert each.largest < program.pools / 2, each
