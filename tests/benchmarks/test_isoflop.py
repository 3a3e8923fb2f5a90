import math

import pytest

from benchmarks import isoflop, sweep
from benchmarks.equal_flops import flops_of, with_flops
from benchmarks.isoflop import DENSE, MOE, PEER, PEER_INT4, SIZES, arms


def test_all_models_of_a_size_take_the_same_flops():
    every = arms()
    for size in SIZES:
        wanted = every[size, PEER].flops
        assert all(
            arm.flops == pytest.approx(wanted, rel=0.01)
            for (of, _), arm in every.items()
            if of == size
        )
    # The pools are those of 16,384 and 65,536 experts in two layers.
    for name in (PEER, PEER_INT4):
        assert every["D=64", name].expert_parameters == 2 * 128**2 * 2 * 64
        assert every["D=128", name].expert_parameters == 2 * 256**2 * 2 * 128
    # Beside dense layers, mixtures add parameters and no FLOPs.
    assert every["D=128", MOE].parameters > 4 * every["D=128", DENSE].parameters


def test_the_width_found_is_the_nearest():
    settings = {"model.layers": (("dense", 3),)}
    wanted = flops_of({**settings, "mlp.hidden": 345}) + 500  # a unit makes 3 * 512
    assert with_flops(settings, "mlp.hidden", wanted)["mlp.hidden"] == 345
    with pytest.raises(ValueError, match="no mlp.hidden makes"):
        with_flops(settings, "mlp.hidden", 1000.0)


def test_every_rate_of_every_arm_is_tuned_and_losses_are_paired_by_seed(tmp_path, monkeypatch):
    trained = []
    best = {"mixture": 3e-3, "pool": 1e-1}

    def pretend(recipe, settings, backend=None, teacher=None):
        """Loss by kind and seed, least at the best rates."""
        trained.append(settings)
        kind = "mixture" if "moe.hidden" in settings else "dense"
        kind = "pool" if "pool.storage" in settings else kind
        loss = {"dense": 5.0, "mixture": 4.0, "pool": 3.0}[kind] + 0.1 * settings["seed"]
        rate = settings["optimizer.learning_rate"]
        loss += abs(math.log(rate / best.get(kind, 1e-2)))
        loss += abs(math.log(settings.get("pool.learning_rate", 1e-2) / 1e-2))
        return sweep.Run(loss, {}, 0.0)

    monkeypatch.setattr(sweep, "train", pretend)
    monkeypatch.setattr(isoflop, "ROOT", tmp_path)
    result = isoflop.run(quick=True)
    rows = {row[1]: row[-4:] for row in result.rows}
    assert rows == {
        DENSE: ["0.01", "-", "5.0500", "+0.0000 +- 0.0000"],
        MOE: ["0.003", "-", "4.0500", "-1.0000 +- 0.0000"],
        PEER_INT4: ["0.1", "0.01", "3.0500", "-2.0000 +- 0.0000"],
    }
    full_length = [settings for settings in trained if settings["steps"] == isoflop.QUICK_STEPS]
    assert len(full_length) == 3 * 2
    assert [figure.ok for figure in result.figures] == [True, None, None, None, None]
    assert (tmp_path / "isoflop" / "loss_against_flops.png").stat().st_size > 1000
