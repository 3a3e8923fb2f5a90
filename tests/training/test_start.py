"""Runs that start from the weights of other runs."""

import re

import jax
import numpy as np
import pytest

from peerjax.errors import CheckpointError, ConfigError
from peerjax.inference.trained import open_run, restore
from peerjax.pool import stored_as
from peerjax.sharding import make_mesh
from peerjax.training.loop import train
from tests.conftest import config_of_finished
from tests.training.test_resume import saved_arrays
from tests.training.tiny import SAVE_EVERY, STEPS, tiny_config, write_corpus


def first_state(config, tmp_path, monkeypatch):
    """The arrays of a run before its first step."""
    from peerjax.training import loop

    found = {}

    class Stop(Exception):
        pass

    def keep(model, variables, *args, **kwargs):
        raise Stop

    monkeypatch.setattr(loop, "evaluate", keep)
    original = loop.Source.state

    def state(self, *args):
        found["state"] = original(self, *args)
        return found["state"]

    monkeypatch.setattr(loop.Source, "state", state)
    with pytest.raises(Stop):
        train(config, str(tmp_path / "new"))
    return found["state"]


@pytest.mark.parametrize("bits", [None, 2])
def test_weights_and_fitting_accumulators_are_taken_and_all_else_starts_anew(
    bits, finished, tmp_path, monkeypatch
):
    config = config_of_finished(write_corpus(tmp_path / "other", documents=60))  # another mix
    config.init_from = f"{finished}/checkpoints/{SAVE_EVERY}"
    config.pool.accumulator_bits = bits
    # A run that was killed before its first checkpoint was complete starts from them again.
    (tmp_path / "new" / "checkpoints" / "3").mkdir(parents=True)
    state = first_state(config, tmp_path, monkeypatch)
    old = saved_arrays(finished, SAVE_EVERY)
    found = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state._asdict())
    }
    taken = [name for name in found if name.startswith(("['params']", "['pools']", "['stats']"))]
    assert len(taken) > 10
    for name in taken:
        np.testing.assert_array_equal(
            found[name],
            old[re.sub(r"\.(\w+)", r"['\1']", name)],
        )
    accumulators = [each for name, each in found.items() if "accumulators" in name]
    of_optimizer = {name: each for name, each in found.items() if "opt_state" in name}
    moments = [each for name, each in of_optimizer.items() if re.search(r"moments|\.mu|\.nu", name)]
    (accumulated,) = (each for name, each in old.items() if "accumulators" in name)
    if bits is None:
        np.testing.assert_array_equal(accumulators[0], accumulated)
    else:
        assert not accumulators[0].any()
    assert moments
    assert not any(each.any() for each in moments)
    assert state.step == 0


@pytest.mark.parametrize("storage", ["float32", "int8", "ternary"])
def test_pools_are_rounded_to_another_storage(storage, finished, tmp_path, monkeypatch):
    config = config_of_finished(write_corpus(tmp_path / "other"))
    config.init_from = f"{finished}/checkpoints/{SAVE_EVERY}"
    config.pool.storage = storage
    state = first_state(config, tmp_path, monkeypatch)
    old = restore(open_run(str(finished), SAVE_EVERY), make_mesh())
    expected = jax.jit(stored_as, static_argnums=1)(old["pools"]["run_1"]["pool"], storage)
    assert jax.tree.structure(state.pools["run_1"]["pool"]) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(state.pools["run_1"]["pool"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(*map(jax.tree.leaves, (state.params, old["params"])), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 24}, r"another model.width \(16\) than this run \(24\)"),
        ({"model.layers": (("dense", 2),)}, "another model.layers"),
        ({"peer.spread": 2}, "peer.spread is 1 there and 2 here"),
        ({"peer.heads": 4}, r"params/run_1/block/peer/keys1 is \[1, 2, 8, 8\] there and \[1, 4"),
        ({"init_from": "/nowhere"}, "holds no run"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(changes, message, finished, corpus, tmp_path):
    config = config_of_finished(corpus)
    config.init_from = str(finished)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        train(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_is_not_there_is_named(finished, corpus, tmp_path):
    config = tiny_config(corpus)
    config.init_from = f"{finished}/checkpoints/{STEPS + 100}"
    with pytest.raises(CheckpointError, match="has no checkpoint of step"):
        train(config, str(tmp_path / "new"))
