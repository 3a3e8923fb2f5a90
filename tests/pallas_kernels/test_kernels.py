"""Every kernel against XLA, on the same inputs. `tests/accelerators` compiles them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_lookup import lookup
from pallas_kernels.factored_gradient import Tap
from peerjax.pool import initialize_pool

KERNELS = ["mosaic_tpu"]
IMPLEMENTATIONS = ["xla", *KERNELS]


def make_pool(storage, width, num_experts, layers=2, seed=0):
    options = {"heads": 1, "experts_per_head": 4, "residual_scale": 0.2, "storage": storage}
    return initialize_pool(jax.random.key(seed), layers, num_experts, width, **options)


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
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    return jnp.array(ids, jnp.int32), jnp.array(gates), jnp.array(x, dtype), jnp.array(bias)


def value_and_gradients(implementation, pool, ids, gates, x, bias, activation="gelu"):
    def loss(gates, x, bias, tap):
        y = lookup(
            pool, ids, gates, x,
            activation=activation, hidden_bias=bias, tap=tap, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    tap = Tap.zeros_for(ids, x)
    gradients, y = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(gates, x, bias, tap)
    return y, gradients


def assert_equal_to_rounding(found, expected, tolerance=5e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(each, np.float64) for each in (a, b))
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("storage", "width", "num_experts", "tokens", "chosen", "activation"),
    [
        ("int4", 256, 100, 13, 8, "gelu"),  # two experts in a unit
        ("int4", 1024, 37, 5, 16, "gelu"),  # an expert in two units
        ("int4", 64, 1001, 33, 5, "relu"),  # eight experts in a unit; K pads
        ("int4", 576, 41, 7, 8, "relu2"),  # eight experts in nine units
        ("int4", 512, 300, 3, 200, "gelu"),  # more experts a token than one product takes
        ("int4", 256, 64, 1, 64, "gelu"),  # decoding
        ("int8", 128, 77, 70, 4, "gelu"),
        ("int8", 1024, 19, 9, 24, "relu"),
    ],
)
def test_the_lookup_and_its_gradients(
    kernel, storage, width, num_experts, tokens, chosen, activation
):
    pool = make_pool(storage, width, num_experts).at_layer(jnp.int32(1))
    inputs = make_inputs(num_experts, tokens, chosen, width, seed=width + tokens)
    expected = value_and_gradients("xla", pool, *inputs, activation)
    found = value_and_gradients(kernel, pool, *inputs, activation)
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
    gates = gates.at[0].set(jnp.nan)
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
