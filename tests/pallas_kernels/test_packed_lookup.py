"""The lookup on packed pools against dense autodiff of the dequantised model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_lookup import lookup
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from pallas_kernels.storage import BITS, read_codes
from peerjax.pool import initialize_pool
from tests.conftest import compile_as_users_do
from tests.pallas_kernels.levels import SPREAD
from tests.pallas_kernels.on_cpus import on_cpus
from tests.pallas_kernels.test_expert_lookup import assert_close, naive

LAYERS, N, D, T, K = 3, 40, 64, 37, 6


def make(storage, seed=0):
    pool = initialize_pool(jax.random.key(seed), LAYERS, N, D, storage=storage)
    keys = jax.random.split(jax.random.key(seed + 1), 3)
    # Ids repeat within a token and across tokens.
    ids = jax.random.randint(keys[0], (LAYERS, T, K), 0, N).at[:, :, 1].set(3).at[:, 5].set(N - 1)
    gates = jax.random.uniform(keys[1], (LAYERS, T, K))
    return pool, ids, gates, jax.random.normal(keys[2], (T, D))


def codes_of(pool):
    """[layers, N, 2, D] float32"""
    layers = range(pool.weights.shape[0])
    read = [read_codes(pool.weights, jnp.int32(i), jnp.arange(N), D, pool.storage) for i in layers]
    return jnp.stack(read).astype(jnp.float32)


def dequantize(codes, scales):
    return codes * jnp.moveaxis(scales, 1, 2)[..., None]


@on_cpus
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("remat", [False, True])
def test_every_gradient_equals_dense_autodiff(implementation, storage, remat):
    pool, ids, gates, x = make(storage)
    codes = codes_of(pool)
    zero = jnp.zeros((LAYERS, T, K))
    taps = Tap(zero, zero, jnp.zeros((LAYERS, T, D)), jnp.zeros((LAYERS, T, D)))

    def ours(taps, scales, gates, x):
        packed = dataclasses.replace(pool, scales=scales)

        def body(x, layer_input):
            layer, ids, gates, tap = layer_input
            y = lookup(
                packed.at_layer(layer), ids, gates, x,
                activation="gelu", tap=tap, implementation=implementation,
            )  # fmt: skip
            return x + y, ids

        body = jax.checkpoint(body) if remat else body
        x, kept = jax.lax.scan(body, x, (jnp.arange(LAYERS), ids, gates, taps))
        return jnp.sum(jnp.sin(x)), kept

    def dense(weights, scales, gates, x):
        weights = weights + dequantize(codes, scales)
        for layer in range(LAYERS):
            x = x + naive(weights[layer], ids[layer], gates[layer], x)
        return jnp.sum(jnp.sin(x))

    gradient, kept = jax.jit(jax.grad(ours, (0, 1, 2, 3), has_aux=True))(
        taps, pool.scales, gates, x
    )
    expected = jax.jit(jax.grad(dense, (0, 1, 2, 3)))(jnp.zeros_like(codes), pool.scales, gates, x)
    factored = FactoredGradient.from_tap(kept, gradient[0])
    assert_close(factored.dense(N), expected[0])  # fails if the custom backward did not run
    assert_close(gradient[1:], expected[1:])


@on_cpus
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_nothing_of_the_size_of_the_pool_or_of_the_chosen_experts(implementation, storage):
    tokens, chosen, width, experts = 256, 64, 256, 1 << 16

    pool = jax.eval_shape(
        lambda: initialize_pool(jax.random.key(0), 2, experts, width, storage=storage)
    )

    def step(pool, ids, gates, x, tap):
        def loss(gates, x, tap):
            at = pool.at_layer(jnp.int32(1))
            y = lookup(at, ids, gates, x, activation="gelu", tap=tap, implementation=implementation)
            return jnp.sum(y**2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(gates, x, tap)

    shape = jax.ShapeDtypeStruct
    ids, gates = shape((tokens, chosen), jnp.int32), shape((tokens, chosen), jnp.float32)
    x = shape((tokens, width), jnp.float32)
    tap = jax.eval_shape(Tap.zeros_for, ids, x)
    compiled = compile_as_users_do(jax.jit(step).lower(pool, ids, gates, x, tap))
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < 0.2 * tokens * chosen * width * 4
    text = compiled.as_text()
    assert f"f32[{tokens},{chosen},{width}]" not in text
    assert f"f32[{experts}" not in text
    assert f"f32[2,{experts}" not in text


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_packed_pool_is_the_rounded_float_pool(storage):
    arguments = (jax.random.key(3), LAYERS, N, D)
    floats = np.asarray(initialize_pool(*arguments).weights)
    pool = initialize_pool(*arguments, storage=storage)
    codes = np.asarray(codes_of(pool))
    scales = np.moveaxis(np.asarray(pool.scales), 1, 2)[..., None]
    # Drawn from the same keys where no place of the last row is left over, as here.
    top = (1 << (BITS[storage] - 1)) - 1
    size = np.sqrt(np.mean(np.square(floats), axis=-1, keepdims=True))
    np.testing.assert_allclose(scales, size / (SPREAD[storage] * top), rtol=1e-5)
    nearest = np.clip(floats, -top * scales, top * scales)
    assert (np.abs(codes * scales - nearest) <= 0.5001 * scales).all()
    assert 0.9 * top < np.abs(codes).max() <= top


def test_an_int4_pool_takes_half_a_byte_a_parameter():
    pool = jax.eval_shape(
        lambda: initialize_pool(jax.random.key(0), 1, 1 << 14, 1024, storage="int4")
    )
    parameters = (1 << 14) * 2 * 1024
    assert pool.weights.size * 4 == parameters / 2
    assert pool.scales.size * 4 / parameters < 0.004
