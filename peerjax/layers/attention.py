"""Causal self-attention that stays inside documents, with rotary positions and a cache."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platforms import by_platform
from peerjax.layers.spec import Context


def rotate(
    x: Float[Array, "B L heads dim"], positions: Int[Array, "B L"], base: float
) -> Float[Array, "B L heads dim"]:
    """Applies rotary position embeddings in the half-split convention.

    Feature i is paired with feature i + dim / 2, as in Llama's Hugging Face code, and not with its
    neighbour. The pair is rotated by `position * base^(-2 i / dim)` radians.

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
    """Returns the attention mask with which a token sees only its own document."""
    return segments[:, None, :, None] == segments[:, None, None, :]


class KVCache(NamedTuple):
    """Keys and values, by position, of the tokens that a stack of blocks has read."""

    key: Float[Array, "layers B S heads dim"]
    value: Float[Array, "layers B S heads dim"]

    @staticmethod
    def zeros(
        layers: int, batch: int, size: int, heads: int, dim: int, dtype: jnp.dtype
    ) -> "KVCache":
        """Returns an empty cache for sequences of at most `size` tokens."""
        shape = (layers, batch, size, heads, dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def written(
        self,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B L"],
        key: Float[Array, "B L heads dim"],
        value: Float[Array, "B L heads dim"],
    ) -> "KVCache":
        """Returns the cache with a layer's keys and values at `positions`; in place if donated."""
        sequences = jnp.arange(positions.shape[0])[:, None]
        return KVCache(
            self.key.at[layer, sequences, positions].set(key),
            self.value.at[layer, sequences, positions].set(value),
        )


def seen(positions: Int[Array, "B L"], size: int) -> Bool[Array, "B 1 L S"]:
    """Returns the mask over a cache of `size` positions; no token sees positions after its own."""
    return (jnp.arange(size) <= positions[:, :, None])[:, None]


def attend(
    query: Float[Array, "B L heads dim"],
    key: Float[Array, "B S heads dim"],
    value: Float[Array, "B S heads dim"],
    mask: Bool[Array, "B 1 L S"],
    *,
    is_causal: bool,
) -> Float[Array, "B L heads dim"]:
    """Computes softmax attention over the keys that a mask, and causality, let each token see.

    On CPUs, every head is a product of matrices. XLA computes these about twice as fast there as
    the products of `jax.nn.dot_product_attention`.
    """
    return by_platform(
        query,
        key,
        value,
        mask,
        cpu=partial(_attend_head_by_head, is_causal=is_causal),
        default=partial(_attend, is_causal=is_causal),
    )


def _attend(query: Array, key: Array, value: Array, mask: Array, *, is_causal: bool) -> Array:
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)


def _attend_head_by_head(
    query: Array, key: Array, value: Array, mask: Array, *, is_causal: bool
) -> Array:
    batch, length, heads, dim = query.shape
    if is_causal:
        mask = mask & jnp.tril(jnp.ones(mask.shape[-2:], bool))

    def by_head(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(batch * heads, -1, dim)

    scores_NLS = jnp.einsum(
        "nld,nsd->nls",
        by_head(query) * dim**-0.5,
        by_head(key),
        preferred_element_type=jnp.float32,
    )
    scores_BHLS = scores_NLS.reshape(batch, heads, length, -1)
    seen_BHLS = jnp.where(mask, scores_BHLS, jnp.finfo(jnp.float32).min)
    shares_NLS = jax.nn.softmax(seen_BHLS).reshape(scores_NLS.shape).astype(value.dtype)
    mixed_NLd = jnp.einsum("nls,nsd->nld", shares_NLS, by_head(value))
    return mixed_NLd.reshape(batch, heads, length, dim).swapaxes(1, 2)


class Attention(nn.Module):
    """Multi-head causal self-attention.

    Attributes:
        heads: number of heads, which must divide the width of x.
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
        context: Context,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Attends to x itself, or to the cache after x has been written into it.

        Args:
            x_BLD: the input.
            context: the layer uses its `positions`. Without a cache, tokens see each other only
                within a segment of `segments`. With a cache, `layer` is its index in the cache.
            cache: keys and values of all layers of the stack.

        Returns:
            The attention output, and the cache.
        """
        width = x_BLD.shape[-1]
        per_head = (self.heads, width // self.heads)
        # If tokens had two axes, XLA on CPUs would copy transposes for the gradient of weights.
        x_TD = x_BLD.reshape(-1, width)

        def project(name: str) -> Array:
            dense = nn.DenseGeneral(per_head, use_bias=False, dtype=self.dtype, name=name)
            return dense(x_TD).reshape(*x_BLD.shape[:2], *per_head)

        query_BLHd = rotate(project("query"), context.positions, self.rope_base)
        key_BSHd = rotate(project("key"), context.positions, self.rope_base)
        value_BSHd = project("value")
        if cache is None:
            mask = same_document(context.segments)
        else:
            cache = cache.written(context.layer, context.positions, key_BSHd, value_BSHd)
            key_BSHd, value_BSHd = cache.key[context.layer], cache.value[context.layer]
            mask = seen(context.positions, key_BSHd.shape[1])
        mixed_BLHd = attend(query_BLHd, key_BSHd, value_BSHd, mask, is_causal=cache is None)
        init = nn.initializers.variance_scaling(self.residual_scale**2, "fan_in", "normal")
        out = nn.DenseGeneral(
            width, axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=init, name="out"
        )
        return out(mixed_BLHd.reshape(-1, *per_head)).reshape(x_BLD.shape), cache
