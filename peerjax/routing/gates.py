"""Rules that turn the scores of retrieved experts into gates."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array


class Gate(NamedTuple):
    """A rule for gates. Both functions take the scores [*S, k] of a head's retrieved experts.

    Attributes:
        weigh: returns the gates, float32 [*S, k]. It must be differentiable.
        is_on: returns booleans [*S, k]. An expert that is off gets the id that lookups skip.
            `None` keeps all experts on.
    """

    weigh: Callable[[Array], Array]
    is_on: Callable[[Array], Array] | None = None


# The softmax over a head's experts, as in PEER (arXiv:2407.04153, section 2.1).
SOFTMAX = Gate(partial(jax.nn.softmax, axis=-1))
