"""What an evaluation looks at: probes, and the pass over text that feeds them."""

from collections.abc import Mapping

from peerjax.data.tokenizer import Tokenizer
from peerjax.evaluation.codes import Codes
from peerjax.evaluation.evaluate import evaluate, put_batch
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
    "put_batch",
]

# What training and `evaluate.py` look at, in the order of their tables. To add a probe, add a line.
PROBES: dict[str, type[Probe]] = {"loss": Loss, "experts": Usage, "codes": Codes}


def probes_for(tokenizer: Tokenizer) -> Mapping[str, Probe]:
    """All probes, for text of a tokenizer."""
    return {name: probe.of(tokenizer) for name, probe in PROBES.items()}
