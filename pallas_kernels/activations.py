"""Activation functions of experts, by name."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, "*S"]], Float[Array, "*S"]]


@jax.custom_jvp
def gelu(h: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """`h Phi(h)`, Phi the distribution function of the normal distribution.

    The exact form: `jax.nn.gelu` defaults to the tanh approximation, and its exact form, like
    JAX's derivative of erf, needs functions that kernels lack.
    """
    return h * _normal_cdf(h)


def _normal_cdf(h: Float[Array, "*S"]) -> Float[Array, "*S"]:
    return 0.5 + 0.5 * jax.lax.erf(h * jnp.float32(math.sqrt(0.5)))


def _gelu_slope(h: Float[Array, "*S"]) -> Float[Array, "*S"]:
    density = jnp.exp(-0.5 * h * h) * jnp.float32(1 / math.sqrt(2 * math.pi))
    return _normal_cdf(h) + h * density


gelu.defjvps(lambda tangent, value, h: tangent * _gelu_slope(h))

ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
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
