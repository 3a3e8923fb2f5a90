import math
import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerjax.routing.monet import (
    MonetRouter,
    ambiguity,
    gates,
    keys_per_side,
    mean_square_sum,
    threshold,
    uniformity,
)
from peerjax.routing.running import MOMENTS, STATS, Moments
from peerjax.routing.running_norm import IN_BATCH, RUNNING

HEADS, TOKENS = 8, 256


@pytest.mark.parametrize(
    # The number above the quantile is binomial; where it is 0, the largest key counts as one.
    ("n", "top_k", "expected"),
    [(512, 32, 32 + (15 / 16) ** 512), (8, 1, 1 + (7 / 8) ** 8)],
)
def test_as_many_keys_are_on_as_the_quantile_says(n, top_k, expected):
    z = jax.random.normal(jax.random.key(0), (TOKENS, HEADS, n))
    on = np.asarray(gates(z, z, top_k) > 0).sum(-1)
    assert on.min() >= 1
    deviation = math.sqrt(n * (top_k / n) * (1 - top_k / n) / on.size)
    assert abs(on.mean() - expected) < 4 * deviation, on.mean()


def test_the_threshold_is_the_normal_quantile_or_the_largest_score():
    normalised = jnp.array([[2.0, 0.0, -1.0, 1.6], [1.5, 1.0, -3.0, 0.0]])
    # Phi^-1(1 - 1/4) = 0.67449, Phi^-1(1 - 2/4) = 0.
    np.testing.assert_allclose(threshold(normalised, 1)[:, 0], [0.6744898, 0.6744898], rtol=1e-6)
    np.testing.assert_array_equal(threshold(normalised, 2)[:, 0], [0, 0])
    np.testing.assert_array_equal(threshold(normalised - 3, 1)[:, 0], [-1.0, -1.5])
    np.testing.assert_array_equal(threshold(normalised, 4)[:, 0], [-np.inf, -np.inf])
    paper = threshold(jnp.full((1, 512), 2.0), 32)
    np.testing.assert_allclose(paper, 1.5341205, rtol=1e-6)
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=rf"top_k={top_k} is not in 1 .. 4"):
            threshold(normalised, top_k)


@st.composite
def scores(draw):
    n = draw(st.sampled_from([1, 2, 5, 16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    z = rng.standard_normal((5, 2, n)) * draw(st.sampled_from([0.01, 1.0, 30.0]))
    # Ties, and scores that are normalised to something far from normal.
    z = np.round(z, draw(st.integers(0, 6))).astype(np.float32)
    shift, scale = rng.standard_normal(), rng.uniform(0.1, 3)
    return z, ((z - shift) / scale).astype(np.float32), draw(st.sampled_from([1, n // 2 + 1, n]))


@partial(jax.jit, static_argnums=2)
def gates_and_slopes(z, normalised, top_k, weights):
    def total(z, normalised):
        found = gates(z, normalised, top_k)
        return jnp.sum(weights * found), found

    slopes, found = jax.grad(total, (0, 1), has_aux=True)(z, normalised)
    return found, *slopes


@settings(deadline=None, max_examples=60)
@given(scores())
def test_gates_are_a_softmax_over_the_keys_above_the_threshold(drawn):
    z, normalised, top_k = drawn
    n = z.shape[-1]
    quantile = statistics.NormalDist().inv_cdf(1 - top_k / n) if top_k < n else -math.inf
    on = normalised >= np.float32(quantile)
    on |= (normalised == normalised.max(-1, keepdims=True)) & ~on.any(-1, keepdims=True)
    exp = np.where(on, np.exp(z.astype(np.float64) - z.max(-1, keepdims=True)), 0)
    weights = np.random.default_rng(0).standard_normal(z.shape).astype(np.float32)
    found, d_z, d_normalised = map(np.asarray, gates_and_slopes(z, normalised, top_k, weights))
    assert np.all(found[~on] == 0)
    np.testing.assert_allclose(found, exp / exp.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)

    expected = found * (weights - np.sum(found * weights, -1, keepdims=True))
    np.testing.assert_allclose(d_z, expected, atol=1e-5)
    assert np.all(np.asarray(d_z)[~on] == 0)
    assert not np.any(d_normalised)


def test_losses_of_gates_written_down_by_hand():
    g1 = jnp.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.25, 0.5, 0.25], [0.0, 1.0, 0.0]]])
    g2 = jnp.array([[[0.2, 0.2, 0.6], [0.4, 0.3, 0.3]], [[0.0, 0.0, 1.0], [0.1, 0.9, 0.0]]])
    # Means over the two tokens; the third key of head 2 is never on: clamped at 1e-9.
    means = [0.375, 0.5, 0.125, 0.5, 0.5, 1e-9, 0.1, 0.1, 0.8, 0.25, 0.6, 0.15]
    expected = -sum(map(math.log, means)) / (2 * 2 * 3)
    np.testing.assert_allclose(uniformity(g1, g2), expected, rtol=1e-6)
    largest = [0.5, 1.0, 0.5, 1.0, 0.6, 0.4, 1.0, 0.9]
    np.testing.assert_allclose(ambiguity(g1, g2), 1 - sum(largest) / 8, rtol=1e-6)
    # How the tokens are laid out says nothing.
    np.testing.assert_allclose(uniformity(g1[:, None], g2[:, None]), expected, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(2, 1, 3), (1, 4, 1), (3, 12, 5)]), st.integers(0, 2**31 - 1))
