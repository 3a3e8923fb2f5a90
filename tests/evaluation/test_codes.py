import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.storage import read_codes, write_codes
from peerjax.evaluation import codes as evaluation
from peerjax.evaluation.codes import code_statistics
from peerjax.pool import initialize_pool


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_counts_every_code_once(storage, monkeypatch):
    monkeypatch.setattr(
        evaluation, "EXPERTS_PER_CHUNK", 16
    )  # 50 experts: the last chunk is partial
    num_experts, width = 50, 64
    pool = initialize_pool(jax.random.key(0), 2, num_experts, width, storage=storage)
    top = {"int4": 7, "int8": 127}[storage]
    full = jnp.full((3, 2, width), -top)  # three experts of the second layer at their limit
    words = write_codes(pool.weights, jnp.int32(1), jnp.array([0, 20, 49]), full, storage)
    pool = dataclasses.replace(pool, weights=words)

    statistics = code_statistics(pool)

    np.testing.assert_allclose(statistics.saturated_rows, [0, 3 / num_experts], atol=1e-6)
    logs = np.log(np.asarray(pool.scales, np.float64)).mean((1, 2))
    np.testing.assert_allclose(statistics.log_scale, logs, rtol=1e-5)
    for layer in range(2):
        codes = read_codes(words, jnp.int32(layer), jnp.arange(num_experts), width, storage)
        eighth = np.abs(codes).ravel() * 8 // (top + 1)
        expected = np.bincount(eighth, minlength=8) / codes.size
        np.testing.assert_allclose(statistics.histogram[layer], expected, atol=1e-5)
