"""Experts that belong to a domain of text."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

FACTOR = 2.0


def domain_experts(
    routing: Mapping[str, Float[np.ndarray, " N"]], factor: float = FACTOR
) -> dict[str, Bool[np.ndarray, " N"]]:
    """Returns the experts of each domain.

    An expert belongs to a domain if its mean gate there is at least `factor` times its mean gate in
    every other domain.

    Args:
        routing: mean gate of every expert of a layer over the tokens of each domain, by domain.
            There must be two domains or more.
        factor: smallest ratio of mean gates at which an expert belongs to a domain.

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


def mutual_information(sums: Mapping[str, Float[np.ndarray, " N"]]) -> float:
    """Returns the mutual information of expert and domain, in nats.

    A domain is drawn uniformly, then an expert in proportion to its gates in that domain. 0 means
    that all domains use the experts alike. The logarithm of the number of domains means that no two
    domains share an expert.

    Args:
        sums: sum of the gates of every expert of a layer, by domain; none is all zero.
    """
    shares = np.stack([each / each.sum(dtype=np.float64) for each in sums.values()])
    mean = shares.mean(axis=0)
    ratios = np.divide(shares, mean, out=np.ones_like(shares), where=shares > 0)
    return float(np.sum(shares * np.log(ratios)) / len(shares))


def random_experts(
    used: Bool[np.ndarray, " N"], count: int, rng: np.random.Generator
) -> Bool[np.ndarray, " N"]:
    """Draws `count` experts from those in `used`."""
    drawn = np.zeros(len(used), bool)
    drawn[rng.choice(np.flatnonzero(used), count, replace=False)] = True
    return drawn
