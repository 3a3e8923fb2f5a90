"""Probes of active experts and of attention sinks, against counting token by token."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from peerjax.evaluation import evaluate
from peerjax.evaluation.activations import LargeActivations
from peerjax.evaluation.active import ActiveExperts
from peerjax.evaluation.sinks import SINK_ABOVE, Sinks
from peerjax.inference.evaluating import (
    SINK_PROBES,
    evaluate_without,
    print_evaluation,
    write_evaluation,
)
from peerjax.inference.trained import open_run
from peerjax.routing.auxiliary import CHOICE, ROUTING
from peerjax.sharding import make_mesh
from peerjax.training.step import set_by_first_batch
from tests.training.test_step import LENGTH, ROWS, as_rows, make, make_batch

HEADS, K, TARGET = 2, 4, 5.0
PART = 8  # tokens of the contexts that are measured


def on_two_texts(task, variables, probe, batch):
    rows = as_rows(batch)
    return evaluate(
        task.model, variables, {"one": rows[:3], "two": rows[3:]}, {"probe": probe},
        make_mesh(jax.devices()[:1]), rows=lambda text: range(len(text)), batch_size=4,
    )  # fmt: skip


def test_active_experts_are_counted_by_text_and_layer():
    _, task, _, state = make(
        **{"model.layers": (("peer", 2), ("dense", 1)), "peer.gate": "jumprelu",
           "peer.target": TARGET, "peer.always_on": 3}
    )  # fmt: skip
    batch = make_batch()
    state = set_by_first_batch(task, state, batch)
    found = on_two_texts(task, state.variables, ActiveExperts(), batch)
    inputs = (batch["inputs"], batch["positions"], batch["segments"])
    kept = task.model.apply(state.variables, *inputs, mutable=[ROUTING])[1][ROUTING]
    choice = kept["run_0"]["block"]["peer"]["pool"][CHOICE]
    is_active = (np.asarray(choice.ids) < 64).reshape(2, ROWS, LENGTH, HEADS, K)
    for text, rows in (("one", slice(0, 3)), ("two", slice(3, ROWS)), ("all", slice(0, ROWS))):
        assert found[text]["probe"].keys() == {"layer_0", "layer_1"}
        for layer in range(2):
            own = is_active[layer, rows].reshape(-1, HEADS, K)
            active, result = own.sum((1, 2)), found[text]["probe"][f"layer_{layer}"]
            assert result["mean"] == pytest.approx(active.mean(), rel=1e-6)
            assert result["deviation"] == pytest.approx(active.std(), rel=1e-5)
            assert result["none"] == pytest.approx((active == 0).mean())
            assert result["all"] == pytest.approx((active == HEADS * K).mean())
            assert result["cut_off"] == pytest.approx((own.sum(-1) == K).mean())
            np.testing.assert_allclose(
                result["distribution"], np.bincount(active, minlength=HEADS * K + 1) / active.size
            )
    assert found["all"]["probe"]["layer_0"]["mean"] == pytest.approx(TARGET, rel=0.02)
    assert found["all"]["probe"]["layer_0"]["deviation"] > 0


def test_layers_whose_gates_do_not_adapt_have_no_figures():
    _, task, _, state = make()
    assert on_two_texts(task, state.variables, ActiveExperts(), make_batch())["all"]["probe"] == {}


def with_documents(batch):
    """Cuts every row into documents of 5, 8 and 19 tokens; the last row is one document."""
    lengths = np.array([5, 8, LENGTH - 13])
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (ROWS, 1))
    segments = np.tile(np.repeat(np.arange(3), lengths), (ROWS, 1))
    positions[-1], segments[-1] = np.arange(LENGTH), 0
    return {**batch, "positions": positions.astype("int32"), "segments": segments.astype("int32")}


def naive_shares(task, state, batch):
    """The attention of the only head of the first layer, computed without the layer."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), state.params["run_0"])
    block = params["block"]
    x = np.asarray(state.params["embed"]["embedding"], np.float64)[np.asarray(batch["inputs"])]
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x *= block["attention_norm"]["scale"]
    half = x.shape[-1] // 2
    angles = batch["positions"][..., None] * 10_000.0 ** (-np.arange(half) / half)

    def rotated(name):
        first, second = np.split(x @ block["attention"][name]["kernel"][:, 0], 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    scores = 4 * np.einsum("bld,bsd->bls", rotated("query"), rotated("key")) / np.sqrt(2 * half)
    segments = batch["segments"]
    seen = (segments[:, :, None] == segments[:, None]) & np.tri(LENGTH, dtype=bool)
    terms = np.where(seen, np.exp(scores), 0)
    return terms / terms.sum(-1, keepdims=True)


def test_sinks_are_those_of_the_formula():
    _, task, _, state = make(**{"model.heads": 1})
    # Larger queries, so that some contexts have a sink.
    query = state.params["run_0"]["block"]["attention"]["query"]
    query["kernel"] *= 4
    batch = with_documents(make_batch())
    first_token = int(batch["inputs"][0, 5])
    found = {
        token: on_two_texts(task, state.variables, Sinks(length=PART, first_token=token), batch)
        for token in (None, first_token)
    }
    query["kernel"] /= 4
    shares = naive_shares(task, state, batch)
    alphas, later, starts = [], [], []
    for row in range(ROWS):
        for segment in np.unique(batch["segments"][row]):
            places = np.flatnonzero(batch["segments"][row] == segment)
            later += list(shares[row, places[1:], places[0]])
            if len(places) >= PART:
                alphas.append(shares[row, places[:PART], places[0]].mean())
                starts.append(int(batch["inputs"][row, places[0]]))
    alphas, chosen = np.array(alphas), np.array(starts) == first_token
    assert 0 < np.mean(alphas > SINK_ABOVE) < 1
    assert 0 < chosen.sum() < len(chosen)
    for token, own in ((None, alphas), (first_token, alphas[chosen])):
        result = found[token]["all"]["probe"]["layer_0"]
        assert result["alpha_1"] == pytest.approx(own.mean(), rel=1e-4)
        assert result["sink_rate"] == pytest.approx(np.mean(own > SINK_ABOVE))
        assert result["first_share"] == pytest.approx(np.mean(later), rel=1e-4)
        assert result == found[token]["all"]["probe"]["layer_0.head_0"]


def test_uniform_causal_attention_has_the_stated_alpha():
    _, task, _, state = make(**{"data.sequence_length": 64})
    attention = state.params["run_1"]["block"]["attention"]
    attention["query"] = jax.tree.map(jnp.zeros_like, attention["query"])
    batch = make_batch()
    batch = {name: jnp.concatenate([leaf, leaf], axis=1) for name, leaf in batch.items()}
    batch["positions"] = jnp.tile(jnp.arange(64), (ROWS, 1))
    result = on_two_texts(task, state.variables, Sinks(), batch)["all"]["probe"]["layer_1"]
    assert result["alpha_1"] == pytest.approx(0.0741, abs=5e-5)
    assert result["sink_rate"] == 0


def test_large_activations_are_those_of_the_residual_stream():
    _, task, _, state = make()
    embedding = state.params["embed"]["embedding"].at[:, 3].set(1e4)
    state.params["embed"]["embedding"] = embedding
    batch = make_batch()
    result = on_two_texts(task, state.variables, LargeActivations(), batch)["all"]["probe"]
    assert result.keys() == {"layer_0", "layer_1"}
    # What layers add to this is small: their inputs are normalised, so one feature fills them.
    median = np.median(np.abs(np.asarray(embedding)[np.asarray(batch["inputs"])]))
    for of_layer in result.values():
        assert of_layer["largest"] == pytest.approx(1e4, rel=1e-3)
        assert of_layer["median"] == pytest.approx(median, rel=0.3)
        ratio = of_layer["largest"] / of_layer["median"]
        assert of_layer["ratio"] == pytest.approx(ratio, rel=1e-6)


def test_evaluation_with_sinks_is_in_the_file_the_tables_and_a_plot(finished, tmp_path, capsys):
    run = open_run(str(finished))
    found = evaluate_without(run, (), rows=3, further=SINK_PROBES)
    folder = epath.Path(tmp_path)
    write_evaluation(folder, found, {"step": run.step})
    record = json.loads((folder / "evaluation.json").read_text())["texts"]
    assert record["all"]["sinks"].keys() >= {"layer_0", "layer_1.head_1"}
    assert record["all"]["activations"]["layer_1"]["ratio"] > 1
    print_evaluation(folder)
    table = capsys.readouterr().out
    assert "layer_1.head_1" in table
    assert "largest / median" in table
    assert (folder / "sinks.png").exists()
    assert not (folder / "active_experts.png").exists()
