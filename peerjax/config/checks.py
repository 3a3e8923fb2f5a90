"""The validation of a configuration, before data is read."""

from collections.abc import Callable, Iterable
from typing import Any

import ml_collections

from pallas_kernels.codes import CODES, accumulator_bits_of
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.packing import words_per_vector
from pallas_kernels.storage import STORAGES
from peerjax.config.build import feed_forwards
from peerjax.config.fields import flatten
from peerjax.data.mixing import checked_weights
from peerjax.data.text_files import domain_globs
from peerjax.errors import ConfigError
from peerjax.layers import FEED_FORWARDS
from peerjax.layers.attention import ATTENTION_SINKS
from peerjax.layers.peer import PeerConfig
from peerjax.layers.spec import FeedForward
from peerjax.routing.running_norm import IN_BATCH, RUNNING
from peerjax.sharding.exchange import EXCHANGES

# Values of `pool.rule` that need dense gradients of the pools.
DENSE_RULES = ("adamw", "eco")
# Values of `distill.start`.
OWN, ROUNDED, SEARCHED, MONET, PLAIN = "own", "rounded", "searched", "monet", "monet_plain"
STARTS = (OWN, ROUNDED, SEARCHED, MONET, PLAIN)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks everything that can be checked before data is read.

    Raises:
        ConfigError: if a field is invalid. The message names the first such field.
    """
    _require_positive(config, "steps", "data.sequence_length", "data.batch_size", "model.width")
    _require_positive(config, "model.heads", "model.rope_base", "eval.every", "eval.rows")
    _require_positive(config, "log_every", "checkpoint.every")
    _require_positive(config, "optimizer.microbatches", "max_skipped_steps")
    _require_not_negative(config, "optimizer.clip_norm")
    _require_not_negative(config, "optimizer.learning_rate", "optimizer.warmup_steps")
    _require_not_negative(config, "optimizer.weight_decay", "pool.learning_rate", "pool.clip_norm")
    for name in ("optimizer.beta1", "optimizer.beta2", "pool.beta2"):
        _require(config, name, lambda decay: 0 <= decay < 1, "is not in [0, 1)")
    _require(config, "optimizer.final_fraction", lambda part: 0 <= part <= 1, "is not in [0, 1]")
    _require_choice(config, "data.source", ("packages", "files", "shards"))
    _require_choice(config, "model.dtype", ("float32", "bfloat16"))
    _require_choice(config, "model.attention_sink", ATTENTION_SINKS)
    _require_not_negative(config, "model.shared_mlp")
    _require_choice(config, "model.routing_statistics", (RUNNING, IN_BATCH))
    _require_choice(config, "pool.storage", STORAGES)
    _require_choice(config, "pool.rule", ("rowwise", *DENSE_RULES))
    _require_choice(config, "kernels.implementation", ("auto", *IMPLEMENTATIONS))
    _require_choice(config, "kernels.exchange", ("auto", *EXCHANGES))
    model, data = config.model, config.data
    if data.source in ("files", "shards") and not data.pattern:
        raise ConfigError(
            f"data.source is {data.source!r} but data.pattern is empty; set data.pattern"
        )
    if data.source == "files":
        domain_globs(data.pattern)
    # Only shards themselves say what their domains are.
    if data.weights and data.source != "shards":
        named = data.domains
        if data.source == "files":
            named = [domain for domain, _ in domain_globs(data.pattern)]
        checked_weights(data.weights, list(dict.fromkeys(named)))
    if data.source == "shards" and data.tokenizer:
        raise ConfigError(
            "data.source='shards' uses the tokenizer of the shards; leave data.tokenizer empty"
        )
    _require(config, "data.validation_fraction", lambda part: 0 < part < 1, "is not in (0, 1)")
    _require_not_negative(config, "data.workers")
    if data.batch_size % config.optimizer.microbatches:
        raise ConfigError(
            f"data.batch_size={data.batch_size} is not divisible by "
            f"optimizer.microbatches={config.optimizer.microbatches}"
        )
    if data.sequence_length > model.max_length:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} is longer than the model allows "
            f"(model.max_length={model.max_length})"
        )
    _require(config, "model.routing_momentum", lambda part: 0 < part <= 1, "is not in (0, 1]")
    if model.width % (2 * model.heads):
        raise ConfigError(
            f"model.width={model.width} is not divisible by 2 * model.heads={2 * model.heads} "
            "(rotary positions rotate pairs of features)"
        )
    if (kv_heads := model.kv_heads) is not None and (kv_heads < 1 or model.heads % kv_heads):
        raise ConfigError(
            f"model.kv_heads={kv_heads} is not a positive divisor of model.heads={model.heads}"
        )
    _validate_layers(model.layers)
    layers = feed_forwards(config)
    for (kind, count), (spec, _) in zip(model.layers, layers, strict=True):
        _validate_feed_forward(config, spec)
        if count % spec.period:
            raise ConfigError(
                f"model.layers has {count} blocks of {kind!r} in a row, which is not divisible by "
                f"{spec.period}, the number of blocks that share a router"
            )
    if model.shared_mlp and not any(spec.is_sparse for spec, _ in layers):
        raise ConfigError(
            f"model.shared_mlp={model.shared_mlp} is beside sparse layers, but model.layers has "
            "none; set it to 0"
        )
    if not model.shared_tied and not model.shared_mlp:
        raise ConfigError(
            "model.shared_tied=False unties the weights of a shared path, but model.shared_mlp=0 "
            "means that there is none; set model.shared_mlp to a width"
        )
    if not any(PeerConfig.section in (spec.section, *spec.further_sections) for spec, _ in layers):
        for name, default in (("gate", PeerConfig.gate), ("always_on", PeerConfig.always_on)):
            if (value := config.peer[name]) != default:
                raise ConfigError(
                    f"peer.{name}={value!r} needs a PEER layer, but model.layers has none; set it "
                    f"to {default!r}"
                )
    if any(spec.pools for spec, _ in layers):
        _validate_pool(config)
    _require_choice(config, "distill.start", STARTS)
    _require_positive(config, "distill.calibration_rows")
    if config.distill.start != OWN and not config.distill.teacher:
        raise ConfigError(
            f"distill.start={config.distill.start!r} needs a teacher; run distill.py with "
            "--teacher=WORKDIR, a folder of a run"
        )
    if config.checkpoint.keep < 2:
        raise ConfigError(f"checkpoint.keep={config.checkpoint.keep} is less than 2")


def _validate_pool(config: ml_collections.ConfigDict) -> None:
    storage = config.pool.storage
    if storage not in CODES:
        if config.pool.rule == "eco":
            raise ConfigError(
                f"pool.rule='eco' needs packed storage, but pool.storage={storage!r}; "
                "choose pool.rule='adamw'"
            )
        return
    if config.pool.rule == "adamw":
        raise ConfigError(
            f"pool.rule='adamw' needs float storage, but pool.storage={storage!r}; "
            "choose pool.rule='rowwise'"
        )
    for bits in filter(None, (CODES[storage].bits, _accumulator_bits(config, storage))):
        try:
            words_per_vector(config.model.width, bits)
        except ValueError as error:
            raise ConfigError(f"model.width={config.model.width}: {error}") from None


def _validate_feed_forward(config: ml_collections.ConfigDict, spec: FeedForward) -> None:
    try:
        spec.check(config.model.width)
        spec.check_length(config.data.sequence_length)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if spec.packed_storage not in CODES:
        return
    if config.pool.rule in DENSE_RULES:
        raise ConfigError(
            f"{spec.section}.storage={spec.packed_storage!r} needs pool.rule='rowwise', but "
            f"pool.rule={config.pool.rule!r}"
        )
    _accumulator_bits(config, spec.packed_storage)


def _accumulator_bits(config: ml_collections.ConfigDict, storage: str) -> int:
    try:
        return accumulator_bits_of(storage, config.pool.accumulator_bits)
    except ValueError as error:
        raise ConfigError(f"pool.accumulator_bits: {error}") from None


def _validate_layers(layers: tuple) -> None:
    form = "a tuple such as (('dense', 5), ('peer', 1))"
    if not layers:
        raise ConfigError(f"model.layers is empty; give {form}")
    for run in layers:
        if not isinstance(run, tuple) or len(run) != 2:
            raise ConfigError(f"model.layers has {run!r}; give {form}")
        kind, count = run
        if kind not in FEED_FORWARDS:
            raise ConfigError(
                f"model.layers names the unknown kind {kind!r}; "
                f"choose from {', '.join(FEED_FORWARDS)}"
            )
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"model.layers gives {kind!r} the count {count!r}; it must be >= 1")


def _require(
    config: ml_collections.ConfigDict, name: str, holds: Callable[[Any], bool], otherwise: str
) -> None:
    value = flatten(config)[name]
    if not holds(value):  # NaN fails every comparison
        raise ConfigError(f"{name}={value} {otherwise}")


def _require_positive(config: ml_collections.ConfigDict, *names: str) -> None:
    for name in names:
        _require(config, name, lambda value: value > 0, "is not positive")


def _require_not_negative(config: ml_collections.ConfigDict, *names: str) -> None:
    for name in names:
        _require(config, name, lambda value: value >= 0, "is negative")


def _require_choice(config: ml_collections.ConfigDict, name: str, choices: Iterable[str]) -> None:
    value = flatten(config)[name]
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown; choose from {', '.join(choices)}")
