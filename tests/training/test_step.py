"""One step: microbatches add up to the batch; a step that is not finite changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.errors import DivergenceError
from peerjax.objectives import language_model
from peerjax.sharding import make_mesh
from peerjax.training import step as training_step
from peerjax.training.gradients import loss_and_gradients
from peerjax.training.loop import train
from peerjax.training.optimizer import make_optimizer
from peerjax.training.pending import Pending, Warnings
from peerjax.training.state import create_state
from peerjax.training.step import make_train_step, set_by_first_batch
from tests.training.tiny import tiny_config

VOCABULARY, ROWS, LENGTH = 61, 8, 32
CHOICES = [("int4", "rowwise"), ("bfloat16", "rowwise"), ("float32", "adamw")]


def make(storage="int4", rule="rowwise", **changes):
    config = tiny_config("unused")
    config.pool.storage, config.pool.rule = storage, rule
    config.update_from_flattened_dict(changes)
    task, optimizer = language_model(config, VOCABULARY), make_optimizer(config)
    state = jax.jit(lambda: create_state(config, task, optimizer))()
    return config, task, optimizer, state


def make_batch(seed=0, low=0):
    tokens = np.random.default_rng(seed).integers(low, VOCABULARY, (ROWS, LENGTH + 1))
    return {
        "inputs": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "positions": jnp.tile(jnp.arange(LENGTH), (ROWS, 1)),
        "segments": jnp.zeros((ROWS, LENGTH), jnp.int32),
    }


def as_rows(batch):
    """The rows of a batch, one by one."""
    return [jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), batch) for row in range(ROWS)]


def assert_close(found, expected, bound=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= bound * np.abs(b).max() + 1e-9


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_add_up_to_the_gradient_of_the_batch(microbatches):
    _, task, _, state = make(**{"peer.query_norm": "batchnorm"})
    differentiate = jax.jit(
        functools.partial(loss_and_gradients, task), static_argnames="microbatches"
    )
    whole_loss, whole = differentiate(state.variables, make_batch())
    with jax.set_mesh(make_mesh()):
        loss, parts = differentiate(state.variables, make_batch(), microbatches=microbatches)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
    assert_close(parts.params, whole.params)
    assert parts.pools.keys() == whole.pools.keys() == {"run_1"}
    np.testing.assert_array_equal(
        parts.pools["run_1"]["pool"].ids, whole.pools["run_1"]["pool"].ids
    )
    assert_close(parts.pools["run_1"]["pool"].dense(64), whole.pools["run_1"]["pool"].dense(64))
    assert_close(parts.moments, whole.moments)
    assert parts.losses == whole.losses == {}  # no layer adds a term


@pytest.mark.parametrize("microbatches", [1, 2])
def test_running_statistics_start_at_the_first_batch_and_follow_the_steps(microbatches):
    changes = {"peer.query_norm": "batchnorm", "optimizer.microbatches": microbatches}
    config, task, optimizer, state = make(**changes)
    batches = make_batch(0), make_batch(1)

    def moments_of(state, batch):
        return loss_and_gradients(task, state.variables, batch)[1].moments

    expected = jax.jit(moments_of)(state, batches[0])
    state = jax.jit(set_by_first_batch, static_argnums=0)(task, state, batches[0])
    stats = state.stats["run_1"]["block"]["peer"]
    assert stats.keys() == {"query_norm", "initial_norm_keys1", "initial_norm_keys2"}
    # The only router is behind no other: whatever normalises it, its queries are the same.
    assert_close(stats["query_norm"], expected["run_1"]["block"]["peer"]["query_norm"])

    found = jax.jit(moments_of)(state, batches[1])["run_1"]["block"]["peer"]["query_norm"]
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, stats["query_norm"], found)
    state, _ = jax.jit(make_train_step(config, task, optimizer))(state, batches[1])
    assert_close(state.stats["run_1"]["block"]["peer"]["query_norm"], expected)


@pytest.mark.parametrize(("storage", "rule"), CHOICES)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(storage, rule):
    config, task, optimizer, state = make(storage, rule, **{"optimizer.warmup_steps": 0})
    step = jax.jit(make_train_step(config, task, optimizer))
    embedding = state.params["embed"]["embedding"]
    poisoned = embedding.at[0].set(jnp.inf)  # token 0 is read by the second batch only
    state.params["embed"]["embedding"] = poisoned
    start, _ = step(state, make_batch(1, low=1))
    skipped, metrics = step(start, make_batch(2))
    assert metrics["skipped/total"] == metrics["skipped/in_a_row"] == 1
    before, after = start._asdict(), skipped._asdict()
    for part in ("params", "pools", "stats"):
        jax.tree.map(np.testing.assert_array_equal, after[part], before[part])

    def assert_kept(path, after, before):
        if "statistics" not in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(after, before)

    jax.tree_util.tree_map_with_path(assert_kept, after["opt_state"], before["opt_state"])
    assert skipped.step == start.step + 1

    # The next good step is the one that would have come without the bad one.
    expected, _ = step(start, make_batch(3, low=1))
    found, metrics = step(skipped, make_batch(3, low=1))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, found.pools, expected.pools)
    assert (metrics["skipped/total"], metrics["skipped/in_a_row"]) == (1, 0)
    assert np.any(found.params["head"]["kernel"] != start.params["head"]["kernel"])


def test_packed_matrices_are_passed_over_by_a_step_that_is_not_finite(monkeypatch):
    layers = {"model.layers": (("peer", 1), ("monet_hd", 1)), "monet.storage": "int4"}
    sizes = {"monet.num_experts": 64, "monet.top_k": 2, "monet.group": 1}
    sizes["optimizer.warmup_steps"] = 0
    config, task, optimizer, state = make(**layers, **sizes)
    make_step = functools.partial(make_train_step, config, task, optimizer)
    good = jax.jit(make_step())
    start, _ = good(state, make_batch(1))

    def overflow_below(*args, **options):
        loss, gradients = loss_and_gradients(*args, **options)
        embed = jax.tree.map(lambda leaf: leaf + jnp.inf, gradients.params["embed"])
        return loss, gradients._replace(params={**gradients.params, "embed": embed})

    monkeypatch.setattr(training_step, "loss_and_gradients", overflow_below)
    skipped, metrics = jax.jit(make_step())(start, make_batch(2))
    assert metrics["skipped/total"] == 1
    assert metrics["gradient_norm"] == jnp.inf

    # Codes, accumulators and moments alike: the next good step is as if there had been none.
    expected, _ = good(start, make_batch(3))
    found, _ = good(skipped, make_batch(3))
    for part in ("params", "pools", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, part), getattr(expected, part))


def test_skipped_steps_are_told_and_too_many_in_a_row_stop_the_run():
    config = tiny_config("unused")
    config.max_skipped_steps = 2
    warnings = Warnings(config)
    figures = {"loss": float("nan"), "gradient_norm": float("inf"), "skipped/in_a_row": 1.0}
    pending = Pending(7, {}, np.arange(3))
    (told,) = warnings.about(pending, figures)
    assert told == (
        "warning: loss and gradient_norm are not finite in step 7 (batch 6, rows 0, 1, 2 of the "
        "training text); the step is skipped, 1 in a row so far"
    )
    with pytest.raises(DivergenceError, match="2 steps in a row were skipped"):
        list(warnings.about(pending, figures | {"skipped/in_a_row": 2.0}))
    assert not list(warnings.about(pending, {"loss": 1.0, "skipped/in_a_row": 0.0}))


@pytest.mark.slow
def test_a_learning_rate_at_which_codes_clip_is_warned_of_once(corpus, tmp_path, capsys):
    config = tiny_config(corpus)
    config.steps, config.optimizer.warmup_steps = 4, 1
    config.pool.learning_rate = 1.0
    train(config, str(tmp_path))
    told = capsys.readouterr().out
    assert told.count("exceeded their range") == 1
    assert "pool.learning_rate=1.0 may be too large" in told
