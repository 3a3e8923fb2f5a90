"""A kind of layer that is written in this file alone: two pools, two routers, and a state."""

import dataclasses
import json
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.evaluation import evaluate
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.removal import removed_collection
from peerjax.evaluation.usage import routers
from peerjax.flops import forward_flops
from peerjax.inference.evaluating import evaluate_run
from peerjax.inference.prompts import continue_prompts
from peerjax.inference.sampling import Sampling
from peerjax.inference.trained import open_run, restore
from peerjax.layers import FEED_FORWARDS
from peerjax.layers.look_up import LookUp
from peerjax.layers.spec import FeedForward, require_positive
from peerjax.model import decode, empty_cache
from peerjax.objectives.task import inputs_of
from peerjax.pool import ExpertPool, memory_report
from peerjax.routing.auxiliary import DECODE, sow_loss
from peerjax.routing.product_keys import product_key_choice
from peerjax.sharding import make_mesh
from peerjax.training.gradients import loss_and_gradients
from tests.training.test_resume import assert_resumes, metrics_file
from tests.training.test_step import ROWS, VOCABULARY, as_rows, assert_close, make, make_batch
from tests.training.tiny import tiny_config


@dataclasses.dataclass(frozen=True)
class TwinConfig(FeedForward):
    """Two pools; the second is chosen from by the token and the first token of its document."""

    section: ClassVar[str] = "twin"

    keys: int = 6
    experts_per_token: int = 3

    @property
    def pools(self):
        return {"fine": self.keys**2, "coarse": 2 * self.keys}

    def check(self, width):
        require_positive(self, "keys", "experts_per_token")

    def module(self, sizes, name=None):
        return Twin(self, name=name)

    def flops(self, width):
        scores = 2 * width * (3 * self.keys + 2)
        return {"router": scores, "lookup": 2 * self.experts_per_token * 4 * width}


class Twin(nn.Module):
    config: TwinConfig

    @nn.compact
    def __call__(self, x_BLD, context, routed=None):
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        both_TD = x_TD + self.first_of_document(x_BLD, context).reshape(x_TD.shape)
        y_TD = self.look_up("fine", x_TD, x_TD, context, self.config.keys)
        y_TD += self.look_up("coarse", both_TD, x_TD, context, 2)
        return y_TD.reshape(x_BLD.shape), None

    def look_up(self, name, query_TD, x_TD, context, other):
        keys = (other, self.config.keys)
        scores = [
            nn.Dense(count, use_bias=False, name=f"{name}_{side}")(query_TD)[None]
            for side, count in enumerate(keys)
        ]
        sow_loss(self, f"{name}_size", 1e-3 * sum(jnp.mean(each**2) for each in scores))
        choice = product_key_choice(*scores, self.config.experts_per_token)
        return LookUp(name=name)(x_TD, choice, context)

    def first_of_document(self, x_BLD, context):
        if context.segments is not None:
            first = jnp.arange(x_BLD.shape[1]) - context.positions
            return jnp.take_along_axis(x_BLD, first[:, :, None], axis=1)
        state = self.variable(DECODE, "first", jnp.zeros, (len(x_BLD), x_BLD.shape[2]))
        begins = context.positions[:, :1] == 0
        state.value = jnp.where(begins, x_BLD[:, 0], state.value)
        return jnp.broadcast_to(state.value[:, None], x_BLD.shape)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FEED_FORWARDS, "twin", TwinConfig)


FLOATS = {"model.layers": (("dense", 1), ("twin", 2)), "pool.storage": "float32"}


