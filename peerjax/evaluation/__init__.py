"""Evaluation of a model: probes, and the pass over text that runs them."""

from collections.abc import Mapping, Sequence

from peerjax.data.tokenizer import Tokenizer
from peerjax.evaluation.activations import LargeActivations
from peerjax.evaluation.active import ActiveExperts
from peerjax.evaluation.codes import Codes
from peerjax.evaluation.evaluate import evaluate
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.metaexperts import Metaexperts
from peerjax.evaluation.probe import ALL, Evaluation, Probe, figures_of
from peerjax.evaluation.sinks import Sinks
from peerjax.evaluation.usage import Usage

__all__ = [
    "ALL",
    "FURTHER_PROBES",
    "PROBES",
    "Evaluation",
    "Probe",
    "evaluate",
    "figures_of",
    "probes_for",
]

# Probes of training and `evaluate.py`, in the order of their tables. To add a probe, add a line.
PROBES: dict[str, type[Probe]] = {
    "loss": Loss,
    "experts": Usage,
    "metaexperts": Metaexperts,
    "active": ActiveExperts,
    "codes": Codes,
}
# Probes that `evaluate.py` adds if a flag asks for them.
FURTHER_PROBES: dict[str, type[Probe]] = {"sinks": Sinks, "activations": LargeActivations}


def probes_for(tokenizer: Tokenizer, further: Sequence[str] = ()) -> Mapping[str, Probe]:
    """Returns all probes, and some of the further ones, for text of a tokenizer."""
    chosen = {**PROBES, **{name: FURTHER_PROBES[name] for name in further}}
    return {name: probe.of(tokenizer) for name, probe in chosen.items()}
