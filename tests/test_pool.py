import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codes import CODES
from pallas_kernels.expert_update import UpdateState
from pallas_kernels.expert_update.integer_step import nearest
from pallas_kernels.storage import read_floats
from peerjax.pool import initialize_pool, memory_report, places_for, stored_as, with_places
from tests.conftest import compile_as_users_do
from tests.pallas_kernels.test_expert_update import make_gradient


def make(storage, width, num_experts, layers=2):
    return initialize_pool(jax.random.key(0), layers, num_experts, width, storage=storage)


def shapes(storage, width, num_experts=1 << 14):
    pool = jax.eval_shape(lambda: make(storage, width, num_experts))
    return pool, jax.eval_shape(UpdateState.zeros_for, pool)


@pytest.mark.parametrize(("width", "most"), [(256, 1.04), (1024, 1.01), (1536, 1.006)])
def test_int4_keeps_about_a_byte_a_parameter(width, most):
    report = memory_report(*shapes("int4", width))
    assert report.parameters == 2 * (1 << 14) * 2 * width
    assert report.experts == 2 * (1 << 14)
    assert report.parts["codes"] == report.parts["accumulators"] == report.parameters / 2
    # Two scales and two row moments an expert.
    assert report.parts["scales"] + report.parts["row statistics"] == report.experts * 16
    assert 1 < report.bytes_per_parameter <= most
    assert report.adamw_bytes == 16 * report.parameters
    assert report.experts_per_gb == pytest.approx(1e9 / (2 * width * report.bytes_per_parameter))


@pytest.mark.parametrize("storage", ["int4", "float32"])
def test_room_for_more_experts_changes_none(storage):
    few = make(storage, 16, 2000)
    many = jax.eval_shape(lambda: with_places(few, 2048))
    drawn = initialize_pool(jax.random.key(0), 2, 2000, 16, storage=storage, places=2048)
    for roomy in (with_places(few, 2048), drawn):
        assert jax.tree.structure(roomy) == jax.tree.structure(many)
        assert jax.tree.map(jnp.shape, roomy) == jax.tree.map(jnp.shape, many)
        ids = jnp.arange(2000)
        for layer in range(2):
            for old, new in zip(
                read_floats(few.at_layer(layer), ids),
                read_floats(roomy.at_layer(layer), ids),
                strict=True,
            ):
                np.testing.assert_array_equal(old, new)


def test_a_pool_is_padded_for_parts_of_whole_lines_but_not_by_much():
    assert places_for(2048, 16, "int4", 4) == 2048
    assert places_for(2000, 16, "int4", 4) == 2048
    assert places_for(4, 16, "int4", 4) == 4  # a line on every device would be 512 experts
    million = places_for(1000**2, 256, "int4", 8)
    assert 1000**2 < million < 1.02 * 1000**2
    assert million % (8 * 4096) == 0  # every device draws whole portions


def test_other_storages_and_the_gradient():
    assert memory_report(*shapes("int8", 1024)).bytes_per_parameter == pytest.approx(2.01, abs=0.01)
    floats = memory_report(*shapes("float32", 1024))
    assert floats.bytes_per_parameter == pytest.approx(4.004, abs=0.001)
    gradient = make_gradient(tokens=10, chosen=3, width=32, layers=2)
    report = memory_report(*shapes("int4", 32), gradient)
    assert report.parts["factored gradient"] == 2 * 10 * (3 * 3 + 2 * 32) * 4
    assert report.kept == sum(report.parts.values()) - report.parts["factored gradient"]
    bfloat16 = gradient._replace(x=gradient.x.astype(jnp.bfloat16))
    assert (
        memory_report(None, None, bfloat16).parts["factored gradient"]
        < report.parts["factored gradient"]
    )


def test_moments_of_adamw_are_counted():
    import optax

    pool, _ = shapes("float32", 64)
    state = jax.eval_shape(optax.adamw(1e-3).init, pool)
    assert memory_report(pool, state).bytes_per_parameter == pytest.approx(12)


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_a_pool_is_drawn_packed_and_in_chunks(storage):
    def temporary(num_experts):
        compiled = compile_as_users_do(jax.jit(lambda: make(storage, 256, num_experts)).lower())
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = 1 << 16, 1 << 22
    scales = 2 * large * 2 * 4
    # Beside the chunk, which does not grow, only the scales are held once more.
    assert temporary(large) - temporary(small) <= 2 * scales


@pytest.mark.parametrize("storage", ["int4", "float32"])
def test_numbers_of_experts_that_share_no_factor_with_a_draw_are_drawn_together(storage):
    text = str(jax.make_jaxpr(lambda: make(storage, 64, 4099))())
    assert max(map(int, re.findall(r"length=(\d+)", text))) == 4  # two draws a layer
    weights = make(storage, 64, 4099).weights
    rows = np.asarray(weights).reshape(-1, *weights.shape[-2:])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert make(storage, 64, 4099).num_experts == 4099


@pytest.mark.parametrize("storage", ["float32", "int8", "int4", "int3", "ternary"])
@pytest.mark.parametrize("before", ["float32", "int8"])
@pytest.mark.parametrize("num_experts", [37, 4096 + 5])
def test_a_pool_is_stored_as_rounding_its_floats_says(before, storage, num_experts):
    width = 32
    pool = make(before, width, num_experts)
    found = jax.jit(stored_as, static_argnums=1)(pool, storage)
    assert (found.storage, found.num_experts, found.width) == (storage, num_experts, width)
    assert found.weights.shape == make(storage, width, num_experts).weights.shape
    for layer in range(2):
        floats, expected = (
            np.asarray(read_floats(each.at_layer(jnp.int32(layer)), jnp.arange(num_experts)))
            for each in (found, pool)
        )
        if storage in CODES:
            codes, scales = nearest(expected, CODES[storage])
            expected = codes * scales[..., None]
            # Few codes are so near to a half that another program rounds them to the other side.
            assert np.mean(np.abs(floats - expected) > 1e-5) < 1e-4
        else:
            np.testing.assert_array_equal(floats, expected)
