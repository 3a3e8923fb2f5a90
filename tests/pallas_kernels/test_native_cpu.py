"""Native kernels against XLA on fresh inputs, and the checks before they are loaded."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.expert_lookup import lookup
from pallas_kernels.expert_update import Hyperparameters
from pallas_kernels.native_cpu import build, library
from pallas_kernels.product_keys import top_k_pairs
from tests.elsewhere import python
from tests.pallas_kernels.on_cpus import needs_native
from tests.pallas_kernels.test_kernels import (
    after_steps,
    assert_equal_to_rounding,
    make_gradient,
    make_inputs,
    make_pool,
    value_and_gradients,
)

FORMATS = [("int8", 8), ("int4", 4), ("int4", 0), ("int4", 2), ("int3", 8), ("ternary", 2)]


@needs_native
@settings(deadline=None, max_examples=25)
@given(
    storage=st.sampled_from(["int8", "int4", "int3", "ternary"]), words=st.integers(1, 40),
    num_experts=st.integers(2, 90), tokens=st.integers(1, 40), chosen=st.integers(2, 140),
    activation=st.sampled_from(["gelu", "relu", "relu2"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_lookup_and_its_gradients(
    storage, words, num_experts, tokens, chosen, activation, seed
):
    """Any width that packs, duplicates, ids outside the pool, NaN where there is no expert."""
    bits = {"int8": 8, "ternary": 2}.get(storage, 4)
    width = words * 32 // bits
    pool = make_pool(storage, width, num_experts, seed=seed).at_layer(jnp.int32(1))
    inputs = make_inputs(num_experts, tokens, chosen, width, seed)
    expected = value_and_gradients("xla", pool, *inputs, activation)
    found = value_and_gradients("native_cpu", pool, *inputs, activation)
    assert_equal_to_rounding(found, expected, 5e-6)


@needs_native
def test_large_hidden_values_and_those_that_are_not_numbers():
    pool = make_pool("int4", 64, 20).at_layer(jnp.int32(0))
    ids, gates, x, bias = make_inputs(20, 9, 8, 64)
    bias = bias.at[1].set(1e4).at[2].set(-1e4).at[3, 2].set(jnp.nan).at[4, 2].set(jnp.inf)
    expected = value_and_gradients("xla", pool, ids, gates, x, bias)
    found = value_and_gradients("native_cpu", pool, ids, gates, x, bias)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        kept = np.isfinite(other)
        np.testing.assert_allclose(
            one[kept], other[kept], rtol=1e-5, atol=1e-5 * np.abs(other[kept]).max()
        )


@needs_native
def test_a_missing_bias_is_zero():
    pool = make_pool("int4", 64, 20).at_layer(jnp.int32(0))
    ids, gates, x, bias = make_inputs(20, 9, 8, 64)
    look_up = partial(lookup, activation="gelu", implementation="native_cpu")
    np.testing.assert_array_equal(
        look_up(pool, ids, gates, x),
        look_up(pool, ids, gates, x, hidden_bias=jnp.zeros_like(bias)),
    )


@needs_native
def test_a_pool_that_is_no_stack_and_bfloat16():
    pool = jax.tree.map(lambda leaf: leaf[0], make_pool("int4", 256, 50, layers=1))
    inputs = make_inputs(50, 6, 8, 256, dtype=jnp.bfloat16)
    found = value_and_gradients("native_cpu", pool, *inputs)
    assert found[0].dtype == jnp.bfloat16
    assert_equal_to_rounding(found, value_and_gradients("xla", pool, *inputs), 1e-2)


@needs_native
def test_a_lookup_can_be_mapped():
    pool = make_pool("int4", 64, 20).at_layer(jnp.int32(0))
    ids, gates, x, _ = make_inputs(20, 6, 8, 64)

    def one(ids, gates, x):
        arguments = (pool, ids[None], gates[None], x[None])
        return lookup(*arguments, activation="gelu", implementation="native_cpu")[0]

    whole = lookup(pool, ids, gates, x, activation="gelu", implementation="native_cpu")
    np.testing.assert_array_equal(jax.vmap(one)(ids, gates, x), whole)


@needs_native
@pytest.mark.parametrize("scores", ["normal", "few values", "special", "constant"])
@pytest.mark.parametrize(
    ("n1", "n2", "k"), [(128, 200, 16), (300, 129, 64), (64, 64, 5), (130, 7, 100), (1000, 1000, 1)]
)
def test_the_same_pairs_as_xla(scores, n1, n2, k):
    rng = np.random.default_rng(n1 + k)

    def draw(n):
        if scores == "normal":
            return rng.standard_normal((70, n)).astype(np.float32)
        few = [-1.0, 0.0, 1.0] if scores == "few values" else [-np.inf, -0.0, 0.0, 1.0, np.nan]
        return rng.choice(np.float32(few[:1] if scores == "constant" else few), (70, n))

    both = jnp.asarray(draw(n1)), jnp.asarray(draw(n2))
    found, expected = (top_k_pairs(*both, k, name) for name in ("native_cpu", "xla"))
    np.testing.assert_array_equal(found, expected)


@needs_native
@pytest.mark.parametrize(("storage", "bits"), FORMATS)
@pytest.mark.parametrize(
    ("width", "num_experts", "tokens", "chosen", "learning_rate"),
    [(64, 1001, 30, 40, 0.02), (48, 37, 7, 6, 0.5), (304, 100, 5, 8, 0.005)],
)
def test_the_update(storage, bits, width, num_experts, tokens, chosen, learning_rate):
    pool = make_pool(storage, width, num_experts)
    gradient = make_gradient(num_experts, tokens, chosen, width, seed=width)
    gradient = gradient._replace(c_down=gradient.c_down.at[:, 3, 1].set(jnp.inf))
    rule = Hyperparameters(learning_rate, weight_decay=0.1)
    expected, found = (
        after_steps(name, pool, gradient, rule, bits=bits) for name in ("xla", "native_cpu")
    )
    # Float sums are added in another order, so that a step may straddle a threshold of rounding.
    for one, other in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(expected[:2]), strict=True):
        if one.dtype == jnp.int32:
            assert np.mean(np.asarray(one) != other) <= 1e-3
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5)
    assert_equal_to_rounding(found[2], expected[2], 1e-4)


@needs_native
def test_results_do_not_depend_on_the_number_of_threads():
    """On as many processors as the process may use, and on one of them."""
    every = len(os.sched_getaffinity(0))
    digests = set()
    for number in (1, every):
        done = python("-m", "tests.pallas_kernels.native_results", str(number))
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_the_library_is_there_wherever_it_can_be_compiled():
    try:
        build.compiler()
        build.check_platform()
    except build.BuildError:
        pytest.skip("there is no compiler, or another platform")
    assert library.why_not() is None


@needs_native
def test_a_library_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    remedy, path = "run `python -m pallas_kernels.native_cpu`", build.library_for(build.OLDER)
    assert library.why_not_load(path) is None
    missing = tmp_path / "missing.so"
    assert library.why_not_load(missing) == f"they are not compiled; {remedy}"
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert "cannot be loaded" in library.why_not_load(broken)
    with monkeypatch.context() as other:
        other.setattr(build, "digest_of_sources", lambda: "0123456789abcdef")
        assert "was compiled from other sources" in library.why_not_load(path)
    with monkeypatch.context() as other:
        other.setattr(build, "version_of", lambda headers: (0, 0))
        reason = library.why_not_load(path)
        assert "of XLA's interface, but this jaxlib has 0.0" in reason
    with monkeypatch.context() as other:
        other.setattr(library, "_processor_flags", lambda: {"sse2", "fma"})
        other.setattr(library, "processor", library.processor.__wrapped__)
        assert "but this processor lacks abm, avx2" in library.why_not_load(path)
    with monkeypatch.context() as other:
        other.setattr(build.platform, "machine", lambda: "arm64")
        assert "not for linux on arm64" in library.why_not_load(path)


def test_xla_computes_where_the_library_is_refused(monkeypatch):
    monkeypatch.setattr(library, "why_not", lambda: "they are not compiled; run it")
    assert dispatch.chosen() == "xla"
    line = "kernels: xla; others cannot be used here: they are not compiled; run it"
    assert dispatch.describe() == line
    pool = make_pool("int4", 64, 20).at_layer(jnp.int32(0))
    ids, gates, x, _ = make_inputs(20, 6, 8, 64)
    text = jax.jit(lambda x: lookup(pool, ids, gates, x, activation="gelu")).lower(x).as_text()
    assert "peer_lookup_forward" not in text
    with pytest.raises(ValueError, match="native_cpu cannot look experts up: they are not"):
        lookup(pool, ids, gates, x, activation="gelu", implementation="native_cpu")


@needs_native
def test_native_kernels_are_chosen_on_cpus():
    assert dispatch.chosen() == "native_cpu"
    assert dispatch.chosen("xla") == "xla"
    assert dispatch.describe().startswith("kernels: native_cpu")
    pool = make_pool("int4", 64, 20).at_layer(jnp.int32(0))
    ids, gates, x, _ = make_inputs(20, 6, 8, 64)
    text = jax.jit(lambda x: lookup(pool, ids, gates, x, activation="gelu")).lower(x).as_text()
    assert "peer_lookup_forward" in text


def test_the_variable_names_a_kind_of_processor(monkeypatch):
    find = library.processor.__wrapped__
    monkeypatch.setenv("PEERJAX_PROCESSOR", build.OLDER)
    assert find() == build.OLDER
    monkeypatch.setenv("PEERJAX_PROCESSOR", "z80")
    with pytest.raises(ValueError, match="PEERJAX_PROCESSOR=z80 is none of x86-64-v4, x86-64-v3"):
        find()
    monkeypatch.setattr(library, "processor", find)
    assert library.why_not.__wrapped__().startswith("PEERJAX_PROCESSOR=z80 is none of")
    monkeypatch.delenv("PEERJAX_PROCESSOR")
    for flags, kind in ((library.OF_OLDER | library.OF_NEWER, build.NEWER),
                        (library.OF_OLDER, build.OLDER), (set(), build.OLDER)):  # fmt: skip
        monkeypatch.setattr(library, "_processor_flags", lambda flags=flags: flags)
        assert find() == kind
