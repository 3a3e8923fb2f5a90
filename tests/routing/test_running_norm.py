import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.routing.running import MOMENTS, STATS, Moments, pooled, updated
from peerjax.routing.running_norm import IN_BATCH, RUNNING, RunningNorm

SHAPE = (3, 40, 5)  # heads, tokens, keys


@pytest.fixture
def z():
    return 3 + 2 * jax.random.normal(jax.random.key(0), SHAPE)


@pytest.mark.parametrize("axes", [(1,), (1, 2)])
def test_training_normalises_by_what_was_and_tells_what_is(z, axes):
    norm = RunningNorm(axes)
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(SHAPE))
    fresh = norm.init(jax.random.key(0), z)
    assert fresh.keys() == {STATS}
    assert jax.tree.map(jnp.shape, fresh[STATS]["moments"]) == Moments(shape, shape)
    stats = {"moments": Moments(jnp.full(shape, 2.0), jnp.full(shape, 4.0))}
    y, kept = norm.apply({STATS: stats}, z, mutable=[MOMENTS])
    np.testing.assert_allclose(y, (z - 2) / np.sqrt(4 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(y, norm.apply({STATS: stats}, z))
    mean, variance = kept[MOMENTS]["moments"]
    np.testing.assert_allclose(mean, np.mean(z, axes, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(variance, np.var(z, axes, keepdims=True), rtol=1e-5)


def test_in_batch_statistics_are_of_training_only_and_have_gradients(z):
    stats = {"moments": Moments(jnp.zeros((3, 1, 1)), jnp.ones((3, 1, 1)))}

    def total(z, statistics, mutable):
        norm = RunningNorm((1, 2), statistics)
        y = norm.apply({STATS: stats}, z, mutable=mutable)
        return jnp.sum((y[0] if mutable else y) ** 3)

    trained = jax.grad(total)(z, IN_BATCH, [MOMENTS])
    np.testing.assert_allclose(jnp.sum(trained, (1, 2)), 0, atol=1e-3)  # a shift changes nothing
    for statistics, mutable in ((IN_BATCH, False), (RUNNING, [MOMENTS])):
        np.testing.assert_allclose(jax.grad(total)(z, statistics, mutable), 3 * z**2, rtol=1e-4)


def test_moments_of_parts_are_those_of_the_whole(z):
    def moments(part):
        return {"run": Moments(jnp.mean(part, (1, 2)), jnp.var(part, (1, 2)))}

    parts = [moments(part) for part in jnp.split(z, 4, axis=1)]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *parts)
    jax.tree.map(
        lambda found, whole: np.testing.assert_allclose(found, whole, rtol=1e-5),
        pooled(stacked),
        moments(z),
    )


def test_an_update_moves_moments_and_nothing_else():
    stats = {"a": {"moments": Moments(jnp.ones(2), jnp.ones(2)), "initial_norm": jnp.ones(3)}}
    found = updated(stats, {"a": {"moments": Moments(jnp.zeros(2), jnp.full(2, 11.0))}}, 0.1)
    np.testing.assert_allclose(found["a"]["moments"].mean, 0.9)
    np.testing.assert_allclose(found["a"]["moments"].variance, 2.0)
    np.testing.assert_array_equal(found["a"]["initial_norm"], 1)
    assert updated(stats, {}, 0.1) == stats
