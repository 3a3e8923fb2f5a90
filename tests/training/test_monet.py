"""Monet in training: both decompositions, in floats and packed; resuming; what cannot be."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.config import validate
from peerjax.errors import ConfigError
from peerjax.inference.prompts import continue_prompts
from peerjax.inference.sampling import Sampling
from peerjax.inference.trained import open_run, restore
from peerjax.optim import dequantize, is_packed_matrix
from peerjax.routing.choice import FactoredChoice
from peerjax.sharding import make_mesh
from peerjax.training.checkpoint import count_parameters
from peerjax.training.gradients import loss_and_gradients
from peerjax.training.loop import train
from peerjax.training.step import make_train_step, set_by_first_batch
from tests.training.test_resume import assert_resumes, metrics_file
from tests.training.test_step import assert_close, make, make_batch
from tests.training.tiny import tiny_config

CHANGES = {"monet.num_experts": 64, "monet.top_k": 2, "model.layers": (("monet_hd", 4),)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "storage"), [("monet_hd", "float32"), ("monet_vd", "int4")])
def test_learns_resumes_bit_equally_and_goes_on_with_a_prompt(kind, storage, corpus, tmp_path):
    config = tiny_config(corpus)
    config.update_from_flattened_dict(CHANGES)
    config.model.layers = (("dense", 1), (kind, 4))
    config.monet.storage = storage
    if storage == "int4":  # the state of a float Monet is that of dense layers
        assert_resumes(config, tmp_path)
    else:
        train(config, str(tmp_path / "whole"))

    records = [json.loads(line) for line in metrics_file(tmp_path / "whole").splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    terms = {name for name in records[-1] if name.startswith("losses/")}
    assert terms == {"losses/layers_1-4/uniformity", "losses/layers_1-4/ambiguity"}
    experts = json.loads((tmp_path / "whole" / "report.json").read_text())["experts"]
    assert experts.keys() == {"layer_1", "layer_3"}  # a router for two layers

    run = open_run(str(tmp_path / "whole"))
    variables = restore(run, make_mesh(jax.devices()[:1]))
    packed = [is_packed_matrix(leaf) for leaf in jax.tree.leaves(variables, is_packed_matrix)]
    assert sum(packed) == (6 * 2 if storage == "int4" else 0)
    found = continue_prompts(run, variables, ["a router", "the"], 4, Sampling(temperature=0))
    assert len(found.texts) == 2


def test_packed_matrices_move_by_gradients_of_their_floats():
    packed = {
        "monet.storage": "int4",
        "optimizer.warmup_steps": 0,
        "pool.learning_rate": 0.1,
        **CHANGES,
    }
    config, task, optimizer, state = make(**packed)
    assert count_parameters(state.params) == count_parameters(make(**CHANGES)[-1].params)

    differentiate = jax.jit(functools.partial(loss_and_gradients, task))
    as_floats = {**state.variables, "params": dequantize(state.params)}
    (loss, found), (expected_loss, expected) = (
        differentiate(variables, make_batch()) for variables in (state.variables, as_floats)
    )
    assert loss == expected_loss
    assert_close(found.params, expected.params)

    after, _ = jax.jit(make_train_step(config, task, optimizer))(state, make_batch())
    experts = after.params["run_0"]["group"]["block_1"]["monet"]
    before = state.params["run_0"]["group"]["block_1"]["monet"]
    for name in ("u", "v"):
        assert is_packed_matrix(experts[name])
        assert np.any(experts[name].floats() != before[name].floats())
    for name in ("c", "b"):
        assert np.any(experts[name] != before[name])


def test_gates_of_all_experts_are_summed_from_those_of_their_halves():
    shape = (2, 5, 3, 4)  # routers, tokens, heads, keys
    g1, g2 = (jax.random.uniform(jax.random.key(side), shape) for side in (1, 2))
    weight = jnp.array([1.0, 0.0, 1.0, 0.5, 1.0])
    found = FactoredChoice(g1, g2).gate_sums(weight)
    expected = np.zeros((2, 16))
    for router, token, head, i, j in np.ndindex(*shape, 4):
        gate = g1[router, token, head, i] * g2[router, token, head, j]
        expected[router, 4 * i + j] += weight[token] * gate
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_statistics_of_every_router_start_at_the_first_batch():
    config, task, _, state = make(**CHANGES)
    stats = jax.jit(set_by_first_batch, static_argnums=0)(task, state, make_batch()).stats
    router = stats["run_0"]["group"]["block_0"]["monet"]["router"]
    for side in ("norm1", "norm2"):
        moments = router[side]["moments"]
        assert moments.mean.shape == (2, 1, config.monet.heads, 1)
        assert np.all(moments.variance != 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"monet.num_experts": 60}, "monet: 60 experts are not a square"),
        ({"monet.top_k": 9}, "monet: top_k=9 is not in 1 .. 8"),
        ({"monet.group": 3}, "4 blocks of 'monet_hd' in a row, which is not divisible by 3"),
        ({"monet.group": 0}, "monet.group=0 is not positive"),
        ({"monet.storage": "int5"}, "monet.storage='int5' is unknown"),
        (
            {"model.layers": (("monet_vd", 2),), "monet.expert_width": 3},
            "monet.expert_width=3 and model.width=16 must be even for 'monet_vd'",
        ),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    config = tiny_config("unused")
    config.update_from_flattened_dict({**CHANGES, **changes})
    with pytest.raises(ConfigError, match=message):
        validate(config)
