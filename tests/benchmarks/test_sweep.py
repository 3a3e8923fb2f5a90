import math

import pytest

from benchmarks.sweep import paired, rung, tune


def test_the_ladder_climbs_by_threes_and_tens():
    assert [rung(1e-2, steps) for steps in (-2, -1, 0, 1, 2)] == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


@pytest.mark.parametrize("best", [1e-4, 3e-3, 1e-2, 3e-1])
def test_tuning_goes_on_while_the_best_is_at_an_edge(best):
    tried = []

    def loss(rate):
        tried.append(rate)
        return abs(math.log(rate / best))

    found, table = tune(loss, 1e-2)
    assert found == best
    assert sorted(tried) == [rate for rate, _ in table]
    assert table[0][0] < best < table[-1][0]
    assert len(set(tried)) == len(tried)


def test_the_interval_of_paired_differences():
    interval = paired([1.0, 2.0, 3.0], [0.9, 1.8, 2.7])
    assert interval.mean == pytest.approx(0.2)
    assert interval.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
