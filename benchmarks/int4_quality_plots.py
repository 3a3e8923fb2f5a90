"""Plots of `int4_quality`, from its data file: python -m benchmarks.int4_quality_plots."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from benchmarks.result import REPOSITORY, published

matplotlib.use("Agg")
PLOTS = REPOSITORY / "docs" / "int4_quality"


def plot(details: Mapping[str, Any]) -> None:
    """Writes loss against bytes, and the long run over its steps."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    _loss_against_bytes(details["sizes"])
    _long_run(details["long_run"])


def _loss_against_bytes(sizes: list[dict[str, Any]]) -> None:
    by_pools = defaultdict(list)
    for each in sizes:
        by_pools[each["pools"]].append((*each["bytes"], np.mean(each["losses"])))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, index, what in ((axes[0], 0, "inference"), (axes[1], 1, "training")):
        for name, points in by_pools.items():
            points.sort()
            axis.plot(
                [point[index] / 1e6 for point in points],
                [point[2] for point in points],
                marker="o",
                label=name,
            )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel(f"MB of experts a layer, {what}")
    axes[0].set_ylabel("validation loss, nats/token")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(PLOTS / "loss_against_bytes.png", dpi=100)
    plt.close(figure)


def _long_run(series: list[dict[str, float]]) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6))
    steps = [each["step"] for each in series]
    axes[0].plot(steps, [each["validation/all/nats_per_token"] for each in series])
    axes[0].set_title("validation loss, nats/token")
    layers = sorted({key.split("/")[1] for key in series[0] if key.startswith("codes/")})
    for layer in layers:
        for axis, name in ((axes[1], "saturated_rows"), (axes[2], "log_scale")):
            axis.plot(steps, [each[f"codes/{layer}/{name}"] for each in series], label=layer)
    axes[1].set_title("share of saturated rows")
    axes[2].set_title("mean logarithm of scales")
    shares = [[each[f"codes/{layers[0]}/share_{code}"] for each in series] for code in range(8)]
    axes[3].stackplot(steps, shares, labels=[str(code) for code in range(8)])
    axes[3].set_title(f"magnitudes of codes, {layers[0]}")
    axes[3].legend(fontsize="small", ncols=2)
    axes[2].legend()
    for axis in axes:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(PLOTS / "long_run.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    plot(published("int4_quality"))
