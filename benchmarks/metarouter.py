"""Compares metarouters that choose for tokens and for chunks with PEER, on twelve domains of text.

The claim has three parts: metaexperts differ clearly between topics, this costs a small loss at
small scale, and a little more if one metaexpert serves a whole sequence of 1,024 tokens. Twins of a
model with M metaexperts of N experts are PEER with M N experts and PEER with N, and tokens use
equally many experts in all. Learning rates are tuned with 16 metaexperts and for the larger PEER.

A model is also evaluated with a part of its metaexperts (or experts) alone, which have the largest
sums of weights on some rows of training text of the domain.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from jaxtyping import Array

from benchmarks import domains_text
from benchmarks.protocol import OF_POOLS, QUICK_STEPS, SEEDS, SHARED
from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.short_run import seconds_in_turns
from benchmarks.sweep import (
    ROOT,
    Run,
    Settings,
    at_once,
    from_seeds,
    made_by,
    measured_by,
    paired,
    tune_rates,
)
from peerjax.data.pipeline import load_corpus, validation_rows
from peerjax.evaluation import ALL, evaluate
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.metaexperts import Metaexperts
from peerjax.evaluation.probe import Probe
from peerjax.evaluation.removal import removed_collection
from peerjax.evaluation.specialisation import specialisation
from peerjax.evaluation.usage import GateSums, routers
from peerjax.inference.trained import Run as Trained
from peerjax.inference.trained import open_run, restore
from peerjax.objectives.language import next_token_loss
from peerjax.plots import plot_metaexperts
from peerjax.routing.auxiliary import CHOICE, METAEXPERTS
from peerjax.sharding import make_mesh

RECIPE = "metapeer_token"
STEPS, CHUNK = 500, 32
START = {SHARED: 1e-2, OF_POOLS: 3e-2}
METAEXPERTS_PER_ARM = (8, 16)
TOKEN, SEQUENCE, ONE = "token", "sequence", "sequence, one choice"
CHOICES: dict[str, Settings] = {
    TOKEN: {"metapeer.choice": "token"},
    SEQUENCE: {"metapeer.choice": "sequence", "metapeer.chunk": CHUNK},
    ONE: {"metapeer.choice": "sequence", "metapeer.chunk": CHUNK, "metapeer.switch": False},
}
# Numbers of sub-keys of the twins: as many experts as one metaexpert, as 8 and as 16.
TWINS = {1: (64, 64), 8: (128, 256), 16: (256, 256)}
TIMED_STEPS, ROUNDS = 10, 3
ROWS, CALIBRATION, PARTS = 12, (1, 10, 100), (4, 8)
QUICK: Settings = {"data.sequence_length": 128, "data.batch_size": 2, "metapeer.chunk": 32}
Arm = tuple[str, int]


def arms() -> dict[Arm, Settings]:
    """Returns the fields of every arm."""
    found: dict[Arm, Settings] = {
        (choice, number): {**settings, "metapeer.metaexperts": number}
        for number in METAEXPERTS_PER_ARM
        for choice, settings in CHOICES.items()
    }
    for number, sub_keys in TWINS.items():
        found["PEER", number] = {
            "model.layers": (("dense", 1), ("peer", 2), ("dense", 1)),
            "peer.num_experts": sub_keys,
            "peer.heads": 4,
        }
    return found


def run(quick: bool) -> Result:
    """Tunes and trains all arms, and compares them."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    text = domains_text.settings()
    common = {**text, "steps": steps, "eval.every": steps, "eval.rows": ROWS}
    every = {
        arm: {**common, **fields, **(QUICK if quick else {})} for arm, fields in arms().items()
    }
    largest = {choice: every[choice, METAEXPERTS_PER_ARM[-1]] for choice in (TOKEN, SEQUENCE)}
    largest["PEER"] = every["PEER", METAEXPERTS_PER_ARM[-1]]
    jobs = [partial(tune_rates, RECIPE, each, START, steps) for each in largest.values()]
    tuned = dict(zip(largest, at_once(jobs), strict=True))
    tuned[ONE] = tuned[SEQUENCE]
    full = {arm: {**fields, **tuned[arm[0]][0]} for arm, fields in every.items()}
    runs = from_seeds(RECIPE, full, seeds, inspect=measured_by("benchmarks.metarouter"))
    for arm, each in runs.items():
        if not all(run.more for run in each):
            raise RuntimeError(f"{arm[0]}, {arm[1]} diverged with the rates that were tuned")
    timed = seconds_in_turns(RECIPE, full, *((2, 1) if quick else (TIMED_STEPS, ROUNDS)))
    plot(runs, ROOT / "metarouter" if quick else REPOSITORY / "docs" / "metarouter")
    return Result(
        columns=(
            "arm", "nats/token", "without chunk 0", "ms a step", "switched",
            "information: metaexperts", "shuffled", "experts", "shuffled",
        ),
        rows=[_row(arm, each, timed[arm]) for arm, each in runs.items()],
        figures=_figures(runs),
        details={
            "tuning": {
                name: {"rates": rates, "tried": tried} for name, (rates, tried) in tuned.items()
            },
            "arms": [
                {
                    "arm": arm, "losses": [run.nats_per_token for run in each],
                    "measured": [run.more for run in each],
                    "seconds_per_step": timed[arm], "made_by": made_by(each),
                }
                for arm, each in runs.items()
            ],
        },
    )  # fmt: skip


