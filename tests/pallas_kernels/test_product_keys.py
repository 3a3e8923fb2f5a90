import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.product_keys import pair_scores, scores_at, top_k_pairs, xla
from tests.pallas_kernels.on_cpus import ON_CPUS, on_cpus

# n1, n2, k: single sub-keys, all pairs, one pair, and more experts than sub-keys of a side.
SIZES = [
    (1, 1, 1), (1, 12, 5), (12, 1, 12), (2, 2, 4), (3, 4, 12), (4, 3, 5), (7, 5, 1), (5, 12, 20),
    (9, 11, 13), (12, 12, 20),
]  # fmt: skip


@on_cpus
@settings(deadline=None, max_examples=60)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**31 - 1))
def test_retrieves_the_top_k_of_all_pairs(implementation, size, seed):
    n1, n2, k = size
    rng = np.random.default_rng(seed)
    scores1 = rng.standard_normal((3, 2, n1)).astype(np.float32)
    scores2 = rng.standard_normal((3, 2, n2)).astype(np.float32)
    every = (scores1[..., :, None] + scores2[..., None, :]).reshape(3, 2, n1 * n2)

    ids = np.asarray(top_k_pairs(jnp.array(scores1), jnp.array(scores2), k, implementation))

    assert ids.shape == (3, 2, k)
    assert all(len(set(row)) == k for row in ids.reshape(-1, k))
    # Best first, and the very scores that a sort of all N finds.
    found = np.take_along_axis(every, ids, axis=-1)
    np.testing.assert_array_equal(found, -np.sort(-every, axis=-1)[..., :k])


@on_cpus
def test_equal_scores_still_give_distinct_experts(implementation):
    ids = top_k_pairs(jnp.zeros((1, 4)), jnp.zeros((1, 5)), 7, implementation)
    assert len(set(np.asarray(ids)[0])) == 7


def test_more_than_all_pairs_is_refused():
    with pytest.raises(ValueError, match=r"cannot choose 7 experts of 2 \* 3"):
        top_k_pairs(jnp.zeros((1, 2)), jnp.zeros((1, 3)), 7)


def test_pair_scores_and_their_gradient():
    scores1 = jax.random.normal(jax.random.key(0), (4, 3))
    scores2 = jax.random.normal(jax.random.key(1), (4, 5))
    ids = jnp.array([[0, 14, 7], [3, 3, 3], [1, 2, 4], [10, 11, 5]])

    def brute_force(scores1, scores2):
        every = (scores1[:, :, None] + scores2[:, None, :]).reshape(4, 15)
        return jnp.take_along_axis(every, ids, axis=1)

    weights = jax.random.normal(jax.random.key(2), ids.shape)

    def gradients(function):
        return jax.jit(jax.grad(lambda a, b: jnp.sum(weights * function(a, b)), (0, 1)))(
            scores1, scores2
        )

    found = pair_scores(scores1, scores2, ids)
    np.testing.assert_array_equal(found, brute_force(scores1, scores2))
    expected = gradients(brute_force)
    for one, other in zip(gradients(lambda a, b: pair_scores(a, b, ids)), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "of_accelerators"), [*[(name, False) for name in ON_CPUS], ("xla", True)]
)
def test_the_gradient_of_scores_at_some_sub_keys(implementation, of_accelerators, monkeypatch):
    """Against autodiff of all products; sub-keys repeat, and so do those of a token."""
    if of_accelerators:
        monkeypatch.setattr(xla, "by_platform", lambda *a, cpu, default: default(*a))
    heads, tokens, num_keys, width, k = 3, 17, 40, 12, 5
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((tokens, heads, width)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal((heads, num_keys, width)), jnp.float32)
    index = jnp.asarray(rng.integers(0, num_keys, (heads, tokens, k)), jnp.int32)
    index = index.at[:, 4].set(7)
    weights = jnp.asarray(rng.standard_normal(index.shape), jnp.float32)

    def products(query, keys):
        return jnp.einsum("thd,hnd->htn", query, keys)

    def ours(query, keys):
        scores = jax.lax.stop_gradient(products(query, keys))
        return jnp.sum(weights * jnp.sin(scores_at(query, keys, scores, index, implementation)))

    def brute_force(query, keys):
        chosen = jnp.take_along_axis(products(query, keys), index, axis=-1)
        return jnp.sum(weights * jnp.sin(chosen))

    expected = jax.jit(jax.value_and_grad(brute_force, (0, 1)))(query, keys)
    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(query, keys)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
