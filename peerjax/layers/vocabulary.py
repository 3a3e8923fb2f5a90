"""The first and the last layer: from tokens to vectors, and from vectors to logits."""

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import BATCH


class Embedding(nn.Module):
    """Maps tokens to vectors of the compute dtype."""

    vocab_size: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Returns the vectors of tokens.

        Every device sums the gradient over its own tokens, in float32. The compiler would rather
        send all tokens to the devices that have the moments of a part of the table.
        """
        init = nn.initializers.normal(1.0)
        table = self.param("embedding", init, (self.vocab_size, self.width), jnp.float32)

        def take(table: Array, tokens_BL: Array) -> Array:
            return jnp.take(table, tokens_BL, axis=0).astype(self.dtype)

        return over_mesh(take, (P(), BATCH), BATCH)(table, tokens_BL)


class Head(nn.Module):
    """Maps the last residual stream, normalised, to logits in float32."""

    vocab_size: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Returns the logits of every token."""
        # Initial logits are small, so a fresh model predicts nearly uniformly.
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (self.width, self.vocab_size), jnp.float32)
        # Tokens are in one axis. With two axes, XLA on CPU takes twice as long for the gradient.
        x_TD = x_BLD.reshape(-1, self.width).astype(self.dtype)
        logits_TV = (x_TD @ kernel.astype(self.dtype)).astype(jnp.float32)
        return logits_TV.reshape(*x_BLD.shape[:-1], self.vocab_size)
