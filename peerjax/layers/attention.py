"""Causal self-attention that stays inside documents, with rotary positions and a cache."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peerjax.layers.attend import Seen, attend, attention_shares
from peerjax.layers.spec import Context
from peerjax.routing.auxiliary import SINKS, sow_last

# What `AttentionConfig.sink` may be.
NONE, LOGIT, GATE = ATTENTION_SINKS = ("none", "logit", "gate")


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


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Settings of the attention of a model.

    Attributes:
        heads: number of heads, which must divide the width of the model.
        kv_heads: number of heads of keys and values, which must divide `heads`. Consecutive heads
            share one.
        rope_base: base of the rotary frequencies.
        sink: "none"; "logit" for a learned logit of each head, with which the shares of a token sum
            to less than 1; or "gate" for a sigmoid gate of each head's output.
    """

    heads: int
    kv_heads: int
    rope_base: float
    sink: str = "none"


class Attention(nn.Module):
    """Multi-head causal self-attention.

    If the collection "sinks" is mutable, the module sows `first_share` [B, heads, L] into it: the
    share of a token's attention that goes to the first token of its document.

    Attributes:
        config: settings of the attention.
        residual_scale: scale of the output projection's initial values.
        dtype: compute dtype; parameters are float32.

    References:
        Qiu et al., "Gated Attention for Large Language Models", arXiv:2505.06708, section 2.2 (the
        head-wise gate after attention).
    """

    config: AttentionConfig
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
        config, width = self.config, x_BLD.shape[-1]
        dim = width // config.heads
        # If tokens had two axes, XLA on CPUs would copy transposes for the gradient of weights.
        x_TD = x_BLD.reshape(-1, width)

        def project(name: str, heads: int) -> Array:
            dense = nn.DenseGeneral((heads, dim), use_bias=False, dtype=self.dtype, name=name)
            return dense(x_TD).reshape(*x_BLD.shape[:2], heads, dim)

        query_BLHd = rotate(project("query", config.heads), context.positions, config.rope_base)
        key_BSHd = rotate(project("key", config.kv_heads), context.positions, config.rope_base)
        value_BSHd = project("value", config.kv_heads)
        if cache is None:
            seen = Seen.in_documents(context.segments)
        else:
            cache = cache.written(context.layer, context.positions, key_BSHd, value_BSHd)
            key_BSHd, value_BSHd = cache.key[context.layer], cache.value[context.layer]
            seen = Seen(context.positions)
        sink = None
        if config.sink == LOGIT:
            sink = self.param("sink", nn.initializers.zeros, (config.heads,))
        mixed_BLHd = attend(query_BLHd, key_BSHd, value_BSHd, seen, sink)
        if cache is None and self.is_mutable_collection(SINKS):
            shares_BHLS = attention_shares(query_BLHd, key_BSHd, seen, sink)
            first_BL = jnp.arange(x_BLD.shape[1]) - context.positions
            first_share = jnp.take_along_axis(shares_BHLS, first_BL[:, None, :, None], axis=-1)
            sow_last(self, SINKS, "first_share", first_share[..., 0])
        mixed_THd = mixed_BLHd.reshape(-1, config.heads, dim)
        if config.sink == GATE:
            gate = nn.Dense(config.heads, use_bias=False, dtype=self.dtype, name="gate")
            mixed_THd = mixed_THd * nn.sigmoid(gate(x_TD))[..., None]
        init = nn.initializers.variance_scaling(self.residual_scale**2, "fan_in", "normal")
        out = nn.DenseGeneral(
            width, axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=init, name="out"
        )
        return out(mixed_THd).reshape(x_BLD.shape), cache
