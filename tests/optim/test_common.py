"""What must hold of every transform, whatever its rule: one battery over all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.expert_lookup import lookup
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from peerjax import optim
from peerjax.pool import initialize_pool

TOKENS, K, N, WIDTH = 24, 4, 32, 16


def of_pool(storage):
    """A stack of one pool, its loss, and its factored gradient."""
    pool = initialize_pool(jax.random.key(0), 1, N, WIDTH, residual_scale=4.0, storage=storage)
    keys = jax.random.split(jax.random.key(1), 3)
    ids = jax.random.randint(keys[0], (TOKENS, K), 0, N)
    x, target = jax.random.normal(keys[1], (2, TOKENS, WIDTH))
    gates = jax.random.uniform(keys[2], (TOKENS, K))

    def loss(pool, tap=None):
        y = lookup(pool.at_layer(jnp.int32(0)), ids, gates, x, activation="gelu", tap=tap)
        return jnp.mean((y - target) ** 2)

    def gradient(pool):
        tap = jax.grad(loss, argnums=1)(pool, Tap.zeros_for(ids, x))
        return jax.tree.map(lambda leaf: leaf[None], FactoredGradient.from_tap(ids, tap))

    return pool, loss, gradient, lambda gradient: gradient.only_if(jnp.bool_(False))


def of_matrix(storage):
    matrix = optim.pack(jax.random.normal(jax.random.key(0), (N, WIDTH)), storage)
    target = jax.random.normal(jax.random.key(1), (N, WIDTH))

    def loss_of_floats(floats):
        return jnp.mean((floats - target) ** 2)

    def loss(matrix):
        return loss_of_floats(matrix.floats())

    return matrix, loss, lambda own: jax.grad(loss_of_floats)(own.floats()), jnp.zeros_like


def dense(rule):
    return lambda rate: optim.on_dense_gradients(rule(rate))


TRANSFORMS = {
    "pools, int4": (optim.int4_accumulation, of_pool, "int4", 0.03),
    "pools, int3": (optim.int4_accumulation, of_pool, "int3", 0.03),
    "pools, bfloat16": (
        optim.int4_accumulation,
        of_pool,
        "bfloat16",
        2**-5,
    ),  # optax rounds injected rates to the params' type
    "matrices, int4": (optim.int4_accumulation, of_matrix, "int4", 0.1),
    "matrices, ternary": (optim.int4_accumulation, of_matrix, "ternary", 0.1),
    "AdamW on dense gradients": (dense(optax.adamw), of_pool, "float32", 0.03),
    "ECO on dense gradients": (dense(optim.eco), of_pool, "int4", 0.03),
}
everywhere = pytest.mark.parametrize("name", TRANSFORMS)


@functools.cache
def make(name):
    make_transform, problem, storage, rate = TRANSFORMS[name]
    params, loss, gradient, no_gradient = problem(storage)
    transform = make_transform(rate)

    @jax.jit
    def step(params, state, hits=True):
        found = gradient(params)
        found = jax.tree.map(lambda a, b: jnp.where(hits, a, b), found, no_gradient(found))
        updates, state = transform.update(found, state, params)
        return optim.apply_updates(params, updates), state

    return transform, params, jax.jit(loss), gradient, step


def forms(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@everywhere
def test_descends(name):
    transform, params, loss, _, step = make(name)
    before, state = loss(params), transform.init(params)
    for _ in range(30):
        params, state = step(params, state)
    assert loss(params) < 0.7 * before


@everywhere
def test_state_and_params_keep_their_form(name):
    transform, params, _, _, step = make(name)
    state = transform.init(params)
    new_params, new_state = step(params, state)
    assert forms(new_params) == forms(params)
    assert forms(new_state) == forms(state)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@everywhere
def test_a_gradient_that_hits_nothing_leaves_params_and_moments(name):
    transform, params, _, _, step = make(name)
    params, state = step(params, transform.init(params))
    same, kept = step(params, state, hits=False)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    for path, old in jax.tree_util.tree_leaves_with_path(state):
        if not any(part in str(path) for part in ("count", "statistics")):
            new = dict(jax.tree_util.tree_leaves_with_path(kept))[path]
            np.testing.assert_array_equal(new, old)


@everywhere
def test_takes_its_rate_from_inject_hyperparams(name):
    make_transform, _, _, rate = TRANSFORMS[name]
    transform, params, _, gradient, _ = make(name)

    def of_rate(learning_rate):
        return make_transform(learning_rate)

    injected = optax.inject_hyperparams(of_rate)(learning_rate=rate)

    @jax.jit
    def update(rate):
        state, found = injected.init(params), gradient(params)
        state.hyperparams["learning_rate"] = rate
        updates, _ = injected.update(found, state, params)
        expected, _ = transform.update(found, transform.init(params), params)
        return updates, expected, optim.apply_updates(params, updates)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    updates, expected, _ = update(jnp.float32(rate))
    jax.tree.map(close, updates, expected)
    _, _, same = update(jnp.float32(0))
    jax.tree.map(close, same, params)


@everywhere
def test_needs_the_params(name):
    transform, params, _, gradient, _ = make(name)
    with pytest.raises(ValueError, match="needs the params"):
        transform.update(gradient(params), transform.init(params))
