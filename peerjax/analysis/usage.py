"""How evenly a pool's experts are used."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Usage(NamedTuple):
    """Expert usage of one layer.

    Attributes:
        usage: share of experts that got any gate.
        unevenness: KL divergence of the gate distribution from uniform, in nats; 0 is even,
            log N means that one expert got everything.
    """

    usage: float
    unevenness: float


def expert_usage(gate_sums: Float[np.ndarray, " N"]) -> Usage:
    """Usage and unevenness of a layer.

    With z_i the sum of expert i's gates over the evaluation tokens, normalised to sum 1,
    `usage = #{z_i > 0} / N` and `unevenness = log N + sum_i z_i log z_i`.

    Args:
        gate_sums: z before normalisation; not all zero.

    References:
        He, "Mixture of A Million Experts", arXiv:2407.04153, section 3.3 ("Expert usage and
        query batch normalisation").
    """
    z = np.asarray(gate_sums, np.float64)
    used = z[z > 0] / z.sum()
    return Usage(len(used) / len(z), float(np.log(len(z)) + np.sum(used * np.log(used))))
