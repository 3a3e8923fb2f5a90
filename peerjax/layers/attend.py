"""Softmax attention on arrays: grouped keys and values, documents, and a sink logit a head.

No mask is kept for the backward pass. Tokens carry their places and documents, from which a mask is
computed where it is needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platforms import by_platform
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import BATCH

LANES = 128  # the kernel for TPUs takes sequences of a multiple of this length


class Seen(NamedTuple):
    """The keys that each token sees: those of its document that do not come after it.

    Attributes:
        places: index of the last key that each token may see.
        documents: number of the document of each token. The keys are those of the same tokens.
            `None` if all keys are of one document.
    """

    places: Int[Array, "B L"]
    documents: Int[Array, "B L"] | None = None

    @staticmethod
    def in_documents(documents: Int[Array, "B L"]) -> Seen:
        """Returns what the tokens of whole sequences see."""
        places = jnp.broadcast_to(jnp.arange(documents.shape[1]), documents.shape)
        return Seen(places, documents)

    def mask(self, keys: int) -> Bool[Array, "B 1 L S"]:
        """Returns whether each token sees each of the first `keys` keys."""
        seen_BLS = jnp.arange(keys) <= self.places[:, :, None]
        if self.documents is not None:
            seen_BLS &= self.documents[:, :, None] == self.documents[:, None, :]
        return seen_BLS[:, None]


def attend(
    query: Float[Array, "B L heads dim"],
    key: Float[Array, "B S kv_heads dim"],
    value: Float[Array, "B S kv_heads dim"],
    seen: Seen,
    sink: Float[Array, " heads"] | None = None,
) -> Float[Array, "B L heads dim"]:
    """Computes softmax attention over the keys that each token sees.

    Consecutive heads of the query share a head of keys and values. On TPUs, JAX's kernel of splash
    attention computes whole sequences whose length is a multiple of 128.

    Args:
        query: queries.
        key: keys. The number of their heads divides that of the queries.
        value: values.
        seen: the keys that each token sees.
        sink: logit of one more key of every head, whose value is 0; `None` for no such key.
    """
    operands = (query, key, value, seen, sink)
    if seen.documents is not None and query.shape[1] % LANES == 0:
        return by_platform(*operands, default=_by_matrices, tpu=_by_splash)
    return _by_matrices(*operands)


def attention_shares(
    query: Float[Array, "B L heads dim"],
    key: Float[Array, "B S kv_heads dim"],
    seen: Seen,
    sink: Float[Array, " heads"] | None = None,
) -> Float[Array, "B heads L S"]:
    """Returns the share of every key in the attention of each token, in float32.

    The shares of a token sum to 1, or to less if there is a sink.
    """
    batch, length, heads, _ = query.shape
    shares_NMS, _ = _softmax(_scores(query, key), seen, sink)
    return shares_NMS.reshape(batch, heads, length, -1)


# Consecutive heads that share keys and values are one product of matrices: N = B * kv_heads and
# M = heads / kv_heads * L. XLA on CPUs computes it about twice as fast as the products of
# `jax.nn.dot_product_attention`.


def _by_matrices(query: Array, key: Array, value: Array, seen: Seen, sink: Array | None) -> Array:
    batch, length, heads, dim = query.shape
    mixed_NMd = _mix(_scores(query, key), _by_head(value, value.shape[2]), seen, sink)
    return mixed_NMd.reshape(batch, heads, length, dim).swapaxes(1, 2)


def _scores(query: Array, key: Array) -> Float[Array, "N M S"]:
    kv_heads = key.shape[2]
    query_NMd = _by_head(query * query.shape[-1] ** -0.5, kv_heads)
    return jnp.einsum(
        "nmd,nsd->nms", query_NMd, _by_head(key, kv_heads), preferred_element_type=jnp.float32
    )


def _by_head(x_BLHd: Array, kv_heads: int) -> Float[Array, "N _ d"]:
    batch, _, _, dim = x_BLHd.shape
    return x_BLHd.swapaxes(1, 2).reshape(batch * kv_heads, -1, dim)


def _softmax(scores_NMS: Array, seen: Seen, sink: Array | None) -> tuple[Array, Array | None]:
    """Returns the shares of keys, and those of the sink. The latter is a term `exp(sink)`.

    References:
        OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925, section 2.2 (a learned
        bias in the denominator of the softmax).
    """
    shape, (batch, length) = scores_NMS.shape, seen.places.shape
    scores_BHLS = scores_NMS.reshape(batch, -1, length, shape[-1])
    lowest = jnp.finfo(scores_NMS.dtype).min
    scores_BHLS = jnp.where(seen.mask(shape[-1]), scores_BHLS, lowest)
    largest = jnp.max(scores_BHLS, axis=-1, keepdims=True)
    if sink is None:
        terms = jnp.exp(scores_BHLS - largest)
        shares = terms / jnp.sum(terms, axis=-1, keepdims=True)
        return shares.reshape(shape), None
    logit = sink.astype(scores_BHLS.dtype)[:, None, None]
    largest = jnp.maximum(largest, logit)
    terms, of_sink = jnp.exp(scores_BHLS - largest), jnp.exp(logit - largest)
    total = jnp.sum(terms, axis=-1, keepdims=True) + of_sink
    return (terms / total).reshape(shape), of_sink / total


@jax.custom_vjp
def _mix(scores_NMS: Array, value_NSd: Array, seen: Seen, sink: Array | None) -> Array:
    """Returns the mean of values under the softmax of scores.

    The backward pass reads the shares and no mask, because the share of a key that is not seen is
    0.
    """
    return _mix_forward(scores_NMS, value_NSd, seen, sink)[0]


def _mix_forward(
    scores_NMS: Array, value_NSd: Array, seen: Seen, sink: Array | None
) -> tuple[Array, Any]:
    shares_NMS, of_sink = _softmax(scores_NMS, seen, sink)
    shares_NMS = shares_NMS.astype(value_NSd.dtype)
    mixed_NMd = jnp.einsum("nms,nsd->nmd", shares_NMS, value_NSd)
    return mixed_NMd, (shares_NMS, of_sink, value_NSd)


def _mix_backward(kept: Any, d_mixed_NMd: Array) -> tuple[Array, Array, None, Array | None]:
    shares_NMS, of_sink, value_NSd = kept
    d_value_NSd = jnp.einsum("nms,nmd->nsd", shares_NMS, d_mixed_NMd)
    d_shares_NMS = jnp.einsum(
        "nmd,nsd->nms", d_mixed_NMd, value_NSd, preferred_element_type=jnp.float32
    )
    weighted_NMS = shares_NMS * d_shares_NMS
    mean_NM1 = jnp.sum(weighted_NMS, axis=-1, keepdims=True)
    d_scores_NMS = weighted_NMS - shares_NMS * mean_NM1
    if of_sink is None:
        return d_scores_NMS, d_value_NSd, None, None
    # The value of the sink is 0, so only the mean moves its logit.
    d_sink = -jnp.sum(of_sink * mean_NM1.reshape(of_sink.shape), axis=(0, 2, 3))
    return d_scores_NMS, d_value_NSd, None, d_sink


_mix.defvjp(_mix_forward, _mix_backward)


def _by_splash(
    query: Array,
    key: Array,
    value: Array,
    seen: Seen,
    sink: Array | None,
    interpret: bool = False,
) -> Array:
    def local(query: Array, key: Array, value: Array, documents: Any, sink: Any) -> Array:
        length, heads, dim = query.shape[1:]
        causal = splash_attention.CausalMask((length, length))
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([causal] * heads),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

        def of_sequence(query: Array, key: Array, value: Array, documents: Array) -> Array:
            query, key, value = (each.swapaxes(0, 1) for each in (query, key, value))
            segment_ids = splash_attention.SegmentIds(documents, documents)
            mixed = kernel(query * dim**-0.5, key, value, segment_ids, sink)
            return mixed.swapaxes(0, 1)

        return jax.vmap(of_sequence)(query, key, value, documents)

    specs = (BATCH, BATCH, BATCH, BATCH, P())
    return over_mesh(local, specs, BATCH)(query, key, value, seen.documents, sink)
