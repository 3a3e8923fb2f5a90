"""Every kernel against XLA, on the same inputs. `tests/accelerators` compiles them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platforms
from pallas_kernels.dispatch import PLATFORMS
from pallas_kernels.expert_lookup import lookup
from pallas_kernels.expert_lookup import mosaic_gpu as lookup_gpu
from pallas_kernels.expert_update import Hyperparameters, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.storage import read_codes, write_codes
from peerjax.pool import initialize_pool

KERNELS = ["mosaic_tpu", "mosaic_gpu"]
IMPLEMENTATIONS = ["xla", *KERNELS]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CALLS = {"mosaic_tpu": "tpu_custom_call", "mosaic_gpu": "mosaic_gpu"}


def make_pool(storage, width, num_experts, layers=2, seed=0):
    key = jax.random.key(seed)
    # Steps of 0.02 hardly move `up`.
    return initialize_pool(key, layers, num_experts, width, residual_scale=8.0, storage=storage)


def make_inputs(num_experts, tokens, chosen, width, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_experts, (tokens, chosen))
    ids[0, 0], ids[-1, -1], ids[0, -1] = 0, num_experts - 1, num_experts  # and the sentinel
    ids[:, chosen // 2] = ids[0, chosen // 2]  # one expert for all tokens
    ids[tokens // 2] = ids[tokens // 2, 0]  # and one token with one expert only
    ids[tokens // 3, 1] = -7
    gates = rng.uniform(0, 1, (tokens, chosen)).astype(np.float32)
    gates[tokens // 4] = 0
    bias = rng.standard_normal((tokens, chosen)).astype(np.float32)
    gates[ids == num_experts] = bias[ids == num_experts] = np.nan  # which nobody is to see
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    return jnp.array(ids, jnp.int32), jnp.array(gates), jnp.array(x, dtype), jnp.array(bias)


def value_and_gradients(implementation, pool, ids, gates, x, bias, activation="gelu"):
    dy = jax.random.normal(jax.random.key(5), x.shape)

    def loss(gates, x, bias, tap):
        y = lookup(
            pool, ids, gates, x,
            activation=activation, hidden_bias=bias, tap=tap, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(dy * y.astype(jnp.float32)), y

    tap = Tap.zeros_for(ids, x)
    gradients, y = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(gates, x, bias, tap)
    return y, gradients


def few_for_gpus(kernel, tokens):
    """A block of a GPU has one token, or one row to update; a step of a TPU's grid has several."""
    return min(tokens, 4) if kernel == "mosaic_gpu" else tokens


def assert_equal_to_rounding(found, expected, tolerance=5e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(each, np.float64) for each in (a, b))
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("storage", "width", "num_experts", "tokens", "chosen", "activation"),
    [
        ("int4", 256, 100, 7, 8, "gelu"),  # two experts in a unit
        slow("int4", 1024, 37, 5, 16, "gelu"),  # an expert in two units
        slow("int4", 64, 1001, 33, 5, "relu"),  # eight experts in a unit; K pads
        slow("int4", 576, 41, 4, 8, "relu2"),  # eight experts in nine units
        slow("int4", 512, 300, 2, 130, "gelu"),  # more experts a token than one product takes
        ("int4", 256, 64, 1, 40, "gelu"),  # decoding
        slow("int8", 128, 77, 5, 8, "gelu"),
        slow("int8", 1024, 19, 4, 12, "relu"),
        slow("int3", 256, 41, 3, 8, "relu"),
    ],
)
def test_the_lookup_and_its_gradients(
    kernel, storage, width, num_experts, tokens, chosen, activation
):
    tokens = few_for_gpus(kernel, tokens)
    pool = make_pool(storage, width, num_experts).at_layer(jnp.int32(1))
    inputs = make_inputs(num_experts, tokens, chosen, width, seed=width + tokens)
    expected = value_and_gradients("xla", pool, *inputs, activation)
    found = value_and_gradients(kernel, pool, *inputs, activation)
    assert_equal_to_rounding(found, expected)


