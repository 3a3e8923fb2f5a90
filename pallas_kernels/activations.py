"""Activation functions of experts, by name."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Activation(NamedTuple):
    """A function and its derivative.

    The derivative is written out, because kernels lower neither JAX's derivative of erf nor a
    `jax.custom_jvp`.
    """

    value: Callable[[Float[Array, "*S"]], Float[Array, "*S"]]
    slope: Callable[[Float[Array, "*S"]], Float[Array, "*S"]]

    def __call__(self, h: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """Returns the value of the function at `h`."""
        return self.value(h)


def _normal_cdf(h: Float[Array, "*S"]) -> Float[Array, "*S"]:
    return 0.5 + 0.5 * jax.lax.erf(h * jnp.float32(math.sqrt(0.5)))


def _normal_density(h: Float[Array, "*S"]) -> Float[Array, "*S"]:
    return jnp.exp(-0.5 * h * h) * jnp.float32(1 / math.sqrt(2 * math.pi))


ACTIVATIONS: dict[str, Activation] = {
    # The exact form; `jax.nn.gelu` defaults to the tanh approximation.
    "gelu": Activation(
        lambda h: h * _normal_cdf(h), lambda h: _normal_cdf(h) + h * _normal_density(h)
    ),
    "relu": Activation(
        lambda h: jnp.maximum(h, 0.0), lambda h: jnp.where(h > 0, 1.0, 0.0).astype(h.dtype)
    ),
    "relu2": Activation(
        lambda h: jnp.square(jnp.maximum(h, 0.0)), lambda h: 2.0 * jnp.maximum(h, 0.0)
    ),
}


def activation_by_name(name: str) -> Activation:
    """Returns the activation called `name`.

    Raises:
        ValueError: if there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
