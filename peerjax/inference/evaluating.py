"""The loss of a trained model and the use of its experts, on its validation text or any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import rich.console
from etils import epath

from peerjax.analysis.plots import plot_expert_usage, plot_losses_by_domain
from peerjax.atomic import write_atomically
from peerjax.data.packing import PackedRows
from peerjax.data.pipeline import load_corpus, load_text
from peerjax.inference.trained import Run, restore
from peerjax.sharding import make_mesh
from peerjax.training.evaluation import Evaluation, evaluate
from peerjax.training.report import USAGE_PLOT, print_table
from peerjax.training.step import make_eval_step
from peerjax.training.workdir import check_data

FILE, LOSS_PLOT = "evaluation.json", "losses.png"


def evaluate_run(run: Run, pattern: str = "", rows: int | None = None) -> Evaluation:
    """Evaluates a checkpoint on all devices.

    Args:
        run: whose checkpoint.
        pattern: files to read, as `data.pattern`; by default, the validation text of the run.
        rows: how many of each domain to read, spread evenly; all by default.

    Raises:
        DataError: if text is missing, unreadable or too short, or the run's text has changed.
    """
    texts = _texts(run, pattern)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        return evaluate(
            jax.jit(make_eval_step(run.model)),
            restore(run, mesh),
            texts,
            run.tokenizer,
            mesh,
            rows=rows,
            batch_size=run.config.data.batch_size,
        )


def _texts(run: Run, pattern: str) -> Mapping[str, PackedRows]:
    if pattern:
        data = run.config.data
        return load_text(pattern, data.text_field, run.tokenizer, data.sequence_length)
    corpus = load_corpus(run.config)
    check_data(run.folder, corpus.identity)
    return corpus.validation


def write_evaluation(folder: epath.Path, evaluation: Evaluation, facts: Mapping[str, Any]) -> None:
    """Writes `evaluation.json` and plots of what it says.

    Args:
        folder: where to; made if it is not there.
        evaluation: what was found.
        facts: further fields of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    losses = {"all": evaluation.overall, **evaluation.losses}
    record = {
        **facts,
        "losses": {
            domain: {
                "nats_per_token": loss.nats_per_token,
                "bits_per_byte": loss.bits_per_byte,
                "tokens": loss.tokens,
                "bytes": loss.num_bytes,
            }
            for domain, loss in losses.items()
        },
        "experts": {layer: usage._asdict() for layer, usage in evaluation.usage.items()},
    }
    plot_losses_by_domain(
        folder / LOSS_PLOT, {domain: loss.bits_per_byte for domain, loss in losses.items()}
    )
    if evaluation.gate_sums:
        plot_expert_usage(folder / USAGE_PLOT, evaluation.gate_sums)
    write_atomically(folder / FILE, json.dumps(record, indent=1))


def print_evaluation(folder: epath.Path) -> None:
    """Prints what `write_evaluation` wrote."""
    record = json.loads((folder / FILE).read_text())
    console = rich.console.Console(highlight=False, soft_wrap=True)
    rows = [
        [
            domain,
            f"{loss['nats_per_token']:.4f}",
            f"{loss['bits_per_byte']:.4f}",
            f"{loss['tokens']:,}",
        ]
        for domain, loss in record["losses"].items()
    ]
    columns = ("text", "nats/token", "bits/byte", "tokens")
    print_table(console, f"Loss after {record['step']} steps", columns, rows)
    rows = [
        [layer, f"{usage['usage']:.1%}", f"{usage['unevenness']:.3f}"]
        for layer, usage in record["experts"].items()
    ]
    if rows:
        print_table(console, "Experts", ("layer", "usage", "unevenness"), rows)
    console.print(f"figures and plots: {folder}")
