import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.layers.decompositions import horizontal, vertical
from peerjax.layers.dense import DenseConfig
from peerjax.layers.monet import MonetHDConfig, MonetVDConfig, Routed
from peerjax.layers.spec import Context, Sizes
from peerjax.routing.choice import FactoredChoice
from peerjax.routing.monet import MonetRouter, gates
from tests.conftest import compile_as_users_do

D, KEYS, WIDTH, HEADS, TOKENS = 10, 4, 6, 3, 7
DECOMPOSITIONS = {"horizontal": (MonetHDConfig, horizontal), "vertical": (MonetVDConfig, vertical)}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model of the paper's Table 6; vocabulary 32,000, embeddings untied, 512^2 experts."""

    total: int
    layers: int
    width: int
    expert_width: int
    routing_heads: int


PAPER = {
    "850M": Size(853_501_440, 24, 1536, 12, 6),
    "1.4B": Size(1_465_157_632, 24, 2048, 16, 8),
    "4.1B": Size(4_173_401_088, 32, 3072, 24, 12),
}
VOCABULARY, EXPERTS, LAYERS_PER_ROUTER = 32_000, 512**2, 4


class Experts:
    """The experts of a layer, with gates that a test gives."""

    def __init__(self, decomposition, width, *fields, **sizes):
        config = DECOMPOSITIONS[decomposition][0](*fields)
        config.check(width)
        self.module = config.module(Sizes(width, **sizes))

    def init(self, key, x, g1, g2):
        return self.module.init(key, x, Context(), Routed(FactoredChoice(g1, g2)))

    def apply(self, variables, x, g1, g2, removed=None):
        routed = Routed(FactoredChoice(g1, g2), removed)
        return self.module.apply(variables, x, Context(), routed)[0]


def make(decomposition, dtype="float32", expert_width=WIDTH, num_experts=KEYS**2):
    layer = Experts(decomposition, D, num_experts, expert_width, HEADS, 2, dtype=dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, TOKENS, D))
    z1, z2 = jax.random.normal(keys[1], (2, 1, TOKENS, HEADS, KEYS))
    params = layer.init(keys[2], x, jax.nn.softmax(z1), jax.nn.softmax(z2))["params"]
    # Biases are drawn too: fresh ones are 0.
    drawn = {
        name: 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(params.items())
    }
    return layer, drawn, x, z1, z2


