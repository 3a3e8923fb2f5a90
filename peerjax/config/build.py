"""Turns a configuration into the description of its model."""

import jax
import ml_collections

from peerjax.config.fields import with_tuples
from peerjax.layers import FEED_FORWARDS
from peerjax.layers.attention import AttentionConfig
from peerjax.layers.spec import FeedForward
from peerjax.model import ModelConfig
from peerjax.sharding.rules import AXES, complete_sizes


def feed_forwards(config: ml_collections.ConfigDict) -> tuple[tuple[FeedForward, int], ...]:
    """Returns the feed-forward layers in `model.layers`, each with its number of blocks."""
    sections = {
        kind.section: with_tuples(config[kind.section].to_dict()) for kind in FEED_FORWARDS.values()
    }
    return tuple((FEED_FORWARDS[kind].of(sections), count) for kind, count in config.model.layers)


def model_config(config: ml_collections.ConfigDict, vocab_size: int) -> ModelConfig:
    """Returns the part of a configuration that the model is built from."""
    fields = dict(config.model)
    del fields["max_length"], fields["routing_momentum"]
    heads, kv_heads = fields.pop("heads"), fields.pop("kv_heads")
    fields["attention"] = AttentionConfig(
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        rope_base=fields.pop("rope_base"),
        sink=fields.pop("attention_sink"),
    )
    fields["layers"] = feed_forwards(config)
    return ModelConfig(
        vocab_size=vocab_size,
        pool_storage=config.pool.storage,
        implementation=implementation_of(config),
        exchange=exchange_of(config),
        **fields,
    )


def implementation_of(config: ml_collections.ConfigDict) -> str | None:
    """Returns `kernels.implementation` in the form that `pallas_kernels` takes."""
    return None if config.kernels.implementation == "auto" else config.kernels.implementation


def pool_parts_of(config: ml_collections.ConfigDict) -> int:
    """Returns into how many parts `config.mesh` splits pools.

    With `mesh.expert=-1`, the result is 1 if the other axes do not fit the devices.
    """
    data, fsdp, expert = (config.mesh[axis] for axis in AXES)
    if expert == -1:
        try:
            expert = complete_sizes((data, fsdp, expert), jax.device_count())[-1]
        except ValueError:
            return 1
    return expert


def exchange_of(config: ml_collections.ConfigDict) -> str | None:
    """Returns `kernels.exchange` in the form that `peerjax.sharding` takes."""
    return None if config.kernels.exchange == "auto" else config.kernels.exchange
