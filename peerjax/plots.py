"""Plots the results of a run as PNG files."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from etils import epath

from peerjax.evaluation.usage import curve_ranks

# The first colour of matplotlib's default cycle is reserved for training.
TRAIN_COLOR = "C0"


def plot_losses(path: epath.Path, records: Sequence[Mapping[str, float | int]]) -> None:
    """Draws the training loss and the validation loss of every domain over steps.

    Args:
        path: the PNG to write.
        records: lines of `metrics.jsonl`.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    train = [(record["step"], record["loss"]) for record in records if "loss" in record]
    if train:
        axes.plot(*zip(*train, strict=True), TRAIN_COLOR, alpha=0.4, linewidth=1, label="training")
    names = sorted({name for record in records for name in record if _is_loss(name)})
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        domain = name.split("/")[1]
        width = 2.5 if domain == "all" else 1.2
        label = f"validation: {domain}"
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=width, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_losses_by_domain(path: epath.Path, bits_per_byte: Mapping[str, float]) -> None:
    """Draws a bar for the loss on each domain's text.

    Args:
        path: the PNG to write.
        bits_per_byte: loss by domain.
    """
    figure = matplotlib.figure.Figure(
        figsize=(8, 1.2 + 0.4 * len(bits_per_byte)), layout="constrained"
    )
    axes = figure.add_subplot()
    bars = axes.barh(list(bits_per_byte), list(bits_per_byte.values()))
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="bits per byte", title="Loss")
    axes.margins(x=0.1)
    _save(figure, path)


def plot_distillation(
    path: epath.Path,
    records: Sequence[Mapping[str, float | int]],
    texts: Mapping[str, Mapping[str, float]],
    starts: Sequence[Mapping[str, Any]],
    tokens_per_step: int,
) -> None:
    """Draws a student's loss over tokens, with the stages of its start, and the gap by text.

    Args:
        path: the PNG to write.
        records: lines of `metrics.jsonl`.
        texts: the comparison of student and teacher, by text.
        starts: the stages, each with a title and its comparison with the teacher, by text.
        tokens_per_step: tokens in a step.
    """
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    over_tokens, by_text = figure.subplots(1, 2)
    name = "validation/all/nats_per_token"
    points = [(each["step"] * tokens_per_step, each[name]) for each in records if name in each]
    over_tokens.plot(*zip(*points, strict=True), marker=".", label="student")
    for number, stage in enumerate(starts):
        loss = stage["texts"]["all"]["student"]
        over_tokens.axhline(loss, color=f"C{number + 1}", linestyle=":", label=stage["title"])
    over_tokens.axhline(texts["all"]["teacher"], color="black", label="teacher")
    over_tokens.set(xlabel="tokens", ylabel="validation loss, nats/token")
    over_tokens.grid(alpha=0.3)
    over_tokens.legend()
    gaps = np.array([found["gap"] for found in texts.values()])
    ends = np.array([[found["gap_low"], found["gap_high"]] for found in texts.values()]).T
    errors = np.abs(ends - gaps)
    by_text.errorbar(gaps, range(len(texts)), xerr=errors, fmt="o", capsize=3)
    by_text.axvline(0, color="grey", linestyle=":")
    by_text.set_yticks(range(len(texts)), list(texts))
    by_text.invert_yaxis()
    by_text.set(xlabel="student - teacher, nats/token, with 95% intervals over rows")
    _save(figure, path)


def plot_removals(path: epath.Path, changes: Mapping[str, Mapping[str, float]]) -> None:
    """Draws the change of the loss on each domain without the experts of one domain.

    Args:
        path: the PNG to write.
        changes: changes by domain whose experts are removed, then by domain of text.
    """
    texts = list(next(iter(changes.values())))
    values = np.array([[each[text] for text in texts] for each in changes.values()])
    figure = matplotlib.figure.Figure(figsize=(2.5 + len(texts), 1.5 + 0.6 * len(changes)))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    largest = np.abs(values).max() or 1.0
    axes.imshow(values, cmap="coolwarm", vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:+.3f}", ha="center", va="center")
    axes.set_xticks(range(len(texts)), texts)
    axes.set_yticks(range(len(changes)), list(changes))
    axes.set(xlabel="text", ylabel="experts removed", title="Change of the loss (nats/token)")
    _save(figure, path)


