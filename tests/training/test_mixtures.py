"""Mixtures in training: the terms they add to the loss, their usage, devices, resuming."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.config import validate
from peerjax.errors import ConfigError
from peerjax.training.gradients import loss_and_gradients
from tests.elsewhere import python
from tests.training.test_resume import assert_resumes, metrics_file
from tests.training.test_step import LENGTH, ROWS, assert_close, make, make_batch
from tests.training.tiny import tiny_config

WEIGHT = 0.5


@functools.cache
def make_mixtures(balance_weight):
    changes = {"model.layers": (("moe", 2),), "moe.balance_weight": balance_weight}
    _, task, _, state = make(**changes)
    differentiate = functools.partial(loss_and_gradients, task)
    return task, state, jax.jit(differentiate, static_argnames="microbatches")


def test_terms_of_layers_are_differentiated_but_not_part_of_the_loss_shown():
    task, state, differentiate = make_mixtures(WEIGHT)
    batch = make_batch()

    def term(params):
        variables = {**state.variables, "params": params}
        inputs = (batch[name] for name in ("inputs", "positions", "segments"))
        kept = task.model.apply(variables, *inputs, mutable=["losses"])[1]
        return jnp.sum(kept["losses"]["run_0"]["block"]["moe"]["balance"])

    total, of_term = jax.jit(jax.value_and_grad(term))(state.params)
    loss, found = differentiate(state.variables, batch)
    plain_loss, plain = make_mixtures(0.0)[2](state.variables, batch)
    assert loss == plain_loss
    assert found.losses.keys() == {"layers_0-1/balance"}
    assert float(found.losses["layers_0-1/balance"]) == pytest.approx(float(total) / 2, rel=1e-6)
    assert float(found.losses["layers_0-1/balance"]) > 0.9 * WEIGHT  # at least 1 up to noise
    assert plain.losses["layers_0-1/balance"] == 0
    expected = jax.tree.map(jnp.add, plain.params, of_term)
    assert np.any(of_term["run_0"]["block"]["moe"]["router"]["kernel"] != 0)
    assert_close(found.params, expected)


def test_microbatches_average_losses_terms_and_gradients():
    _, state, differentiate = make_mixtures(WEIGHT)
    batch = make_batch()
    halves = [
        differentiate(state.variables, jax.tree.map(lambda leaf, part=part: leaf[part], batch))
        for part in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
    ]
    loss, found = differentiate(state.variables, batch, microbatches=2)
    assert_close(loss, (halves[0][0] + halves[1][0]) / 2)
    for part in ("params", "losses"):
        first, second = (getattr(gradients, part) for _, gradients in halves)
        expected = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        assert_close(getattr(found, part), expected)


@pytest.mark.slow
def test_one_and_eight_devices_train_the_same_mixture(tmp_path):
    found = {}
    for devices in (1, 8):
        output = tmp_path / f"{devices}.npz"
        python("-m", "tests.training.on_devices", str(output), devices=devices).check_returncode()
        found[devices] = dict(np.load(output))
        assert found[devices].pop("devices") == devices
    # Only the order of float32 sums differs.
    for name, one in found[1].items():
        bound = 1e-5 if name.startswith("[0]") else 1e-4  # gradients; figures after steps
        assert np.abs(found[8][name] - one).max() <= bound * np.abs(one).max(), name
    # Thresholds follow counts, which are integers.
    thresholds = [name for name in found[1] if name.startswith("[4]")]
    assert len(thresholds) == 3
    for name in thresholds:
        np.testing.assert_allclose(found[8][name], found[1][name], rtol=1e-6)
    # Each mixture's gates sum to 1, and each of the two heads of a pool's.
    of_mixture, of_pool = (found[1][f"[2]['layer_{layer}']"] for layer in (0, 1))
    assert (of_mixture.shape, of_pool.shape) == ((8,), (64,))
    np.testing.assert_allclose(of_mixture.sum(), ROWS * LENGTH, rtol=1e-5)
    np.testing.assert_allclose(of_pool.sum(), 2 * ROWS * LENGTH, rtol=1e-5)
    with_all, with_half = (found[1][f"[2]['{name}']"] for name in ("loss", "without"))
    assert with_all != with_half


@pytest.mark.slow
def test_a_run_of_mixtures_and_dense_layers_resumes_bit_equally(corpus, tmp_path):
    config = tiny_config(corpus)
    config.model.layers = (("dense", 1), ("moe", 1))
    assert_resumes(config, tmp_path)

    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["experts"].keys() == {"layer_1"}
    assert report["experts"]["layer_1"]["usage"] == 1
    assert report["expert_parameters"] == 0
    last = json.loads(metrics_file(tmp_path / "whole").splitlines()[-1])
    terms = {name: value for name, value in last.items() if name.startswith("losses/")}
    assert terms.keys() == {"losses/layer_1/balance"}
    assert 0 < terms["losses/layer_1/balance"] < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe.experts_per_token": 9}, "moe.experts_per_token=9 is more than moe.num_experts=8"),
        ({"moe.hidden": 0}, "moe.hidden=0 is not positive"),
        ({"moe.balance_weight": -1.0}, "moe.balance_weight=-1.0 is negative"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes, message):
    config = tiny_config("unused")
    config.update_from_flattened_dict({"model.layers": (("moe", 1),), **changes})
    with pytest.raises(ConfigError, match=message):
        validate(config)
