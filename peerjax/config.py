"""All fields of a configuration with their defaults, and the validation of a configuration."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict
from ml_collections import config_dict

from pallas_kernels.codes import CODES, accumulator_bits_of
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.packing import words_per_vector
from pallas_kernels.storage import STORAGES
from peerjax.data.text_files import domain_globs
from peerjax.errors import ConfigError
from peerjax.layers import FEED_FORWARDS
from peerjax.layers.attention import ATTENTION_SINKS, AttentionConfig
from peerjax.layers.peer import PeerConfig
from peerjax.layers.spec import FeedForward
from peerjax.model import ModelConfig
from peerjax.routing.running_norm import IN_BATCH, RUNNING

# Values of `pool.rule` that need dense gradients of the pools.
DENSE_RULES = ("adamw", "eco")
# Fields that may change when a run is resumed. A change to any other field is an error.
CHANGEABLE = (
    "steps",
    "max_skipped_steps",
    "log_every",
    "eval",
    "checkpoint",
    "data.workers",
    "kernels",
)
# Names of fields in earlier versions, with the fields that replace them.
RENAMED = {
    "model.mlp_width": ("mlp.hidden",),
    "model.activation": ("mlp.activation", "moe.activation"),
}


def default_config() -> ml_collections.ConfigDict:
    """Returns a locked configuration with the default of every field.

    Recipes in `configs/` change some of them. Each kind of layer has a section. Its class in
    `peerjax.layers` documents the fields.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1000
    # Workdir of a run, or one of its checkpoints such as "runs/a/checkpoints/500". A new run takes
    # parameters, pools and running statistics from it, and accumulators if `pool` is set alike. If
    # this is empty, weights are drawn at random.
    config.init_from = ""
    config.max_skipped_steps = 10  # training stops after so many non-finite steps in a row
    config.log_every = 10  # steps between progress lines if the output is not a terminal

    data = config.data = ml_collections.ConfigDict()
    data.source = "packages"  # "packages", "files", or "shards" (written by prepare.py)
    data.domains = ("speeches", "drama", "code")  # domains to read with source "packages"
    # With source "files": a glob such as "corpus/**/*.txt", or several globs as named domains such
    # as "web=corpus/**/*.txt;notes=notes/*.jsonl". With source "shards": the folder of the shards.
    data.pattern = ""
    data.text_field = "text"  # field of JSON lines that has the text, with source "files"
    # Path of a tokenizer JSON, which is copied into the workdir. Empty selects the tokenizer that
    # comes with peerjax or with the shards.
    data.tokenizer = ""
    data.validation_fraction = 0.05  # share of the documents used for validation
    data.sequence_length = 256  # tokens in a sequence
    data.batch_size = 8  # sequences in a step, over all devices
    data.workers = 0  # processes that prepare batches; 0 uses a thread instead

    model = config.model = ml_collections.ConfigDict()
    model.width = 128  # D, features of the residual stream
    model.layers = (("dense", 1), ("peer", 1), ("dense", 1))  # stacks: (kind, number of blocks)
    model.heads = 4  # attention heads
    # Heads of keys and values; consecutive attention heads share one. `None` means `model.heads`.
    model.kv_heads = config_dict.placeholder(int)
    # "logit" adds a learned logit to the softmax of each attention head, so that a head can attend
    # to nothing. "gate" multiplies the output of each head by a sigmoid gate.
    model.attention_sink = "none"
    model.max_length = 2048  # the longest sequence the model accepts, in tokens
    model.rope_base = 10_000.0
    model.dtype = "float32"  # dtype of activations, or "bfloat16"; parameters are float32
    model.remat = False  # recompute each block in the backward pass
    # Hidden neurons of a small dense layer beside every sparse layer; 0 for none. It has one set of
    # weights for all layers, or one for each with `shared_tied = False`.
    model.shared_mlp = 0
    model.shared_tied = True
    # Statistics for batch normalisation in routers during training. "running" uses statistics of
    # earlier steps. "in_batch" is the form in the papers, in which later tokens affect the experts
    # of earlier ones. Use it only for comparison.
    model.routing_statistics = "running"
    # Weight of the current batch in running statistics. Queries move by a large part of their
    # spread in one step. With the usual 0.1, statistics lag and experts become unused.
    model.routing_momentum = 0.9

    for kind in FEED_FORWARDS.values():
        config[kind.section] = ml_collections.ConfigDict(dataclasses.asdict(kind()))

    pool = config.pool = ml_collections.ConfigDict()
    pool.storage = "int4"  # "int4", "int8", "bfloat16" or "float32"
    # Update rule of pools: "rowwise", "adamw" for float storage, or "eco" for packed storage.
    # "eco" adds the rounding error to momentum. "adamw" and "eco" are for comparison, because both
    # keep dense gradients and moments.
    pool.rule = "rowwise"
    pool.learning_rate = 1e-2  # peak; `optimizer` below sets the schedule
    # Bound on the gradient norm of the pools of each stack, under "rowwise". 0 means no bound.
    pool.clip_norm = 0.0
    pool.beta2 = 0.99  # decay of the second moment of each vector, under "rowwise"
    # Bits of the accumulators of packed pools and matrices: 0, 2, 4 or 8. `None` means as many as
    # a code has.
    pool.accumulator_bits = config_dict.placeholder(int)

    kernels = config.kernels = ml_collections.ConfigDict()
    # Implementation of retrieval, lookup and update: "auto" (chosen by platform and sizes), "xla",
    # "native_cpu", "mosaic_tpu" or "mosaic_gpu". A Mosaic kernel for another platform is
    # interpreted, which is slow. Mixtures have no kernels. For them, each name selects the XLA
    # program that is fastest on its platform, and all these programs run everywhere. Sampling and
    # evaluation of a run use "auto".
    kernels.implementation = "auto"

    optimizer = config.optimizer = ml_collections.ConfigDict()
    optimizer.learning_rate = 3e-3  # peak for all parameters except pools
    optimizer.warmup_steps = 50
    optimizer.final_fraction = 0.1  # share of the peak that is left after the cosine decay
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.weight_decay = 0.1  # applies to matrices and pools, not to norms and embeddings
    # Bound on the global gradient norm of all parameters except pools and packed matrices. Under
    # dense rules it includes pools. 0 means no bound.
    optimizer.clip_norm = 1.0
    optimizer.microbatches = 1  # parts of a batch, computed one after the other to save memory

    config.eval = ml_collections.ConfigDict()
    config.eval.every = 250  # steps between evaluations; also before step 1 and after the last
    config.eval.rows = 32  # sequences of each domain in an evaluation

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 100  # steps between checkpoints; also after the last step
    config.checkpoint.keep = 3  # latest checkpoints to keep; at least 2, in case one is damaged
    return config.lock()


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads a configuration from JSON. Fields that the JSON lacks get their defaults.

    Raises:
        ConfigError: if a field is unknown or has another type.
    """
    config = default_config()
    try:
        fields = _flatten(_with_tuples(json.loads(text)))
        for old, names in RENAMED.items():
            if old in fields:
                value = fields.pop(old)
                fields |= {name: value for name in names if name not in fields}
        config.update_from_flattened_dict(fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"it was written by another version of peerjax ({error})") from None
    return config


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
    model, data = config.model, config.data
    if data.source in ("files", "shards") and not data.pattern:
        raise ConfigError(
            f"data.source is {data.source!r} but data.pattern is empty; set data.pattern"
        )
    if data.source == "files":
        domain_globs(data.pattern)
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
    if not any(isinstance(spec, PeerConfig) for spec, _ in layers):
        for name, default in (("gate", PeerConfig.gate), ("always_on", PeerConfig.always_on)):
            if (value := config.peer[name]) != default:
                raise ConfigError(
                    f"peer.{name}={value!r} needs a PEER layer, but model.layers has none; set it "
                    f"to {default!r}"
                )
    if any(spec.pools for spec, _ in layers):
        _validate_pool(config)
    if config.checkpoint.keep < 2:
        raise ConfigError(f"checkpoint.keep={config.checkpoint.keep} is less than 2")


def feed_forwards(config: ml_collections.ConfigDict) -> tuple[tuple[FeedForward, int], ...]:
    """Returns the feed-forward layers in `model.layers`, each with its number of blocks."""
    layers = []
    for kind, count in config.model.layers:
        cls = FEED_FORWARDS[kind]
        fields = _with_tuples(config[cls.section].to_dict())
        layers.append((cls(**fields), count))
    return tuple(layers)


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
        **fields,
    )


def implementation_of(config: ml_collections.ConfigDict) -> str | None:
    """Returns `kernels.implementation` in the form that `pallas_kernels` takes."""
    return None if config.kernels.implementation == "auto" else config.kernels.implementation


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
    """Returns the differences of two configurations in all fields that may not change."""
    old_fields, new_fields = _flatten(old), _flatten(new)
    changed = []
    for name in sorted(old_fields.keys() | new_fields.keys()):
        changeable = any(name == field or name.startswith(field + ".") for field in CHANGEABLE)
        before, after = old_fields.get(name), new_fields.get(name)
        if not changeable and before != after:
            changed.append(f"{name} (was {before!r}, is {after!r})")
    return changed


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
    value = _flatten(config)[name]
    if not holds(value):  # NaN fails every comparison
        raise ConfigError(f"{name}={value} {otherwise}")


def _require_positive(config: ml_collections.ConfigDict, *names: str) -> None:
    for name in names:
        _require(config, name, lambda value: value > 0, "is not positive")


def _require_not_negative(config: ml_collections.ConfigDict, *names: str) -> None:
    for name in names:
        _require(config, name, lambda value: value >= 0, "is negative")


def _require_choice(config: ml_collections.ConfigDict, name: str, choices: Iterable[str]) -> None:
    value = _flatten(config)[name]
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown; choose from {', '.join(choices)}")


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _with_tuples(value) if isinstance(value, dict) else _as_tuples(value)
        for name, value in fields.items()
    }


def _as_tuples(value: Any) -> Any:
    """Turns the lists in a field back into tuples, which JSON does not have."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _flatten(fields: ml_collections.ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Returns fields by their full name, such as "model.width"."""
    if isinstance(fields, ml_collections.ConfigDict):
        fields = fields.to_dict()
    return flatten_dict(_with_tuples(fields), sep=".")
