import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.pallas_kernels.test_expert_update import LAYERS, N, dense, make_gradient


def test_dense_equals_the_sum_of_outer_products():
    gradient = make_gradient()
    np.testing.assert_allclose(gradient.dense(N), dense(gradient), atol=1e-4)


def test_rows_are_the_rows_of_the_dense_gradient_each_once():
    gradient = make_gradient()
    ids, rows = jax.jit(lambda gradient: gradient.rows(N))(gradient)
    expected = dense(gradient)
    for layer in range(LAYERS):
        kept = np.asarray(ids[layer] < N)
        found = np.asarray(ids[layer])[kept]
        np.testing.assert_array_equal(found, np.flatnonzero(np.abs(expected[layer]).sum((1, 2))))
        np.testing.assert_allclose(rows[layer][kept], expected[layer][found], atol=1e-4)
        assert not np.any(rows[layer][~kept])


def test_clipping_bounds_the_exact_norm_and_keeps_the_direction():
    gradient = make_gradient()
    norm = float(gradient.norm(N))
    np.testing.assert_allclose(gradient.clip(norm / 3, N).dense(N), dense(gradient) / 3, atol=1e-4)
    np.testing.assert_array_equal(gradient.clip(norm * 2, N).c_up, gradient.c_up)


def test_norm_is_that_of_the_dense_gradient_and_not_of_the_factors():
    gradient = make_gradient()
    expected = np.sqrt(np.sum(dense(gradient) ** 2))
    np.testing.assert_allclose(jax.jit(lambda g: g.norm(N))(gradient), expected, rtol=1e-5)
    single = jax.tree.map(lambda leaf: leaf[0], gradient)
    one_layer = np.sqrt(np.sum(dense(gradient)[0] ** 2))
    np.testing.assert_allclose(single.norm(N), one_layer, rtol=1e-5)
    assert abs(float(optax.tree.norm(gradient._replace(ids=jnp.zeros(())))) - expected) > 1