@pytest.mark.slow
def test_it_trains_resumes_is_sampled_and_evaluated(corpus, tmp_path, capsys):
    config = tiny_config(corpus)
    config.model.layers = (("dense", 1), ("twin", 2))
    assert_resumes(config, tmp_path)

    records = [json.loads(line) for line in metrics_file(tmp_path / "whole").splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    pools, layers = ("fine", "coarse"), (1, 2)
    assert {f"losses/layers_1-2/{pool}_size" for pool in pools} <= records[-1].keys()
    assert {f"pool_step/layers_1-2.{pool}" for pool in pools} <= records[-1].keys()
    assert {f"experts_hit/layers_1-2.{pool}" for pool in pools} <= records[-1].keys()
    names = {f"layer_{layer}.{pool}" for layer in layers for pool in pools}
    assert {f"experts/{name}/usage" for name in names} <= records[-1].keys()
    assert {f"codes/{name}/log_scale" for name in names} <= records[-1].keys()

    run = open_run(str(tmp_path / "whole"))
    assert evaluate_run(run, rows=2)["all"]["experts"].keys() == names
    variables = restore(run, make_mesh(jax.devices()[:1]))
    assert len(continue_prompts(run, variables, ["a router", "the"], 4, Sampling()).texts) == 2
    capsys.readouterr()


def test_reading_token_by_token_gives_the_logits_of_reading_at_once():
    _, task, _, state = make(**FLOATS)
    tokens, positions, segments = inputs_of(make_batch())
    expected = jax.jit(task.model.apply)(state.variables, tokens, positions, segments)
    read = jax.jit(decode, static_argnums=0)
    cache, parts = empty_cache(task.model.config, ROWS, tokens.shape[1]), []
    for first, last in ((0, 5), (5, 6), (6, 7)):
        place = (slice(None), slice(first, last))
        logits, cache = read(task.model, state.variables, cache, tokens[place], positions[place])
        parts.append(logits)
    assert_close(jnp.concatenate(parts, axis=1), expected[:, :7])
    assert cache["decode"]["run_1"]["block"]["twin"]["first"].shape == (2, ROWS, 16)


def test_gradients_of_both_pools_are_those_of_dense_arrays():
    _, task, _, state = make(**FLOATS)
    batch = make_batch()

    def loss(weights):
        pools = {"run_1": {name: ExpertPool.of_floats(each) for name, each in weights.items()}}
        variables = {**state.variables, "pools": pools}
        logits, kept = task.model.apply(variables, *inputs_of(batch), mutable=["losses"])
        terms = map(jnp.sum, jax.tree.leaves(kept["losses"]))
        return task.loss(logits, {}, batch, (), 0).mean() + sum(terms)

    pools = state.pools["run_1"]
    expected = jax.jit(jax.grad(loss))({name: pool.weights for name, pool in pools.items()})
    _, found = jax.jit(lambda: loss_and_gradients(task, state.variables, batch))()
    assert found.pools["run_1"].keys() == {"fine", "coarse"}
    for name, gradient in found.pools["run_1"].items():
        assert_close(gradient.dense(pools[name].num_experts), expected[name])
    assert found.losses.keys() == {"layers_1-2/fine_size", "layers_1-2/coarse_size"}


def test_experts_of_each_pool_are_removed_by_themselves():
    _, task, _, state = make(**FLOATS)
    counts = {name: each.num_experts for each in routers(task.model) for name in each.names}
    assert counts == {
        "layer_1.coarse": 12, "layer_1.fine": 36, "layer_2.coarse": 12, "layer_2.fine": 36,
    }  # fmt: skip

    def loss_of(pools, given):
        probes = {"loss": Loss((1,) * VOCABULARY, given=given)}
        text = {"text": as_rows(make_batch())}
        found = evaluate(
            task.model, {**state.variables, "pools": pools}, text, probes,
            make_mesh(jax.devices()[:1]), rows=lambda text: range(ROWS), batch_size=ROWS,
        )  # fmt: skip
        return found["all"]["loss"]["nats_per_token"]

    removed = {name: np.full(count, name == "layer_2.fine") for name, count in counts.items()}
    of_run = state.pools["run_1"]
    zeroed = of_run | {"fine": ExpertPool.of_floats(of_run["fine"].weights.at[1].set(0))}
    found = loss_of(state.pools, removed_collection(task.model, removed))
    assert found == pytest.approx(loss_of({"run_1": zeroed}, {}), rel=1e-6)
    assert found != loss_of(state.pools, {})


def test_a_budget_of_the_model_reaches_every_lookup():
    _, task, _, state = make(**FLOATS)
    batch = make_batch()

    @jax.jit
    def logits(budget, pools):
        variables = {**state.variables, "pools": pools}
        return jax.jit(task.model.apply)(variables, *inputs_of(batch), budget_BL=budget)

    def of_budget(count):
        return logits(jnp.full(batch["inputs"].shape, count), state.pools)

    whole = jax.jit(task.model.apply)(state.variables, *inputs_of(batch))
    zeroed = jax.tree.map(jnp.zeros_like, state.pools)
    assert_close(of_budget(3), whole)
    assert_close(of_budget(0), logits(jnp.full(batch["inputs"].shape, 3), zeroed))
    assert np.abs(of_budget(1) - whole).max() > 1e-3
    # A budget of some tokens leaves the tokens before them as they are.
    some = logits(
        jnp.where(jnp.arange(32) < 20, 3, 1) + jnp.zeros_like(batch["inputs"]), state.pools
    )
    assert_close(some[:, :20], whole[:, :20])


def test_its_flops_and_its_memory_are_counted():
    _, task, _, state = make(**FLOATS)
    width, config = 16, TwinConfig()
    flops = forward_flops(task.model.config, 32)
    assert flops["lookup"] == 2 * config.flops(width)["lookup"]
    report = memory_report(state.pools, state.opt_state)
    assert report.experts == 2 * (36 + 12)
    assert report.parts["weights"] == 4 * 2 * width * report.experts
