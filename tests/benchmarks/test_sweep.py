import functools
import json
import math
import time

import jax
import pytest

from benchmarks import sweep
from benchmarks.sweep import paired, rung, tune


def test_the_ladder_climbs_by_threes_and_tens():
    assert [rung(1e-2, steps) for steps in (-2, -1, 0, 1, 2)] == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


@pytest.mark.parametrize("best", [1e-4, 3e-3, 1e-2, 3e-1])
def test_tuning_goes_on_while_the_best_is_at_an_edge(best):
    tried = []

    def loss(rate):
        tried.append(rate)
        return abs(math.log(rate / best))

    found, table = tune(loss, 1e-2)
    assert found == best
    assert sorted(tried) == [rate for rate, _ in table]
    assert table[0][0] < best < table[-1][0]
    assert len(set(tried)) == len(tried)


def test_the_interval_of_paired_differences():
    interval = paired([1.0, 2.0, 3.0], [0.9, 1.8, 2.7])
    assert interval.mean == pytest.approx(0.2)
    assert interval.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)


def test_a_run_is_written_down_and_not_repeated(tmp_path, monkeypatch):
    trained = []

    def pretend(recipe, settings, folder, teacher=None):
        trained.append(settings)
        if settings["pool.learning_rate"] > 1:
            return False
        report = {"validation": {"all": {"nats_per_token": {"after": 4.5}}}, "experts": {"a": {}}}
        (folder / "report.json").write_text(json.dumps(report))
        return True

    monkeypatch.setattr(sweep, "LEDGER", tmp_path / "runs.jsonl")
    monkeypatch.setattr(sweep, "ROOT", tmp_path / "runs")
    monkeypatch.setattr(sweep, "_train", pretend)
    settings = {"pool.learning_rate": 0.1, "peer.num_experts": (8, 8), "seed": 0}
    first = sweep.train("quickstart", settings)
    assert first.nats_per_token == 4.5
    assert sweep.train("quickstart", settings) == first
    diverged = {**settings, "pool.learning_rate": 10.0}
    for _ in range(2):
        assert sweep.train("quickstart", diverged).nats_per_token == math.inf
    sweep.train("quickstart", {**settings, "seed": 1})
    sweep.train("peer_small", settings)
    assert len(trained) == 4
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["nats_per_token"] for line in lines] == [4.5, None, 4.5, 4.5]
    assert all(line["commit"] and line["device"] for line in lines)


def test_students_of_different_teachers_are_different_runs(tmp_path, monkeypatch):
    trained = []

    def pretend(recipe, settings, folder, teacher=None):
        trained.append((folder, teacher))
        losses = {"validation": {"all": {"nats_per_token": {"after": float(len(trained))}}}}
        (folder / "report.json").write_text(json.dumps({**losses, "experts": {}}))
        return True

    monkeypatch.setattr(sweep, "LEDGER", tmp_path / "runs.jsonl")
    monkeypatch.setattr(sweep, "ROOT", tmp_path / "runs")
    monkeypatch.setattr(sweep, "_train", pretend)
    teachers = [sweep.Teacher("reference", {"seed": seed}) for seed in (0, 1)]
    for _ in range(2):
        found = [sweep.train("distill/int4", {"a": 1}, teacher=each) for each in (*teachers, None)]
        assert [each.nats_per_token for each in found] == [1.0, 2.0, 3.0]
    assert len({folder for folder, _ in trained}) == len(trained) == 3


def test_jobs_keep_their_order():
    assert sweep.at_once([lambda number=number: number for number in range(7)]) == [*range(7)]


def test_no_job_is_begun_after_one_that_failed():
    begun = []

    def job(number):
        begun.append(number)
        if number == 0:
            raise RuntimeError("the first")
        time.sleep(0.05)

    with pytest.raises(RuntimeError, match="the first"):
        sweep.at_once([functools.partial(job, number) for number in range(100)])
    assert len(begun) < 50


def test_arms_of_equal_settings_are_trained_once(monkeypatch):
    trained = []

    def pretend(recipe, settings, backend):
        trained.append(settings)
        return sweep.Run(settings["rate"] + settings["seed"], {}, 0.0)

    monkeypatch.setattr(sweep, "train", pretend)
    runs = sweep.from_seeds(
        "quickstart", {"a": {"rate": 10}, 2: {"rate": 20}, "b": {"rate": 10}}, [1, 3]
    )
    losses = {key: [run.nats_per_token for run in each] for key, each in runs.items()}
    assert losses == {"a": [11, 13], 2: [21, 23], "b": [11, 13]}
    assert len(trained) == 4


def test_runs_that_are_compared_are_of_one_backend(tmp_path, monkeypatch):
    trained = []

    def pretend(recipe, settings, folder, teacher=None):
        trained.append((jax.default_backend(), settings["seed"]))
        loss = {"cpu": 4.0, "gpu": 5.0}[jax.default_backend()]
        report = {"validation": {"all": {"nats_per_token": {"after": loss}}}, "experts": {}}
        (folder / "report.json").write_text(json.dumps(report))
        return True

    def losses(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        (runs,) = sweep.from_seeds("quickstart", {"a": {"rate": 1}}, [0, 1]).values()
        return [run.nats_per_token for run in runs]

    monkeypatch.setattr(sweep, "LEDGER", tmp_path / "runs.jsonl")
    monkeypatch.setattr(sweep, "ROOT", tmp_path / "runs")
    monkeypatch.setattr(sweep, "_train", pretend)
    sweep.train("quickstart", {"rate": 1, "seed": 0})
    # One of two was found on the CPU: the GPU trains both, and the CPU takes them then.
    assert losses("gpu") == [5.0, 5.0]
    assert losses("cpu") == [5.0, 5.0]
    assert sorted(trained) == [("cpu", 0), ("gpu", 0), ("gpu", 1)]
    # A rate may be tuned anywhere.
    assert sweep.train("quickstart", {"rate": 1, "seed": 0}).nats_per_token == 4.0