def plot_expert_usage(path: epath.Path, usage: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws, for each layer, the experts' shares of the gates, most used first.

    Args:
        path: the PNG to write.
        usage: results of the probe `peerjax.evaluation.usage.Usage`, by layer.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in usage.items():
        rank = curve_ranks(found["num_experts"]) / found["num_experts"]
        curve = found["curve"]
        axes.loglog(rank, np.where(curve > 0, curve, np.nan), label=name.replace("_", " "))
    axes.axhline(1.0, color="grey", linestyle=":", label="even")
    axes.set(
        xlabel="experts, most used first (share of all)",
        ylabel="gate received (1 = even share)",
        title="Expert usage on the validation text",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_active_experts(
    path: epath.Path,
    of_all: Mapping[str, Mapping[str, Any]],
    by_text: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> None:
    """Draws the number of active experts a token: by layer and text, and its distribution.

    Args:
        path: the PNG to write.
        of_all: results of the probe `ActiveExperts` on all text, by layer.
        by_text: results by text, then by layer.
    """
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    means, shares = figure.subplots(1, 2)
    layers = list(of_all)
    for number, (text, found) in enumerate(by_text.items()):
        places = np.arange(len(layers)) + 0.1 * (number - (len(by_text) - 1) / 2)
        values = [[found[layer][each] for layer in layers] for each in ("mean", "deviation")]
        means.errorbar(places, values[0], values[1], label=text, fmt="o", capsize=3)
    means.set_xticks(range(len(layers)), [layer.replace("_", " ") for layer in layers])
    means.set(title="Mean and deviation", ylabel="active experts a token")
    for layer, found in of_all.items():
        distribution: Any = found["distribution"]
        numbers, at_most = np.arange(len(distribution)), np.cumsum(distribution)
        shares.step(numbers, at_most, where="post", label=layer.replace("_", " "))
    shares.set(
        title="Tokens with at most so many", xlabel="active experts", ylabel="share of tokens"
    )
    for axes in (means, shares):
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def plot_sinks(
    path: epath.Path,
    sinks: Mapping[str, Mapping[str, Any]],
    activations: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draws alpha_1 of every head, and large activations, by layer.

    Args:
        path: the PNG to write.
        sinks: results of the probe `Sinks`, by layer and head.
        activations: results of the probe `LargeActivations`, by layer.
    """
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    heads, ratios = figure.subplots(1, 2)
    names = [layer.replace("_", " ") for layer in activations]
    values = [found["alpha_1"] for row, found in sinks.items() if ".head_" in row]
    shares = np.reshape(values, (len(names), -1))
    image = heads.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=heads)
    heads.set_yticks(range(len(names)), names)
    heads.set_xticks(range(shares.shape[1]))
    heads.set(title="alpha_1, the attention to the first token", xlabel="head")
    ratios.bar(names, [found["ratio"] for found in activations.values()])
    ratios.set(title="Largest activation over the median", yscale="log")
    ratios.grid(alpha=0.3)
    _save(figure, path)


def plot_metaexperts(
    path: epath.Path, by_domain: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    """Draws the share of every metaexpert in each domain of text, as a heat map for each layer.

    Args:
        path: the PNG to write.
        by_domain: results of the probe `Metaexperts`, by domain and layer.
    """
    layers = list(next(iter(by_domain.values())))
    size = (3 + 4 * len(layers), 2 + 0.3 * len(by_domain))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        shares = np.stack([found[layer]["shares"] for found in by_domain.values()])
        image = axes.imshow(shares, cmap="viridis", vmin=0, aspect="auto")
        figure.colorbar(image, ax=axes)
        axes.set_yticks(range(len(by_domain)), list(by_domain))
        axes.set(title=f"{layer.replace('_', ' ')}: shares of metaexperts", xlabel="metaexpert")
    _save(figure, path)


def plot_pools(path: epath.Path, records: Sequence[Mapping[str, float | int]]) -> None:
    """Draws packed pools over steps: hit experts, step size, saturated rows, shares of codes.

    Args:
        path: the PNG to write.
        records: lines of `metrics.jsonl`.
    """
    figure = matplotlib.figure.Figure(figsize=(11, 7), layout="constrained")
    hit, step, full, shares = figure.subplots(2, 2).ravel()
    names = sorted({name for record in records for name in record})
    panels = [
        (hit, "experts_hit/", "share of experts hit in a step"),
        (step, "pool_step/", "mean |step| of hit weights (units of the accumulator)"),
        (full, "/saturated_rows", "share of saturated rows"),
    ]
    for axes, part, title in panels:
        for name in (name for name in names if part in name):
            label = name.replace(part, "").removeprefix("codes/")
            axes.plot(*_series(records, name), label=label, linewidth=1)
        axes.set(title=title, xlabel="step")
        if axes.lines:  # dense rules have no figures of steps
            axes.legend()
    layers = sorted({name.split("/")[1] for name in names if name.startswith("codes/")})
    for layer in layers[:1]:
        series = [_series(records, f"codes/{layer}/share_{eighth}") for eighth in range(8)]
        labels = [f"{eighth}/8" for eighth in range(8)]
        shares.stackplot(series[0][0], [values for _, values in series], labels=labels)
        shares.set(title=f"magnitude of the codes of {layer}", xlabel="step", ylim=(0, 1))
        shares.legend(fontsize="small", ncols=2)
    _save(figure, path)


def _series(records: Sequence[Mapping[str, float | int]], name: str) -> tuple[list, list]:
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]


def _is_loss(name: str) -> bool:
    return name.startswith("validation/") and name.endswith("/nats_per_token")


def plot_largest_pools(
    path: epath.Path, counts: Sequence[int], experts: Sequence[float], target: str, chips: int
) -> None:
    """Draws how many experts a pool can have on a number of devices.

    Args:
        path: the PNG to write.
        counts: numbers of devices that share a pool.
        experts: largest number of experts on each number of devices.
        target: name of the target whose step was compiled.
        chips: number of its chips.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(counts, experts, marker=".", base=2)
    axes.set(
        xlabel="devices that share a pool",
        ylabel="experts of a pool",
        title=f"Largest pools, estimated from {target} ({chips} chips)",
    )
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: matplotlib.figure.Figure, path: epath.Path) -> None:
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
