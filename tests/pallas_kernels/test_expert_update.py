"""The update against a reference written with loops over experts and 64-bit floats."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunking import ChunkSize
from pallas_kernels.counter_hash import hash_words
from pallas_kernels.expert_update import Hyperparameters, UpdateState, api, update
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.storage import BITS, read_codes
from peerjax.pool import initialize_pool

LAYERS, N, D, T, K = 2, 50, 32, 21, 5
PACKED = ["int8", "int4"]
RULE = Hyperparameters(learning_rate=0.02, scale_learning_rate=0.003)


def make_pool(storage, num_experts=N, width=D, layers=LAYERS, seed=0):
    return initialize_pool(
        jax.random.key(seed), layers, num_experts, width,
        heads=1, experts_per_head=4, storage=storage,
    )  # fmt: skip


def make_gradient(seed=0, num_experts=N, tokens=T, chosen=K, width=D, layers=LAYERS):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_experts, (layers, tokens, chosen))
    ids[:, :, 1] = 3  # one expert for all tokens, and repeats within a token
    ids[:, 4] = num_experts - 1
    ids[:, 5, 2] = num_experts  # the sentinel
    leaves = [(tokens, chosen), (tokens, chosen), (tokens, width), (tokens, width)]
    floats = [rng.standard_normal((layers, *shape)).astype(np.float32) for shape in leaves]
    return FactoredGradient(jnp.array(ids, jnp.int32), *map(jnp.array, floats))


def dense(gradient, num_experts=N):
    """[layers, N, 2, D] in float64."""
    ids, c_down, c_up, x, dy = (np.asarray(leaf, np.float64) for leaf in gradient)
    layers, width = ids.shape[0], x.shape[-1]
    rows = np.zeros((layers, num_experts, 2, width))
    for layer, token, chosen in np.ndindex(ids.shape):
        expert = int(ids[layer, token, chosen])
        if 0 <= expert < num_experts:
            rows[layer, expert, 0] += c_down[layer, token, chosen] * x[layer, token]
            rows[layer, expert, 1] += c_up[layer, token, chosen] * dy[layer, token]
    return rows


def all_codes(words, pool, storage=None):
    """[layers, N, 2, D]"""
    if words is None:
        return np.zeros((LAYERS, pool.num_experts, 2, pool.width), np.int64)
    ids = jnp.arange(pool.num_experts)
    layers = range(words.shape[0])
    storage = storage or pool.storage
    read = [read_codes(words, jnp.int32(i), ids, pool.width, storage) for i in layers]
    return np.asarray(read, np.int64)


def reference(pool, state, gradient, rule, seed, step, bits):
    """One step, expert by expert; returns codes, accumulators, scales, moments."""
    unit, top = 2**bits, 2 ** (BITS[pool.storage] - 1) - 1
    rows = dense(gradient, pool.num_experts)
    codes = all_codes(pool.weights, pool)
    accumulators = all_codes(state.accumulators, pool, f"int{bits}")
    scales = np.array(pool.scales, np.float64)
    nu, nu_scale = np.array(state.moments, np.float64), np.array(state.scale_moments, np.float64)
    for layer, expert, matrix in np.ndindex(*rows.shape[:3]):
        g = rows[layer, expert, matrix]
        mean_square = np.mean(g**2)
        if mean_square == 0:
            continue
        at, row = (layer, matrix, expert), (layer, expert, matrix)
        new = mean_square if nu[at] == 0 else rule.beta2 * nu[at] + (1 - rule.beta2) * mean_square
        nu[at] = new
        delta = g / np.sqrt(new)
        delta /= max(1.0, np.sqrt(np.mean(delta**2)))
        v = unit * codes[row] + accumulators[row]
        u = -rule.learning_rate * delta * unit / scales[at]
        u -= rule.learning_rate * rule.weight_decay * v
        words = np.asarray(hash_words(seed, 1, step, layer, matrix, expert, jnp.arange(D)))
        up = words // 256 / 2.0**24 < u - np.floor(u)
        moved = v + (np.floor(u) + up).astype(np.int64)
        low, high = -top * unit - unit // 2, top * unit + max(unit // 2 - 1, 0)
        doubles = np.mean((moved < low) | (moved > high)) > rule.grow_above
        if doubles:
            moved = (moved + words % 2) // 2
        moved = np.clip(moved, low, high)
        g_scale = scales[at] * np.sum(g * codes[row])
        new = g_scale**2 if nu_scale[at] == 0 else (
            rule.beta2 * nu_scale[at] + (1 - rule.beta2) * g_scale**2
        )  # fmt: skip
        nu_scale[at] = new
        move = g_scale / max(np.sqrt(new), abs(g_scale)) if g_scale else 0.0
        scales[at] *= (2.0 if doubles else 1.0) * np.exp(-rule.scale_learning_rate * move)
        codes[row] = (moved + unit // 2) // unit
        accumulators[row] = moved - unit * codes[row]
    return codes, accumulators, scales, nu, nu_scale


def assert_equals_reference(pool, state, gradient, rule, seed, step, bits):
    expected = reference(pool, state, gradient, rule, seed, step, bits)
    one_step = jax.jit(partial(update, accumulator_bits=bits))
    new_pool, new_state, _ = one_step(pool, state, gradient, rule, seed=seed, step=step)
    codes = all_codes(new_pool.weights, pool)
    accumulators = all_codes(new_state.accumulators, pool, f"int{bits}")
    unit = 2**bits
    # float32 sums may straddle a rounding threshold where float64 ones do not: by one unit.
    moved = unit * (codes - expected[0]) + accumulators - expected[1]
    assert np.abs(moved).max() <= 1
    assert np.mean(moved != 0) < 1e-3
    np.testing.assert_allclose(new_pool.scales, expected[2], rtol=1e-5)
    np.testing.assert_allclose(new_state.moments, expected[3], rtol=1e-4)
    np.testing.assert_allclose(new_state.scale_moments, expected[4], rtol=1e-3, atol=1e-9)
    return new_pool, new_state


@pytest.mark.parametrize("storage", PACKED)
@pytest.mark.parametrize("learning_rate", [1e-4, 0.02, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_three_steps_equal_the_reference(storage, learning_rate, weight_decay):
    pool = make_pool(storage)
    state = UpdateState.zeros_for(pool)
    rule = RULE._replace(learning_rate=learning_rate, weight_decay=weight_decay)
    for step in range(3):
        gradient = make_gradient(seed=step)
        bits = BITS[storage]
        pool, state = assert_equals_reference(pool, state, gradient, rule, 7, step, bits)


@pytest.mark.parametrize(("storage", "bits"), [("int4", 0), ("int4", 2), ("int4", 8), ("int8", 4)])
@pytest.mark.parametrize("learning_rate", [0.02, 0.5])
def test_accumulators_of_other_widths(storage, bits, learning_rate):
    pool = make_pool(storage)
    state = UpdateState.zeros_for(pool, bits)
    rule = RULE._replace(learning_rate=learning_rate)
    for step in range(2):
        gradient = make_gradient(seed=step)
        pool, state = assert_equals_reference(pool, state, gradient, rule, 7, step, bits)


def test_only_xla_knows_accumulators_of_other_widths():
    pool, state = make_pool("int4"), UpdateState.zeros_for(make_pool("int4"), 2)
    arguments = {"seed": 0, "step": 0, "accumulator_bits": 2}
    with pytest.raises(ValueError, match="mosaic_tpu cannot update experts: its accumulators are"):
        update(pool, state, make_gradient(), RULE, implementation="mosaic_tpu", **arguments)
    with pytest.raises(ValueError, match="accumulators have 0 or 2 or 4 or 8 bits, not 3"):
        UpdateState.zeros_for(pool, 3)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_experts_that_are_not_hit_stay_bit_identical(storage):
    pool = make_pool(storage)
    state = UpdateState.zeros_for(pool)
    gradient = make_gradient()
    # Zero coefficients, the sentinel and numbers outside the pool are no hits.
    ids = gradient.ids.at[:, :, 2:].set(jnp.array([10, 11, 12]))
    ids = ids.at[:, 0, 3].set(-1).at[:, 1, 3].set(N + 3)
    zero = (ids == 10) | (ids == 12)
    gradient = gradient._replace(
        ids=ids,
        c_down=jnp.where(zero, 0.0, gradient.c_down),
        c_up=jnp.where(zero, 0.0, gradient.c_up),
    )
    new_pool, new_state, counts = jax.jit(update)(pool, state, gradient, RULE, seed=0, step=0)
    hit = np.abs(dense(gradient)).sum((2, 3)) > 0
    assert not hit[:, [10, 12]].any()
    np.testing.assert_array_equal(counts.experts, hit.sum(1))

    def rows(pool, state):
        if not pool.is_packed:
            return np.asarray(pool.weights, np.float32)
        return np.stack([all_codes(pool.weights, pool), all_codes(state.accumulators, pool)], -1)

    before, after = rows(pool, state), rows(new_pool, new_state)
    np.testing.assert_array_equal(before[~hit], after[~hit])
    changed = (before != after).reshape(*hit.shape, -1).any(-1)
    np.testing.assert_array_equal(changed, hit)
    moments = np.asarray(new_state.moments)
    assert (moments.transpose(0, 2, 1)[~hit] == 0).all()
    if pool.is_packed:
        scales = np.asarray(new_pool.scales != pool.scales).transpose(0, 2, 1)
        np.testing.assert_array_equal(scales.any(-1), hit)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_chunk_sizes_and_jit_change_nothing(storage, monkeypatch):
    pool, gradient = make_pool(storage), make_gradient()

    def run(experts, compile_whole):
        monkeypatch.setattr(api, "HIT_EXPERTS", ChunkSize(experts, experts))
        state = UpdateState.zeros_for(pool)

        def step(pool, state, gradient):
            return update(pool, state, gradient, RULE, seed=1, step=2)

        return (jax.jit(step) if compile_whole else step)(pool, state, gradient)

    expected = run(128, True)
    for arguments in [(1, True), (7, True), (1000, True), (128, False)]:
        for one, other in zip(
            jax.tree.leaves(run(*arguments)), jax.tree.leaves(expected), strict=True
        ):
            if one.dtype == jnp.int32:
                np.testing.assert_array_equal(one, other)
            else:  # compiled alone or in a larger program, float sums differ in the last bit
                np.testing.assert_allclose(one, other, rtol=1e-4)


def test_a_pool_without_layers_is_a_stack_of_one():
    stack, gradient = make_pool("int4", layers=1), make_gradient(layers=1)
    pool = dataclasses.replace(stack, weights=stack.weights[0], scales=stack.scales[0])
    single = jax.tree.map(lambda leaf: leaf[0], gradient)
    arguments = {"seed": 0, "step": 0}
    one = update(stack, UpdateState.zeros_for(stack), gradient, RULE, **arguments)
    other = update(pool, UpdateState.zeros_for(pool), single, RULE, **arguments)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a[0], b)


def constant_gradient(value, width=D):
    """One token that chooses expert 0, whose rows both get the gradient `value` everywhere."""
    ones = jnp.ones((1, 1, 1))
    vector = jnp.full((1, 1, width), value, jnp.float32)
    return FactoredGradient(jnp.zeros((1, 1, 1), jnp.int32), ones, ones, vector, vector)


def position(pool, state):
    """(w + a / 2^b) of expert 0, in code steps: [2, D]."""
    unit = 2 ** BITS[pool.storage]
    codes, accumulators = all_codes(pool.weights, pool), all_codes(state.accumulators, pool)
    return codes[0, 0] + accumulators[0, 0] / unit


@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.4, 1.7])
def test_expected_movement_equals_the_float_step(fraction):
    """`fraction` is the step in units of 1/16 code; a thousandth moves at the right rate too."""
    width, seeds, steps = 512, 64, 16
    pool = make_pool("int4", num_experts=1, width=width, layers=1)
    start = position(pool, UpdateState.zeros_for(pool))
    inside = np.abs(start) <= 4.5
    # Both scales equal, so that one learning rate is one fraction of a unit; scales frozen.
    pool = dataclasses.replace(pool, scales=jnp.full_like(pool.scales, 0.1))
    rule = Hyperparameters(learning_rate=fraction * 0.1 / 16, scale_learning_rate=0.0)
    gradient = constant_gradient(3.0, width)

    @jax.jit
    def run(seed):
        state = UpdateState.zeros_for(pool)

        def one(carry, step):
            new_pool, new_state, _ = update(*carry, gradient, rule, seed=seed, step=step)
            return (new_pool, new_state), None

        return jax.lax.scan(one, (pool, state), jnp.arange(steps))[0]

    moved = np.stack([position(*run(seed)) - start for seed in range(seeds)])[:, inside]
    # Each of `steps` roundings moves one unit with the probability of its fraction.
    part = fraction % 1
    expected = -steps * fraction / 16
    error = np.sqrt(steps * part * (1 - part) / moved.size) / 16
    assert abs(moved.mean() - expected) < 4 * error, (moved.mean(), expected, error)
    to_nearest = -steps * np.round(fraction) / 16
    if fraction < 0.5:
        assert to_nearest == 0  # where rounding to nearest never moves at all


def test_a_row_that_would_clip_doubles_its_scale_and_keeps_its_value():
    width = 256
    pool = make_pool("int4", num_experts=1, width=width, layers=1)
    pool = dataclasses.replace(pool, scales=jnp.full_like(pool.scales, 0.1))
    state = UpdateState.zeros_for(pool)
    before = position(pool, state) * 0.1
    rule = Hyperparameters(learning_rate=0.5, scale_learning_rate=0.0)
    arguments = (constant_gradient(-1.0, width), rule)
    new_pool, new_state, counts = update(pool, state, *arguments, seed=0, step=0)
    np.testing.assert_allclose(new_pool.scales, 0.2)
    assert counts.doubled[0] == 2
    after = position(new_pool, new_state) * 0.2
    # Five codes up; half a unit of the old step, and half of one of the new, are rounded.
    np.testing.assert_allclose(after - before, 0.5, atol=0.1 / 16 + 0.2 / 16)
    unchanged, _, counts = update(
        pool, state, arguments[0], rule._replace(grow_above=1.0), seed=0, step=0
    )
    np.testing.assert_array_equal(unchanged.scales, pool.scales)
    assert counts.clipped[0] > 0


@pytest.mark.parametrize("storage", PACKED)
def test_in_place_and_of_a_cost_that_does_not_know_n(storage):
    def compiled(num_experts):
        pool = jax.eval_shape(lambda: make_pool(storage, num_experts, 256, 2))
        state = jax.eval_shape(UpdateState.zeros_for, pool)
        gradient = jax.eval_shape(lambda: make_gradient(tokens=64, chosen=8, width=256))

        def step(pool, state, gradient):
            return update(pool, state, gradient, RULE, seed=0, step=0)

        analysis = jax.jit(step, donate_argnums=(0, 1)).lower(pool, state, gradient).compile()
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((pool, state)))
        return analysis.memory_analysis(), size

    (small, _), (large, size) = compiled(1 << 10), compiled(1 << 18)
    assert large.alias_size_in_bytes >= size  # everything is rewritten in place
    assert large.temp_size_in_bytes <= 1.05 * small.temp_size_in_bytes
    assert large.temp_size_in_bytes < 0.02 * size


def test_what_does_not_fit_is_refused():
    pool = make_pool("int4")
    state = UpdateState.zeros_for(pool)
    single = jax.tree.map(lambda leaf: leaf[0], make_gradient())
    with pytest.raises(ValueError, match="does not fit the pool"):
        update(pool, state, single, RULE, seed=0, step=0)
    with pytest.raises(ValueError, match="width 16 but the experts 32"):
        update(pool, state, make_gradient(width=16), RULE, seed=0, step=0)
