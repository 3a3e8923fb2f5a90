"""Attention head by head, as CPUs compute it, against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.layers.attention import attend, same_document, seen

B, L, HEADS, DIM = 3, 7, 4, 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cached", [False, True])
def test_values_and_gradients_are_those_of_jax(cached, dtype):
    size = 11 if cached else L
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (B, L, HEADS, DIM)).astype(dtype)
    key, value = (jax.random.normal(k, (B, size, HEADS, DIM)).astype(dtype) for k in keys[1:3])
    if cached:
        mask = seen(jnp.arange(L) + jnp.array([[0], [2], [4]]), size)
    else:
        mask = same_document(jnp.array([[0] * 7, [0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]]))
    weights = jax.random.normal(keys[3], query.shape)

    def differentiate(function):
        def loss(query, key, value):
            y = function(query, key, value, mask=mask, is_causal=not cached)
            return jnp.sum(weights * y.astype(jnp.float32)), y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)

    (_, found), found_gradients = differentiate(attend)
    (_, expected), gradients = differentiate(jax.nn.dot_product_attention)
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    for one, other in zip((found, *found_gradients), (expected, *gradients), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0, atol=tolerance
        )
