import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.expert_lookup import lookup
from pallas_kernels.expert_update import UpdateState
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from peerjax import optim
from peerjax.optim import accumulation
from peerjax.pool import initialize_pool
from tests.pallas_kernels.test_expert_update import make_gradient, make_pool

STORAGES = ["float32", "bfloat16", "int8", "int4"]


def one_step(transform, gradient, state, params):
    updates, state = transform.update(gradient, state, params)
    return optim.apply_updates(params, updates), state


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("storage", STORAGES)
def test_beside_other_parameters_in_a_partition_it_is_the_same_step(storage):
    params = {"dense": {"w": jnp.ones((3, 3))}, "pools": {"a": make_pool(storage)}}
    gradient = make_gradient()
    gradients = {"dense": {"w": jnp.ones((3, 3))}, "pools": {"a": gradient}}
    transform = optax.partition(
        {
            "dense": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
            "pools": optim.int4_accumulation(0.02),
        },
        {"dense": "dense", "pools": "pools"},
    )
    state = transform.init(params)
    new, new_state = jax.jit(lambda g, s, p: one_step(transform, g, s, p))(gradients, state, params)
    alone = optim.int4_accumulation(0.02)
    pool = params["pools"]["a"]
    expected, _ = jax.jit(lambda g, s, p: one_step(alone, g, s, p))(
        gradient, alone.init(pool), pool
    )
    assert_trees_equal(new["pools"]["a"], expected)
    assert float(new["dense"]["w"][0, 0]) < 1
    assert jax.tree.structure(state) == jax.tree.structure(new_state)


def test_clipping_acts_on_the_gradient_before_the_rule():
    pool, gradient = make_pool("float32"), make_gradient()
    norm = float(gradient.norm(pool.num_experts))
    clipping = optim.int4_accumulation(0.1, clip_norm=norm / 4)
    _, state = one_step(clipping, gradient, clipping.init(pool), pool)
    plain = optim.int4_accumulation(0.1)
    _, expected = one_step(plain, gradient, plain.init(pool), pool)
    # A row's step does not depend on the size of its gradient, its second moment does.
    np.testing.assert_allclose(state.pools.moments, expected.pools.moments / 16, rtol=1e-4)


def test_rows_that_are_passed_over_do_not_clip_the_others():
    pool, gradient = make_pool("float32"), make_gradient()
    huge = int(gradient.ids[0, 0, 0])
    bad = gradient._replace(
        c_down=jnp.where((gradient.ids == huge).at[1].set(False), 1e30, gradient.c_down)
    )
    clipping = optim.int4_accumulation(0.1, clip_norm=float(gradient.norm(pool.num_experts)) / 4)
    new, state = one_step(clipping, bad, clipping.init(pool), pool)
    moved = np.any(np.asarray(new.weights != pool.weights), axis=-1)
    assert not moved[0, huge, 0]
    assert moved[0, :, 1].sum() > 1
    assert moved[1].sum() > 1
    assert np.all(np.isfinite(state.pools.moments))


def test_no_recompilation_on_a_second_call_and_schedules_count():
    pool = make_pool("int4")
    transform = optim.int4_accumulation(optax.linear_schedule(0.0, 0.1, 4))
    traces = []

    @jax.jit
    def step(gradient, state, pool):
        traces.append(None)
        return one_step(transform, gradient, state, pool)

    state = transform.init(pool)
    first, state = step(make_gradient(), state, pool)
    assert_trees_equal(first, pool)  # at a learning rate of 0
    second, state = step(make_gradient(seed=1), state, first)
    assert len(traces) == 1
    assert int(state.count) == 2
    assert np.any(second.weights != first.weights)


def test_two_pools_and_two_steps_draw_different_bits():
    pool, gradient = make_pool("int4"), make_gradient()
    transform = optim.int4_accumulation(0.02)
    pools, gradients = {"a": pool, "b": pool}, {"a": gradient, "b": gradient}
    state = transform.init(pools)
    new, state = one_step(transform, gradients, state, pools)
    assert np.any(new["a"].weights != new["b"].weights)
    later, _ = one_step(
        transform, gradients, state._replace(pools=transform.init(pools).pools), pools
    )
    assert np.any(new["a"].weights != later["a"].weights)


