"""Samples text from a model, token by token, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from peerjax.model import Decoder, decode, empty_cache
from peerjax.optim import dequantize
from peerjax.sharding.over_mesh import size_of_mesh


class Sampling(NamedTuple):
    """Settings for sampling a token.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_p: total probability of the tokens to sample from, the fewest and most likely ones; 1
            samples from all.
        seed: random seed. Draws depend only on the seed, the number of the prompt and the position.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def nucleus(logits: Float[Array, "B V"], top_p: float | Float[Array, ""]) -> Float[Array, "B V"]:
    """Keeps the logits of the fewest, most likely tokens with total probability `top_p`.

    Other logits become -inf. The most likely token is always kept. All tokens exactly as likely as
    the last one kept are kept too.

    References:
        Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, eq. 2.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    stays = (before < top_p).at[:, 0].set(True)
    least = jnp.min(descending, axis=-1, keepdims=True, where=stays, initial=jnp.inf)
    return jnp.where(logits >= least, logits, -jnp.inf)


def draw(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """Samples a token for every row, each with its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = nucleus(logits, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def generate(
    model: Decoder,
    variables: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    first_prompt: int = 0,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Continues all prompts in one batch, one token of each at a time.

    Args:
        model: the decoder.
        variables: the decoder's collections "params", "pools" and "stats".
        prompts: token ids. Each prompt begins a document, and none is empty.
        count: number of tokens to sample for each prompt.
        sampling: settings for sampling.
        first_prompt: number of the first prompt; the next prompts have the next numbers.

    On a mesh of several devices, prompts are split over them. Copies fill up the last part.

    Yields:
        The next token of every prompt, `count` times.
    """
    asked = len(prompts)
    prompts = [*prompts, *[prompts[0]] * (-asked % size_of_mesh())]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    variables = jax.jit(dequantize)(variables)  # once, not for every token
    cache = empty_cache(model.config, len(prompts), int(max(lengths)) + count)
    read = partial(
        _read, model, sampling._replace(seed=0), jax.random.key(sampling.seed), variables
    )
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    numbers = np.arange(first_prompt, first_prompt + len(prompts), dtype=np.int32)
    drawn, cache = read(cache, tokens, positions, np.asarray(lengths - 1, np.int32), numbers)
    first = np.zeros(len(prompts), np.int32)
    for step in range(count - 1):
        # Starts the next step before waiting for the tokens of this one.
        places = np.asarray(lengths + step, np.int32)[:, None]
        following, cache = read(cache, drawn[:, None], places, first, numbers)
        yield np.asarray(drawn)[:asked]
        drawn = following
    yield np.asarray(drawn)[:asked]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _read(
    model: Decoder,
    sampling: Sampling,
    key: Key[Array, ""],
    variables: dict[str, Any],
    cache: dict[str, Any],
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    last: Int[Array, " B"],
    numbers: Int[Array, " B"],
) -> tuple[Int[Array, " B"], dict[str, Any]]:
    """Reads some tokens of every row, and samples the token that follows number `last` of them.

    The random key of a row depends on the number of its prompt, in `numbers`. Cache entries after
    the end of a shorter prompt are overwritten before they are used.
    """
    logits, cache = decode(model, variables, cache, tokens, positions, only=last)
    rows = jnp.arange(len(last))
    keys = jax.vmap(
        lambda number, position: jax.random.fold_in(jax.random.fold_in(key, number), position)
    )(numbers, positions[rows, last])
    return draw(logits[:, 0], keys, sampling), cache
