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

    No array is larger than x and dy of one layer and all tokens, or what a chip has of all layers
    beside pools.
    """
    require(target)
    config = config_of(recipe)
    program = program_for(target, config, VOCABULARY)
    assert program.expert_parameters >= parameters
    assert program.total <= memory
    assert_updated_in_place_by_kernels(program)
    width, depth, peer = config.model.width, config.model.layers[0][1], config.peer
    tokens = config.data.batch_size * config.data.sequence_length
    own, keys = tokens // program.chips, max(peer.num_experts)
    of_one_layer = tokens * max(2 * width, peer.heads * peer.experts_per_head)
    of_all_layers = depth * max(own * width, peer.heads * keys * peer.key_width)
    largest = max(
        of_one_layer,
        of_all_layers,
        own * max(peer.heads * keys, VOCABULARY),  # scores and logits
        VOCABULARY * width,
    )
    assert program.largest_float <= largest
    assert program.largest_other <= largest
    assert 4 * largest < program.pools / 16
    for each in program.collectives:
        assert each.largest <= 4 * largest, each
