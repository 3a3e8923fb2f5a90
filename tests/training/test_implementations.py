"""A tiny model trained through each implementation of lookup and update follows the same path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import IMPLEMENTATIONS
from peerjax.config import validate
from peerjax.errors import ConfigError
from peerjax.sharding import make_mesh
from peerjax.training.step import make_train_step
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


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "xla"])
def test_the_losses_are_those_of_xla(implementation, expected):
    if implementation == "mosaic_gpu" and jax.__version_info__ >= (0, 11):
        pytest.skip("the GPU interpreter of JAX 0.11 has effects that Flax's scan does not take")
    # One code that a rounding threshold sends elsewhere moves a weight by a seventh of its row's
    # largest: losses are close, not equal.
    np.testing.assert_allclose(losses_by(implementation), expected, atol=1e-4)


def test_an_unknown_implementation_is_named():
    config = tiny_config("unused")
    config.kernels.implementation = "triton"
    with pytest.raises(ConfigError, match="kernels.implementation='triton' is unknown"):
        validate(config)
