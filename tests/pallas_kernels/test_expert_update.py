"""The update against a reference written with loops over experts and 64-bit floats."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunking import ChunkSize
from pallas_kernels.counter_hash import hash_words
from pallas_kernels.expert_update import Hyperparameters, UpdateState, api, update
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.storage import BITS, pack_experts, read_codes
from peerjax.pool import initialize_pool
from tests.conftest import compile_as_users_do
from tests.pallas_kernels.levels import SPREAD, TOP
from tests.pallas_kernels.on_cpus import ON_CPUS, needs_native, on_cpus

LAYERS, N, D, T, K = 2, 50, 32, 21, 5
PACKED = ["int8", "int4"]
OTHERS = [
    *[("int4", 0), ("int4", 2), ("int4", 8), ("int8", 4)],
    *[("int3", 4), ("int3", 0), ("ternary", 2), ("ternary", 4)],
]
RULE = Hyperparameters(learning_rate=0.02)


def make_pool(storage, num_experts=N, width=D, layers=LAYERS, seed=0):
    return initialize_pool(jax.random.key(seed), layers, num_experts, width, storage=storage)


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
    unit, top = 2**bits, TOP[pool.storage]
    rows = dense(gradient, pool.num_experts)
    codes = all_codes(pool.weights, pool)
    accumulators = all_codes(state.accumulators, pool, f"{bits}-bit accumulators")
    scales = np.array(pool.scales, np.float64)
    nu = np.array(state.moments, np.float64)
    counters = np.ix_(*(range(size) for size in (*rows.shape[:1], 2, rows.shape[1], D)))
    layers, matrices, experts, columns = (jnp.asarray(each) for each in counters)
    every_word = np.asarray(hash_words(seed, 1, step, layers, matrices, experts, columns))
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
        words = every_word[layer, matrix, expert]
        up = words // 256 / 2.0**24 < u - np.floor(u)
        moved = v + (np.floor(u) + up).astype(np.int64)
        beyond = np.sqrt(np.mean(moved.astype(np.float64) ** 2)) / (
            SPREAD[pool.storage] * top * unit
        )
        squares = moved.astype(np.float64) ** 2
        low, high = -top * unit - unit // 2, top * unit + max(unit // 2 - 1, 0)
        stopped = np.sum((moved < low) | (moved > high)) * high**2 > np.sum(squares) / 2
        outer = np.sum(squares[squares > high**2 / 2]) < np.sum(squares) / 2
        grows, shrinks = beyond > 2**0.25 or stopped, beyond < 2**-0.25 and outer
        factor = 2 ** (0.25 * (1 if grows else -int(shrinks)))
        scaled = moved / factor
        up = (words % 256 + 0.5) / 256 < scaled - np.floor(scaled)
        moved = np.clip((np.floor(scaled) + up).astype(np.int64), low, high)
        scales[at] *= factor
        codes[row] = (moved + unit // 2) // unit
        accumulators[row] = moved - unit * codes[row]
    return codes, accumulators, scales, nu


@cache
def compiled_with(bits, implementation):
    return jax.jit(partial(update, accumulator_bits=bits, implementation=implementation))


def assert_equals_reference(pool, state, gradient, rule, seed, step, bits):
    """Every implementation for CPUs takes the step of the reference; returns that of the first."""
    expected = reference(pool, state, gradient, rule, seed, step, bits)
    arguments = (pool, state, gradient, rule, seed, step, bits)
    steps = [assert_steps_to(expected, each, *arguments) for each in ON_CPUS]
    return steps[0]


def assert_steps_to(expected, implementation, pool, state, gradient, rule, seed, step, bits):
    one_step = compiled_with(bits, implementation)
    new_pool, new_state, _ = one_step(pool, state, gradient, rule, seed=seed, step=step)
    codes = all_codes(new_pool.weights, pool)
    accumulators = all_codes(new_state.accumulators, pool, f"{bits}-bit accumulators")
    unit = 2**bits
    # float32 sums may straddle a rounding threshold where float64 ones do not: by one unit.
    moved = unit * (codes - expected[0]) + accumulators - expected[1]
    assert np.abs(moved).max() <= 1
    # int8 takes 16 bits with its accumulators: float32 leaves 8 for where a rounding falls.
    assert np.mean(moved != 0) < (3e-3 if pool.storage == "int8" else 1e-3)
    np.testing.assert_allclose(new_pool.scales, expected[2], rtol=1e-5)
    np.testing.assert_allclose(new_state.moments, expected[3], rtol=1e-4)
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


@pytest.mark.parametrize(("storage", "bits"), OTHERS)
@pytest.mark.parametrize("learning_rate", [0.02, 0.5])
def test_accumulators_of_other_widths_and_codes_of_fewer_levels(storage, bits, learning_rate):
    pool = make_pool(storage)
    state = UpdateState.zeros_for(pool, bits)
    rule = RULE._replace(learning_rate=learning_rate)
    for step in range(2):
        gradient = make_gradient(seed=step)
        pool, state = assert_equals_reference(pool, state, gradient, rule, 7, step, bits)


def test_mosaic_kernels_have_accumulators_as_wide_as_codes():
    pool, state = make_pool("int4"), UpdateState.zeros_for(make_pool("int4"), 2)
    arguments = {"seed": 0, "step": 0, "accumulator_bits": 2}
    with pytest.raises(ValueError, match="mosaic_tpu cannot update experts: its accumulators are"):
        update(pool, state, make_gradient(), RULE, implementation="mosaic_tpu", **arguments)
    ternary = make_pool("ternary")
    with pytest.raises(ValueError, match="mosaic_gpu cannot update experts: it reads codes of 4"):
        update(
            ternary, UpdateState.zeros_for(ternary), make_gradient(), RULE,
            seed=0, step=0, implementation="mosaic_gpu",
        )  # fmt: skip
    with pytest.raises(ValueError, match="accumulators have 0 or 2 or 4 or 8 bits, not 3"):
        UpdateState.zeros_for(pool, 3)


@pytest.mark.parametrize(
    ("storage", "implementation"),
    [*[(each, "xla") for each in ("float32", "bfloat16", "int8", "int4")], ("int4", None)],
)
def test_experts_that_are_not_hit_stay_bit_identical(storage, implementation):
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
    one_step = jax.jit(partial(update, implementation=implementation))
    new_pool, new_state, counts = one_step(pool, state, gradient, RULE, seed=0, step=0)
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
        assert not scales[~hit].any()


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_chunk_sizes_and_jit_change_nothing(storage, monkeypatch):
    pool, gradient = make_pool(storage), make_gradient()

    def run(experts, compile_whole):
        monkeypatch.setattr(api, "HIT_EXPERTS", ChunkSize(experts, experts))
        state = UpdateState.zeros_for(pool)

        def step(pool, state, gradient):
            return update(pool, state, gradient, RULE, seed=1, step=2, implementation="xla")

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


PARTS = 2


@pytest.mark.parametrize(
    ("storage", "implementation"),
    [
        pytest.param("int4", "native_cpu", marks=needs_native), ("int8", "xla"),
        ("bfloat16", "xla"), ("int4", "mosaic_tpu"), ("int4", "mosaic_gpu"),
    ],
)  # fmt: skip
def test_parts_of_a_pool_and_single_layers_are_updated_as_in_the_whole(storage, implementation):
    num_experts, tokens = 64, 21 if implementation in ("xla", "native_cpu") else 6
    width = D if implementation in ("xla", "native_cpu") else 128
    pool = make_pool(storage, num_experts, width)
    state, gradient = UpdateState.zeros_for(pool), make_gradient(1, num_experts, tokens, 5, width)
    options = {"seed": 3, "step": 7, "implementation": implementation}
    whole, after, counts = jax.jit(partial(update, **options))(pool, state, gradient, RULE)
    size = num_experts // PARTS
    total = jax.tree.map(jnp.zeros_like, counts)
    for part in range(PARTS):
        own, own_state, expected, expected_state = (
            part_of(tree, part, size, num_experts) for tree in (pool, state, whole, after)
        )
        ids = gradient.ids - part * size
        local = gradient._replace(ids=jnp.where((ids >= 0) & (ids < size), ids, size))
        for layer in range(LAYERS):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer : layer + 1], local)
            own, own_state, more = jax.jit(partial(update, **options))(
                own, own_state, one, RULE, first_layer=layer, first_expert=part * size
            )
            total = jax.tree.map(jnp.add, total, more)
        for found, wanted in zip(
            *map(jax.tree.leaves, ((own, own_state), (expected, expected_state))), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(total, counts, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def part_of(tree, part, size, num_experts):
    """The arrays of some of the experts, of a pool or of a state."""

    def cut(leaf):
        axis = 2 if leaf.ndim == 3 and leaf.shape[1] == 2 and leaf.shape[2] == num_experts else 1
        count = leaf.shape[axis] // PARTS
        return jax.lax.slice_in_dim(leaf, part * count, (part + 1) * count, axis=axis)

    cut_tree = jax.tree.map(cut, tree)
    is_pool = dataclasses.is_dataclass(tree)
    return dataclasses.replace(cut_tree, num_experts=size) if is_pool else cut_tree


def test_a_pool_without_layers_is_a_stack_of_one():
    stack, gradient = make_pool("int4", layers=1), make_gradient(layers=1)
    pool = dataclasses.replace(stack, weights=stack.weights[0], scales=stack.scales[0])
    single = jax.tree.map(lambda leaf: leaf[0], gradient)
    arguments = {"seed": 0, "step": 0}
    one = update(stack, UpdateState.zeros_for(stack), gradient, RULE, **arguments)
    other = update(pool, UpdateState.zeros_for(pool), single, RULE, **arguments)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a[0], b)


def constant_gradient(value, experts=1, width=D):
    """One token that chooses all experts, whose rows get the gradient `value` everywhere."""
    ids = jnp.arange(experts)[None, None]
    ones = jnp.ones(ids.shape)
    vector = jnp.full((1, 1, width), value, jnp.float32)
    return FactoredGradient(ids, ones, ones, vector, vector)


def alike(codes, scales):
    """A stack of one layer whose experts all have these codes [2, D] and scales [2]."""
    codes = jnp.broadcast_to(codes, (COPIES, *codes.shape)).astype(jnp.int32)
    pool = make_pool("int4", COPIES, codes.shape[-1], layers=1)
    scales = jnp.broadcast_to(jnp.asarray(scales)[None, :, None], pool.scales.shape)
    return dataclasses.replace(pool, weights=pack_experts(codes, "int4")[None], scales=scales)


def position(pool, state):
    """(w + a / 2^b) of the experts of one layer, in code steps: [N, 2, D]."""
    unit = 2 ** BITS[pool.storage]
    codes, accumulators = all_codes(pool.weights, pool), all_codes(state.accumulators, pool)
    return codes[0] + accumulators[0] / unit


def after_constant_steps(pool, value, rule, steps):
    """Pool and state after as many steps along a constant gradient, and how many scales grew."""
    gradient = constant_gradient(value, pool.num_experts, pool.width)

    def one(carry, step):
        new_pool, new_state, counts = update(*carry, gradient, rule, seed=3, step=step)
        return (new_pool, new_state), counts.grown

    start = (pool, UpdateState.zeros_for(pool))
    (end, kept), grown = jax.jit(lambda start: jax.lax.scan(one, start, jnp.arange(steps)))(start)
    return end, kept, np.sum(grown)


# Experts that start alike and draw random bits of their own, where means over draws are compared.
COPIES = 200


@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.4, 1.7])
def test_expected_movement_equals_the_float_step(fraction):
    """`fraction` is the step in units of 1/16 code; a thousandth moves at the right rate too."""
    drawn, steps = make_pool("int4", 1, 256, layers=1), 16
    codes = all_codes(drawn.weights, drawn)[0, 0]
    # Both scales equal, so that one learning rate is one fraction of a unit.
    pool = alike(codes, [0.1, 0.1])
    rule = Hyperparameters(learning_rate=fraction * 0.1 / 16)
    end, kept, _ = after_constant_steps(pool, 3.0, rule, steps)
    # The largest fraction moves some rows so far that their scales follow.
    followed = np.asarray(end.scales != pool.scales)
    assert followed.any() == (fraction > 1)
    in_first_scales = np.asarray(end.scales[0].T)[..., None] / 0.1
    moved = (position(end, kept) * in_first_scales - codes)[:, np.abs(codes) <= 4.5]
    # Each of `steps` roundings moves one unit with the probability of its fraction; a scale that
    # moves rounds once more.
    part = fraction % 1
    expected = -steps * fraction / 16
    error = np.sqrt((steps * part * (1 - part) + (fraction > 1)) / moved.size) / 16
    assert abs(moved.mean() - expected) < 4 * error, (moved.mean(), expected, error)
    to_nearest = -steps * np.round(fraction) / 16
    if fraction < 0.5:
        assert to_nearest == 0  # where rounding to nearest never moves at all


@pytest.mark.parametrize("size", [0.05, 0.5, 1.0, 2.0, 20.0])
def test_scales_follow_their_rows_and_weights_stay_what_they_are_on_average(size):
    """Of rows whose scale is `size` times what it should be; nothing else moves it."""
    drawn, steps = make_pool("int4", 1, 256, layers=1), 30
    codes = jnp.clip(jnp.round(all_codes(drawn.weights, drawn)[0, 0] / size), -7, 7)
    pool = alike(codes, drawn.scales[0, :, 0] * size)
    start = np.asarray(codes * pool.scales[0, :, 0][:, None])
    end, kept, grown = after_constant_steps(pool, 1.0, Hyperparameters(learning_rate=0.0), steps)
    at = position(end, kept)
    rms = np.sqrt(np.mean(np.square(at), axis=-1))
    wanted = SPREAD["int4"] * 7
    if size > 10:  # codes that are all 0
        np.testing.assert_array_equal(end.scales, pool.scales)
    else:
        assert np.all((rms > wanted / 1.25) & (rms < wanted * 1.25))
    assert bool(grown) == (size < 0.7)
    if size > 0.1:
        # Each move of a scale rounds by less than a unit, which is 1/16 of a code.
        weights = at * np.asarray(end.scales[0].T)[..., None]
        error = np.asarray(end.scales).max() / 16 * np.sqrt(steps / COPIES)
        np.testing.assert_allclose(np.mean(weights, axis=0), start, atol=5 * error)


def compiled_update(storage, num_experts, implementation="xla"):
    """The update of two layers, compiled; and the bytes of what it rewrites."""
    pool = jax.eval_shape(lambda: make_pool(storage, num_experts, 256, 2))
    state = jax.eval_shape(UpdateState.zeros_for, pool)
    gradient = jax.eval_shape(lambda: make_gradient(tokens=64, chosen=8, width=256))

    def step(pool, state, gradient):
        return update(pool, state, gradient, RULE, seed=0, step=0, implementation=implementation)

    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((pool, state)))
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(pool, state, gradient)
    return compile_as_users_do(lowered), size


@on_cpus
@pytest.mark.parametrize("storage", PACKED)
def test_in_place_and_of_a_cost_that_does_not_know_n(implementation, storage):
    small = compiled_update(storage, 1 << 10, implementation)[0].memory_analysis()
    compiled, size = compiled_update(storage, 1 << 18, implementation)
    large = compiled.memory_analysis()
    assert large.alias_size_in_bytes >= size  # everything is rewritten in place
    assert large.temp_size_in_bytes <= 1.05 * small.temp_size_in_bytes
    assert large.temp_size_in_bytes < 0.02 * size


def test_no_bfloat16_pool_is_made_float32_as_a_whole():
    compiled, _ = compiled_update("bfloat16", 4099)
    assert "[2,4099,2,256]" in compiled.as_text()
    assert "f32[2,4099,2,256]" not in compiled.as_text()


def test_what_does_not_fit_is_refused():
    pool = make_pool("int4")
    state = UpdateState.zeros_for(pool)
    single = jax.tree.map(lambda leaf: leaf[0], make_gradient())
    with pytest.raises(ValueError, match=r"ids of the gradient has shape .* the pool needs \(2, "):
        update(pool, state, single, RULE, seed=0, step=0)
    with pytest.raises(
        ValueError, match=r"x of the gradient has shape .* 16\).* the pool needs .* 32\)"
    ):
        update(pool, state, make_gradient(width=16), RULE, seed=0, step=0)
    gradient = make_gradient()
    one_layer = jax.tree.map(lambda leaf: leaf[:1], gradient)
    with pytest.raises(
        ValueError, match=r"ids of the gradient has shape \(1, .* the pool needs \(2, "
    ):
        update(pool, state, one_layer, RULE, seed=0, step=0)
    with pytest.raises(ValueError, match="dy of the gradient has shape"):
        update(pool, state, gradient._replace(dy=gradient.dy[:, :-1]), RULE, seed=0, step=0)
    with pytest.raises(ValueError, match="for other params or another accumulator_bits"):
        update(pool, UpdateState.zeros_for(pool, 2), gradient, RULE, seed=0, step=0)
    short = state._replace(moments=state.moments[..., :-1])
    with pytest.raises(ValueError, match="for other params or another accumulator_bits"):
        update(pool, short, gradient, RULE, seed=0, step=0)