def test_extra_arguments_are_ignored_and_params_are_needed():
    pool, transform = make_pool("int4"), optim.int4_accumulation(0.02)
    transform.update(make_gradient(), transform.init(pool), pool, value=1.0)
    with pytest.raises(ValueError, match="int4_accumulation needs the params"):
        transform.update(make_gradient(), transform.init(pool))


def test_adding_to_codes_is_refused():
    pool = make_pool("int4")
    with pytest.raises(ValueError, match="int4_accumulation must come last in the chain"):
        optim.apply_updates({"pool": pool}, {"pool": jax.tree.map(jnp.zeros_like, pool)})


def test_a_pool_whose_new_words_were_scaled_is_refused():
    pool = make_pool("int4")
    late = optax.chain(optim.int4_accumulation(0.02), optax.scale(0.5))
    updates, _ = late.update(make_gradient(), late.init(pool), pool)
    with pytest.raises(ValueError, match="is not an Overwrite with a pool of the same form"):
        optim.apply_updates(pool, updates)


@pytest.mark.parametrize("storage", ["float32", "int4"])
def test_a_fresh_state_can_be_donated(storage):
    pool, transform = make_pool(storage), optim.int4_accumulation(0.02)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(pool, state):
        def step(carry, _):
            return one_step(transform, make_gradient(), carry[1], carry[0]), None

        return jax.lax.scan(step, (pool, state), None, length=2)[0]

    assert int(train(pool, transform.init(pool))[1].count) == 2


@pytest.mark.parametrize("bits", [0, 8])
def test_a_state_of_other_accumulators_is_refused(bits):
    pool, transform = make_pool("int4"), optim.int4_accumulation(0.02)
    state = optim.int4_accumulation(0.02, accumulator_bits=bits).init(pool)
    with pytest.raises(ValueError, match="another accumulator_bits"):
        transform.update(make_gradient(), state, pool)


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40 + 3])
def test_any_integer_is_a_seed(seed):
    pool = make_pool("int4")
    transform = optim.int4_accumulation(0.02, seed=seed)
    small = optim.int4_accumulation(0.02, seed=jnp.uint32(seed % 2**32))
    new, _ = one_step(transform, make_gradient(), transform.init(pool), pool)
    expected, _ = one_step(small, make_gradient(), small.init(pool), pool)
    assert_trees_equal(new, expected)


def test_bytes_a_parameter_while_training():
    pool = jax.eval_shape(
        lambda: initialize_pool(jax.random.key(0), 1, 1 << 14, 1024, storage="int4")
    )
    state = jax.eval_shape(UpdateState.zeros_for, pool)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((pool, state)))
    assert size / ((1 << 14) * 2 * 1024) <= 1.02


@pytest.mark.parametrize("storage", STORAGES)
def test_learns_a_function(storage):
    """Experts alone fit random targets: the loss falls well below that of no experts."""
    width, tokens, chosen = 32, 64, 8
    pool = initialize_pool(jax.random.key(0), 1, 64, width, storage=storage)
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (tokens, width))
    target = jax.random.normal(keys[1], (tokens, width))
    ids = jax.random.randint(keys[2], (tokens, chosen), 0, 64)
    gates = jnp.full((tokens, chosen), 1 / chosen)
    transform = optim.int4_accumulation(optax.cosine_decay_schedule(0.05, 200))

    def loss(tap, pool):
        y = lookup(pool.at_layer(jnp.int32(0)), ids, gates, x, activation="gelu", tap=tap)
        return jnp.mean((y - target) ** 2)

    @jax.jit
    def step(carry, _):
        pool, state = carry
        value, tap = jax.value_and_grad(loss)(Tap.zeros_for(ids, x), pool)
        gradient = jax.tree.map(lambda a: a[None], FactoredGradient.from_tap(ids, tap))
        return one_step(transform, gradient, state, pool), value

    _, losses = jax.lax.scan(step, (pool, transform.init(pool)), None, length=200)
    assert float(losses[-1]) < 0.6 * float(losses[0])


def test_the_example_in_the_docstring_runs():
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(optim.int4_accumulation, globs={}, module=accumulation)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert example.examples
