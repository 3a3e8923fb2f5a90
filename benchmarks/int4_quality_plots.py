"""Plots the data file of `int4_quality`: python -m benchmarks.int4_quality_plots."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from benchmarks.int4_arms import INT4
from benchmarks.result import REPOSITORY, published
from benchmarks.sweep import paired

matplotlib.use("Agg")
PLOTS = REPOSITORY / "docs" / "int4_quality"
BASE = (INT4, 65_536)  # the quickstart, to which intervals are relative


def plot(details: Mapping[str, Any]) -> None:
    """Plots loss against bytes, and the figures of the long run over its steps."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    _loss_against_bytes(details["sizes"])
    _long_run(details["long_run"])


def _loss_against_bytes(sizes: list[dict[str, Any]]) -> None:
    """Plots loss against bytes.

    Bars are the 95% intervals of the differences, by seed, from int4 with 65,536 experts.
    """
    (of_int4,) = (each["losses"] for each in sizes if (each["pools"], each["experts"]) == BASE)
    by_pools = defaultdict(list)
    for each in sizes:
        half_width = paired(each["losses"], of_int4).half_width
        by_pools[each["pools"]].append((*each["bytes"], np.mean(each["losses"]), half_width))
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), sharey=True)
    for axis, index, what in ((axes[0], 0, "inference"), (axes[1], 1, "training")):
        for name, points in by_pools.items():
            points.sort()
            axis.errorbar(
                [point[index] / 1e6 for point in points],
                [point[2] for point in points],
                [point[3] for point in points],
                marker="o",
                capsize=3,
                elinewidth=0.8,
                label=name,
            )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel(f"MB of experts a layer, {what}")
    axes[0].set_ylabel("validation loss, nats/token")
    axes[1].legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(PLOTS / "loss_against_bytes.png", dpi=100)
    plt.close(figure)


def _long_run(series: list[dict[str, float]]) -> None:
    steps = [each["step"] for each in series]
    layers = sorted({key.split("/")[1] for key in series[0] if key.startswith("codes/")})
    figure, axes = plt.subplots(1, 3 + len(layers), figsize=(4 * (3 + len(layers)), 3.6))
    axes[0].plot(steps, [each["validation/all/nats_per_token"] for each in series])
    axes[0].set_title("validation loss, nats/token")
    axes[1].set_title("share of rows with over 5% of codes at the limit", fontsize="small")
    axes[2].set_title("geometric mean of scales, over the first", fontsize="medium")
    for layer, of_codes in zip(layers, axes[3:], strict=True):
        axes[1].plot(steps, [each[f"codes/{layer}/saturated_rows"] for each in series], label=layer)
        scales = np.exp([each[f"codes/{layer}/log_scale"] for each in series])
        axes[2].plot(steps, scales / scales[0], label=layer)
        shares = [[each[f"codes/{layer}/share_{code}"] for each in series] for code in range(8)]
        of_codes.stackplot(steps, shares, labels=[str(code) for code in range(8)])
        of_codes.set_title(f"magnitudes of codes, {layer}")
    axes[1].legend()
    axes[2].legend()
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    for axis in axes:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(PLOTS / "long_run.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    plot(published("int4_quality"))
