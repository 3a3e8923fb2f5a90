"""The shared path: one set of weights, whose gradient is the sum over layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from peerjax.layers.moe import MoeConfig
from peerjax.layers.shared import SharedWeights, apply_shared
from peerjax.model import Decoder
from tests.test_model import CONFIG, LENGTH, PEER, VOCAB

WIDTH, HIDDEN = CONFIG.width, 12
LAYERS = ((PEER, 2), (MoeConfig(num_experts=4, experts_per_token=2, hidden=8), 1))


def make(**changes):
    config = dataclasses.replace(CONFIG, layers=LAYERS, **changes)
    model = Decoder(config)
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCAB)
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    variables = jax.jit(model.init)(jax.random.key(1), tokens, positions)

    def loss(params):
        given = {**variables, "params": params}
        logits = model.apply(given, tokens, positions, mutable=["routing", "losses"])[0]
        return jnp.sum(jnp.sin(logits)), logits

    return variables["params"], jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_the_formula():
    rng = np.random.default_rng(0)
    weights = SharedWeights(*(rng.normal(size=s).astype(np.float32) for s in ((5, 3), (3, 5))))
    x = rng.normal(size=(2, 4, 5)).astype(np.float32)
    hidden = np.asarray(x, np.float64) @ weights.down
    hidden *= 0.5 * (1 + scipy.special.erf(hidden / np.sqrt(2)))
    found = apply_shared(weights, jnp.asarray(x), jnp.dtype("float32"))
    np.testing.assert_allclose(found, hidden @ weights.up, rtol=1e-5, atol=1e-5)


def test_tied_weights_are_one_set_whose_gradient_is_the_sum_over_layers():
    params, differentiate = make(shared_mlp=HIDDEN)
    assert params["shared"]["down"].shape == (WIDTH, HIDDEN)
    assert "shared" not in params["run_0"]["block"]
    untied_params, differentiate_untied = make(shared_mlp=HIDDEN, shared_tied=False)
    assert "shared" not in untied_params
    assert untied_params["run_0"]["block"]["shared"]["up"].shape == (2, HIDDEN, WIDTH)
    copied = {name: dict(each) for name, each in params.items() if name != "shared"}
    for run, layers in (("run_0", 2), ("run_1", 1)):
        shared = {name: jnp.stack([each] * layers) for name, each in params["shared"].items()}
        copied[run] = {"block": {**params[run]["block"], "shared": shared}}
    (_, logits), gradient = differentiate(params)
    (_, untied_logits), untied = differentiate_untied(copied)
    np.testing.assert_allclose(logits, untied_logits, rtol=1e-5, atol=1e-6)
    for name in ("down", "up"):
        parts = [untied[run]["block"]["shared"][name] for run in ("run_0", "run_1")]
        summed = jnp.sum(jnp.concatenate(parts), axis=0)
        np.testing.assert_allclose(gradient["shared"][name], summed, rtol=2e-4, atol=1e-5)
        assert all(np.any(part) for part in parts)


def test_without_it_the_model_is_as_before():
    params, differentiate = make()
    (_, logits), _ = differentiate(params)
    with_path, differentiate_with = make(shared_mlp=HIDDEN)
    assert with_path.keys() - params.keys() == {"shared"}
    zeros = jax.tree.map(jnp.zeros_like, with_path["shared"])
    (_, without), _ = differentiate_with({**params, "shared": zeros})
    np.testing.assert_array_equal(without, logits)
