"""A model without the experts of a domain."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
from etils import epath

from peerjax.data.pipeline import load_text, validation_rows
from peerjax.errors import ConfigError, DataError
from peerjax.evaluation import evaluate
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.removal import checked_domains, removed_collection
from peerjax.evaluation.usage import routers
from peerjax.inference.evaluating import evaluate_without, print_evaluation, write_evaluation
from peerjax.inference.trained import open_run
from peerjax.sharding import make_mesh
from peerjax.training.loop import train
from tests.training.test_step import ROWS, VOCABULARY, as_rows, make, make_batch
from tests.training.tiny import SAVE_EVERY, tiny_config


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two domains of other words; a pattern that finds them."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for domain, words in (("one", "router expert token pool"), ("two", "in is of the a and")):
        (folder / domain).mkdir()
        for number in range(24):
            text = " ".join(rng.choice(words.split(), 120))
            (folder / domain / f"{number}.txt").write_text(text)
    return ";".join(f"{domain}={folder / domain}/*.txt" for domain in ("one", "two"))


def trained(kind, texts, folder):
    config = tiny_config(texts)
    config.steps = SAVE_EVERY
    config.model.layers = ((kind, 2),)
    config.pool.storage = "float32"
    config.monet.num_experts, config.monet.top_k = 64, 2
    config.moe.num_experts, config.moe.hidden = 8, 8
    train(config, str(folder))
    return open_run(str(folder))


def loss_of(model, variables, removed=None):
    """The loss on some batch, without some experts."""
    given = {} if removed is None else removed_collection(model, removed)
    probes = {"loss": dataclasses.replace(Loss((1,) * VOCABULARY), given=given)}
    text, mesh = {"text": as_rows(make_batch())}, make_mesh(jax.devices()[:1])
    found = evaluate(
        model, variables, text, probes, mesh, rows=lambda text: range(len(text)), batch_size=ROWS
    )
    return found["all"]["loss"]["nats_per_token"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peer", "moe", "monet_vd"])
def test_losses_without_a_domain_are_told_beside_those_without_random_experts(
    kind, texts, tmp_path, capsys
):
    run = trained(kind, texts, tmp_path)
    found = evaluate_without(run, ["all"])
    evaluation, removals, _ = found
    assert evaluation["all"]["loss"]["tokens"] > 0
    assert [removal.domain for removal in removals] == ["one", "two"]
    for removal in removals:
        assert removal.experts.keys() == evaluation["all"]["experts"].keys()
        for figures in (removal.changes, removal.control, removal.gates):
            assert figures.keys() == {"one", "two"}
        other = "two" if removal.domain == "one" else "one"
        assert removal.gates[removal.domain] >= removal.gates[other]
    if kind == "peer":
        assert sum(sum(removal.experts.values()) for removal in removals)
        assert any(removal.changes != removal.control for removal in removals)
    write_evaluation(epath.Path(tmp_path / "out"), found, {"step": run.step})
    print_evaluation(epath.Path(tmp_path / "out"))
    assert "as many at random" in capsys.readouterr().out
    assert (tmp_path / "out" / "removals.png").exists()
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["removals"][0]["changes"] == removals[0].changes


def test_a_removed_expert_of_a_pool_is_one_whose_weights_are_0():
    _, task, _, state = make(**{"pool.storage": "float32"})
    removed = np.random.default_rng(0).random((1, 64)) < 0.5
    found = loss_of(task.model, state.variables, {"layer_1": removed[0]})
    pool = state.pools["run_1"]["pool"]
    kept = ~removed[:, :, None]
    zeroed = jax.tree.map(
        lambda leaf: leaf * kept.reshape(kept.shape + (1,) * (leaf.ndim - 3)), pool.weights
    )
    pools = state.pools | {"run_1": {"pool": type(pool).of_floats(zeroed)}}
    assert found == pytest.approx(loss_of(task.model, state.variables | {"pools": pools}), rel=1e-6)
    assert found != loss_of(task.model, state.variables)


@pytest.mark.parametrize("kind", ["peer", "moe", "metapeer", "monet_hd", "monet_vd"])
def test_every_kind_of_layer_leaves_out_what_is_removed(kind):
    _, task, _, state = make(
        **{
            "model.layers": ((kind, 2),),
            "pool.storage": "float32",
            "monet.num_experts": 64,
            "monet.top_k": 2,
            "monet.group": 1,
            "moe.num_experts": 8,
            "moe.hidden": 8,
        }
    )
    counts = {name: each.num_experts for each in routers(task.model) for name in each.names}
    assert counts.keys() == {"layer_0", "layer_1"}

    def loss_without(*removed):
        experts = {
            name: np.full(count, each)
            for (name, count), each in zip(counts.items(), removed, strict=True)
        }
        return loss_of(task.model, state.variables, experts)

    whole = loss_of(task.model, state.variables)
    assert loss_without(False, False) == pytest.approx(whole, rel=1e-6)
    # The experts of a layer are taken from that layer.
    losses = {whole, *(loss_without(*each) for each in ((True, False), (False, True)))}
    assert len({round(each, 5) for each in losses}) == 3


def test_what_cannot_be_removed_is_said_before_anything_is_read(texts, tmp_path, finished):
    run = open_run(str(finished))
    with pytest.raises(DataError, match="of one domain, files: .* give several"):
        evaluate_without(run, ["files"])
    with pytest.raises(DataError, match="no text of domain 'three'; choose from one, two"):
        evaluate_without(run, ["one", "three"], texts)
    with pytest.raises(DataError, match="domain 'one' has one row of text, and needs two"):
        evaluate_without(run, ["one"], texts, rows=1)
    dense = make(**{"model.layers": (("dense", 1),)})[1].model
    two = load_text(texts, "text", run.tokenizer, 32)
    with pytest.raises(ConfigError, match="no layer of this model has experts"):
        checked_domains(dense, two, ["one"], partial(validation_rows, count=None))
