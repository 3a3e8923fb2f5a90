import numpy as np
import pytest

from tests.elsewhere import python


@pytest.mark.slow
def test_one_and_eight_devices_write_the_same_codes(tmp_path):
    found = {}
    for devices in (1, 8):
        output = tmp_path / f"{devices}.npz"
        python("-m", "tests.optim.on_devices", str(output), devices=devices).check_returncode()
        found[devices] = np.load(output)
        assert found[devices]["devices"] == devices
    # Every device sums the rows of all tokens in their order: even the float sums are the same.
    for name in set(found[1].files) - {"devices"}:
        np.testing.assert_array_equal(found[8][name], found[1][name], err_msg=name)
