"""`int4_accumulation` on matrices of any project, as optax tests its optimizers."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.counter_hash import hash_words
from peerjax import optim
from tests.pallas_kernels.levels import SPREAD, TOP

WIDTHS = [3, 8, 20, 64]


def matrix(width=20, rows=6, seed=0, storage="int4"):
    return optim.pack(jax.random.normal(jax.random.key(seed), (rows, width)), storage)


@functools.partial(jax.jit, static_argnums=0)
def one_step(transform, gradients, state, params):
    updates, state = transform.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=12)
@given(
    width=st.integers(1, 40), rows=st.integers(1, 5), storage=st.sampled_from(["int4", "int8"]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_packing_is_rounding_to_nearest_at_the_scale_of_training(width, rows, storage, seed):
    weights = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    packed = optim.pack(jnp.asarray(weights), storage)
    assert packed.shape == weights.shape
    top = TOP[storage]
    scales = np.sqrt(np.mean(weights**2, -1)) / (SPREAD[storage] * top)
    for row, scale in enumerate(scales):
        squares = weights[row] ** 2
        # A rung up for as long as clipped weights hold more than half.
        while np.sum(squares[squares > ((top + 0.5) * scale) ** 2]) > np.sum(squares) / 2:
            scale *= 2**0.25
        scales[row] = scale
    np.testing.assert_allclose(packed.scales, scales, rtol=1e-5)
    inside = np.clip(weights, -top * scales[:, None], top * scales[:, None])
    assert np.all(np.abs(np.asarray(packed.floats()) - inside) <= scales[:, None] * 0.5001)


def test_only_packed_matrices_are_dequantized():
    params = {"w": matrix(), "b": jnp.arange(3), "deep": [matrix(8)]}
    floats = optim.dequantize(params)
    assert floats["b"] is params["b"]
    np.testing.assert_array_equal(floats["deep"][0], params["deep"][0].floats())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("storage", "bits"),
    [
        ("int4", None),
        ("int4", 0),
        ("int4", 2),
        ("int4", 8),
        ("int8", None),
        ("int3", None),
        ("ternary", None),
        ("ternary", 4),
    ],
)
def test_two_steps_equal_exact_integer_arithmetic(width, storage, bits):
    """Differences are added to words by optax; what they stand for is worked out in float64."""
    rate, decay, rows = 0.05, 0.1, 5
    transform = optim.int4_accumulation(rate, weight_decay=decay, seed=3, accumulator_bits=bits)
    params = {"w": matrix(width, rows, storage=storage)}
    state = transform.init(params)
    top = TOP[storage]
    unit = 2 ** ({"int8": 8, "int4": 4, "int3": 4, "ternary": 2}[storage] if bits is None else bits)
    value = np.asarray(params["w"].codes(), np.int64) * unit
    scales, nu = np.asarray(params["w"].scales, np.float64), None
    for step in range(2):
        gradient = np.random.default_rng(step).standard_normal((rows, width)).astype(np.float32)
        gradient[1] = 0  # a row that is not hit
        params, state = one_step(transform, {"w": jnp.asarray(gradient)}, state, params)
        square = np.mean(gradient.astype(np.float64) ** 2, -1)
        nu = square if nu is None else 0.99 * nu + 0.01 * square
        delta = gradient / np.maximum(np.sqrt(np.maximum(nu, square)), 1e-30)[:, None]
        u = -rate * delta * unit / scales[:, None] - rate * decay * value
        seed = hash_words(3, 0)
        words = np.asarray(hash_words(seed, 2, step, jnp.arange(rows)[:, None], jnp.arange(width)))
        up = words // 256 / 2.0**24 < u - np.floor(u)
        moved = value + (np.floor(u) + up).astype(np.int64)
        beyond = np.sqrt(np.mean(moved.astype(np.float64) ** 2, -1)) / (
            SPREAD[storage] * top * unit
        )
        low, high = -top * unit - unit // 2, top * unit + max(unit // 2 - 1, 0)
        squares = moved.astype(np.float64) ** 2
        held = np.sum(squares, -1) / 2
        stopped = np.sum((moved < low) | (moved > high), -1) * high**2 > held
        outer = np.sum(squares * (squares > high**2 / 2), -1) < held
        factor = np.where((beyond < 2**-0.25) & outer, 2**-0.25, 1)
        factor = np.where((beyond > 2**0.25) | stopped, 2**0.25, factor)
        factor = np.where(square > 0, factor, 1.0)
        scaled = moved / factor[:, None]
        up = (words % 256 + 0.5) / 256 < scaled - np.floor(scaled)
        moved = (np.floor(scaled) + up).astype(np.int64)
        moved = np.clip(moved, low, high)
        hit = (square > 0)[:, None]
        value = np.where(hit, moved, value)
        np.testing.assert_array_equal(params["w"].codes(), (value + unit // 2) // unit)
        scales = scales * factor
        np.testing.assert_allclose(params["w"].scales, scales, rtol=1e-6)


def test_scales_climb_a_rung_when_codes_grow_and_go_down_when_they_shrink():
    params = matrix(64, 4)
    large = optim.int4_accumulation(2.0)
    outwards = -jnp.sign(params.floats() + 1e-9)
    new, state = one_step(large, outwards, large.init(params), params)
    np.testing.assert_allclose(new.scales, 2**0.25 * params.scales, rtol=1e-6)
    assert float(state.statistics.grown) == 4
    decay = optim.int4_accumulation(1e-3, weight_decay=300.0)
    new, state = one_step(decay, 1e-9 * outwards, decay.init(params), params)
    np.testing.assert_allclose(new.scales, 2**-0.25 * params.scales, rtol=1e-6)
    assert float(state.statistics.grown) == 0


def test_in_chain_partition_masked_and_inject_hyperparams():
    params = {"w": matrix(), "b": jnp.ones(3)}
    gradients = {"w": 100 * jax.random.normal(jax.random.key(1), (6, 20)), "b": jnp.ones(3)}
    alone = optim.int4_accumulation(0.02)
    clip = optax.clip_by_global_norm(1.0)
    norm = float(optax.tree.norm(gradients))

    def expected(factor):
        return one_step(alone, gradients["w"] * factor, alone.init(params["w"]), params["w"])[0]

    labels = {"w": "packed", "b": "float"}
    partition = optax.chain(
        clip, optax.partition({"packed": alone, "float": optax.sgd(1.0)}, labels)
    )
    new, _ = one_step(partition, gradients, partition.init(params), params)
    assert_trees_equal(new["w"], expected(np.float32(1 / norm)))
    np.testing.assert_allclose(new["b"], 1 - 1 / norm, rtol=1e-6)

    mask = {"w": True, "b": False}
    masked = optax.chain(
        optax.masked(alone, mask), optax.masked(optax.sgd(1.0), {"w": False, "b": True})
    )
    new, _ = one_step(masked, gradients, masked.init(params), params)
    assert_trees_equal(new["w"], expected(1))
    np.testing.assert_array_equal(new["b"], 0)

    injected = optax.inject_hyperparams(optim.int4_accumulation)(learning_rate=0.02)
    state = injected.init(params["w"])
    new, _ = one_step(injected, gradients["w"], state, params["w"])
    assert_trees_equal(new, expected(1))
    state.hyperparams["learning_rate"] = jnp.array(0.0)
    new, _ = one_step(injected, gradients["w"], state, params["w"])
    assert_trees_equal(new, params["w"])


def test_no_recompilation_extra_arguments_and_state_like_itself():
    params, transform = {"w": matrix()}, optim.int4_accumulation(optax.linear_schedule(0.1, 0.0, 9))
    traces = []

    @jax.jit
    def step(gradients, state, params):
        traces.append(None)
        updates, state = transform.update(gradients, state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    gradients = {"w": jnp.ones((6, 20))}
    once = step(gradients, state, params)
    twice = step(gradients, once[1], once[0])
    assert len(traces) == 1
    for a, b in ((once, (params, state)), (twice, once)):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
    assert int(twice[1].count) == 2


def test_tree_map_over_what_belongs_to_params():
    transform, params = optim.int4_accumulation(0.1), {"w": matrix()}
    state = transform.init(params)
    ones = optax.tree_map_params(transform, jnp.ones_like, state)
    assert int(ones.count) == 0
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(ones.pools))


@pytest.mark.parametrize("bits", [None, 0, 8])
def test_convergence_on_a_quadratic(bits):
    target = jax.random.normal(jax.random.key(2), (8, 32))
    steps = 300
    transform = optim.int4_accumulation(
        optax.cosine_decay_schedule(0.1, steps), accumulator_bits=bits
    )

    def loss(floats):
        return jnp.mean((floats - target) ** 2)

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(optim.dequantize(params))
        params, state = one_step(transform, gradient, state, params)
        return (params, state), value

    params = matrix(32, 8)
    carry, losses = jax.lax.scan(step, (params, transform.init(params)), None, length=steps)
    # Rounding to nearest of the target itself is the best that codes can do.
    best = float(loss(optim.pack(target).floats()))
    assert float(losses[0]) > 1
    assert float(loss(carry[0].floats())) < 2 * best


SPARSE = {
    "identity": np.eye(32),
    "one in twenty": np.random.default_rng(0).standard_normal((8, 256))
    * (np.random.default_rng(1).random((8, 256)) < 0.05),
    "one beside noise": np.eye(64) + 0.05 * np.random.default_rng(2).standard_normal((64, 64)),
}


@pytest.mark.parametrize("storage", ["int4", "int8"])
@pytest.mark.parametrize("kind", SPARSE)
def test_rows_of_few_large_weights_stay_what_they_are(kind, storage):
    weights = jnp.asarray(SPARSE[kind], jnp.float32)
    params, transform = optim.pack(weights, storage), optim.int4_accumulation(0.0)
    packed = params.floats()
    size = jnp.linalg.norm(weights, axis=1)
    assert np.all(jnp.linalg.norm(packed - weights, axis=1) < 0.4 * size)

    @jax.jit
    def step(carry, _):
        return one_step(transform, jnp.ones(params.shape), carry[1], carry[0]), None

    (params, _), _ = jax.lax.scan(step, (params, transform.init(params)), None, length=60)
    moved = jnp.linalg.norm(params.floats() - packed, axis=1)
    assert np.all(moved < 0.3 * size), np.max(moved / size)


@pytest.mark.parametrize("size", [0.01, 1.0])
def test_convergence_to_rows_of_few_large_weights(size):
    """From rows whose weights, and so whose codes, lie elsewhere: scales go up, and come down."""
    target, steps = jnp.eye(32), 1000
    transform = optim.int4_accumulation(optax.cosine_decay_schedule(0.03, steps))

    def loss(floats):
        return jnp.mean((floats - target) ** 2)

    @jax.jit
    def step(carry, _):
        params, state = carry
        return one_step(transform, jax.grad(loss)(params.floats()), state, params), None

    params = optim.pack(size * jax.random.normal(jax.random.key(0), (32, 32)))
    (params, _), _ = jax.lax.scan(step, (params, transform.init(params)), None, length=steps)
    # All zeros have a loss of 1/32.
    assert float(loss(params.floats())) < 0.002


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
def test_a_row_whose_gradient_is_not_finite_is_passed_over(bad):
    params, transform = matrix(), optim.int4_accumulation(0.1)
    state = transform.init(params)
    gradient = jnp.ones(params.shape)
    step = jax.jit(functools.partial(one_step, transform))
    new, state = step(gradient.at[2, 3].set(bad), state, params)
    assert_trees_equal(
        jax.tree.map(lambda leaf: leaf[2], (new, state.pools)),
        jax.tree.map(lambda leaf: leaf[2], (params, transform.init(params).pools)),
    )
    assert float(state.statistics.rows) == 5
    assert all(np.isfinite(each) for each in state.statistics)
    # It goes on from the next gradient.
    _, state = step(gradient, state, new)
    assert np.all(np.any(state.pools.accumulators != 0, axis=1))


@pytest.mark.parametrize("x64", [False, True])
def test_steps_can_be_scanned_with_everything_donated(x64):
    transform = optim.int4_accumulation(0.05)
    with jax.enable_x64(x64):
        params = {"a": matrix(), "b": matrix(8)}
        gradients = optim.dequantize(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train(params, state):
            def step(carry, _):
                return one_step(transform, gradients, carry[1], carry[0]), None

            return jax.lax.scan(step, (params, state), None, length=3)[0]

        _, state = train(params, transform.init(params))
    assert int(state.count) == 3


def test_misuse_that_can_be_seen_is_refused():
    params, transform = {"layer": {"w": matrix()}}, optim.int4_accumulation(0.1)
    gradients = {"layer": {"w": jnp.ones((6, 20))}}
    with pytest.raises(ValueError, match=r"\['b'\] is a .*pack it with peerjax.optim.pack"):
        transform.init({**params, "b": jnp.ones(3)})
    state = transform.init(params)
    with pytest.raises(ValueError, match="int4_accumulation needs the params"):
        transform.update(gradients, state)
    with pytest.raises(ValueError, match=r"float array of that shape, not \(20,\); differentiate"):
        transform.update({"layer": {"w": jnp.ones(20)}}, state, params)
    with pytest.raises(ValueError, match="float array of that shape"):
        transform.update(params, state, params)
    late = optax.chain(transform, optax.scale(0.5))
    updates, _ = late.update(gradients, late.init(params), params)
    with pytest.raises(ValueError, match=r"\['layer'\]\['w'\] is not a difference of words"):
        optim.apply_updates(params, updates)
    with pytest.raises(ValueError, match="not a difference of words"):
        optim.apply_updates(params, gradients)
    with pytest.raises(ValueError, match="packed as int8, int4, int3, ternary, not as 'int5'"):
        optim.pack(jnp.ones((2, 8)), "int5")
    with pytest.raises(ValueError, match=r"shape \(8,\) has no rows to pack"):
        optim.pack(jnp.ones(8))
    with pytest.raises(ValueError, match=r"shape \(0, 8\) is empty"):
        optim.pack(jnp.ones((0, 8)))
    for bad in (np.nan, np.inf, 1e30):
        with pytest.raises(ValueError, match="not finite and cannot be packed"):
            optim.pack(jnp.ones((2, 8)).at[1, 1].set(bad))
    other = optim.int4_accumulation(0.1, accumulator_bits=8)
    with pytest.raises(ValueError, match="made for other params or another accum"):
        transform.update(gradients, other.init(params), params)


def test_trees_that_do_not_fit_are_refused():
    params, transform = {"v": matrix(), "w": matrix()}, optim.int4_accumulation(0.1)
    gradients = {"v": jnp.ones((6, 20)), "w": jnp.ones((6, 20))}
    with pytest.raises(ValueError, match="params and gradients of different trees"):
        transform.update({"w": gradients["w"]}, transform.init(params), params)
    with pytest.raises(ValueError, match="params and a state of different trees"):
        transform.update(gradients, transform.init({"w": params["w"]}), params)

    def is_packed(params):
        return jax.tree.map(optim.is_packed_matrix, params, is_leaf=optim.is_packed_matrix)

    masked = optax.masked(transform, is_packed)  # asked about gradients, it finds nothing packed
    with pytest.raises(ValueError, match="masks of optax.masked must be trees, not functions"):
        masked.update(gradients, masked.init(params), params)


def test_an_injected_buffer_width_is_refused():
    # Without the type checks that tests add: users do not have them.
    inject = optax.inject_hyperparams(inspect.unwrap(optim.int4_accumulation))
    with pytest.raises(ValueError, match=r'static_args=\("accumulator_bits",\)'):
        inject(learning_rate=0.1, accumulator_bits=8).init(matrix())


@pytest.mark.parametrize(
    "wrap",
    [lambda inner: optax.MultiSteps(inner, 2), lambda inner: optax.apply_if_finite(inner, 3)],
)
def test_wrappers_that_cannot_hold_it_fail(wrap):
    params, wrapped = {"w": matrix()}, wrap(optim.int4_accumulation(0.1))
    with pytest.raises((ValueError, TypeError), match="pytree structure"):
        wrapped.update({"w": jnp.ones((6, 20))}, wrapped.init(params), params)


def test_differences_wrap_around_exactly():
    old = matrix(8, 1)
    words = jnp.full_like(old.words, jnp.iinfo(jnp.int32).min)
    change = dataclasses.replace(old, words=words - old.words, scales=jnp.zeros_like(old.scales))
    new = optax.apply_updates(old, change)
    np.testing.assert_array_equal(new.words, words)
