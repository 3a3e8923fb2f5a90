"""Gates, kinds, shared paths, sinks and storages in all pairs: each trains, resumes and samples."""

import itertools
import shutil

import jax
import numpy as np
import pytest

from peerjax.inference.prompts import continue_prompts
from peerjax.inference.sampling import Sampling
from peerjax.inference.trained import open_run, restore
from peerjax.sharding import make_mesh
from peerjax.training.loop import train
from tests.training.tiny import tiny_config

FACTORS = {
    "gate": ("softmax", "jumprelu", "threshold"),
    "kind": ("peer", "monet_hd", "monet_vd"),
    "shared": ("none", "tied", "untied", "always on"),
    "sink": ("none", "logit", "gate"),
    "storage": ("int4", "int8", "float32"),
}
RUNS = [
    ("softmax", "peer", "always on", "none", "int8"),
    ("jumprelu", "peer", "none", "none", "int4"),
    ("jumprelu", "peer", "tied", "logit", "int8"),
    ("jumprelu", "peer", "untied", "gate", "float32"),
    ("jumprelu", "peer", "always on", "logit", "float32"),
    ("threshold", "peer", "none", "gate", "int8"),
    ("threshold", "peer", "tied", "none", "float32"),
    ("threshold", "peer", "untied", "logit", "int4"),
    ("threshold", "peer", "always on", "gate", "int4"),
    ("softmax", "monet_hd", "none", "logit", "float32"),
    ("softmax", "monet_hd", "tied", "gate", "int4"),
    ("softmax", "monet_hd", "untied", "none", "int8"),
    ("softmax", "monet_vd", "none", "gate", "int8"),
    ("softmax", "monet_vd", "tied", "none", "int4"),
    ("softmax", "monet_vd", "untied", "logit", "float32"),
]


def makes_sense(pair):
    """Adaptive gates and experts that are always on are those of PEER."""
    of_peer = pair.get("gate", "softmax") != "softmax" or "always on" in pair.values()
    return not of_peer or pair.get("kind", "peer") == "peer"


def config_of(run, corpus):
    gate, kind, shared, sink, storage = run
    config = tiny_config(corpus)
    config.steps = 2
    config.checkpoint.every = 1
    config.eval.every, config.eval.rows = 2, 4
    config.model.layers = ((kind, 2),)
    config.model.kv_heads = 1
    config.model.attention_sink = sink
    config.model.remat = gate != "softmax"
    config.model.shared_mlp = 8 if "tied" in shared else 0
    config.model.shared_tied = shared != "untied"
    config.peer.always_on = 3 if shared == "always on" else 0
    config.peer.gate, config.peer.target = gate, 5.0
    config.peer.query_norm = "batchnorm"
    config.monet.num_experts, config.monet.heads, config.monet.top_k = 64, 2, 3
    config.pool.storage = config.monet.storage = storage
    return config


def test_the_runs_contain_all_pairs_that_make_sense():
    assert len(RUNS) <= 16
    for first, second in itertools.combinations(FACTORS, 2):
        places = [list(FACTORS).index(name) for name in (first, second)]
        found = {tuple(run[place] for place in places) for run in RUNS}
        pairs = itertools.product(FACTORS[first], FACTORS[second])
        expected = {pair for pair in pairs if makes_sense(dict(zip((first, second), pair)))}  # noqa: B905
        assert expected <= found, (first, second, expected - found)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: ", ".join(run))
def test_trains_resumes_bit_equally_and_samples(run, corpus, tmp_path):
    assert_trains_resumes_and_samples(config_of(run, corpus), tmp_path)


def assert_trains_resumes_and_samples(config, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(config, str(whole))
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "2")
    (again / "report.json").unlink()
    train(config, str(again))
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    runs = [open_run(str(folder)) for folder in (whole, again)]
    states = [restore(each, make_mesh()) for each in runs]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
    found = continue_prompts(runs[1], states[1], ["the router"], 3, Sampling())
    assert found.tokens == 3
