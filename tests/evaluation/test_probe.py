"""A probe that is written in this file alone, in the files and tables of an evaluation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from peerjax.evaluation import PROBES, Probe, evaluate
from peerjax.evaluation.loss import Loss
from peerjax.inference.evaluating import Found, evaluate_run, print_evaluation, write_evaluation
from peerjax.inference.trained import open_run
from peerjax.objectives.task import inputs_of
from peerjax.sharding import make_mesh
from tests.training.test_step import ROWS, VOCABULARY, as_rows, make, make_batch


@dataclasses.dataclass(frozen=True)
class Certainty(Probe):
    """The mean probability of the likeliest token, and how many tokens were read."""

    def zeros(self, model):
        return jnp.zeros(2)

    def add(self, model, sums, logits_BLV, kept, batch):
        likeliest_BL = jnp.max(jax.nn.softmax(logits_BLV), axis=-1)
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], likeliest_BL.shape)
        return sums + jnp.stack([jnp.sum(likeliest_BL * weight_BL), jnp.sum(weight_BL)])

    def result(self, model, sums, variables):
        return {"certainty": float(sums[0] / sums[1]), "read": int(sums[1])}


def test_a_new_probe_is_in_the_file_and_in_the_table(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROBES, "certainty", Certainty)
    run = open_run(str(finished))
    found = evaluate_run(run, rows=3)
    write_evaluation(epath.Path(tmp_path), Found(found), {"step": run.step})
    record = json.loads((tmp_path / "evaluation.json").read_text())
    of_all = record["texts"]["all"]["certainty"]
    assert of_all["read"] == record["texts"]["all"]["loss"]["tokens"]
    assert 0 < of_all["certainty"] < 1
    print_evaluation(epath.Path(tmp_path))
    table = capsys.readouterr().out
    assert "certainty" in table
    assert f"{of_all['certainty']:.4g}" in table


def test_padding_does_not_count_and_all_text_is_the_sum_of_its_domains():
    _, task, _, state = make()
    rows = as_rows(make_batch())
    texts = {"one": rows[:3], "two": rows[3:]}
    probes = {"loss": Loss((2,) * VOCABULARY), "certainty": Certainty()}
    found = evaluate(
        task.model, state.variables, texts, probes, make_mesh(jax.devices()[:1]),
        rows=lambda text: range(len(text)), batch_size=4,
    )  # fmt: skip
    batch = make_batch()
    logits = jax.jit(task.model.apply)(state.variables, *inputs_of(batch))
    losses = np.asarray(task.loss(logits, {}, batch, (), 0), np.float64)
    for text, part in (("one", losses[:3]), ("two", losses[3:]), ("all", losses)):
        result = found[text]["loss"]
        assert result["nats_per_token"] == pytest.approx(part.mean(), rel=1e-6)
        assert (result["tokens"], result["bytes"]) == (part.size, 2 * part.size)
        assert found[text]["certainty"]["read"] == part.size
    assert result["bits_per_byte"] == pytest.approx(losses.mean() / 2 / np.log(2), rel=1e-6)


def test_equal_probes_share_one_program_whatever_they_are_called_and_given():
    traced = []

    @dataclasses.dataclass(frozen=True)
    class Traced(Probe):
        def add(self, model, sums, logits_BLV, kept, batch):
            traced.append(self)
            return sums

        def result(self, model, sums, variables):
            return {}

    _, task, _, state = make()
    probes = {name: Traced(given={"more": {"of": np.ones(2)}}) for name in ("one", "two", "three")}
    evaluate(
        task.model, state.variables, {"text": as_rows(make_batch())}, probes,
        make_mesh(jax.devices()[:1]), rows=lambda text: range(ROWS), batch_size=ROWS,
    )  # fmt: skip
    assert len(traced) == 2  # for the sums of all text and of the domain