def test_losses_are_bounded_and_least_where_they_should_be(sizes, seed):
    heads, n, tokens = sizes
    z = 3 * jax.random.normal(jax.random.key(seed), (2, tokens, heads, n))
    g1, g2 = gates(z, z, 1 + n // 3)
    assert math.log(n) * (1 - 1e-5) <= uniformity(g1, g2) <= -math.log(1e-9)
    assert -1e-6 <= ambiguity(g1, g2) <= (1 - 1 / n) * (1 + 1e-5) + 1e-6
    even = jnp.full((tokens, heads, n), 1 / n)
    np.testing.assert_allclose(uniformity(even, even), math.log(n), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ambiguity(even, even), 1 - 1 / n, rtol=1e-5)
    sharp = jax.nn.one_hot(jnp.full((tokens, heads), seed % n), n)
    assert ambiguity(sharp, sharp) == 0


@pytest.mark.parametrize(("n", "top_k"), [(512, 32), (64, 4), (16, 1), (4, 4)])
def test_the_mean_square_sum_is_that_of_gaussian_scores(n, top_k):
    z = jax.random.normal(jax.random.key(1), (4096, n))
    found = jnp.mean(jnp.sum(gates(z, z, top_k) ** 2, axis=-1))
    np.testing.assert_allclose(mean_square_sum(n, top_k), found, rtol=0.06)


def make_router(statistics=RUNNING):
    router = MonetRouter(num_experts=256, heads=3, top_k=4, statistics=statistics)
    x = jax.random.normal(jax.random.key(0), (2, 9, 24))
    return router, x, jax.jit(router.init)(jax.random.key(1), x)


def test_the_router_scores_every_sub_key_and_normalises_each_head():
    router, x, variables = make_router()
    params = variables["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {"w1": (48, 24), "w2": (48, 24)}
    moments = {
        side: Moments(jnp.array([0.5, -1.0, 0.0]) + side, jnp.array([0.25, 4.0, 1.0]) * side)
        for side in (1, 2)
    }
    stats = dict(variables[STATS])
    for side, (mean, variance) in moments.items():
        stats[f"norm{side}"] = {
            "moments": Moments(mean.reshape(1, 3, 1), variance.reshape(1, 3, 1))
        }
    found = router.apply({"params": params, STATS: stats}, x.astype(jnp.bfloat16))
    for side, gate in enumerate(found, start=1):
        assert gate.shape == (2, 9, 3, 16)
        assert gate.dtype == jnp.float32
        keys = np.asarray(params[f"w{side}"]).reshape(3, 16, 24)
        z = np.einsum("bld,hnd->blhn", x.astype(jnp.bfloat16).astype(jnp.float32), keys)
        mean, variance = (np.asarray(each)[:, None] for each in moments[side])
        normalised = jnp.array((z - mean) / np.sqrt(variance + 1e-5))
        np.testing.assert_allclose(gate, gates(jnp.array(z), normalised, 4), atol=1e-5)
        norms = np.linalg.norm(keys, axis=-1)
        np.testing.assert_allclose(variables[STATS][f"initial_norm_w{side}"], norms, rtol=1e-5)


def test_a_fresh_router_has_about_normal_scores_and_top_k_keys_on():
    router = MonetRouter(num_experts=512**2, heads=4, top_k=32)
    x = jax.random.normal(jax.random.key(0), (128, 64))
    (g1, g2), kept = router.apply(jax.jit(router.init)(jax.random.key(1), x), x, mutable=[MOMENTS])
    for gate in (g1, g2):
        assert 25 < np.asarray(gate > 0).sum(-1).mean() < 40
    for moments in (kept[MOMENTS]["norm1"]["moments"], kept[MOMENTS]["norm2"]["moments"]):
        np.testing.assert_allclose(moments.mean, 0, atol=0.2)
        np.testing.assert_allclose(moments.variance, 1, atol=0.2)


@pytest.mark.parametrize("statistics", [RUNNING, IN_BATCH])
def test_the_last_token_changes_earlier_gates_with_statistics_of_the_batch_only(statistics):
    router, x, variables = make_router(statistics)
    changed = x.at[:, -1].multiply(-3.0)

    def earlier(x, mutable):
        found = router.apply(variables, x, mutable=mutable)
        return [np.asarray(gate[:, :-1]) for gate in (found[0] if mutable else found)]

    for mutable in ([MOMENTS], False):
        same = [
            np.array_equal(one, other)
            for one, other in zip(earlier(x, mutable), earlier(changed, mutable), strict=True)
        ]
        leaks = statistics == IN_BATCH and mutable
        assert same == ([False, False] if leaks else [True, True])


def test_experts_must_be_a_square():
    assert keys_per_side(262_144) == 512
    for number, choices in ((1000, "961 or 1024"), (0, "1 or 4"), (-3, "1 or 4")):
        with pytest.raises(ValueError, match=f"{number} experts .* choose {choices}"):
            keys_per_side(number)
