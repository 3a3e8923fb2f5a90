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
# Tokens that are computed at a time. With 64, shares of the quickstart stay in the caches of a CPU.
FEWEST_TOKENS, MOST_CHUNKS = 64, 8
LOWEST = float(jnp.finfo(jnp.float32).min)  # score of a key that is not seen


class Seen(NamedTuple):
    """The keys that each token sees: those of its document that do not come after it.

    Attributes:
        places: index of the last key that each token may see.
        documents: number of the document of each token, and of each key; `None` if all keys are of
            one document.
    """

    places: Int[Array, "B L"]
    documents: tuple[Int[Array, "B L"], Int[Array, "B S"]] | None = None

    @staticmethod
    def in_documents(documents: Int[Array, "B L"]) -> Seen:
        """Returns what the tokens of whole sequences see."""
        places = jnp.broadcast_to(jnp.arange(documents.shape[1]), documents.shape)
        return Seen(places, (documents, documents))

    def mask(self, keys: int) -> Bool[Array, "B 1 L S"]:
        """Returns whether each token sees each of the first `keys` keys."""
        seen_BLS = jnp.arange(keys) <= self.places[:, :, None]
        if self.documents is not None:
            of_tokens, of_keys = self.documents
            seen_BLS &= of_tokens[:, :, None] == of_keys[:, None, :]
        return seen_BLS[:, None]

    def at(self, tokens: slice, keys: slice) -> Seen:
        """Returns what some tokens see of some of the first keys."""
        if self.documents is None:
            return Seen(self.places[:, tokens])
        of_tokens, of_keys = self.documents
        return Seen(self.places[:, tokens], (of_tokens[:, tokens], of_keys[:, keys]))


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
    if seen.documents is not None:
        return _causal(query, key, value, seen, sink)
    batch, length, heads, dim = query.shape
    shares_NMS, _ = _softmax(_scores(query, key), seen, sink)
    value_NSd = _by_head(value, value.shape[2])
    mixed_NMd = jnp.einsum("nms,nsd->nmd", shares_NMS.astype(value.dtype), value_NSd)
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


def _softmax(scores_NMS: Array, seen: Seen, sink: Array | None) -> tuple[Array, Array]:
    """Returns the shares of keys, and the logarithm of their denominators [N, M, 1].

    A sink adds the term `exp(sink)` to the denominators.

    References:
        OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925, section 2.2 (a learned
        bias in the denominator of the softmax).
    """
    shape, (batch, length) = scores_NMS.shape, seen.places.shape
    scores_NMS = _where(seen, scores_NMS, LOWEST)
    scores_BHLS = scores_NMS.reshape(batch, -1, length, shape[-1])
    largest = jnp.max(scores_BHLS, axis=-1, keepdims=True)
    logit = None if sink is None else sink.astype(scores_BHLS.dtype)[:, None, None]
    if logit is not None:
        largest = jnp.maximum(largest, logit)
    terms = jnp.exp(scores_BHLS - largest)
    total = jnp.sum(terms, axis=-1, keepdims=True)
    if logit is not None:
        total += jnp.exp(logit - largest)
    log_total = (largest + jnp.log(total)).reshape(*shape[:-1], 1)
    return (terms / total).reshape(shape), log_total


def _where(seen: Seen, x_NMS: Array, otherwise: float) -> Array:
    """Returns numbers of tokens and keys with another one for keys that are not seen."""
    (batch, length), keys = seen.places.shape, x_NMS.shape[-1]
    x_BHLS = x_NMS.reshape(batch, -1, length, keys)
    return jnp.where(seen.mask(keys), x_BHLS, otherwise).reshape(x_NMS.shape)


@jax.custom_vjp
def _causal(query: Array, key: Array, value: Array, seen: Seen, sink: Array | None) -> Array:
    """Computes attention in whole sequences, a few tokens of all sequences at a time.

    Keys after these tokens are left out, which saves up to half of the work. The backward pass
    computes the shares again, so that nothing of the size L * S is kept. It reads the logarithms of
    their denominators, and no sink: its value is 0.
    """
    return _causal_forward(query, key, value, seen, sink)[0]


