import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.layers import metapeer
from peerjax.layers.attention import AttentionConfig, rotate
from peerjax.layers.dense import DenseConfig
from peerjax.layers.metapeer import MetaPeerConfig
from peerjax.layers.moe import MoeConfig
from peerjax.layers.monet import MonetHDConfig, MonetVDConfig
from peerjax.layers.peer import PeerConfig
from peerjax.model import Decoder, ModelConfig
from peerjax.routing.running import FIRST, with_first

VOCAB, LENGTH = 61, 24
DENSE = DenseConfig(hidden=64)
PEER = PeerConfig(num_experts=(8, 16), heads=2, experts_per_head=4, key_width=8)
META = MetaPeerConfig(
    metaexperts=5,
    chosen=2,
    chunk=4,
    peer=PeerConfig(num_experts=(4, 8), heads=2, experts_per_head=4, key_width=8),
)
MOE = MoeConfig(num_experts=5, experts_per_token=2, hidden=24)
MONET_HD, MONET_VD = (
    kind(num_experts=64, expert_width=4, heads=2, top_k=3, group=2)
    for kind in (MonetHDConfig, MonetVDConfig)
)
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    width=32,
    layers=((DENSE, 1), (PEER, 2), (DENSE, 1)),
    attention=AttentionConfig(heads=4, kv_heads=4, rope_base=10_000.0),
    dtype="float32",
    remat=False,
    pool_storage="float32",
)


def with_layers(*layers, **changes):
    return dataclasses.replace(CONFIG, layers=layers, **changes)


VARIANTS = {
    "dense": with_layers((DENSE, 3)),
    "peer": CONFIG,
    "bfloat16": with_layers((PEER, 2), dtype="bfloat16", pool_storage="bfloat16"),
    "batchnorm": with_layers((dataclasses.replace(PEER, query_norm="batchnorm"), 2)),
    "monet_hd": with_layers((DENSE, 1), (MONET_HD, 4)),
    "monet_vd": with_layers((MONET_VD, 2), remat=True),
    "remat": dataclasses.replace(CONFIG, remat=True),
    "moe": with_layers((MOE, 2), (DENSE, 1)),
    "moe, bfloat16": with_layers((MOE, 2), dtype="bfloat16"),
    "metapeer token": with_layers((META, 2)),
    "metapeer, some open": with_layers((dataclasses.replace(META, open=2), 2)),
    "metapeer sequence": with_layers((dataclasses.replace(META, choice="sequence"), 2)),
    "metapeer, one choice": with_layers(
        (dataclasses.replace(META, choice="sequence", switch=False, chosen=1), 2), remat=True
    ),
    "jumprelu": with_layers(
        (dataclasses.replace(PEER, gate="jumprelu", target=5.0, always_on=3), 2),
        attention=AttentionConfig(4, 2, 10_000.0, "logit"),
        shared_mlp=8,
        remat=True,
    ),
    "threshold": with_layers(
        (dataclasses.replace(PEER, gate="threshold", target=5.0), 2),
        attention=AttentionConfig(4, 1, 10_000.0, "gate"),
        shared_mlp=8,
        shared_tied=False,
    ),
}


@functools.cache
def make(config):
    model = Decoder(config)
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCAB)
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    segments = jnp.zeros_like(tokens)
    variables = jax.jit(model.init)(jax.random.key(1), tokens, positions, segments)
    read = jax.jit(functools.partial(model.apply, mutable=[FIRST]))
    sown = read(variables, tokens, positions, segments)[1]
    for collection in ("params", "stats"):
        given = variables.get(collection, {})
        variables = {**variables, collection: with_first(given, sown.get(FIRST, {}))}
    return model, variables, (tokens, positions, segments)


def readable_of(variables):
    """What a trained model is made of."""
    return {name: variables[name] for name in ("params", "pools", "stats") if name in variables}


@functools.cache
def train_and_eval(config):
    """Logits as evaluation computes them, and as a training step does while differentiating."""
    model, variables, _ = make(config)
    readable = readable_of(variables)

    def evaluate(*inputs):
        return model.apply(readable, *inputs)

    def loss(params, *inputs):
        trained = {**readable, "params": params, "taps": variables.get("taps", {})}
        kept = ["routing", "moments", "losses"]
        training = {"seed": 0, "step": 0, "rows_B": jnp.arange(2)}
        logits, _ = model.apply(trained, *inputs, **training, mutable=kept)
        return jnp.sum(logits**2), logits

    @jax.jit
    def train(*inputs):
        # The forward pass of training, whose backward pass is not compiled.
        return jax.vjp(lambda params: loss(params, *inputs), variables["params"], has_aux=True)[2]

    return jax.jit(evaluate), train


@pytest.mark.parametrize("name", VARIANTS)
def test_changing_the_last_token_leaves_earlier_logits_bit_equal(name):
    _, _, inputs = make(VARIANTS[name])
    changed = (inputs[0].at[:, -1].add(1) % VOCAB, *inputs[1:])
    for mode in train_and_eval(VARIANTS[name]):
        logits, other = mode(*inputs), mode(*changed)
        np.testing.assert_array_equal(logits[:, :-1], other[:, :-1])
        assert np.any(logits[:, -1] != other[:, -1])


