import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.routing.token_choice import balance_loss, block_size, gates_of, sorted_slots


@pytest.mark.parametrize(("tokens", "k", "num_experts", "block"), [(4, 1, 3, 2), (2, 2, 3, 3)])
def test_every_choice_there_is_gets_slots_of_its_expert(tokens, k, num_experts, block):
    pairs = tokens * k
    choices = itertools.product(itertools.permutations(range(num_experts), k), repeat=tokens)
    ids = jnp.asarray(list(choices), jnp.int32)
    found = jax.jit(jax.vmap(lambda each: sorted_slots(each, num_experts, block)))(ids)
    for each, of_pair, pair, expert in zip(ids, *map(np.asarray, found), strict=True):
        np.testing.assert_array_equal(pair[of_pair.reshape(-1)], np.arange(pairs))
        assert np.sum(pair == pairs) == len(pair) - pairs
        np.testing.assert_array_equal(expert[of_pair // block], each)
        assert np.all(np.diff(expert) >= 0)


def test_padding_stays_near_an_eighth_of_the_work():
    for pairs, num_experts in itertools.product((64, 1000, 4096, 65_536), (2, 8, 64)):
        block = block_size(pairs, num_experts)
        if block > 8:
            assert num_experts * (block - 1) / 2 <= pairs / 8
    assert block_size(1, 1000) == 8
    assert block_size(10**6, 2) == 128


def test_gates_are_the_chosen_probabilities_over_their_sum():
    logits = jax.random.normal(jax.random.key(0), (7, 5))
    probabilities = np.asarray(jax.nn.softmax(logits))
    for k in (2, 3):
        _, ids = jax.lax.top_k(logits, k)
        expected = np.take_along_axis(probabilities, np.asarray(ids), 1)
        expected /= expected.sum(1, keepdims=True)
        np.testing.assert_allclose(gates_of(logits, ids), expected, rtol=1e-5)
    # One expert a token: the probability itself, or the router would learn nothing.
    best = jnp.argmax(logits, axis=1)[:, None]
    np.testing.assert_allclose(gates_of(logits, best)[:, 0], probabilities.max(1), rtol=1e-5)
    assert np.all(jax.jit(jax.grad(lambda each: gates_of(each, best).sum()))(logits) != 0)


def test_the_balance_loss_by_hand_and_its_extremes():
    probabilities = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    ids = jnp.array([[0, 1], [1, 2]])
    # f = (1, 2, 1) / 4 and P = (0.3, 0.45, 0.25).
    expected = 3 * (0.25 * 0.3 + 0.5 * 0.45 + 0.25 * 0.25)
    assert float(balance_loss(jnp.log(probabilities), ids)) == pytest.approx(expected, rel=1e-6)
    even = jnp.arange(6).reshape(6, 1) % 3
    assert float(balance_loss(jnp.zeros((6, 3)), even)) == pytest.approx(1)
    one = jnp.tile(jnp.array([30.0, 0, 0]), (6, 1))
    assert float(balance_loss(one, jnp.zeros((6, 1), jnp.int32))) == pytest.approx(3)


def test_descending_the_balance_loss_takes_probability_from_busy_experts():
    logits, ids = jnp.zeros((4, 3)), jnp.array([[0], [0], [0], [1]])
    gradient = np.asarray(jax.jit(jax.grad(balance_loss))(logits, ids)).sum(0)
    assert gradient[0] > 0 > gradient[1] > gradient[2]