Runs = Mapping[Arm, Sequence[Run]]


def _information(run: Run, unit: str, group: str, kind: str) -> float:
    """Returns the information of a unit as a mean over layers."""
    layers = [units[unit][group] for units in run.more["information"].values() if unit in units]
    return float(np.mean([each[kind] for each in layers])) if layers else float("nan")


def _row(arm: Arm, runs: Sequence[Run], seconds: Sequence[float]) -> list[str]:
    def mean(value: Any) -> str:
        values = [value(run) for run in runs]
        return f"{np.mean(values):.4f}" if np.all(np.isfinite(values)) else ""

    return [
        f"{arm[0]}, {arm[1]}",
        mean(lambda run: run.nats_per_token),
        mean(lambda run: run.more["later"]),
        f"{1e3 * np.median(seconds):.0f}",
        mean(lambda run: run.more.get("switched", float("nan"))),
        *(
            mean(lambda run, unit=unit, kind=kind: _information(run, unit, ALL, kind))
            for unit in ("metaexperts", "experts")
            for kind in ("domains", "shuffled")
        ),
    ]


def _figures(runs: Runs) -> list[Figure]:
    def difference(name: str, first: Arm, second: Arm) -> list[Figure]:
        values = [
            [run.nats_per_token if name == "nats/token" else run.more[name] for run in runs[arm]]
            for arm in (first, second)
        ]
        label = f"{first[0]}, {first[1]} - {second[0]}, {second[1]}: {name}"
        return paired(*values).figures(label)

    figures = []
    for number in METAEXPERTS_PER_ARM:
        for name in ("nats/token", "later"):
            figures += difference(name, (TOKEN, number), ("PEER", number))
            figures += difference(name, (SEQUENCE, number), (TOKEN, number))
            figures += difference(name, (ONE, number), (SEQUENCE, number))
        figures += difference("nats/token", (TOKEN, number), ("PEER", 1))
        for choice in CHOICES:
            for group in runs[choice, number][0].more["groups"]:
                values = [
                    [_information(run, "metaexperts", group, kind) for run in runs[choice, number]]
                    for kind in ("domains", "shuffled")
                ]
                label = f"{choice}, {number}: information of metaexperts on {group} above shuffled"
                figures += paired(*values).figures(label)
        for choice in (*CHOICES, "PEER"):
            for part in PARTS:
                if f"1/{part}, 100" not in runs[choice, number][0].more["alone"]:
                    continue
                rises = [run.more["alone"][f"1/{part}, 100"] for run in runs[choice, number]]
                label = f"{choice}, {number}: loss with 1/{part}, chosen on 100 rows, above whole"
                figures.append(Figure(label, float(np.mean(rises))))
    return figures


@dataclasses.dataclass(frozen=True)
class LaterLoss(Probe):
    """The loss of tokens at and after a position in their document, in nats a token.

    Attributes:
        first: the position.
    """

    keeps: ClassVar[tuple[str, ...]] = ()
    first: int

    def zeros(self, model: Any) -> Array:
        """Returns the sums before any text is read."""
        return jnp.zeros(2)

    def add(self, model: Any, sums: Any, logits_BLV: Array, kept: Any, batch: Any) -> Array:
        """Adds a batch to the sums."""
        nats_BL = next_token_loss(logits_BLV, (), batch, (), 0)
        counts_BL = (batch["positions"] >= self.first) * batch["weight"][:, None]
        return sums + jnp.stack([jnp.sum(nats_BL * counts_BL), jnp.sum(counts_BL)])

    def result(self, model: Any, sums: Any, variables: Any) -> dict[str, float]:
        """Returns the loss."""
        return {"nats_per_token": float(sums[0] / sums[1]), "tokens": float(sums[1])}