@pytest.mark.parametrize("name", ["batchnorm", "monet_hd"])
def test_the_papers_batch_normalisation_leaks_the_future(name):
    config = dataclasses.replace(VARIANTS[name], routing_statistics="in_batch")
    _, _, inputs = make(config)
    changed = (inputs[0].at[:, -1].add(1) % VOCAB, *inputs[1:])
    evaluate, train = train_and_eval(config)
    np.testing.assert_array_equal(evaluate(*inputs)[:, :-1], evaluate(*changed)[:, :-1])
    assert np.any(train(*inputs)[:, :-1] != train(*changed)[:, :-1])


def test_a_metarouter_that_reads_whole_documents_leaks_the_future(monkeypatch):
    def mean_of_all(sums_BPM, places_BL, counts_BL, otherwise_M):
        return jnp.broadcast_to(sums_BPM[:, -1:] / LENGTH, (*places_BL.shape, len(otherwise_M)))

    monkeypatch.setattr(metapeer, "means_before", mean_of_all)
    config = VARIANTS["metapeer sequence"]
    _, _, inputs = make(config)
    changed = (inputs[0].at[:, -1].add(1) % VOCAB, *inputs[1:])
    for mode in train_and_eval.__wrapped__(config):
        assert np.any(mode(*inputs)[:, :-1] != mode(*changed)[:, :-1])


@pytest.mark.parametrize("name", VARIANTS)
def test_changing_one_document_leaves_its_neighbours_bit_equal(name):
    _, _, (tokens, _, _) = make(VARIANTS[name])
    bounds = [0, 7, 15, LENGTH]
    segments = jnp.tile(jnp.repeat(jnp.arange(3), jnp.diff(jnp.array(bounds))), (2, 1))
    places = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(bounds)])
    positions = jnp.tile(jnp.asarray(places), (2, 1))
    middle = slice(7, 15)
    changed = tokens.at[:, middle].set((tokens[:, middle] + 5) % VOCAB)
    for mode in train_and_eval(VARIANTS[name]):
        logits, other = (mode(each, positions, segments) for each in (tokens, changed))
        np.testing.assert_array_equal(logits[:, :7], other[:, :7])
        np.testing.assert_array_equal(logits[:, 15:], other[:, 15:])
        assert np.all(np.any(logits[:, middle] != other[:, middle], axis=-1))


@pytest.mark.parametrize("name", ["peer", "metapeer sequence"])
def test_a_document_reads_the_same_alone_and_packed(name):
    model, variables, (tokens, _, _) = make(VARIANTS[name])
    readable = readable_of(variables)
    apply = jax.jit(model.apply)
    alone = apply(
        readable, tokens[:, 10:], jnp.tile(jnp.arange(14), (2, 1)), jnp.zeros((2, 14), jnp.int32)
    )
    positions = jnp.tile(jnp.concatenate([jnp.arange(10), jnp.arange(14)]), (2, 1))
    segments = jnp.tile(jnp.repeat(jnp.arange(2), jnp.array([10, 14])), (2, 1))
    packed = apply(readable, tokens, positions, segments)
    np.testing.assert_allclose(packed[:, 10:], alone, atol=1e-5)


def test_remat_changes_no_gradient():
    def gradients(config):
        model, variables, inputs = make(config)

        def loss(params, taps):
            trained = {"params": params, "taps": taps, "pools": variables["pools"]}
            return jnp.sum(jnp.sin(model.apply(trained, *inputs, mutable=["routing"])[0]))

        return jax.jit(jax.grad(loss, (0, 1)))(variables["params"], variables["taps"])

    plain, remat = gradients(CONFIG), gradients(VARIANTS["remat"])
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.max(np.abs(one)))


def test_rotary_positions_turn_half_split_pairs_by_relative_angles():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 8))

    def dot(first, second):
        turned = [rotate(x, jnp.array([[p]]), 100.0)[0, 0, 0] for p in (first, second)]
        return float(turned[0] @ turned[1])

    assert dot(3, 10) == pytest.approx(dot(20, 27), abs=1e-5)
    turned = rotate(x, jnp.array([[2]]), 100.0)[0, 0, 0]
    angle = 2 * 100.0 ** (-1 / 4)  # pair (1, 5) of 8 features
    first, second = x[0, 0, 0, 1], x[0, 0, 0, 5]
    expected = first * np.cos(angle) - second * np.sin(angle)
    assert float(turned[1]) == pytest.approx(float(expected), abs=1e-5)


def test_fresh_model_predicts_nearly_uniformly():
    model, variables, inputs = make(CONFIG)
    readable = readable_of(variables)
    log_probabilities = jax.nn.log_softmax(jax.jit(model.apply)(readable, *inputs))
    assert float(-log_probabilities.mean()) == pytest.approx(np.log(VOCAB), abs=0.05)
