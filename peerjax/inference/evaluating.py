"""Evaluates a trained model on its validation text or any other, and shows the results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import rich.console
from etils import epath

from peerjax.atomic import make_folder, write_atomically
from peerjax.data.packing import PackedRows
from peerjax.data.pipeline import load_corpus, load_text, validation_rows
from peerjax.evaluation import ALL, Evaluation, evaluate, probes_for
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.probe import only_numbers
from peerjax.evaluation.removal import Removal, checked_domains, remove_domains
from peerjax.evaluation.specialisation import (
    Information,
    check_specialisation,
    specialisation,
)
from peerjax.inference.trained import Run, restore
from peerjax.plots import (
    plot_active_experts,
    plot_expert_usage,
    plot_losses_by_domain,
    plot_metaexperts,
    plot_removals,
    plot_sinks,
)
from peerjax.sharding import mesh_of_run
from peerjax.tables import print_probes, print_table
from peerjax.training.report import USAGE_PLOT
from peerjax.training.workdir import check_data, check_trained_here

FILE, LOSS_PLOT, REMOVAL_PLOT = "evaluation.json", "losses.png", "removals.png"
METAEXPERTS_PLOT = "metaexperts.png"
ACTIVE_PLOT, SINKS_PLOT = "active_experts.png", "sinks.png"
# Probes of `evaluate.py --sinks`.
SINK_PROBES = ("sinks", "activations")


class Found(NamedTuple):
    """Results of an evaluation.

    Attributes:
        evaluation: results by text and probe.
        removals: results without the experts of a domain, for each removed domain.
        information: result of `peerjax.evaluation.specialisation`; empty if not measured.
    """

    evaluation: Evaluation
    removals: Sequence[Removal] = ()
    information: Information = {}  # noqa: RUF012  # a mapping that is never changed


def evaluate_run(run: Run, pattern: str = "", rows: int | None = None) -> Evaluation:
    """Evaluates a checkpoint on all devices.

    Args:
        run: the run and its checkpoint.
        pattern: globs of the files to read, as in `data.pattern`; by default, the validation text
            of the run.
        rows: number of rows to read of each domain, spread evenly; all by default.

    Returns:
        The results by text ("all" or a domain), then by probe of `peerjax.evaluation.PROBES`.

    Raises:
        DataError: if text is missing, unreadable or too short, or the run's text has changed.
    """
    return evaluate_without(run, (), pattern, rows).evaluation


def evaluate_without(
    run: Run,
    domains: Sequence[str],
    pattern: str = "",
    rows: int | None = None,
    further: Sequence[str] = (),
    specialise: bool = False,
) -> Found:
    """Evaluates a checkpoint; if asked, also without the experts of domains, or by specialisation.

    Args:
        run: the run and its checkpoint.
        domains: the domains whose experts to remove, one domain at a time; `["all"]` for every
            domain.
        pattern: globs of the files to read, as in `evaluate_run`.
        rows: number of rows to read of each domain, as in `evaluate_run`.
        further: names of `peerjax.evaluation.FURTHER_PROBES` to add.
        specialise: whether to measure how far experts belong to domains.

    Raises:
        DataError: in the same cases as `evaluate_run`, and if a domain is unknown or there is
            only one.
        ConfigError: if experts of domains are to be removed or measured, but the model has none.
    """
    texts = _texts(run, pattern)
    choose = partial(validation_rows, count=rows)
    domains = checked_domains(run.model, texts, domains, choose)
    if specialise:
        check_specialisation(run.model, texts)
    mesh = mesh_of_run(run.config)
    with jax.set_mesh(mesh):
        variables = restore(run, mesh)
        evaluate_on = partial(
            evaluate, run.model, variables, mesh=mesh, batch_size=run.config.data.batch_size
        )
        whole = evaluate_on(texts, probes_for(run.tokenizer, further), rows=choose)
        found = Found(whole)
        if domains:
            loss = Loss.of(run.tokenizer)
            removals = remove_domains(evaluate_on, run.model, loss, texts, domains, choose)
            found = found._replace(removals=removals)
        if specialise:
            information = specialisation(evaluate_on, run.model, texts, choose)
            found = found._replace(information=information)
    return found


def _texts(run: Run, pattern: str) -> Mapping[str, PackedRows]:
    if pattern:
        data = run.config.data
        return load_text(pattern, data.text_field, run.tokenizer, data.sequence_length)
    check_trained_here(run.folder)
    corpus = load_corpus(run.config)
    check_data(run.folder, corpus.identity)
    return corpus.validation


def write_evaluation(folder: epath.Path, found: Found, facts: Mapping[str, Any]) -> None:
    """Writes `evaluation.json` and plots of its content.

    Args:
        folder: output folder. It is made if it does not exist.
        found: the results.
        facts: further fields of the file.
    """
    evaluation, removals, information = found
    make_folder(folder)
    record = {
        **facts,
        "texts": {text: only_numbers(found) for text, found in evaluation.items()},
        "removals": [dataclasses.asdict(removal) for removal in removals],
        "information": information,
    }
    losses = {text: found["loss"]["bits_per_byte"] for text, found in evaluation.items()}
    plot_losses_by_domain(folder / LOSS_PLOT, losses)
    if usage := evaluation[ALL]["experts"]:
        plot_expert_usage(folder / USAGE_PLOT, usage)
    if active := evaluation[ALL]["active"]:
        by_text = {text: found["active"] for text, found in evaluation.items()}
        plot_active_experts(folder / ACTIVE_PLOT, active, by_text)
    if "sinks" in evaluation[ALL]:
        plot_sinks(folder / SINKS_PLOT, *(evaluation[ALL][name] for name in SINK_PROBES))
    if information and evaluation[ALL]["metaexperts"]:
        by_domain = {text: evaluation[text]["metaexperts"] for text in evaluation if text != ALL}
        plot_metaexperts(folder / METAEXPERTS_PLOT, by_domain)
    if removals:
        plot_removals(
            folder / REMOVAL_PLOT, {removal.domain: removal.changes for removal in removals}
        )
    write_atomically(folder / FILE, json.dumps(record, indent=1))


def print_evaluation(folder: epath.Path) -> None:
    """Prints the results that `write_evaluation` wrote."""
    record = json.loads((folder / FILE).read_text())
    console = rich.console.Console(highlight=False, soft_wrap=True)
    console.print(f"after {record['step']} steps")
    print_probes(console, record["texts"])
    if record["removals"]:
        _print_removals(console, record["removals"])
    if record["information"]:
        _print_information(console, record["information"])
    console.print(f"figures and plots: {folder}")


def _print_information(console: rich.console.Console, information: Information) -> None:
    rows = [
        [f"{layer}, {unit}", group, *(f"{figure:.4f}" for figure in figures.values())]
        for layer, units in information.items()
        for unit, groups in units.items()
        for group, figures in groups.items()
    ]
    title = "Mutual information with the domain (nats)"
    print_table(console, title, ("layer", "domains", "measured", "shuffled", "largest"), rows)


def _print_removals(console: rich.console.Console, removals: Sequence[Mapping[str, Any]]) -> None:
    texts = list(removals[0]["changes"])
    rows = []
    for removal in removals:
        count = f"{sum(removal['experts'].values()):,}"
        for which, key in ((removal["domain"], "changes"), ("as many at random", "control")):
            rows.append([which, count, *(f"{removal[key][text]:+.4f}" for text in texts)])
    columns = ("removed", "experts", *texts)
    print_table(console, "Change of the loss (nats/token)", columns, rows)
