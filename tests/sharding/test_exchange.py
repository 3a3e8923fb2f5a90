"""Exchanges of tokens between devices, against lookups and updates of a whole pool."""

import numpy as np
import pytest

from peerjax.sharding.exchange import DISPATCH, GATHER, capacity_for, cheaper_exchange
from tests.elsewhere import python
from tests.sharding.on_exchange import CHOICES, EXCHANGES

MESHES = ("1x1x8", "2x1x4", "8x1x1")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    script = ("-m", "tests.sharding.on_exchange")
    for name, devices, meshes in (("one", 1, ("1x1x1",)), ("many", 8, MESHES)):
        python(*script, str(folder / f"{name}.npz"), *meshes, devices=devices).check_returncode()
    return np.load(folder / "one.npz"), np.load(folder / "many.npz")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_exact_sums_are_the_same_on_every_mesh_and_by_every_exchange(
    results, mesh, choice, exchange
):
    """Lookup, gradients, codes, accumulators, scales, moments, with and without clipping."""
    one, many = results
    prefix = f"{mesh}/{choice}/{exchange}/"
    names = [name for name in many.files if name.startswith(prefix)]
    assert len(names) > 20
    for name in names:
        if name.endswith("overflows"):
            continue
        expected = one[name.replace(prefix, f"1x1x1/{choice}/gather/")]
        if name.endswith("step_size"):  # a sum of numbers that are no integers
            assert np.allclose(expected, many[name], rtol=1e-6)
        else:
            assert np.array_equal(expected, many[name]), name
        assert np.any(expected), name


@pytest.mark.slow
def test_only_a_full_device_makes_lookups_gather(results):
    _, many = results
    shares = {name: float(many[name]) for name in many.files if name.endswith("overflows")}
    # On other meshes the capacity is that of all tokens.
    assert {name: share for name, share in shares.items() if share} == {
        "1x1x8/few/dispatch/overflows": 1.0
    }


def test_a_capacity_holds_uniform_tokens_and_never_exceeds_all():
    rng = np.random.default_rng(0)
    for tokens, chosen, group in ((512, 4, 64), (512, 32, 64), (64, 4, 8), (2048, 128, 2048)):
        capacity = capacity_for(tokens, chosen, group)
        assert capacity <= tokens
        used = np.zeros((tokens, group), bool)
        used[np.arange(tokens)[:, None], rng.integers(0, group, (tokens, chosen))] = True
        assert used.sum(0).max() <= capacity, (tokens, chosen, group)


def test_the_exchange_that_sends_less_is_chosen():
    # Nearly every token uses experts of each of 8 devices, but few use those of one of 2,048.
    assert cheaper_exchange(2048, 128, 8) == GATHER
    assert cheaper_exchange(2048, 128, 2048) == DISPATCH
