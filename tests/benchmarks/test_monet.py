import pytest

from benchmarks import monet, monet_time, result, sweep
from benchmarks.monet_models import HD, HD_INT4, MODELS, PEER, PEER_INT4, VD
from benchmarks.protocol import QUICK_STEPS, SEEDS, STEPS


def _pretend(monkeypatch, tmp_path):
    """Monet is 0.1 behind, takes twice the time of PEER, and gains 0.3 in half the steps."""
    trained = []

    def train(recipe, settings, backend=None, teacher=None):
        trained.append(settings)
        loss = 4.0 + 0.01 * settings["seed"] + 0.1 * ("monet.storage" in settings)
        loss += 0.05 * ("int4" in settings.values())
        loss -= 0.3 * (settings["steps"] == STEPS // 2)
        loss += abs(settings["optimizer.learning_rate"] - 0.01)
        loss += abs(settings.get("pool.learning_rate", 0.1) - 0.1)
        experts = {"run_1.0": {"usage": 0.5, "unevenness": 1.0}}
        return sweep.Run(loss, experts, 0.0)

    turns = iter(range(1000))

    def measure(arm, steps):
        seconds = 0.2 if "monet.storage" in arm.settings else 0.1
        slow_turn = 5 * (next(turns) < len(MODELS))
        return {"gradient_share": 0.25, "peak_bytes": 2e9, "seconds_per_step": seconds + slow_turn}

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(monet_time, "measure", measure)
    monkeypatch.setattr(result, "FOLDER", tmp_path)
    result.publish("monet_time", monet_time.run(quick=False), quick=False)
    return trained


def test_monet_is_compared_with_the_peer_of_its_storage(monkeypatch, tmp_path):
    trained = _pretend(monkeypatch, tmp_path)
    found = monet.run(quick=False)
    rows = {row[0]: row[2:] for row in found.rows}
    assert rows[PEER] == ["4.0100", "", "", "50.0%", "1.000", "25.0%", "100", "2.00"]
    assert rows[HD][:3] == ["4.1100", "+0.1000 +- 0.0000", "-0.2000 +- 0.0000"]
    assert rows[VD][:3] == rows[HD][:3]
    assert rows[PEER_INT4][0] == "4.0600"
    assert rows[HD_INT4][:3] == ["4.1600", "+0.1000 +- 0.0000", ""]
    lengths = [settings["steps"] for settings in trained]
    assert lengths.count(STEPS) == len(MODELS) * len(SEEDS)
    assert lengths.count(STEPS // 2) == 2 * len(SEEDS)
    assert found.details["models"][HD_INT4]["rates"] == {
        "optimizer.learning_rate": 0.01,
        "pool.learning_rate": 0.1,
    }
    assert found.figures[0].ok
    values = {figure.name: figure.value for figure in found.figures}
    assert values[f"{HD_INT4} - {HD}, the same tokens (nats/token)"] == pytest.approx(0.05)
    assert values[f"{VD} - {PEER}, the same time (nats/token)"] == pytest.approx(-0.2)


def test_a_quick_run_takes_two_models(monkeypatch, tmp_path):
    trained = _pretend(monkeypatch, tmp_path)
    assert [row[0] for row in monet.run(quick=True).rows] == [PEER, HD]
    assert max(settings["steps"] for settings in trained) == QUICK_STEPS


def test_steps_that_were_never_timed_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(result, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="run `python -m benchmarks monet_time` first"):
        monet.run(quick=False)
