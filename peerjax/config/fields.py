"""All fields of a configuration with their defaults, and configurations as JSON."""

import json
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict
from ml_collections import config_dict

from peerjax.errors import ConfigError
from peerjax.layers import FEED_FORWARDS

# Fields that may change when a run is resumed. A change to any other field is an error.
CHANGEABLE = (
    "steps",
    "max_skipped_steps",
    "log_every",
    "eval",
    "checkpoint",
    "data.workers",
    "kernels",
    "mesh",
)
# Names of fields in earlier versions, with the fields that replace them.
RENAMED = {
    "model.mlp_width": ("mlp.hidden",),
    "model.activation": ("mlp.activation", "moe.activation"),
}
# Sections of which `config_of_student` takes the fields from the teacher.
OF_TEACHER = ("data", "model", *dict.fromkeys(kind.section for kind in FEED_FORWARDS.values()))


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
    # Domains to read with source "packages". `peerjax.data.packages` has the list.
    data.domains = ("speeches", "drama", "code")
    # With source "files": a glob such as "corpus/**/*.txt", or several globs as named domains such
    # as "web=corpus/**/*.txt;notes=notes/*.jsonl". With source "shards": the folder of the shards.
    data.pattern = ""
    data.text_field = "text"  # field of JSON lines that has the text, with source "files"
    # Path of a tokenizer JSON, which is copied into the workdir; or "bpe_4096" or "bpe_8192", which
    # come with peerjax. Empty selects "bpe_4096" or the tokenizer of the shards.
    data.tokenizer = ""
    # Shares of the domains in the rows of training, such as (("speeches", 2.0), ("drama", 1.0)).
    # Rows of a domain are repeated as often as its share requires. By default, every row is read
    # once in an epoch.
    data.weights = ()
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
    # spread in one step. With the usual 0.1, statistics lag and experts become unused. Shares of
    # metaexperts do not depend on it.
    model.routing_momentum = 0.9

    for kind in FEED_FORWARDS.values():
        config[kind.section] = ml_collections.ConfigDict(kind.defaults())

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
    # How devices send tokens to the devices that have their experts, if the axis `expert` of the
    # mesh is larger than 1: "gather" sends every token to all of them, "dispatch" only to those
    # that have experts of it, "auto" does what sends fewer bytes.
    kernels.exchange = "auto"

    # Sizes of the axes of the mesh of devices. -1 takes the devices that are left. Of several -1,
    # the last does. Rows of a batch are split over all axes, dense parameters over `fsdp`, and
    # pools over `expert`. So pools are split over all devices, unless other sizes are set.
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "expert": -1})

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

    # Fields of `distill.py`. In pairs of numbers, a value follows a cosine from the first number at
    # step 0 to the second at the last step.
    distill = config.distill = ml_collections.ConfigDict()
    distill.teacher = ""  # workdir of the teacher, which the flag --teacher sets; "" trains without
    # Weights of the student before the first step. "own" draws them at random, or takes them from
    # `init_from`. "rounded" takes the teacher's weights in the student's storages. "searched" does
    # so with the scales that give the lowest loss on calibration text. "monet" makes PEER layers of
    # the teacher's Monet layers, with their routers. "monet_plain" gives them routers of PEER.
    distill.start = "own"
    distill.alpha = (0.9, 0.5)  # weight of the divergence from the teacher; 1 - alpha of the text
    distill.temperature = (2.0, 1.0)  # divisor of both models' logits in the divergence
    distill.beta = (1.0, 0.1)  # weight of the distance of feed-forward outputs
    # Number of the teacher's likeliest tokens in the divergence, with all other tokens as one
    # class. `None` means all tokens, or 64 with a cache.
    distill.top_k = config_dict.placeholder(int)
    distill.calibration_rows = 32  # rows of training text on which conversions are chosen

    config.eval = ml_collections.ConfigDict()
    config.eval.every = 250  # steps between evaluations; also before step 1 and after the last
    config.eval.rows = 32  # sequences of each domain in an evaluation

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 100  # steps between checkpoints; also after the last step
    config.checkpoint.keep = 3  # latest checkpoints to keep; at least 2, in case one is damaged
    return config.lock()


def config_of_student() -> ml_collections.ConfigDict:
    """Returns a locked configuration for `distill.py`, with fields that the teacher gives.

    In the sections "data" and "model" and in those of layers, every field is `None`. This means the
    value in the teacher's configuration.
    """
    config = default_config()
    with config.unlocked():
        for section in OF_TEACHER:
            for name, value in config[section].items():
                if value is not None:
                    config[section][name] = config_dict.placeholder(type(value))
    return config


def with_fields_of(
    teacher: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Returns a copy of a configuration whose fields that are `None` have the teacher's values."""
    fields, given = flatten(config), flatten(teacher)
    for name, value in fields.items():
        if value is None and name.split(".")[0] in OF_TEACHER:
            fields[name] = given[name]
    result = default_config()
    result.update_from_flattened_dict(fields)
    return result


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads a configuration from JSON. Fields that the JSON lacks get their defaults.

    Raises:
        ConfigError: if a field is unknown or has another type.
    """
    config = default_config()
    try:
        fields = flatten(with_tuples(json.loads(text)))
        for old, names in RENAMED.items():
            if old in fields:
                value = fields.pop(old)
                fields |= {name: value for name in names if name not in fields}
        config.update_from_flattened_dict(fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"it was written by another version of peerjax ({error})") from None
    return config


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
    """Returns the differences of two configurations in all fields that may not change."""
    old_fields, new_fields = flatten(old), flatten(new)
    changed = []
    for name in sorted(old_fields.keys() | new_fields.keys()):
        changeable = any(name == field or name.startswith(field + ".") for field in CHANGEABLE)
        before, after = old_fields.get(name), new_fields.get(name)
        if not changeable and before != after:
            changed.append(f"{name} (was {before!r}, is {after!r})")
    return changed


def flatten(fields: ml_collections.ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Returns fields by their full name, such as "model.width"."""
    if isinstance(fields, ml_collections.ConfigDict):
        fields = fields.to_dict()
    return flatten_dict(with_tuples(fields), sep=".")


def with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Turns the lists in nested fields into tuples."""
    return {
        name: with_tuples(value) if isinstance(value, dict) else _as_tuples(value)
        for name, value in fields.items()
    }


def _as_tuples(value: Any) -> Any:
    """Turns lists into tuples, which JSON does not have."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value
