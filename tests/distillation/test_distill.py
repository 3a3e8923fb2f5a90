"""Students of a small run: the report, resuming, starts, and what is refused."""

import json

import jax
import numpy as np
import pytest
import scipy.special

from peerjax.config import config_of_student
from peerjax.data.pipeline import load_corpus, validation_rows
from peerjax.distillation import report
from peerjax.distillation.comparison import Rows, compare, summary
from peerjax.distillation.distill import ROWS, distill
from peerjax.errors import CheckpointError, ConfigError
from peerjax.inference.trained import open_run, restore
from peerjax.sharding import make_mesh
from peerjax.training import pending
from peerjax.training.loop import train
from tests.conftest import config_of_finished
from tests.training.test_resume import saved_arrays
from tests.training.tiny import SAVE_EVERY, tiny_config

STEPS = 4


def recipe_of_student(storage="int4", **changes):
    recipe = config_of_student()
    recipe.steps = STEPS
    recipe.pool.storage = storage
    recipe.distill.start = "searched"
    recipe.distill.calibration_rows = 3
    recipe.optimizer.warmup_steps = 1
    recipe.eval.every = 2
    recipe.eval.rows = ROWS
    recipe.checkpoint.every = 2
    recipe.update_from_flattened_dict(changes)
    return recipe


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """The folder of a run with float pools."""
    config = config_of_finished(corpus)
    config.pool.storage = "float32"
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(config, str(folder))
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "run"
    distill(recipe_of_student(), str(folder), str(teacher))
    return folder


@pytest.mark.slow
def test_the_report_says_what_the_student_lost_and_takes(student, teacher):
    record = json.loads((student / report.FILE).read_text())
    whole = record["texts"]["all"]
    assert whole["gap"] == pytest.approx(whole["student"] - whole["teacher"])
    assert whole["gap_low"] <= whole["gap"] <= whole["gap_high"]
    assert 0 < whole["divergence"] < 0.1
    assert 0.5 < whole["agreement"] <= 1
    assert [each["title"] for each in record["starts"]] == [
        "rounded",
        "searched scales",
    ]
    sizes = record["bytes"]
    assert sizes["teacher"]["weights"] == 64 * 2 * 16 * 4
    assert sizes["student"]["codes"] == 64 * 2 * 16 / 2
    assert sizes["student"]["levels"] == pytest.approx(64 * 2 * 16 * np.log2(15) / 8)
    assert record["tokens"] == STEPS * 8 * 32
    assert (student / report.PLOT).exists()
    config = open_run(str(student)).config
    assert (config.model.width, config.peer.num_experts) == (16, (8, 8))
    assert config.distill.teacher == str(teacher)


