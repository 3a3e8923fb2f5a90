import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import ACTIVATIONS
from pallas_kernels.expert_lookup import lookup
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from pallas_kernels.storage import ExpertPool
from tests.conftest import compile_as_users_do

N, D, T, K = 40, 24, 37, 6


@pytest.fixture
def problem():
    """Random experts and tokens, with ids that repeat within a token and across tokens."""
    keys = jax.random.split(jax.random.key(7), 4)
    weights = jax.random.normal(keys[0], (N, 2, D)) / D**0.5
    ids = jax.random.randint(keys[1], (T, K), 0, N).at[:, 1].set(3).at[5].set(N - 1)
    gates = jax.random.uniform(keys[2], (T, K))
    return weights, ids, gates, jax.random.normal(keys[3], (T, D))


def naive(weights, ids, gates, x, activation="gelu"):
    """Every expert on every token, then a weighted sum: no gather at all."""
    hidden_TN = ACTIVATIONS[activation](x @ weights[:, 0].T)
    mixing_TN = jnp.sum(jax.nn.one_hot(ids, weights.shape[0]) * gates[:, :, None], axis=1)
    return (mixing_TN * hidden_TN) @ weights[:, 1]


def assert_close(actual, expected, bound=1e-5):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error, scale = np.max(np.abs(one - other)), np.max(np.abs(other))
        assert scale > 0
        assert error <= bound * scale


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_sum_over_all_experts(problem, activation):
    weights, ids, gates, x = problem
    y = lookup(ExpertPool.of_floats(weights), ids, gates, x, activation=activation)
    assert_close(y, naive(weights, ids, gates, x, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gradient_equals_that_of_the_sum(problem, activation):
    weights, ids, gates, x = problem

    def loss(function):
        return lambda *args: jnp.sum(jnp.sin(3 * function(*args)))

    def ours(weights, gates, x):
        return lookup(ExpertPool.of_floats(weights), ids, gates, x, activation=activation)

    def oracle(weights, gates, x):
        return naive(weights, ids, gates, x, activation)

    actual = jax.jit(jax.grad(loss(ours), (0, 1, 2)))(weights, gates, x)
    assert_close(actual, jax.jit(jax.grad(loss(oracle), (0, 1, 2)))(weights, gates, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_hidden_bias_is_added_before_the_activation_and_has_a_gradient(problem, activation):
    weights, ids, gates, x = problem
    bias = jax.random.normal(jax.random.key(3), ids.shape)

    def ours(weights, gates, x, bias):
        pool = ExpertPool.of_floats(weights)
        y = lookup(pool, ids, gates, x, activation=activation, hidden_bias=bias)
        return jnp.sum(jnp.sin(y))

    def oracle(weights, gates, x, bias):
        hidden = jnp.einsum("tkd,td->tk", weights[ids, 0], x) + bias
        mixing = gates * ACTIVATIONS[activation](hidden)
        return jnp.sum(jnp.sin(jnp.einsum("tk,tkd->td", mixing, weights[ids, 1])))

    arguments = (weights, gates, x, bias)
    np.testing.assert_allclose(ours(*arguments), oracle(*arguments), rtol=1e-5)
    actual = jax.jit(jax.grad(ours, (0, 1, 2, 3)))(*arguments)
    assert_close(actual, jax.jit(jax.grad(oracle, (0, 1, 2, 3)))(*arguments))
    pool = ExpertPool.of_floats(weights)
    nobody = lookup(pool, jnp.full_like(ids, N), gates, x, activation=activation, hidden_bias=bias)
    assert not np.any(nobody)


def stack_loss(pool, taps, ids, gates, x, remat):
    """Three layers under `lax.scan`, each reading its own layer of a stack; ids as output."""

    def body(x, layer_input):
        layer, ids, gates, tap = layer_input
        y = lookup(pool.at_layer(layer), ids, gates, x, activation="gelu", tap=tap)
        return x + y, ids

    body = jax.checkpoint(body) if remat else body
    x, kept = jax.lax.scan(body, x, (jnp.arange(3), ids, gates, taps))
    return jnp.sum(jnp.sin(x)), kept


@pytest.mark.parametrize("remat", [False, True])
def test_tap_gives_the_dense_gradient_under_scan(remat):
    keys = jax.random.split(jax.random.key(11), 4)
    weights = jax.random.normal(keys[0], (3, N, 2, D)) / D**0.5
    ids = jax.random.randint(keys[1], (3, T, K), 0, N)
    gates = jax.random.uniform(keys[2], (3, T, K))
    x = jax.random.normal(keys[3], (T, D))
    taps = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), Tap.zeros_for(ids[0], x))

    def unrolled(weights):
        y = x
        for layer in range(3):
            y = y + naive(weights[layer], ids[layer], gates[layer], y)
        return jnp.sum(jnp.sin(y))

    def by_tap(taps):
        return stack_loss(ExpertPool.of_floats(weights), taps, ids, gates, x, remat)

    def by_pool(weights):
        return stack_loss(ExpertPool.of_floats(weights), taps, ids, gates, x, remat)[0]

    tap_gradient, kept_ids = jax.jit(jax.grad(by_tap, has_aux=True))(taps)
    factored = FactoredGradient.from_tap(kept_ids, tap_gradient)
    expected = jax.jit(jax.grad(unrolled))(weights)
    assert_close(factored.dense(N), expected)
    assert_close(jax.jit(jax.grad(by_pool))(weights), expected)


@pytest.mark.parametrize("outside", [N, N + 5, -1, -N, 2**31 - 1])
def test_ids_outside_the_pool_do_nothing(problem, outside):
    weights, ids, gates, x = problem
    masked = ids.at[:, 2].set(outside)

    def loss(weights, gates, x, ids):
        return jnp.sum(
            jnp.sin(lookup(ExpertPool.of_floats(weights), ids, gates, x, activation="gelu"))
        )

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(weights, gates, x, masked)
    without = jnp.delete(ids, 2, axis=1), jnp.delete(gates, 2, axis=1)
    expected, expected_gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(
        weights, without[1], x, without[0]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_close(gradients[0], expected_gradients[0])
    assert_close(gradients[2], expected_gradients[2])
    np.testing.assert_array_equal(gradients[1][:, 2], 0)


def test_bfloat16_inputs_are_accumulated_in_float32(problem):
    weights, ids, gates, x = problem
    y = lookup(ExpertPool.of_floats(weights), ids, gates, x.astype(jnp.bfloat16), activation="gelu")
    assert y.dtype == jnp.bfloat16
    expected = naive(weights, ids, gates, x.astype(jnp.bfloat16).astype(jnp.float32))
    # One rounding to bfloat16, at the end: half a unit in the eighth bit.
    np.testing.assert_array_less(np.abs(y - expected), 2**-8 * np.abs(expected) + 1e-6)


def temp_bytes(function, *args):
    return compile_as_users_do(jax.jit(function).lower(*args)).memory_analysis().temp_size_in_bytes


def test_nothing_of_size_tokens_times_experts_times_width():
    tokens, chosen, width, experts = 512, 64, 128, 1 << 14
    weights = jnp.zeros((experts, 2, width))
    ids = jnp.zeros((tokens, chosen), jnp.int32)
    gates, x = jnp.zeros((tokens, chosen)), jnp.zeros((tokens, width))
    materialised = tokens * chosen * width * 4

    def forward(weights, gates, x):
        return lookup(ExpertPool.of_floats(weights), ids, gates, x, activation="gelu")

    def backward(weights, gates, x, tap):
        def loss(gates, x, tap):
            return jnp.sum(
                lookup(ExpertPool.of_floats(weights), ids, gates, x, activation="gelu", tap=tap)
                ** 2
            )

        return jax.jit(jax.grad(loss, (0, 1, 2)))(gates, x, tap)

    def gathered(weights, gates, x):
        rows = weights[ids]
        hidden = jnp.einsum("tkd,td->tk", rows[:, :, 0], x)
        return jnp.einsum("tk,tkd->td", gates * hidden, rows[:, :, 1])

    tap = Tap.zeros_for(ids, x)
    assert temp_bytes(forward, weights, gates, x) < 0.1 * materialised
    # Backward, what is kept is the size of the tap; the pool's own gradient is dead code.
    assert temp_bytes(backward, weights, gates, x, tap) < 0.2 * materialised
    assert temp_bytes(gathered, weights, gates, x) > materialised  # the check can fail


def test_wrong_shapes_are_refused(problem):
    weights, ids, gates, x = problem
    with pytest.raises(ValueError, match="width 24 but the experts have width 12"):
        lookup(ExpertPool.of_floats(weights[:, :, :12]), ids, gates, x, activation="gelu")
    with pytest.raises(ValueError, match="choose a layer"):
        lookup(ExpertPool.of_floats(weights[None]), ids, gates, x, activation="gelu")
    with pytest.raises(ValueError, match="unknown activation 'swish'; choose one of gelu"):
        lookup(ExpertPool.of_floats(weights), ids, gates, x, activation="swish")
