"""ECO against its equations in float64, and what it must do: lose no step to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.counter_hash import hash_words
from pallas_kernels.storage import ExpertPool, read_floats
from peerjax import optim
from tests.pallas_kernels.test_expert_update import LAYERS, D, N, make_pool

OPTIONS = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "seed": 5}
SHAPE = (LAYERS, N, 2, D)


def floats_of(pool):
    ids = jnp.arange(N)
    return np.stack([read_floats(pool.at_layer(jnp.int32(i)), ids) for i in range(LAYERS)])


def steps(rate, count, pool, options=OPTIONS):
    transform = optim.eco(rate, **options)
    state = transform.init(pool)
    one = jax.jit(transform.update, donate_argnums=1)
    for step in range(count):
        gradient = np.random.default_rng(step).standard_normal(SHAPE).astype(np.float32)
        updates, state = one(ExpertPool.of_floats(jnp.asarray(gradient)), state, pool)
        pool = optim.apply_updates(pool, updates)
        yield gradient, pool, jax.tree.map(jnp.copy, state)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_two_steps_equal_the_equations(storage):
    rate, pool = 1e-2, make_pool(storage)
    top = {"int8": 127, "int4": 7}[storage]
    weights, m, v = floats_of(pool).astype(np.float64), 0.0, 0.0
    for t, (g, new, state) in enumerate(steps(rate, 2, pool), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.astype(np.float64) ** 2
        root = np.sqrt(v / (1 - 0.95**t)) + 1e-8
        wanted = (1 - rate * 0.1) * weights - rate * m / (1 - 0.9**t) / root
        scale = np.abs(wanted).max(-1, keepdims=True) / top
        counters = jnp.meshgrid(*map(jnp.arange, SHAPE), indexing="ij")
        words = np.asarray(hash_words(hash_words(5, 0), 3, t - 1, *counters))
        floor = np.floor(wanted / scale)
        weights = scale * np.clip(
            floor + (words // 256 / 2.0**24 < wanted / scale - floor), -top, top
        )
        m = m + (1 - 0.9**t) / rate * (1 - 1 / 0.9) * root * (wanted - weights)
        # float32 may round the other way where a fraction is next to its random number.
        other = np.abs(floats_of(new) - weights) > 1e-4 * scale
        assert np.mean(other) < 1e-3
        same = ~other
        np.testing.assert_allclose(state.first.weights[same], m[same], rtol=1e-2, atol=1e-3)
        weights = floats_of(new).astype(np.float64)
        m = np.asarray(state.first.weights, np.float64)


def test_a_step_at_a_rate_of_zero_leaves_the_pool():
    pool = make_pool("int4")
    _, new, state = next(steps(0.0, 1, pool))
    np.testing.assert_array_equal(new.weights, pool.weights)
    assert np.any(state.first.weights)


def test_what_it_cannot_do_is_said():
    pool = make_pool("int4")
    transform = optim.eco(0.1)
    with pytest.raises(ValueError, match="eco needs the params"):
        transform.update(pool, transform.init(pool))
