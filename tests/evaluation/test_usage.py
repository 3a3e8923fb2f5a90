import numpy as np
import pytest

from peerjax.evaluation.usage import expert_usage


def test_even_use_has_no_unevenness():
    assert expert_usage(np.full(50, 0.3)) == pytest.approx((1.0, 0.0), abs=1e-6)


def test_one_expert_for_all_is_as_uneven_as_can_be():
    gates = np.zeros(64)
    gates[7] = 12.0
    assert expert_usage(gates) == pytest.approx((1 / 64, np.log(64)))


def test_a_case_by_hand():
    # z = (1/2, 1/4, 1/4, 0): log 4 + (1/2) log(1/2) + 2 (1/4) log(1/4) = log(4) - 1.5 log(2).
    assert expert_usage(np.array([2.0, 1.0, 1.0, 0.0])) == pytest.approx((0.75, np.log(2) / 2))
