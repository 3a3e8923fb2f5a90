"""A tiny model trained through each implementation of lookup and update follows the same path."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.native_cpu import library
from peerjax.config import validate
from peerjax.errors import ConfigError
from peerjax.sharding import make_mesh
from peerjax.training.loop import train
from peerjax.training.step import make_train_step
from tests.pallas_kernels.on_cpus import needs_native
from tests.training.test_step import VOCABULARY, make
from tests.training.tiny import tiny_config

STEPS, LENGTH = 2, 4


def losses_by(implementation):
    """4 tokens a step, a layer of 64 experts at D = 64, 8 experts a token."""
    config, task, optimizer, state = make(
        **{
            "kernels.implementation": implementation,
            "model.width": 64,
            "model.layers": (("peer", 1),),
            "optimizer.warmup_steps": 1,
        }
    )
    step = jax.jit(make_train_step(config, task, optimizer), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (STEPS, 1, LENGTH + 1))
    losses = []
    with jax.set_mesh(make_mesh()):
        for each in tokens:
            batch = {
                "inputs": jnp.asarray(each[:, :-1], jnp.int32),
                "targets": jnp.asarray(each[:, 1:], jnp.int32),
                "positions": jnp.arange(LENGTH)[None],
                "segments": jnp.zeros((1, LENGTH), jnp.int32),
            }
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def expected():
    return losses_by("xla")


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=needs_native if name == "native_cpu" else ())
        for name in IMPLEMENTATIONS
        if name != "xla"
    ],
)
def test_the_losses_are_those_of_xla(implementation, expected):
    if implementation == "mosaic_gpu" and jax.__version_info__ >= (0, 11):
        pytest.skip("the GPU interpreter of JAX 0.11 has effects that Flax's scan does not take")
    # One code that a rounding threshold sends elsewhere moves a weight by a seventh of its row's
    # largest: losses are close, not equal.
    np.testing.assert_allclose(losses_by(implementation), expected, atol=1e-4)


@pytest.mark.slow
@needs_native
def test_continuing_on_another_implementation_is_said(corpus, tmp_path, capsys):
    config = tiny_config(corpus)
    config.kernels.implementation, config.steps = "xla", 3
    train(config, str(tmp_path))
    assert json.loads((tmp_path / "kernels.json").read_text()) == {"implementation": "xla"}
    said = capsys.readouterr().out
    assert "kernels: xla, as chosen" in said
    assert "until now" not in said
    config.kernels.implementation, config.steps = "auto", 6
    train(config, str(tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert "kernels: native_cpu" in said
    name = f"native_cpu ({library.processor()})"
    assert f"until now xla computed the run; {name} adds floats in another order" in said
    assert json.loads((tmp_path / "report.json").read_text())["kernels"] == name


def test_kernels_that_cannot_be_used_are_refused_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "why_not", lambda: "they are not compiled; run it")
    config = tiny_config("unused")
    config.kernels.implementation = "native_cpu"
    with pytest.raises(ConfigError, match="native_cpu cannot be used: they are not compiled; run"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_unknown_implementation_is_named():
    config = tiny_config("unused")
    config.kernels.implementation = "triton"
    with pytest.raises(ConfigError, match="kernels.implementation='triton' is unknown"):
        validate(config)
