import numpy as np

from peerjax.evaluation.domains import domain_experts, random_experts


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
