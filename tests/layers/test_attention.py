"""Attention against JAX's own, against formulas, and token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.layers import attend as attend_module
from peerjax.layers.attend import Seen, _by_matrices, _by_splash, attend
from peerjax.layers.attention import ATTENTION_SINKS, Attention, AttentionConfig, KVCache
from peerjax.layers.spec import Context

B, L, HEADS, DIM = 3, 7, 4, 6


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Computes the seven tokens of a sequence three at a time."""
    monkeypatch.setattr(attend_module, "FEWEST_TOKENS", 3)
    assert attend_module._chunks(L) == [
        (slice(0, 3), slice(3)), (slice(3, 6), slice(6)), (slice(6, 7), slice(7))
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cached", [False, True])
def test_values_and_gradients_are_those_of_jax(cached, dtype):
    size = 11 if cached else L
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (B, L, HEADS, DIM)).astype(dtype)
    key, value = (jax.random.normal(k, (B, size, HEADS, DIM)).astype(dtype) for k in keys[1:3])
    if cached:
        seen = Seen(jnp.arange(L) + jnp.array([[0], [2], [4]]))
    else:
        documents = jnp.array([[0] * 7, [0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
        seen = Seen.in_documents(documents)
    weights = jax.random.normal(keys[3], query.shape)

    def differentiate(function):
        def loss(query, key, value):
            y = function(query, key, value)
            return jnp.sum(weights * y.astype(jnp.float32)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    (_, found), found_gradients = differentiate(partial(attend, seen=seen))
    of_jax = partial(jax.nn.dot_product_attention, mask=seen.mask(size))
    (_, expected), gradients = differentiate(of_jax)
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    for one, other in zip((found, *found_gradients), (expected, *gradients), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0, atol=tolerance
        )


def draw(kv_heads=HEADS, length=L):
    keys = jax.random.split(jax.random.key(3), 4)
    query = jax.random.normal(keys[0], (B, length, HEADS, DIM))
    key, value = (jax.random.normal(k, (B, length, kv_heads, DIM)) for k in keys[1:3])
    documents = jnp.sort(jax.random.randint(keys[3], (B, length), 0, 3), axis=1)
    return query, key, value, Seen.in_documents(documents)


def test_a_sink_logit_is_one_more_column_without_a_value():
    query, key, value, seen = draw()
    sink = jnp.array([-2.0, 0.0, 0.7, 3.0])

    def naive(query, key, value, sink):
        scores = jnp.einsum("blhd,bshd->bhls", query, key) / DIM**0.5
        scores = jnp.where(seen.mask(L), scores, -jnp.inf)
        column = jnp.broadcast_to(sink[:, None, None], (*scores.shape[:3], 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1))
        return jnp.einsum("bhls,bshd->blhd", shares[..., :-1], value)

    def found(query, key, value, sink):
        return attend(query, key, value, seen, sink)

    weights = jax.random.normal(jax.random.key(4), query.shape)
    operands = (query, key, value, sink)
    np.testing.assert_allclose(found(*operands), naive(*operands), rtol=1e-5, atol=1e-6)
    gradients = [
        jax.jit(jax.grad(lambda *each, f=f: jnp.sum(weights * f(*each)), (0, 1, 2, 3)))(*operands)
        for f in (found, naive)
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # A sink that nothing reaches changes nothing.
    np.testing.assert_array_equal(
        attend(query, key, value, seen, jnp.full(HEADS, -jnp.inf)), attend(query, key, value, seen)
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_consecutive_heads_share_keys_and_values(kv_heads):
    query, key, value, seen = draw(kv_heads)
    sink = jnp.arange(HEADS, dtype=jnp.float32)

    def repeated(query, key, value):
        key, value = (jnp.repeat(each, HEADS // kv_heads, axis=2) for each in (key, value))
        return attend(query, key, value, seen, sink)

    def grouped(query, key, value):
        return attend(query, key, value, seen, sink)

    np.testing.assert_allclose(
        grouped(query, key, value), repeated(query, key, value), rtol=1e-5, atol=1e-6
    )
    gradients = [
        jax.jit(jax.grad(lambda *each, f=f: jnp.sum(jnp.sin(f(*each))), (0, 1, 2)))(
            query, key, value
        )
        for f in (grouped, repeated)
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_size_of_all_scores_is_kept_for_the_backward_pass():
    query, key, value, seen = draw()
    _, backward = jax.vjp(partial(attend, seen=seen), query, key, value)
    kept = jax.tree.leaves(backward)
    assert len(kept) > 3
    assert max(leaf.size for leaf in kept) == query.size < B * L * L * HEADS


@pytest.mark.parametrize("sink", ATTENTION_SINKS)
def test_a_layer_reads_its_cache_as_it_reads_a_sequence(sink):
    config = AttentionConfig(heads=HEADS, kv_heads=2, rope_base=100.0, sink=sink)
    layer = Attention(config, 1.0, jnp.dtype("float32"))
    x = jax.random.normal(jax.random.key(5), (B, L, HEADS * DIM))
    positions = jnp.broadcast_to(jnp.arange(L), (B, L))
    whole = Context(positions=positions, segments=jnp.zeros_like(positions))
    params = jax.jit(layer.init)(jax.random.key(6), x, whole)["params"]
    assert set(params) - {"query", "key", "value", "out"} == {
        "none": set(), "logit": {"sink"}, "gate": {"gate"}
    }[sink]  # fmt: skip
    if sink == "logit":
        params = {**params, "sink": jnp.array([1.0, -1.0, 0.5, 2.0])}
    read = jax.jit(layer.apply)
    expected, _ = read({"params": params}, x, whole)
    cache = KVCache.zeros(1, B, L, 2, DIM, jnp.dtype("float32"))
    for place in range(L):
        part = slice(place, place + 1)
        context = Context(positions=positions[:, part], layer=0)
        y, cache = read({"params": params}, x[:, part], context, cache)
        np.testing.assert_allclose(y, expected[:, part], rtol=1e-5, atol=1e-5)


def test_a_gate_scales_the_output_of_each_head():
    layers = [
        Attention(AttentionConfig(HEADS, HEADS, 100.0, sink), 1.0, jnp.dtype("float32"))
        for sink in ("none", "gate")
    ]
    x = jax.random.normal(jax.random.key(5), (B, L, HEADS * DIM))
    positions = jnp.broadcast_to(jnp.arange(L), (B, L))
    context = Context(positions=positions, segments=jnp.zeros_like(positions))
    params = layers[1].init(jax.random.key(6), x, context)["params"]
    gates = jax.nn.sigmoid(x @ params["gate"]["kernel"])
    expected = 0.0
    for head in range(HEADS):
        kernel = params["out"]["kernel"]
        alone = kernel * (jnp.arange(HEADS) == head)[:, None, None]
        without = {**params, "out": {"kernel": alone}}
        del without["gate"]
        y, _ = layers[0].apply({"params": without}, x, context)
        expected += y * gates[..., head, None]
    np.testing.assert_allclose(
        layers[1].apply({"params": params}, x, context)[0], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("with_sink", [False, True])
def test_the_kernel_for_tpus_computes_the_same(with_sink):
    length, dim, kv_heads = 256, 32, 2
    keys = jax.random.split(jax.random.key(7), 5)
    query = jax.random.normal(keys[0], (2, length, HEADS, dim))
    key, value = (jax.random.normal(k, (2, length, kv_heads, dim)) for k in keys[1:3])
    documents = jnp.sort(jax.random.randint(keys[3], (2, length), 0, 5), axis=1)
    seen, sink = Seen.in_documents(documents), jnp.array([-1.0, 0.5, 2.0, 0.0])
    weights = jax.random.normal(keys[4], query.shape)

    def differentiate(function):
        def loss(query, key, value, sink):
            return jnp.sum(weights * function(query, key, value, seen, sink if with_sink else None))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(query, key, value, sink)

    found = differentiate(partial(_by_splash, interpret=True))
    expected = differentiate(_by_matrices)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)