@pytest.mark.slow
def test_a_student_starts_with_the_loss_of_the_chosen_stage(student):
    stages = json.loads((student / report.STARTS).read_text())
    first = json.loads((student / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    rounded, searched = (each["texts"]["all"]["student"] for each in stages)
    assert searched != rounded
    loss = first["validation/all/nats_per_token"]
    assert loss == pytest.approx(searched, rel=1e-6)
    assert abs(loss - searched) < abs(loss - rounded)
    multiples = stages[-1]["multiples of the scales of training"]
    assert multiples["run_1/pool"][0].keys() == {"down", "up"}


@pytest.mark.slow
def test_a_killed_student_continues_bit_equally(student, teacher, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    figures = pending.Pending.figures

    class Killed(Exception):
        pass

    def figures_or_die(self):
        if self.step == 3:
            raise Killed
        return figures(self)

    with monkeypatch.context() as patch:
        patch.setattr(pending.Pending, "figures", figures_or_die)
        with pytest.raises(Killed):
            distill(recipe_of_student(), str(folder), str(teacher))
    assert not (folder / report.FILE).exists()
    distill(recipe_of_student(), str(folder), str(teacher))
    assert (folder / "metrics.jsonl").read_bytes() == (student / "metrics.jsonl").read_bytes()
    assert (
        json.loads((folder / report.FILE).read_text())["texts"]
        == (json.loads((student / report.FILE).read_text())["texts"])
    )
    one, other = (saved_arrays(each, STEPS) for each in (folder, student))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.slow
def test_a_student_with_its_own_model_needs_no_outputs(teacher, corpus, tmp_path):
    recipe = tiny_config(corpus)
    recipe.steps, recipe.eval.every = 2, 2
    recipe.model.layers = (("dense", 1),)
    with pytest.raises(ConfigError, match="the student has depth 1 and the teacher 2"):
        distill(recipe, str(tmp_path / "run"), str(teacher))
    recipe.distill.beta = (0.0, 0.0)
    distill(recipe, str(tmp_path / "run"), f"{teacher}/checkpoints/{SAVE_EVERY}")
    record = json.loads((tmp_path / "run" / report.FILE).read_text())
    assert record["starts"] == []
    assert "codes" not in record["bytes"]["student"]


@pytest.fixture(scope="module")
def monet(corpus, tmp_path_factory):
    """The folder of a run with Monet layers."""
    config = config_of_finished(corpus)
    config.steps = 3
    config.model.layers = (("dense", 1), ("monet_vd", 2))
    config.monet.num_experts, config.monet.expert_width, config.monet.heads = 16, 4, 2
    config.monet.top_k = 2
    folder = tmp_path_factory.mktemp("monet") / "run"
    train(config, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("start", ["monet", "monet_plain"])
def test_a_monet_becomes_a_peer_of_packed_experts(start, monet, tmp_path):
    changes = {"distill.start": start, "peer.experts_per_head": 16}
    if start == "monet":
        changes["peer.kept_pairs"] = 8
    distill(recipe_of_student(**changes), str(tmp_path / "run"), str(monet))
    record = json.loads((tmp_path / "run" / report.FILE).read_text())
    losses = {each["title"]: each["texts"]["all"]["student"] for each in record["starts"]}
    losses["teacher"] = record["texts"]["all"]["teacher"]
    if start == "monet":
        assert losses["as PEER"] == pytest.approx(losses["teacher"], abs=1e-4)
        assert losses["pruned"] != losses["teacher"]
        assert len(record["starts"][0]["run_1/pairs in use"]) == 1
        (share,) = record["starts"][0]["run_1/gates of kept pairs"]
        assert 0.5 < share < 1
    assert abs(losses["cut to 16 a head"] - losses["teacher"]) < 0.1
    config = open_run(str(tmp_path / "run")).config
    assert config.model.layers == (("dense", 1), ("peer", 2))
    assert config.pool.storage == "int4"
    assert record["bytes"]["student"]["codes"] == 2 * (8 if start == "monet" else 16) * 4 * 16


def test_a_monet_whose_experts_do_not_fit_is_refused(monet, teacher, tmp_path):
    changes = {"distill.start": "monet", "peer.experts_per_head": 64}
    for fields, folder, message in (
        ({"peer.num_experts": (2, 2)}, monet, r"peer.num_experts=\(2, 2\) cannot hold"),
        ({"peer.kept_pairs": 17}, monet, "kept_pairs=17 is more than the 16 pairs"),
        ({}, teacher, "the teacher has no Monet layer"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill(recipe_of_student(**changes, **fields), str(tmp_path / "a"), str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 24}, "the student has width 24 and the teacher 16"),
        ({"peer.num_experts": (8, 4)}, r"keys2 is \[1, 2, 8, 8\] there and \[1, 2, 4"),
        ({"distill.start": "best"}, "distill.start='best' is unknown"),
        ({"distill.alpha": (0.9, 2.0)}, "distill.alpha=2.0 is not in"),
        ({"init_from": "elsewhere"}, "init_from=elsewhere and distill.start="),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_by_name(changes, message, teacher, tmp_path):
    with pytest.raises(ConfigError, match=message):
        distill(recipe_of_student(**changes), str(tmp_path / "new"), str(teacher))
    assert not (tmp_path / "new").exists()


def test_a_teacher_that_is_missing_or_half_written_is_refused(teacher, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        distill(recipe_of_student(), str(tmp_path / "new"), str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no checkpoint of step 99"):
        distill(recipe_of_student(), str(tmp_path / "new"), f"{teacher}/checkpoints/99")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.json", "data.json", "tokenizer.json"):
        (unfinished / name).write_bytes((teacher / name).read_bytes())
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        distill(recipe_of_student(), str(tmp_path / "new"), str(unfinished))
    assert not (tmp_path / "new").exists()


def test_text_of_another_tokenizer_is_refused(teacher, tmp_path):
    other = tmp_path / "tokenizer.json"
    data = json.loads((teacher / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][:-1]
    other.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="the text has another tokenizer"):
        distill(
            recipe_of_student(**{"data.tokenizer": str(other)}),
            str(tmp_path / "new"),
            str(teacher),
        )


def test_train_refuses_a_teacher(corpus, tmp_path):
    config = tiny_config(corpus)
    config.distill.teacher = "runs/a"
    with pytest.raises(ConfigError, match="train.py has no teacher; run distill.py"):
        train(config, str(tmp_path / "new"))
    config.distill.teacher, config.distill.start = "", "rounded"
    with pytest.raises(ConfigError, match="distill.start='rounded' needs a teacher"):
        train(config, str(tmp_path / "new"))


@pytest.mark.slow
def test_the_comparison_is_that_of_numpy(student, teacher, corpus):
    runs = [open_run(str(each)) for each in (teacher, student)]
    mesh = make_mesh()
    models = [(run.model, restore(run, mesh)) for run in runs]
    texts = load_corpus(runs[0].config).validation
    with jax.set_mesh(mesh):
        found = compare(*models, texts, mesh, rows=5, batch_size=2)
    ((name, rows),) = found.items()
    text = texts[name]
    batch = [text[row] for row in validation_rows(text, 5)]
    inputs = [
        np.stack([row[field] for row in batch]) for field in ("inputs", "positions", "segments")
    ]
    targets = np.stack([row["targets"] for row in batch])
    logits = [np.asarray(model.apply(each, *inputs), np.float64) for model, each in models]
    log_probs = [scipy.special.log_softmax(each, -1) for each in logits]
    for figure, each in ((rows.teacher, log_probs[0]), (rows.student, log_probs[1])):
        expected = -np.take_along_axis(each, targets[..., None], -1)[..., 0].mean(-1)
        np.testing.assert_allclose(figure, expected, rtol=1e-5)
    apart = np.sum(np.exp(log_probs[0]) * (log_probs[0] - log_probs[1]), -1).mean(-1)
    np.testing.assert_allclose(rows.divergence, apart, rtol=1e-3, atol=1e-6)
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).mean(-1)
    np.testing.assert_allclose(rows.agreement, same, atol=0.05)
    assert summary(found)["all"]["rows"] == 5


def test_the_interval_of_the_gap_is_that_of_its_mean():
    rng = np.random.default_rng(0)
    gaps = [rng.normal(0.1, 0.2, 400), rng.normal(0.3, 0.1, 100)]
    zeros = {f"text_{n}": Rows(np.zeros(len(g)), g, g, g) for n, g in enumerate(gaps)}
    found = summary(zeros)
    for name, gap in zip(zeros, gaps, strict=True):
        half = 1.96 * gap.std() / np.sqrt(len(gap))
        assert found[name]["gap_low"] == pytest.approx(gap.mean() - half, abs=half / 8)
        assert found[name]["gap_high"] == pytest.approx(gap.mean() + half, abs=half / 8)
    half = 1.96 * np.sqrt(sum(gap.var() / len(gap) for gap in gaps)) / 2
    assert found["all"]["gap"] == pytest.approx(np.mean([gap.mean() for gap in gaps]))
    assert found["all"]["gap_high"] - found["all"]["gap"] == pytest.approx(half, rel=1 / 8)