def measured(workdir: str) -> dict[str, Any]:
    """Returns the loss after chunk 0, information, and losses with a part of the experts."""
    trained, mesh = open_run(workdir), make_mesh()
    corpus = load_corpus(trained.config)
    choose = partial(validation_rows, count=ROWS)
    with jax.set_mesh(mesh):
        variables = restore(trained, mesh)
        measure = partial(
            evaluate, trained.model, variables, mesh=mesh,
            batch_size=trained.config.data.batch_size,
        )  # fmt: skip
        probes = {
            "loss": Loss.of(trained.tokenizer),
            "later": LaterLoss(trained.config.metapeer.chunk),
            "metaexperts": Metaexperts(),
        }
        found = measure(corpus.validation, probes, rows=choose)
        information = specialisation(measure, trained.model, corpus.validation, choose)
        alone = _alone(trained, measure, corpus, choose)
    figures = found[ALL]["metaexperts"]
    more = {}
    if figures:
        more["switched"] = float(np.mean([each["switched"] for each in figures.values()]))
        more["shares"] = {
            domain: {
                layer: np.round(each["shares"], 5).tolist()
                for layer, each in found[domain]["metaexperts"].items()
            }
            for domain in corpus.validation
        }
    groups = next(iter(next(iter(information.values())).values()))
    return {
        "later": found[ALL]["later"]["nats_per_token"],
        "later_share": found[ALL]["later"]["tokens"] / found[ALL]["loss"]["tokens"],
        "information": information,
        "groups": list(groups),
        "alone": alone,
        **more,
    }


def _alone(trained: Trained, measure: Any, corpus: Any, choose: Any) -> dict[str, float]:
    """Returns how much the loss rises with a part of the metaexperts, or of PEER's experts.

    Each domain is read with the part that has the largest sums of weights on some rows of its
    training text. The results are means over domains.
    """
    model = trained.model
    name = METAEXPERTS if routers(model, METAEXPERTS) else CHOICE
    loss = Loss.of(trained.tokenizer)
    rises: dict[str, list[float]] = {}
    for text, (domain, validation) in zip(
        corpus.train.parts, corpus.validation.items(), strict=True
    ):
        whole = measure({domain: validation}, {"loss": loss}, rows=choose)
        before = whole[domain]["loss"]["nats_per_token"]
        for count in CALIBRATION:
            calibration = partial(validation_rows, count=count)
            found = measure({domain: text}, {"sums": GateSums(name)}, rows=calibration)
            sums = found[domain]["sums"]
            for part in PARTS:
                if name == METAEXPERTS and min(map(np.size, sums.values())) < 2 * part:
                    continue  # a token uses two
                removed = {
                    layer: np.argsort(np.argsort(-each, kind="stable")) >= each.size // part
                    for layer, each in sums.items()
                }
                given = removed_collection(model, removed, name)
                probe = dataclasses.replace(loss, given=given)
                after = measure({domain: validation}, {"loss": probe}, rows=choose)
                rise = after[domain]["loss"]["nats_per_token"] - before
                rises.setdefault(f"1/{part}, {count}", []).append(rise)
    return {label: float(np.mean(each)) for label, each in rises.items()}


def plot(runs: Runs, folder: Path) -> None:
    """Draws the shares of metaexperts in domains, and losses with a part of the experts."""
    folder.mkdir(parents=True, exist_ok=True)
    number = METAEXPERTS_PER_ARM[-1]
    for choice in (TOKEN, SEQUENCE):
        by_domain = {
            domain: {layer: {"shares": np.array(each)} for layer, each in of_domain.items()}
            for domain, of_domain in runs[choice, number][0].more["shares"].items()
        }
        plot_metaexperts(folder / f"{choice}.png", by_domain)
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for choice in (*CHOICES, "PEER"):
        for part, style in zip(PARTS, ("-", "--"), strict=True):
            rises = [
                np.mean([run.more["alone"][f"1/{part}, {count}"] for run in runs[choice, number]])
                for count in CALIBRATION
            ]
            axes.plot(CALIBRATION, rises, style, marker=".", label=f"{choice}, 1/{part}")
    axes.set(
        xscale="log", xlabel="rows of text on which the part was chosen",
        ylabel="rise of the loss, nats/token",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "alone.png", dpi=100)


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1])))