def _causal_forward(
    query: Array, key: Array, value: Array, seen: Seen, sink: Array | None
) -> tuple[Array, Any]:
    mixed, log_totals = [], []
    for tokens, keys in _chunks(query.shape[1]):
        own = seen.at(tokens, keys)
        shares, log_total = _softmax(_scores(query[:, tokens], key[:, keys]), own, sink)
        value_NSd = _by_head(value[:, keys], value.shape[2])
        of_chunk = jnp.einsum("nms,nsd->nmd", shares.astype(value.dtype), value_NSd)
        mixed.append(_by_token(of_chunk, query[:, tokens]))
        log_totals.append(log_total)
    mixed_BLHd = jnp.concatenate(mixed, axis=1)
    return mixed_BLHd, (query, key, value, seen, sink, mixed_BLHd, log_totals)


def _causal_backward(kept: Any, d_mixed: Array) -> tuple[Array, Array, Array, None, Array | None]:
    query, key, value, seen, sink, mixed, log_totals = kept
    kv_heads, scale = key.shape[2], query.shape[-1] ** -0.5
    means_BLH = jnp.sum((d_mixed * mixed).astype(jnp.float32), axis=-1)
    d_query, d_sinks = [], []
    d_key, d_value = (
        jnp.zeros(_by_head(each, kv_heads).shape, jnp.float32) for each in (key, value)
    )
    for (tokens, keys), log_total in zip(_chunks(query.shape[1]), log_totals, strict=True):
        of_chunk = query[:, tokens]
        key_NSd, value_NSd = (_by_head(each[:, keys], kv_heads) for each in (key, value))
        d_mixed_NMd = _by_head(d_mixed[:, tokens], kv_heads)
        scores = _scores(of_chunk, key[:, keys])
        shares_NMS = _where(seen.at(tokens, keys), jnp.exp(scores - log_total), 0.0)
        d_shares_NMS = jnp.einsum(
            "nmd,nsd->nms", d_mixed_NMd, value_NSd, preferred_element_type=jnp.float32
        )
        means_NM1 = _by_head(means_BLH[:, tokens, :, None], kv_heads)
        d_scores_NMS = (shares_NMS * (d_shares_NMS - means_NM1)).astype(query.dtype)
        shares_NMS = shares_NMS.astype(value.dtype)
        d_query.append(_by_token(jnp.einsum("nms,nsd->nmd", d_scores_NMS, key_NSd), of_chunk))
        query_NMd = _by_head(of_chunk, kv_heads)
        d_key = d_key.at[:, keys].add(jnp.einsum("nms,nmd->nsd", d_scores_NMS, query_NMd))
        d_value = d_value.at[:, keys].add(jnp.einsum("nms,nmd->nsd", shares_NMS, d_mixed_NMd))
        if sink is not None:
            logit = sink.astype(jnp.float32)[:, None]
            batch, heads = query.shape[0], query.shape[2]
            of_sink, means = (each.reshape(batch, heads, -1) for each in (log_total, means_NM1))
            d_sinks.append(-jnp.sum(jnp.exp(logit - of_sink) * means, axis=(0, 2)))
    return (
        scale * jnp.concatenate(d_query, axis=1),
        scale * _by_token(d_key, key).astype(key.dtype),
        _by_token(d_value, value).astype(value.dtype),
        None,
        None if sink is None else jnp.sum(jnp.stack(d_sinks), axis=0).astype(sink.dtype),
    )


_causal.defvjp(_causal_forward, _causal_backward)


def _chunks(length: int) -> list[tuple[slice, slice]]:
    """Returns slices of tokens, each with the slice of keys that they can see."""
    size = max(FEWEST_TOKENS, -(-length // MOST_CHUNKS))
    ends = [min(first + size, length) for first in range(0, length, size)]
    return [(slice(first, end), slice(end)) for first, end in zip([0, *ends], ends, strict=False)]


def _by_token(x_NMd: Array, like_BLHd: Array) -> Array:
    """Returns what `_by_head` made into [N, M, d] of an array of the shape of `like_BLHd`."""
    batch, length, heads, dim = like_BLHd.shape
    return x_NMd.reshape(batch, heads, length, dim).swapaxes(1, 2)


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
    assert seen.documents is not None
    documents, _ = seen.documents
    return over_mesh(local, specs, BATCH)(query, key, value, documents, sink)
