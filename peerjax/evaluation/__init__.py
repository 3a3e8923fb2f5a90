"""Evaluation of a model: probes, and the pass over text that runs them."""

from collections.abc import Mapping

from peerjax.data.tokenizer import Tokenizer
from peerjax.evaluation.codes import Codes
from peerjax.evaluation.evaluate import evaluate
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.probe import ALL, Evaluation, Probe, figures_of
from peerjax.evaluation.usage import Usage

__all__ = [
    "ALL",
    "PROBES",
    "Evaluation",
    "Probe",
    "evaluate",
    "figures_of",
    "probes_for",
]

# Probes of training and `evaluate.py`, in the order of their tables. To add a probe, add a line.
PROBES: dict[str, type[Probe]] = {"loss": Loss, "experts": Usage, "codes": Codes}


def probes_for(tokenizer: Tokenizer) -> Mapping[str, Probe]:
    """Returns all probes, for text of a tokenizer."""
    return {name: probe.of(tokenizer) for name, probe in PROBES.items()}