@pytest.mark.slow
def test_several_tiles_in_a_block_of_mosaic_gpu(monkeypatch):
    monkeypatch.setattr(lookup_gpu, "BLOCKS", 1)
    num_experts, width, tokens, chosen = 90, 256, 2, 150
    layout = RowLayout.of(width, "int4")
    at_once = lookup_gpu.rows_at_once(layout, chosen)
    parts, of_part = lookup_gpu.parts_of(tokens, chosen, at_once)
    assert parts == 1
    assert of_part > 2 * lookup_gpu.TILE
    pool = make_pool("int4", width, num_experts).at_layer(jnp.int32(1))
    ids, *inputs = make_inputs(num_experts, tokens, chosen, width)
    ids = ids.at[0, at_once : 3 * at_once].set(num_experts)  # whole groups without an expert
    expected = value_and_gradients("xla", pool, ids, *inputs)
    found = value_and_gradients("mosaic_gpu", pool, ids, *inputs)
    assert_equal_to_rounding(found, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pool_that_is_no_stack(kernel):
    stack = make_pool("int4", 256, 50, layers=1)
    pool = jax.tree.map(lambda leaf: leaf[0], stack)
    inputs = make_inputs(50, 6, 8, 256)
    found = value_and_gradients(kernel, pool, *inputs)
    assert_equal_to_rounding(found, value_and_gradients("xla", pool, *inputs))


@pytest.mark.parametrize("kernel", KERNELS)
def test_activations_in_bfloat16(kernel):
    pool = make_pool("int4", 256, 50).at_layer(jnp.int32(0))
    inputs = make_inputs(50, 6, 8, 256, dtype=jnp.bfloat16)
    found = value_and_gradients(kernel, pool, *inputs)
    assert found[0].dtype == jnp.bfloat16
    assert_equal_to_rounding(found, value_and_gradients("xla", pool, *inputs), tolerance=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_sentinels_give_nothing(implementation):
    pool = make_pool("int4", 256, 50).at_layer(jnp.int32(0))
    _, gates, x, bias = make_inputs(50, 6, 8, 256)
    ids = jnp.full(gates.shape, 50)
    gates, bias = gates.at[0].set(jnp.nan), bias.at[1].set(jnp.nan)
    y, gradients = value_and_gradients(implementation, pool, ids, gates, x, bias)
    assert not np.any(y)
    d_gates, d_x, d_bias, tap = gradients
    for leaf in (d_gates, d_x, d_bias, tap.c_down, tap.c_up):
        assert not np.any(leaf)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_kernel_cannot_do_is_said(kernel):
    pool = make_pool("float32", 64, 50).at_layer(jnp.int32(0))
    ids, gates, x, _ = make_inputs(50, 6, 8, 64)
    with pytest.raises(ValueError, match=f"{kernel} cannot look experts up: it reads packed pools"):
        lookup(pool, ids, gates, x, activation="gelu", implementation=kernel)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        lookup(pool, ids, gates, x, activation="gelu", implementation="cuda")


def make_gradient(num_experts, tokens, chosen, width, layers=2, seed=0):
    rng = np.random.default_rng(seed)
    inputs = [
        make_inputs(num_experts, tokens, chosen, width, seed + each) for each in range(layers)
    ]
    ids = jnp.stack([each[0] for each in inputs])
    shapes = [(tokens, chosen), (tokens, chosen), (tokens, width), (tokens, width)]
    floats = [rng.standard_normal((layers, *shape)).astype(np.float32) for shape in shapes]
    floats[0][:, 2], floats[1][:, 2] = 0, 0  # a token that hits nothing
    floats[0][:, :, 3] = 0  # pairs that hit `up` only
    return FactoredGradient(ids, *map(jnp.array, floats))


def after_steps(implementation, pool, gradient, rule, steps=2, bits=None):
    """Pool, state and the statistics of each step."""
    state = UpdateState.zeros_for(pool, bits)
    if state.accumulators is not None:  # those of a run that has been going on
        keys = jax.random.bits(jax.random.key(9), state.accumulators.shape)
        state = state._replace(accumulators=jax.lax.bitcast_convert_type(keys, jnp.int32))
    arguments = {"seed": 3, "accumulator_bits": bits, "implementation": implementation}
    one_step = jax.jit(lambda *args, step: update(*args, rule, step=step, **arguments))
    all_statistics = []
    for step in range(steps):
        pool, state, statistics = one_step(pool, state, gradient, step=step)
        all_statistics.append(statistics)
    return pool, state, all_statistics


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("storage", "width", "num_experts", "tokens", "chosen", "learning_rate"),
    [
        ("int4", 256, 101, 7, 8, 0.02),  # two experts in a row, the last row half full
        slow("int4", 1024, 37, 5, 6, 0.005),
        slow("int4", 64, 1001, 30, 5, 0.02),  # more pairs than a block
        slow("int4", 576, 41, 7, 8, 0.02),
        slow("int4", 256, 101, 7, 8, 0.5),  # scales grow
        slow("int8", 128, 77, 10, 6, 0.02),
        slow("int3", 256, 41, 4, 6, 0.2),
    ],
)
def test_the_update(kernel, storage, width, num_experts, tokens, chosen, learning_rate):
    tokens = few_for_gpus(kernel, tokens)
    pool = make_pool(storage, width, num_experts)
    gradient = make_gradient(num_experts, tokens, chosen, width, seed=width)
    rule = Hyperparameters(learning_rate, weight_decay=0.1)
    expected, expected_state, expected_statistics = after_steps("xla", pool, gradient, rule)
    found, state, statistics = after_steps(kernel, pool, gradient, rule)
    everything = jnp.arange(num_experts)
    for layer in range(2):
        for ours, theirs in (
            (found.weights, expected.weights),
            (state.accumulators, expected_state.accumulators),
        ):
            read = [
                np.asarray(read_codes(words, jnp.int32(layer), everything, width, storage))
                for words in (ours, theirs)
            ]
            # Float sums are rounded in other places, so that a step may straddle a threshold of
            # rounding: seldom, but int8 takes 16 times as many units a step.
            share = 1e-3 if storage == "int8" else 1e-4
            assert np.mean(read[0] != read[1]) <= share
    assert_equal_to_rounding(found.scales, expected.scales, 1e-5)
    assert_equal_to_rounding(state[1:], expected_state[1:], 1e-5)
    assert_equal_to_rounding(statistics, expected_statistics, 1e-4)
    assert (learning_rate > 0.1) == bool(np.sum(statistics[0].grown))
    # Experts that no pair hits are as they were.
    never = np.setdiff1d(np.arange(num_experts), np.asarray(gradient.ids))
    assert len(never)
    now, before = (
        read_codes(each.weights, jnp.int32(0), jnp.array(never), width, storage)
        for each in (found, pool)
    )
    np.testing.assert_array_equal(now, before)
    np.testing.assert_array_equal(found.scales[0][:, never], pool.scales[0][:, never])


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_update_is_bit_equal_where_sums_are_exact(kernel):
    """Random bits, integer stage, carry and rungs: nothing is left that rounding could move."""
    num_experts, width, chosen = 32, 256, 4
    pool = make_pool("int4", width, num_experts)
    rng = np.random.default_rng(0)
    # Of every second expert, few weights are large and all others 0.
    few = jnp.arange(0, num_experts, 2)
    large = 7 * rng.choice([-1, 1], (len(few), 2, width)) * (rng.random(width) < 0.03)
    words = pool.weights
    for layer in range(2):
        words = write_codes(words, jnp.int32(layer), few, jnp.array(large, jnp.int32), "int4")
    pool = dataclasses.replace(pool, weights=words)
    ids = np.stack([rng.permutation(num_experts).reshape(-1, chosen) for _ in range(2)])
    signs = [rng.choice([-1.0, 1.0], (*ids.shape[:2], width)) for _ in range(2)]
    coefficients = [2.0 ** rng.integers(-3, 4, ids.shape) for _ in range(2)]
    coefficients[0][:, 3, 1] = np.inf  # rows that are passed over
    floats = [jnp.array(each, jnp.float32) for each in (*coefficients, *signs)]
    gradient = FactoredGradient(jnp.array(ids, jnp.int32), *floats)
    for learning_rate in (0.02, 0.5):
        rule = Hyperparameters(learning_rate)
        expected = after_steps("xla", pool, gradient, rule, steps=1)
        found = after_steps(kernel, pool, gradient, rule, steps=1)
        np.testing.assert_array_equal(found[0].weights, expected[0].weights)
        np.testing.assert_array_equal(found[1].accumulators, expected[1].accumulators)
        np.testing.assert_array_equal(found[0].scales, expected[0].scales)
        np.testing.assert_array_equal(found[1].moments, expected[1].moments)
        passed_over = ids[:, 3, 1]
        for layer, expert in enumerate(passed_over):
            assert found[1].moments[layer, 0, expert] == 0
            assert found[0].scales[layer, 0, expert] == pool.scales[layer, 0, expert]
        before, after = (each.scales[:, :, few] for each in (pool, found[0]))
        assert np.all(after >= before)  # by their RMS they would go down
        assert np.any(after > before)
        assert all(np.all(np.isfinite(each)) for each in found[2][0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("width", "tokens", "chosen"), [(256, 64, 128), (1024, 1, 64)])
def test_kernels_lower_for_their_platform_on_any(monkeypatch, kernel, width, tokens, chosen):
    """On every version of JAX that is supported; `tests/accelerators` compiles as well."""
    monkeypatch.setattr(platforms, "can_compile_for", lambda platform: True)
    num_experts = 1 << 14
    stack = jax.eval_shape(lambda: make_pool("int4", width, num_experts))
    pool = dataclasses.replace(stack, layer=jnp.int32(1))
    ids, gates, x, bias = jax.eval_shape(
        lambda: make_inputs(num_experts, tokens, chosen, width, dtype=jnp.bfloat16)
    )
    gradient = jax.eval_shape(lambda: make_gradient(num_experts, 16, chosen, width))
    state = jax.eval_shape(lambda: UpdateState.zeros_for(stack))

    def one_update(pool, state, gradient):
        rule = Hyperparameters(0.02)
        return update(pool, state, gradient, rule, seed=0, step=1)

    def differentiate(pool, *inputs):
        return value_and_gradients(None, pool, *inputs)

    for program, arguments in (
        (differentiate, (pool, ids, gates, x, bias)),
        (one_update, (stack, state, gradient)),
    ):
        lowered = jax.jit(program).trace(*arguments).lower(lowering_platforms=(PLATFORMS[kernel],))
        assert CALLS[kernel] in lowered.as_text()
