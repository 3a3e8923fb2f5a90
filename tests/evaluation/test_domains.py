import numpy as np

from peerjax.evaluation.domains import domain_experts, mutual_information, random_experts


def test_an_expert_belongs_to_the_domain_that_uses_it_twice_as_often_as_any_other():
    routing = {
        "speeches": np.array([0.4, 0.2, 0.3, 0.0, 0.1]),
        "code": np.array([0.1, 0.4, 0.2, 0.0, 0.3]),
        "drama": np.array([0.2, 0.1, 0.1, 0.0, 0.6]),
    }
    found = domain_experts(routing)
    assert found["speeches"].tolist() == [True, False, False, False, False]
    assert found["code"].tolist() == [False, True, False, False, False]
    assert found["drama"].tolist() == [False, False, False, False, True]
    assert domain_experts(routing, factor=1.4)["speeches"].tolist() == [1, 0, 1, 0, 0]


def test_random_experts_are_drawn_evenly_from_those_in_use():
    used = np.array([True, False, True, True, False, True])
    rng = np.random.default_rng(0)
    draws = np.array([random_experts(used, 2, rng) for _ in range(2000)])
    assert np.all(draws.sum(axis=1) == 2)
    expected = np.where(used, 0.5, 0)
    np.testing.assert_allclose(draws.mean(axis=0), expected, atol=4 * np.sqrt(0.25 / 2000))


def test_mutual_information_is_that_of_a_drawn_domain_and_expert():
    rng = np.random.default_rng(0)
    sums = {name: rng.gamma(0.5, size=7) * (rng.random(7) < 0.7) for name in ("a", "b", "c")}
    joint = np.stack([each / each.sum() / 3 for each in sums.values()])
    entropies = [
        -sum(p * np.log(p) for p in each.ravel() if p)
        for each in (joint.sum(axis=0), joint.sum(axis=1), joint)
    ]
    expected = entropies[0] + entropies[1] - entropies[2]
    np.testing.assert_allclose(mutual_information(sums), expected, rtol=1e-12)
    same = {name: sums["a"] * (number + 1) for number, name in enumerate("abc")}
    np.testing.assert_allclose(mutual_information(same), 0, atol=1e-12)
    apart = {name: np.eye(3)[number] for number, name in enumerate("abc")}
    np.testing.assert_allclose(mutual_information(apart), np.log(3), rtol=1e-12)