def expert_of(params, i, j, m):
    """Matrices and biases of one expert: down [m, D], up [D, m], hidden and output biases."""
    if "u" in params:
        rows, other = slice(i * m, (i + 1) * m), slice(j * m, (j + 1) * m)
        return params["u"][rows], params["v"][:, other], params["c"][rows], params["b"][j]
    first, second = (slice(k * m // 2, (k + 1) * m // 2) for k in (i, j))
    return (
        jnp.concatenate([params["u1"][first], params["u2"][second]]),
        jnp.block(
            [
                [params["v11"][:, first], params["v12"][:, first]],
                [params["v21"][:, second], params["v22"][:, second]],
            ]
        ),
        jnp.concatenate([params["c1"][first], params["c2"][second]]),
        jnp.concatenate([params["b1"][i], params["b2"][j]]),
    )


def naive(params, x, g1, g2, m=WIDTH, removed=None):
    """The sum over heads and all N experts that are left, each applied by itself."""
    experts = [expert_of(params, i, j, m) for i in range(KEYS) for j in range(KEYS)]
    down, up, c, b = map(jnp.stack, zip(*experts, strict=True))
    hidden = jnp.square(jnp.maximum(jnp.einsum("...d,nmd->...nm", x, down) + c, 0))
    y = jnp.einsum("...nm,ndm->...nd", hidden, up) + b
    gate = (g1[..., :, None] * g2[..., None, :]).reshape(*g1.shape[:-1], KEYS**2)
    if removed is not None:
        gate = gate * ~removed
    return jnp.einsum("...hn,...nd->...d", gate, y)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_outputs_and_every_gradient_equal_the_sum_over_all_experts(decomposition):
    layer, params, x, z1, z2 = make(decomposition)
    cotangent = jax.random.normal(jax.random.key(9), x.shape)

    def loss(apply, params, x, z1, z2):
        y = apply(params, x, gates(z1, z1, 2), gates(z2, z2, 2))
        return jnp.sum(cotangent * y), y

    def differentiate(apply):
        function = jax.value_and_grad(lambda *args: loss(apply, *args), (0, 1, 2, 3), has_aux=True)
        return jax.jit(function)(params, x, z1, z2)

    (_, y), gradients = differentiate(lambda params, *args: layer.apply({"params": params}, *args))
    (_, expected_y), expected = differentiate(naive)
    found, wanted = jax.tree.leaves((y, gradients)), jax.tree.leaves((expected_y, expected))
    assert len(found) == 4 + len(params)
    for one, other in zip(found, wanted, strict=True):
        assert np.max(np.abs(one - other)) <= 1e-5 * np.max(np.abs(other))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_the_plain_function_is_what_the_module_computes(decomposition):
    layer, params, x, z1, z2 = make(decomposition)
    g1, g2 = jax.nn.softmax(z1), jax.nn.softmax(z2)
    function = DECOMPOSITIONS[decomposition][1]
    found = function(x[0], g1[0], g2[0], **params)
    np.testing.assert_allclose(layer.apply({"params": params}, x, g1, g2)[0], found, atol=1e-5)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_removed_experts_add_neither_their_neurons_nor_their_biases(decomposition):
    layer, params, x, z1, z2 = make(decomposition)
    g1, g2 = jax.nn.softmax(z1), jax.nn.softmax(z2)
    some = jax.random.bernoulli(jax.random.key(7), 0.4, (KEYS**2,))
    assert np.any(some.reshape(KEYS, KEYS) != some.reshape(KEYS, KEYS).T)
    for removed in (some, jnp.zeros_like(some)):
        found = layer.apply({"params": params}, x, g1, g2, removed)
        expected = naive(params, x, g1, g2, removed=removed)
        assert np.max(np.abs(found - expected)) <= 1e-5 * np.max(np.abs(expected))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_bfloat16_computes_in_bfloat16_with_float32_parameters(decomposition):
    layer, params, x, z1, z2 = make(decomposition, "bfloat16")
    g1, g2 = jax.nn.softmax(z1), jax.nn.softmax(z2)
    fresh = layer.init(jax.random.key(0), x, g1, g2)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    y = layer.apply({"params": params}, x.astype(jnp.bfloat16), g1, g2)
    assert y.dtype == jnp.bfloat16
    expected = naive(params, x, g1, g2)
    assert np.max(np.abs(y.astype(jnp.float32) - expected)) <= 0.03 * np.max(np.abs(expected))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_nothing_of_the_size_of_all_experts_exists_and_operations_are_as_stated(decomposition):
    tokens, n, m, heads, width = 64, 128, 4, 2, 32
    layer = Experts(decomposition, width, n * n, m, heads, 8)
    x = jnp.zeros((1, tokens, width))
    g = jnp.zeros((1, tokens, heads, n))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, g, g)

    def loss(variables, x, g1, g2):
        return jnp.sum(layer.apply(variables, x, g1, g2) ** 2)

    backward = compile_as_users_do(jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(variables, x, g, g))
    temporary = backward.memory_analysis().temp_size_in_bytes
    hidden = 4 * tokens * n * m
    assert temporary < 4 * tokens * n * n / 4
    assert temporary < 12 * hidden

    forward = compile_as_users_do(jax.jit(layer.apply).lower(variables, x, g, g))
    matrices = 4 * width * n * m + 4 * heads * n * m + 2 * n * width
    operations = forward.cost_analysis()["flops"] / tokens
    # Activations, sums over heads and such are on top: a few operations a hidden neuron.
    assert matrices <= operations <= matrices + 8 * n * m + 4 * heads * n, operations / matrices


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize(
    ("keys", "heads", "top_k", "expert_width"),
    [(64, 4, 4, 8), (16, 8, 4, 12), (32, 1, 2, 4), (8, 2, 8, 16), (128, 6, 8, 2)],
)
def test_fresh_output_has_the_scale_of_a_dense_mlp(decomposition, keys, heads, top_k, expert_width):
    width = 128
    x = jax.random.normal(jax.random.key(0), (4, 64, width))
    sizes = Sizes(width, residual_scale=0.5)
    mlp = DenseConfig(4 * width, "relu2").module(sizes)
    dense = mlp.apply(mlp.init(jax.random.key(1), x, Context()), x, Context())[0]
    router = MonetRouter(keys**2, heads, top_k)
    g1, g2 = router.apply(router.init(jax.random.key(2), x), x)
    layer = Experts(decomposition, width, keys**2, expert_width, heads, top_k, residual_scale=0.5)
    y = layer.apply(layer.init(jax.random.key(3), x, g1, g2), x, g1, g2)
    ratio = float(jnp.std(y) / jnp.std(dense))
    assert 0.8 < ratio < 1.25, ratio


def test_vertical_halves_must_be_whole():
    message = "monet.expert_width=3 and model.width=10 must be even"
    with pytest.raises(ValueError, match=message):
        make("vertical", expert_width=3)
    with pytest.raises(ValueError, match="24 experts are not a square"):
        make("horizontal", num_experts=24)


def count(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_of_the_paper(name, decomposition):
    size = PAPER[name]
    x = jnp.zeros((1, 1, size.width))
    gate = jnp.zeros((1, 1, size.routing_heads, 512))
    fields = (EXPERTS, size.expert_width, size.routing_heads, 32)
    layer = Experts(decomposition, size.width, *fields, dtype="bfloat16")
    router = MonetRouter(EXPERTS, size.routing_heads, 32)
    attention, norms = 4 * size.width**2, 2 * size.width
    block = count(layer, x, gate, gate) + attention + norms
    total = size.layers * block + 2 * VOCABULARY * size.width + size.width
    total += size.layers // LAYERS_PER_ROUTER * count(router, x)
    assert total == size.total
