"""Choices of experts against sums over all experts, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.layers.look_up import LookUp
from peerjax.layers.spec import Context
from peerjax.pool import initialize_pool
from peerjax.routing.choice import Choice
from peerjax.routing.gates import Gate
from peerjax.routing.product_keys import product_key_choice, spread_ids

TOKENS, K, N, WIDTH = 5, 4, 12, 16


def make(seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(N, K, replace=False) for _ in range(TOKENS)])
    gates = rng.uniform(0.1, 1, (TOKENS, K)).astype(np.float32)
    return Choice(jnp.asarray(ids), jnp.asarray(gates), N)


def pairs_of(choice):
    """For each token, the gate of each expert that it has."""
    return [
        {int(i): float(g) for i, g in zip(ids, gates, strict=True) if i < choice.num_experts}
        for ids, gates in zip(np.asarray(choice.ids), np.asarray(choice.gates), strict=True)
    ]


def best(pairs, count):
    """The pairs with the largest gates."""
    return dict(sorted(pairs.items(), key=lambda pair: -pair[1])[:count])


def test_a_budget_keeps_the_experts_of_each_token_with_the_largest_gates():
    choice, budget = make(), [0, 1, 2, 4, 9]
    found = pairs_of(choice.limited(jnp.array(budget)))
    for own, whole, count in zip(found, pairs_of(choice), budget, strict=True):
        assert own == best(whole, count)


def test_a_budget_keeps_experts_with_gates_below_0_rather_than_none():
    choice = Choice(jnp.array([[N, 2, 5]]), jnp.array([[0.0, -0.5, -0.1]]), N)
    assert pairs_of(choice.limited(jnp.array([1])))[0].keys() == {5}


def test_removed_experts_are_left_out_and_the_others_keep_their_gates():
    choice, removed = make(), np.random.default_rng(1).random(N) < 0.5
    limited = choice.limited(jnp.full(TOKENS, 3))  # with the sentinel among the ids
    found = pairs_of(limited.without(jnp.asarray(removed)))
    for own, whole in zip(found, pairs_of(limited), strict=True):
        assert own == {i: gate for i, gate in whole.items() if not removed[i]}


def test_experts_of_metaexperts_have_numbers_of_their_own_and_no_expert_stays_none():
    choice, metaexpert = make().limited(jnp.array([4, 3, 2, 1, 0])), np.array([2, 0, 1, 2, 1])
    moved = choice.moved(jnp.asarray(metaexpert), total=3 * N)
    assert moved.num_experts == 3 * N
    for own, whole, m in zip(pairs_of(moved), pairs_of(choice), metaexpert, strict=True):
        assert own == {m * N + i: gate for i, gate in whole.items()}


def test_gate_sums_are_those_of_a_loop():
    choices = [make(0).limited(jnp.array([4, 3, 2, 1, 0])), make(1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *choices)
    weight = np.array([1.0, 0.0, 1.0, 1.0, 0.0], np.float32)
    expected = np.zeros((2, N))
    for layer, choice in enumerate(choices):
        for token, own in enumerate(pairs_of(choice)):
            for expert, gate in own.items():
                expected[layer, expert] += weight[token] * gate
    np.testing.assert_allclose(stacked.gate_sums(jnp.asarray(weight)), expected, rtol=1e-6)


def test_an_expert_that_a_gate_turns_off_is_no_expert():
    scores1, scores2 = jax.random.normal(jax.random.key(0), (2, 2, TOKENS, 6))
    gate = Gate(weigh=lambda scores: scores, is_kept=lambda scores: scores > 1.5)
    choice = product_key_choice(scores1, scores2, 4, gate)
    for token, own in enumerate(pairs_of(choice)):
        sums = [(s1[token][:, None] + s2[token]).ravel() for s1, s2 in zip(scores1, scores2)]  # noqa: B905
        expected = [
            (int(i), float(each[i])) for each in sums for i in jnp.argsort(-each)[:4]
            if each[i] > 1.5
        ]  # fmt: skip
        assert own.keys() == {i for i, _ in expected}
    off = np.asarray(choice.ids) == 36
    assert off.any()
    assert not np.asarray(choice.gates)[off].any()
    softmax = gate._replace(weigh=jax.nn.softmax)
    gradient = jax.grad(lambda s: jnp.sum(product_key_choice(s, scores2, 4, softmax).gates ** 2))
    assert np.all(np.isfinite(gradient(scores1)))


def test_a_budget_and_removal_act_on_what_is_looked_up():
    pool = initialize_pool(jax.random.key(0), 1, N, WIDTH).at_layer(jnp.int32(0))
    context = Context(pools={"pool": pool}, layer=jnp.int32(0))
    x = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))
    choice, removed = make(), np.arange(N) % 3 == 0
    budget = jnp.array([[4, 3, 2, 1, 0]])
    variables = {"removed": {"experts": jnp.asarray(removed)}}
    layer = LookUp("relu", name="pool")
    found, kept = layer.apply(
        variables, x, choice, context._replace(budget=budget), mutable=["routing"]
    )
    weights = np.asarray(pool.weights[0])
    expected = np.zeros((TOKENS, WIDTH))
    for token, own in enumerate(pairs_of(choice)):
        for expert, gate in best(own, int(budget[0, token])).items():
            if not removed[expert]:
                down, up = weights[expert]
                expected[token] += gate * max(float(down @ np.asarray(x)[token]), 0) * up
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (kept["routing"]["choice"].ids == N).sum() > 10
    # In a pool with room for more experts, "no expert" is still none.
    roomy = initialize_pool(jax.random.key(0), 1, N, WIDTH, places=N + 5).at_layer(jnp.int32(0))
    again = layer.apply(
        variables, x, choice, context._replace(pools={"pool": roomy}, budget=budget)
    )
    np.testing.assert_array_equal(again, found)
    other = {"pool": initialize_pool(jax.random.key(0), 1, 11, WIDTH)}
    with pytest.raises(ValueError, match="among 12 experts, but the pool 'pool' has 11"):
        layer.apply({}, x, choice, context._replace(pools=other))


@pytest.mark.parametrize(("n1", "n2", "spread"), [(8, 8, 4), (6, 8, 8), (5, 12, 3), (4, 4, 1)])
def test_a_range_of_spread_numbers_has_equally_many_experts_of_each_sub_key(n1, n2, spread):
    ids = jnp.arange(n1 * n2 + 1)
    found = spread_ids(ids, (n1, n2), spread)
    expected = [
        (i + j) % spread * (n1 * n2 // spread) + i * (n2 // spread) + j // spread
        for i in range(n1)
        for j in range(n2)
    ]
    assert found.tolist() == [*expected, n1 * n2]
    assert sorted(expected) == list(range(n1 * n2))
    firsts, seconds = np.divmod(np.argsort(expected), n2)
    size = n1 * n2 // spread
    for part in range(spread):
        own = slice(part * size, (part + 1) * size)
        assert set(np.bincount(firsts[own], minlength=n1)) == {n2 // spread}
        if n1 % spread == 0:
            assert set(np.bincount(seconds[own], minlength=n2)) == {n1 // spread}
