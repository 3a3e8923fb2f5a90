"""How the scores of retrieved experts become gates."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array


class Gate(NamedTuple):
    """A rule for gates; both functions map the scores [*S, k] of a head's retrieved experts.

    Attributes:
        weigh: gives the gates, float32 [*S, k]; differentiable.
        is_on: gives booleans [*S, k]. An expert that is off becomes the id that lookups skip.
            `None` keeps all experts on.
    """

    weigh: Callable[[Array], Array]
    is_on: Callable[[Array], Array] | None = None


# The softmax over a head's experts, as in PEER (arXiv:2407.04153, section 2.1).
SOFTMAX = Gate(partial(jax.nn.softmax, axis=-1))
