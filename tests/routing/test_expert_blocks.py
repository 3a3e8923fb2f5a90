"""A mixture against the sum over all experts, by each implementation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import IMPLEMENTATIONS
from peerjax.routing.expert_blocks import expert_dot, mixture
from peerjax.routing.token_choice import block_size
from tests.conftest import compile_as_users_do

WIDTH, HIDDEN = 12, 20
# Tokens, experts, choices: blocks of 8 and of 64 slots.
SHAPES = [(1, 4, 2), (33, 5, 2), (300, 2, 1)]


def naive(x, ids, gates, down, up):
    """Every expert for every token."""
    weights = jnp.sum(jax.nn.one_hot(ids, len(down)) * gates[..., None], axis=1)
    hidden = jax.nn.gelu(jnp.einsum("td,edf->tef", x, down), approximate=False)
    return jnp.einsum("te,tef,efd->td", weights, hidden, up)


@functools.cache
def results_by(implementation):
    """Output and gradients, of a mixture or (for "naive") of its oracle."""
    function = naive
    if implementation != "naive":
        function = functools.partial(mixture, activation="gelu", implementation=implementation)

    def loss(x, gates, down, up, ids, cotangent):
        y = function(x, ids, gates, down, up)
        return jnp.sum(y * cotangent), y

    return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))


@settings(max_examples=10, deadline=None)
@given(st.data(), st.sampled_from(SHAPES), st.integers(0, 2**31 - 1))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mixture_is_the_sum_over_all_experts(implementation, data, shape, seed):
    tokens, num_experts, k = shape
    # Some experts get no token; with as few as k, all tokens go to the same.
    popular = data.draw(st.permutations(range(num_experts)))[
        : data.draw(st.integers(k, num_experts))
    ]
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(popular)[:k] for _ in range(tokens)]).astype(np.int32)
    sizes = [(tokens, WIDTH), (tokens, k), (num_experts, WIDTH, HIDDEN)]
    sizes += [(num_experts, HIDDEN, WIDTH), (tokens, WIDTH)]
    x, gates, down, up, cotangent = (rng.standard_normal(size, np.float32) for size in sizes)
    found = results_by(implementation)(x, gates, down, up, ids, cotangent)
    expected = results_by("naive")(x, gates, down, up, ids, cotangent)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("block", "inputs", "outputs"), [(8, 33, 24), (128, 128, 512)])
def test_a_row_is_the_same_bit_for_bit_wherever_in_its_blocks_it_lies(
    dtype, block, inputs, outputs
):
    """Or a token that comes later, by moving another's slot, would change its logits."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (3 * block, inputs), dtype)
    weights = jax.random.normal(keys[1], (2, inputs, outputs), dtype)
    expert = jnp.ones(3, jnp.int32)
    multiply = jax.jit(functools.partial(expert_dot, "xla"))

    def product(rows):
        return multiply(rows.reshape(3, block, -1), weights, expert).reshape(len(rows), -1)

    moved = jax.random.permutation(keys[2], len(rows))
    np.testing.assert_array_equal(product(rows)[moved], product(rows[moved]))


@pytest.mark.parametrize("num_experts", [4, 32])
def test_the_compiled_work_grows_with_padding_only_not_with_experts(num_experts):
    tokens, k, width, hidden = 256, 2, 32, 48
    pairs, block = tokens * k, block_size(tokens * k, num_experts)

    def loss(x, gates, down, up, ids):
        return jnp.sum(mixture(x, ids, gates, down, up, activation="gelu") ** 2)

    sizes = [(tokens, width), (tokens, k), (num_experts, width, hidden)]
    sizes += [(num_experts, hidden, width)]
    operands = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    ids = jax.ShapeDtypeStruct((tokens, k), jnp.int32)
    program = compile_as_users_do(
        jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*operands, ids)
    ).as_text()

    # Loops over blocks: two products forward, four backward, each of one block by one expert.
    trips = [int(count) for count in re.findall(r'known_trip_count":\{"n":"(\d+)"', program)]
    loops = [count for count in trips if count > 8]  # the others search the block of an expert
    assert len(loops) == 6
    assert all(count * block <= pairs + num_experts * block for count in loops)
    products = re.findall(r"f32\[([\d,]+)\]\S* dot\(", program)
    products = [np.prod([int(size) for size in shape.split(",")]) for shape in products]
    assert len(products) >= 6
    assert max(products) <= max(block * hidden, width * hidden, tokens * width)
    # What every expert for every token would take is nowhere.
    arrays = re.findall(r"f32\[([\d,]+)\]", program)
    largest = max(np.prod([int(size) for size in shape.split(",")]) for shape in arrays)
    assert largest <= max((pairs + num_experts * block) * hidden, num_experts * width * hidden)
    assert num_experts < 8 or largest < num_experts * tokens * width
