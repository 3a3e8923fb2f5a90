"""What a run reports about its pools at the start, and the short report at its end."""

import json
from collections.abc import Mapping
from typing import Any

import rich.console
from etils import epath

from pallas_kernels.storage import splits_into
from peerjax.atomic import write_atomically
from peerjax.evaluation import ALL, Evaluation
from peerjax.model import ModelConfig
from peerjax.plots import plot_expert_usage, plot_losses, plot_pools
from peerjax.pool import MemoryReport
from peerjax.tables import print_table
from peerjax.training.metrics import read_metrics

FILE = "report.json"
LOSS_PLOT, USAGE_PLOT, POOLS_PLOT = "loss.png", "expert_usage.png", "pools.png"


def write_report(workdir: epath.Path, evaluation: Evaluation, run: Mapping[str, Any]) -> None:
    """Writes `report.json` and the plots of a run that has just ended.

    Args:
        workdir: the run's folder, with a complete `metrics.jsonl`.
        evaluation: the last evaluation, with the probes of `peerjax.evaluation.PROBES`.
        run: further facts (steps, parameters, checkpoint...), which are copied into the report.
            Paths are relative to the folder.
    """
    records = read_metrics(workdir)
    first = next(record for record in records if "validation/all/nats_per_token" in record)
    losses = {
        text: {
            measure: {
                "before": first[f"validation/{text}/{measure}"],
                "after": found["loss"][measure],
            }
            for measure in ("nats_per_token", "bits_per_byte")
        }
        for text, found in evaluation.items()
    }
    usage, codes = (evaluation[ALL].get(probe, {}) for probe in ("experts", "codes"))
    plots = [LOSS_PLOT]
    plot_losses(workdir / LOSS_PLOT, records)
    if usage:
        plots.append(USAGE_PLOT)
        plot_expert_usage(workdir / USAGE_PLOT, usage)
    if codes:
        plots.append(POOLS_PLOT)
        plot_pools(workdir / POOLS_PLOT, records)
    report = {
        **run,
        "validation": losses,
        "experts": {
            layer: {name: found[name] for name in ("usage", "unevenness")}
            for layer, found in usage.items()
        },
        "plots": plots,
    }
    write_atomically(workdir / FILE, json.dumps(report, indent=1))


def is_of(workdir: epath.Path, step: int) -> bool:
    """Returns whether the folder has a report of the run after `step`."""
    path = workdir / FILE
    return path.exists() and json.loads(path.read_text())["steps"] == step


def describe_split(config: ModelConfig) -> list[str]:
    """Returns a line for each size of pools that the mesh can split only with room, or not."""
    parts = config.pool_parts
    lines: list[str] = []
    for num_experts in sorted({size for spec, _ in config.layers for size in spec.pools.values()}):
        places = config.places(num_experts)
        if parts > 1 and not splits_into(places, parts):
            lines.append(
                f"pools of {num_experts:,} experts are whole on every device, because equal parts "
                f"of them would not have whole units on {parts} devices"
            )
        elif places > num_experts:
            lines.append(
                f"pools of {num_experts:,} experts have room for {places:,}, so that {parts} "
                "devices have equal parts"
            )
    return lines


def print_memory(memory: MemoryReport) -> None:
    """Prints the memory that pools take in training, and the memory with float32 and AdamW."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    whole = {
        **memory.parts,
        "kept between steps": memory.kept,
        "float32 + AdamW would take": memory.adamw_bytes,
    }
    rows = [
        [part, f"{size / 2**20:,.1f}", f"{size / memory.parameters:.3f}"]
        for part, size in whole.items()
    ]
    print_table(console, "Memory of pools", ("part", "MiB", "bytes per parameter"), rows)
    console.print(f"{memory.experts:,} experts, {memory.experts_per_gb:,.0f} per GB")


def print_report(workdir: epath.Path) -> None:
    """Prints the report of a finished run."""
    report = json.loads((workdir / FILE).read_text())
    console = rich.console.Console(highlight=False, soft_wrap=True)
    console.print()
    rows = [
        [
            domain,
            *(
                f"{measures[measure][when]:.3f}"
                for measure in ("nats_per_token", "bits_per_byte")
                for when in ("before", "after")
            ),
        ]
        for domain, measures in report["validation"].items()
    ]
    columns = ("text", "nats/token before", "after", "bits/byte before", "after")
    print_table(console, "Validation loss", columns, rows)
    rows = [
        [layer, f"{figures['usage']:.1%}", f"{figures['unevenness']:.3f}"]
        for layer, figures in report["experts"].items()
    ]
    if rows:
        print_table(console, "Experts", ("layer", "usage", "unevenness"), rows)
    speed = report["tokens_per_second"]
    console.print(
        f"{report['steps']} steps of {report['tokens_per_step']:,} tokens"
        f"{f', {speed:,.0f} tokens/s' if speed else ''}; "
        f"{report['parameters']:,} parameters and {report['expert_parameters']:,} in experts"
    )
    for plot in report["plots"]:
        console.print(f"plot        {workdir / plot}")
    console.print(f"checkpoint  {workdir / report['checkpoint']}")
