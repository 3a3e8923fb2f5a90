"""The formula against what XLA counts, of programs without loops (or with the loop taken out).

XLA counts one iteration of a loop, so runs have one block; it also counts elementwise operations
(norms, softmaxes, activations), a few numbers a feature where products take hundreds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from configs import dense_small, moe_small, peer_small
from peerjax.config import model_config
from peerjax.flops import forward_flops
from peerjax.layers import FEED_FORWARDS
from peerjax.layers.attention import AttentionConfig
from peerjax.layers.dense import DenseConfig
from peerjax.layers.metapeer import MetaPeerConfig
from peerjax.layers.peer import PeerConfig
from peerjax.model import Decoder
from peerjax.routing.metaexperts import Routers, scores_of_chosen
from peerjax.routing.token_choice import block_size
from tests.conftest import compile_as_users_do
from tests.test_model import CONFIG, MOE, MONET_HD, MONET_VD

ROWS, LENGTH = 2, 64
TOKENS = ROWS * LENGTH
TINY = dataclasses.replace(
    CONFIG,
    vocab_size=512,
    width=64,
    attention=AttentionConfig(heads=2, kv_heads=2, rope_base=10_000.0),
    implementation="xla",
)
DENSE = DenseConfig(hidden=256, activation="relu")
PEER = PeerConfig((64, 96), heads=2, experts_per_head=8, key_width=32, activation="relu")
MOE = dataclasses.replace(MOE, activation="relu")
# Of the formula: what is elementwise at these widths is 1 to 4 percent.
ELEMENTWISE = 0.05


def compiled_flops(config):
    """As XLA counts them, a token."""
    model = Decoder(config)
    inputs = [jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)] * 3
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    readable = {name: variables[name] for name in ("params", "pools", "stats") if name in variables}
    return _count(model.apply, readable, *inputs) / TOKENS


def _count(function, *operands):
    return compile_as_users_do(jax.jit(function).lower(*operands)).cost_analysis()["flops"]


def with_layers(*layers, **changes):
    return dataclasses.replace(TINY, layers=layers, **changes)


def assert_counted(counted, expected):
    assert expected <= counted <= expected * (1 + ELEMENTWISE)


@pytest.mark.parametrize("layers", [[(DENSE, 1)], [(DENSE, 1)] * 2])
def test_dense(layers):
    config = with_layers(*layers)
    assert_counted(
        compiled_flops(config), sum(forward_flops(config, LENGTH, full_attention=True).values())
    )


def test_peer_where_the_lookup_is_a_loop_over_tokens():
    config = with_layers((PEER, 1))
    flops = forward_flops(config, LENGTH, full_attention=True)
    one_of_all = flops["lookup"] / TOKENS
    assert_counted(compiled_flops(config), sum(flops.values()) - flops["lookup"] + one_of_all)

    # The lookup by itself, without a loop: every expert gathered, multiplied and added.
    def lookup(weights, ids, gates, x):
        experts = weights[ids]
        hidden = jax.nn.relu(jnp.einsum("tkd,td->tk", experts[:, :, 0], x))
        return jnp.einsum("tk,tkd->td", gates * hidden, experts[:, :, 1])

    chosen = PEER.heads * PEER.experts_per_head
    shapes = [(6144, 2, 64), (TOKENS, chosen), (TOKENS, chosen), (TOKENS, 64)]
    dtypes = [jnp.float32, jnp.int32, jnp.float32, jnp.float32]
    operands = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)]
    assert_counted(_count(lookup, *operands) / TOKENS, flops["lookup"])


def test_mixture_with_the_padding_of_its_blocks():
    config = with_layers((MOE, 1), implementation="mosaic_gpu")  # all blocks at once
    flops = forward_flops(config, LENGTH, full_attention=True)
    pairs = TOKENS * MOE.experts_per_token
    block = block_size(pairs, MOE.num_experts)
    slots = (pairs + MOE.num_experts * (block - 1)) // block * block
    padding = flops["experts"] * (slots / pairs - 1)
    assert_counted(compiled_flops(config), sum(flops.values()) + padding)


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_only_the_scores_of_chosen_metaexperts_are_computed(chosen):
    spec = MetaPeerConfig(metaexperts=8, chosen=chosen, peer=PEER)
    (n1, n2), heads, d = PEER.num_experts, PEER.heads, PEER.key_width
    routers = Routers(
        *(
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in [(8, 64, heads * 2 * d), (8, heads, n1, d), (8, heads, n2, d)]
        )
    )
    x = jax.ShapeDtypeStruct((TOKENS, 64), jnp.float32)
    ids = jax.ShapeDtypeStruct((TOKENS, chosen), jnp.int32)
    score = functools.partial(scores_of_chosen, implementation="mosaic_gpu")  # all at once
    pairs = TOKENS * chosen
    block = block_size(pairs, 8)
    slots = (pairs + 8 * (block - 1)) // block * block
    expected = spec.flops(64)["router"] * TOKENS * slots / pairs
    assert_counted(_count(score, x, ids, routers), expected)


@pytest.mark.parametrize("kind", [MONET_HD, MONET_VD])
def test_monet_in_one_group(kind):
    assert_counted(
        compiled_flops(with_layers((kind, 2))),
        sum(forward_flops(with_layers((kind, 2)), LENGTH, full_attention=True).values()),
    )


def test_a_causal_token_sees_half_of_its_row_on_average():
    whole = forward_flops(TINY, LENGTH, full_attention=True)
    causal = forward_flops(TINY, LENGTH)
    part = "attention scores and mixing"
    assert causal[part] / whole[part] == sum(range(1, LENGTH + 1)) / LENGTH**2
    assert {**causal, part: 0} == {**whole, part: 0}


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_every_kind_of_layer_has_a_formula_and_counts_as_often_as_it_is_there(kind):
    spec = FEED_FORWARDS[kind]()

    def total(count):
        return sum(forward_flops(with_layers((spec, count)), LENGTH).values())

    assert total(3) - total(2) == total(2) - total(1) > 0


@pytest.mark.parametrize("twin", [dense_small, moe_small])
def test_the_twins_of_peer_small_take_its_flops(twin):
    def flops(recipe):
        config = recipe.get_config()
        model = model_config(config, 4096)
        return sum(forward_flops(model, config.data.sequence_length).values())

    assert flops(twin) == pytest.approx(flops(peer_small), rel=1e-3)
    assert f"{flops(twin) / 1e6:.2f} MFLOPs" in twin.__doc__
