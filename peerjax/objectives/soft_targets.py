"""Divergence from a teacher's predictions: from all of them, or from the likeliest and the rest."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Temperatures at which `SoftTargets` have the mass of the rest.
TEMPERATURES = (1.0, 1.25, 1.5, 2.0)


class SoftTargets(NamedTuple):
    """A teacher's distribution over the next token: its k likeliest tokens, and the rest as one.

    Attributes:
        ids: the likeliest tokens, best first.
        log_probs: their log-probabilities at temperature 1, in nats.
        rests: `log sum_i exp(log p_i / T)` over the other tokens, for each T of `TEMPERATURES`. It
            does not follow from the other numbers.
    """

    ids: Int[Array, "*S k"]
    log_probs: Float[Array, "*S k"]
    rests: Float[Array, "*S levels"]


def soft_targets(logits: Float[Array, "*S V"], k: int) -> SoftTargets:
    """Returns the k likeliest tokens of a teacher, and the mass of the rest.

    Raises:
        ValueError: if k is not less than the size of the vocabulary.
    """
    if not 0 < k < logits.shape[-1]:
        raise ValueError(f"k={k} is not in [1, {logits.shape[-1]}), the size of the vocabulary")
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    # On CPUs, XLA sorts arrays of more than two dimensions as a whole.
    found = jax.lax.top_k(log_probs.reshape(-1, log_probs.shape[-1]), k)
    likeliest, ids = (each.reshape(*logits.shape[:-1], k) for each in found)
    others = _without(log_probs, ids)
    rests = [jax.nn.logsumexp(others / each, axis=-1) for each in TEMPERATURES]
    return SoftTargets(ids, likeliest, jnp.stack(rests, axis=-1))


def divergence_from_likeliest(
    targets: SoftTargets, logits: Float[Array, "*S V"], level: Int[Array, ""] | int
) -> Float[Array, "*S"]:
    """Returns KL(teacher || student) in nats, with the rest of the vocabulary as one class.

    It is at most the divergence of the whole distributions.

    Args:
        targets: the teacher's predictions.
        logits: the student's logits.
        level: index of the temperature in `TEMPERATURES`. Both distributions have it.
    """
    temperature = jnp.array(TEMPERATURES)[level]
    rest = jnp.take(targets.rests, level, axis=-1)[..., None]
    of_teacher = jnp.concatenate([targets.log_probs / temperature, rest], axis=-1)
    scaled = logits.astype(jnp.float32) / temperature
    # Not the logarithm of 1 - sum, which is inaccurate for a small rest.
    others = jax.nn.logsumexp(_without(scaled, targets.ids), axis=-1, keepdims=True)
    likeliest = jnp.take_along_axis(scaled, targets.ids, axis=-1)
    of_student = jnp.concatenate([likeliest, others], axis=-1)
    return _divergence(of_teacher, of_student)


def divergence(
    teacher: Float[Array, "*S V"], student: Float[Array, "*S V"], temperature: Float[Array, ""]
) -> Float[Array, "*S"]:
    """Returns KL(softmax(teacher / T) || softmax(student / T)) in nats, from logits."""
    return _divergence(*(each.astype(jnp.float32) / temperature for each in (teacher, student)))


def _divergence(teacher: Float[Array, "*S C"], student: Float[Array, "*S C"]) -> Array:
    """Returns the divergence of the softmaxes of two arrays of logits."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _without(logits: Float[Array, "*S V"], ids: Int[Array, "*S k"]) -> Float[Array, "*S V"]:
    """Returns the logits with -inf for some tokens."""
    return jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
