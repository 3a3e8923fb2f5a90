"""Which experts belong to a domain of text."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

FACTOR = 2.0


def domain_experts(
    routing: Mapping[str, Float[np.ndarray, " N"]], factor: float = FACTOR
) -> dict[str, Bool[np.ndarray, " N"]]:
    """The experts of each domain: used there `factor` times as often as anywhere else, or more.

    Args:
        routing: by domain, of two or more, the mean gate of every expert of a layer over the
            domain's tokens.
        factor: by how much an expert must prefer a domain to belong to it.

    References:
        Park et al., "Monet: Mixture of Monosemantic Experts for Transformers", arXiv:2412.04139,
        section 5.1 (domain masking).
    """
    found = {}
    for domain, probability in routing.items():
        others = [each for name, each in routing.items() if name != domain]
        second = np.max(others, axis=0)
        found[domain] = (probability > 0) & (probability >= factor * second)
    return found


def random_experts(
    used: Bool[np.ndarray, " N"], count: int, rng: np.random.Generator
) -> Bool[np.ndarray, " N"]:
    """Draws `count` experts among those that are used."""
    drawn = np.zeros(len(used), bool)
    drawn[rng.choice(np.flatnonzero(used), count, replace=False)] = True
    return drawn
