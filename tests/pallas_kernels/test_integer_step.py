"""The integer stage against exact arithmetic, over all states and all steps -40..40."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codes import CODES
from pallas_kernels.expert_update import integer_step
from tests.pallas_kernels.levels import TOP

PAIRS = [("int8", 8), *itertools.product(["int4", "int3", "ternary"], [0, 2, 4, 8])]


@pytest.mark.parametrize(("storage", "bits"), PAIRS)
def test_carry_and_saturation_are_exact(storage, bits):
    top, own = TOP[storage], CODES[storage]
    accumulators = np.arange(-(1 << bits) // 2, (1 << bits) // 2) if bits else np.array([0])
    codes = np.arange(-top, top + 1)
    steps = np.arange(-40, 41)
    w, a, r = (grid.ravel() for grid in np.meshgrid(codes, accumulators, steps, indexing="ij"))

    v = integer_step.join(jnp.array(w), jnp.array(a), bits) + jnp.array(r)
    clips = integer_step.clips(v, own, bits)
    new_w, new_a = integer_step.split(jnp.clip(v, *integer_step.limits(own, bits)), bits)

    # In 64-bit integers, with divisions instead of shifts.
    unit = 2**bits
    exact = w.astype(np.int64) * unit + a + r
    kept = np.clip(exact, -top * unit - unit // 2, top * unit + max(unit // 2 - 1, 0))
    code = np.floor_divide(kept + unit // 2, unit)
    np.testing.assert_array_equal(clips, kept != exact)
    np.testing.assert_array_equal(new_w, code)
    np.testing.assert_array_equal(new_a, kept - code * unit)
    assert np.abs(new_w).max() == top
    assert new_a.min() >= accumulators.min()
    assert new_a.max() <= accumulators.max()


def test_the_limits_of_int4_are_those_of_the_design():
    assert integer_step.limits(CODES["int4"], 4) == (-120, 119)


def test_huge_and_tiny_steps_become_bounded_integers():
    steps = jnp.array([1e30, -1e30, jnp.inf, -jnp.inf, 3.0, -2.0])
    bound = int(integer_step.LARGEST_STEP)
    assert integer_step.bounded(steps).astype(int).tolist() == [bound, -bound, bound, -bound, 3, -2]


@pytest.mark.parametrize("storage", CODES)
def test_scales_lose_nearly_the_least_of_normal_weights(storage):
    weights = np.random.default_rng(0).standard_normal(100_000)
    top = TOP[storage]

    def loss(scale):
        return np.mean((np.clip(np.round(weights / scale), -top, top) * scale - weights) ** 2)

    codes, scales = integer_step.nearest(jnp.array(weights[None], jnp.float32), CODES[storage])
    found = np.mean((np.asarray(codes, np.float64) * np.asarray(scales)[:, None] - weights) ** 2)
    least = min(loss(1 / (spread * top)) for spread in np.linspace(0.15, 1.0, 171))
    assert found <= 1.07 * least


def test_a_row_of_zeros_gets_a_scale_to_leave_zero_by():
    codes, scales = integer_step.nearest(jnp.zeros((2, 8)), CODES["int4"])
    assert not np.any(codes)
    assert np.all(np.asarray(scales) > 0)
