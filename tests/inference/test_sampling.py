import dataclasses
import itertools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peerjax.inference.sampling import Sampling, draw, generate, nucleus
from peerjax.model import empty_cache
from peerjax.routing.auxiliary import DECODE
from tests.test_model import CONFIG, LENGTH, VARIANTS, make, readable_of

GREEDY = Sampling(temperature=0)
# Without gradients there is nothing to compute again.
CACHED = {name: config for name, config in VARIANTS.items() if name != "remat"}
CACHED["int4"] = dataclasses.replace(CONFIG, pool_storage="int4", width=64)


@pytest.mark.parametrize("name", CACHED)
def test_reading_token_by_token_gives_the_logits_of_reading_at_once(name):
    model, variables, (tokens, positions, _) = make(CACHED[name])
    readable = readable_of(variables)

    def at_once(tokens, positions):
        return model.apply(readable, tokens, positions, mutable=["routing"])

    @jax.jit
    def further(cache, tokens, positions):
        (logits, of_attention), kept = model.apply(
            {**readable, DECODE: cache[DECODE]},
            tokens,
            positions,
            cache=cache["attention"],
            mutable=["routing", DECODE],
        )
        state = {"attention": of_attention, DECODE: kept.pop(DECODE, {})}
        return (logits, state), kept

    expected, routing = jax.jit(at_once)(tokens, positions)
    for prompt in (1, 9):
        cache = empty_cache(model.config, len(tokens), LENGTH + 3)
        bounds = [0, prompt, *range(prompt + 1, LENGTH + 1)]
        parts, ids = [], []
        for first, last in itertools.pairwise(bounds):
            place = (slice(None), slice(first, last))
            (logits, cache), kept = further(cache, tokens[place], positions[place])
            parts.append(logits)
            ids.append(kept)
        found = jnp.concatenate(parts, axis=1)
        scale = np.max(np.abs(expected))
        error = np.max(np.abs(found - expected), axis=-1) / scale
        # A near-tie of a router may fall the other way; in these, none does.
        bound = 2e-2 if CACHED[name].dtype == "bfloat16" else 2e-5
        assert np.all(error < bound), error.max()
        for path, whole in jax.tree_util.tree_leaves_with_path(routing):
            if jnp.issubdtype(whole.dtype, jnp.integer) and CACHED[name].dtype == "float32":
                per_part = [dict(jax.tree_util.tree_leaves_with_path(each))[path] for each in ids]
                layers, _, slots = whole.shape
                joined = [each.reshape(layers, len(tokens), -1, slots) for each in per_part]
                whole = whole.reshape(layers, len(tokens), -1, slots)
                np.testing.assert_array_equal(jnp.concatenate(joined, axis=2), whole)


@pytest.mark.parametrize("name", ["peer", "metapeer sequence"])
def test_prompts_of_a_batch_go_on_as_each_would_alone(name):
    model, variables, _ = make(VARIANTS[name])
    readable = readable_of(variables)
    prompts = [[0, 5, 7, 9, 11, 3], [0], [0, 8, 2]]
    together = np.array(list(generate(model, readable, prompts, 12, GREEDY))).T

    @jax.jit
    def logits_after(tokens, last):
        return model.apply(readable, tokens, jnp.arange(LENGTH)[None], only=last)[0, 0]

    for prompt, continued in zip(prompts, together, strict=True):
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(prompt)] = prompt
        for place, token in enumerate(continued, start=len(prompt)):
            assert token == np.argmax(logits_after(tokens, np.array([place - 1])))
            tokens[0, place] = token


def test_draws_depend_on_seed_row_and_position_only():
    model, variables, _ = make(CONFIG)
    readable = readable_of(variables)

    def sample(seed, prompts):
        return np.array(list(generate(model, readable, prompts, 16, Sampling(1.0, 0.9, seed)))).T

    first = sample(0, [[0, 1], [0, 1]])
    assert np.any(first[0] != first[1])
    np.testing.assert_array_equal(first, sample(0, [[0, 1], [0, 1]]))
    np.testing.assert_array_equal(first[:1], sample(0, [[0, 1]]))
    assert np.any(first != sample(1, [[0, 1], [0, 1]]))


logits_of_rows = hypothesis.extra.numpy.arrays(
    np.float32, (3, 11), elements=st.floats(-8, 8, width=32)
)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(logits_of_rows, st.floats(0, 0.99))
def test_the_nucleus_is_the_smallest_that_holds_its_share(logits, top_p):
    kept = np.isfinite(nucleus(jnp.asarray(logits), top_p))
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    for row, stays, scores in zip(probabilities, kept, logits, strict=True):
        assert stays[np.argmax(scores)]
        assert row[stays].sum() >= top_p - 1e-5
        assert row[stays].min() >= row[~stays].max(initial=0)
        likelier = row[stays & (row > row[stays].min() * (1 + 1e-5))]
        assert likelier.sum() < top_p + 1e-5 or len(likelier) == 0


def test_draws_follow_the_tempered_distribution():
    logits = jnp.array([0.0, 1.0, 2.0, -1.0])
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = draw(jnp.tile(logits, (count, 1)), keys, Sampling(temperature=0.5))
    shares = np.bincount(drawn, minlength=4) / count
    expected = np.asarray(jax.nn.softmax(logits / 0.5))
    assert np.all(np.abs(shares - expected) < 5 * np.sqrt(expected / count))
