"""Activation functions of experts, by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, "*S"]], Float[Array, "*S"]]

ACTIVATIONS: dict[str, Activation] = {
    # The exact form: `jax.nn.gelu` defaults to the tanh approximation, and its exact form needs
    # erfc, which TPU kernels lack.
    "gelu": lambda h: 0.5 * h * (1.0 + jax.lax.erf(h * jnp.float32(2**-0.5))),
    "relu": jax.nn.relu,
    "relu2": lambda h: jnp.square(jax.nn.relu(h)),
}


def activation_by_name(name: str) -> Activation:
    """Returns the function called `name`.

    Raises:
        ValueError: if there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
