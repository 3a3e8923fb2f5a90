"""No device repeats the dense work of another."""

import json

import pytest

from tests.elsewhere import python


@pytest.mark.slow
def test_a_device_of_eight_computes_an_eighth_of_a_step():
    """Experts are looked up by kernels, whose FLOPs are not counted, or in loops counted once."""
    found = python("-m", "tests.sharding.on_flops", devices=8)
    assert not found.returncode, found.stderr
    flops = json.loads(found.stdout.splitlines()[-1])
    assert 0.95 / 8 < flops["all"] / flops["one"] < 1.05 / 8
