"""Causal self-attention that stays inside documents, with rotary positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rotate(
    x: Float[Array, "B L heads dim"], positions: Int[Array, "B L"], base: float
) -> Float[Array, "B L heads dim"]:
    """Applies rotary position embeddings, half-split convention.

    Feature i is paired with feature i + dim / 2 (as in Llama's Hugging Face code, not with its
    neighbour), and the pair is turned by `position * base^(-2 i / dim)` radians.

    References:
        Su et al., "RoFormer", arXiv:2104.09864, section 3.2.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def same_document(segments: Int[Array, "B L"]) -> Bool[Array, "B 1 L L"]:
    """The attention mask that lets a token see its own document only."""
    return segments[:, None, :, None] == segments[:, None, None, :]


class Attention(nn.Module):
    """Multi-head causal self-attention.

    Attributes:
        heads: number of heads; the width of x must be divisible by it.
        rope_base: base of the rotary frequencies.
        residual_scale: scale of the output projection's initial values.
        dtype: compute dtype; parameters are float32.
    """

    heads: int
    rope_base: float
    residual_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        positions_BL: Int[Array, "B L"],
        mask: Bool[Array, "B 1 L L"],
    ) -> Float[Array, "B L D"]:
        """Returns the attention output; `mask` is intersected with causality."""
        width = x_BLD.shape[-1]
        per_head = (self.heads, width // self.heads)

        def project(name: str) -> Array:
            dense = nn.DenseGeneral(per_head, use_bias=False, dtype=self.dtype, name=name)
            return dense(x_BLD)

        query = rotate(project("query"), positions_BL, self.rope_base)
        key = rotate(project("key"), positions_BL, self.rope_base)
        mixed = jax.nn.dot_product_attention(
            query, key, project("value"), mask=mask, is_causal=True
        )
        init = nn.initializers.variance_scaling(self.residual_scale**2, "fan_in", "normal")
        out = nn.DenseGeneral(
            width, axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=init, name="out"
        )
        return out(mixed)
