import numpy as np
import pytest

from benchmarks import int4_quality, int4_quality_plots, sweep
from benchmarks.int4_arms import ADAMW, ADAMW_SHARED, ARMS, ECO, FLOAT32, INT4
from benchmarks.int4_buffers import LONG_STEPS, SMALL_MODEL
from benchmarks.int4_quality import LARGE
from benchmarks.protocol import OF_POOLS, RECIPE, SEEDS, SHARED


def _loss(settings):
    """Of a made-up world: int4 loses 0.01, AdamW 0.05; experts are worth something."""
    loss = 4.0 + 0.1 * settings["seed"]
    loss += {"int4": 0.01}.get(settings["pool.storage"], 0.0)
    loss += {"adamw": 0.05, "eco": 0.02}.get(settings.get("pool.rule"), 0.0)
    loss -= 0.01 * np.log2(np.prod(settings.get("peer.num_experts", (256, 256))) / 2**16)
    # Buffers matter where rates are low.
    low = settings[OF_POOLS] < 0.01
    loss += 0.1 * low * (settings.get("pool.accumulator_bits", 4) == 0)
    tuned = 0.1 if settings.get("pool.rule") == "adamw" else 0.03
    return loss + (not low) * 0.1 * abs(np.log(settings[OF_POOLS] / tuned))


def _series():
    codes = {f"codes/run_1/share_{code}": 1 / 8 for code in range(8)}
    codes |= {"codes/run_1/saturated_rows": 0.0, "codes/run_1/log_scale": -3.0}
    return [{"step": step, "validation/all/nats_per_token": 4.0, **codes} for step in (1, 2)]


def test_every_comparison_is_of_the_runs_it_names(tmp_path, monkeypatch):
    trained = []

    def pretend(recipe, settings, keep_series=False, backend=None, teacher=None):
        trained.append(settings)
        return sweep.Run(_loss(settings), {}, 0.0, series=_series() if keep_series else [])

    monkeypatch.setattr(sweep, "train", pretend)
    monkeypatch.setattr(int4_quality, "train", pretend)
    monkeypatch.setattr(int4_quality_plots, "PLOTS", tmp_path)
    result = int4_quality.run(quick=False)
    rows = {row[0]: row[1:] for row in result.rows}

    # Every arm has its own rate of pools; all but AdamW share int4's rate of the rest.
    alone = f"{ADAMW}, 16,384 experts"
    of_adamw = (ADAMW, ADAMW_SHARED, alone)
    assert {name: rates[OF_POOLS] for name, rates in result.details["rates"].items()} == {
        name: 0.1 if name in of_adamw else 0.03 for name in (*ARMS, alone)
    }
    shared = {
        rates[SHARED]
        for name, rates in result.details["rates"].items()
        if name not in (ADAMW, alone)
    }
    assert len(shared) == 1
    assert rows[FLOAT32] == ["0.03", "4.1000", "-0.0100 +- 0.0000"]
    assert rows[ADAMW] == ["0.1", "4.1500", "+0.0400 +- 0.0000"]
    assert rows["int4, 262,144 experts"] == ["0.03", "4.0900", "-0.0200 +- 0.0000"]
    assert rows["float32, AdamW, 16,384 experts"][1] == "4.1700"

    # Buffers are compared with 4 bits of the same model at the same rate.
    assert rows[f"{RECIPE}, best rate, 0 bits"][2] == "+0.0000 +- 0.0000"
    assert rows[f"{RECIPE}, a tenth of it, 0 bits"][::2] == ["0.003", "+0.1000 +- 0.0000"]
    assert rows[f"{SMALL_MODEL}, a tenth of it, {ECO}"][2] == "+0.0200 +- 0.0000"
    long = [settings for settings in trained if settings["steps"] == LONG_STEPS]
    assert len(long) == 5 * len(SEEDS) + 1

    values = {figure.name: figure for figure in result.figures}
    shares = [figure for name, figure in values.items() if "share of the loss" in name]
    assert [figure.value for figure in shares] == [pytest.approx(0.01 / 4.1, rel=0.01)]
    assert all(figure.ok for figure in result.figures if figure.target)
    pairs = [name for name in values if name.startswith("at equal training bytes")]
    assert [name.removeprefix("at equal training bytes: ") for name in pairs] == [
        f"{ours} experts - {theirs} experts (nats/token)"
        for ours, theirs in (
            ("int4, 262,144", f"{ADAMW}, 16,384"),
            ("int4, 262,144", f"{ADAMW_SHARED}, 16,384"),
            ("int4, 262,144", "bfloat16, 131,072"),
            ("int4, 262,144", "float32, 65,536"),
            ("int4, 131,072", "bfloat16, 65,536"),
            ("int4, 131,072", "int8, 65,536"),
            ("int4, 65,536", "float32, 16,384"),
        )
    ]
    sizes = {(each["pools"], each["experts"]): each for each in result.details["sizes"]}
    bytes_of_int4, bytes_of_adamw = sizes[INT4, 2**18]["bytes"], sizes[ADAMW, 2**14]["bytes"]
    # Codes and a scale a row; half a byte of accumulators and a moment a row. Four floats.
    assert bytes_of_int4 == (2 * LARGE[0] ** 2 * (64 + 4), 2 * LARGE[0] ** 2 * (128 + 8))
    assert bytes_of_adamw == (2 * 128**3 * 4, 2 * 128**3 * 16)
    assert {path.name for path in tmp_path.iterdir()} == {"loss_against_bytes.png", "long_run.png"}
