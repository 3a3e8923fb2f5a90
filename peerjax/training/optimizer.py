"""The optimizer of a configuration, and its state."""

from functools import partial
from typing import Any

import jax
import ml_collections
import optax

from pallas_kernels.expert_update import UpdateState
from pallas_kernels.storage import ExpertPool
from peerjax.config import DENSE_RULES, exchange_of, feed_forwards, implementation_of
from peerjax.layers.parameters import decayed, packed_storage
from peerjax.optim import eco, int4_accumulation, is_packed_matrix, on_dense_gradients
from peerjax.training.state import PARAMS, POOLS


def learning_rate_schedule(config: ml_collections.ConfigDict, peak: float) -> optax.Schedule:
    """Returns a linear warm-up to `peak`, then a cosine decay until `config.steps`.

    The cosine ends at `final_fraction` of the peak.
    """
    optimizer = config.optimizer
    warmup = min(optimizer.warmup_steps, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, config.steps, peak * optimizer.final_fraction
    )


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns AdamW for params, combined with the update rule in `config.pool` for pools.

    Under "rowwise", the gradients of pools are factored, and the step of each vector is bounded.
    Under "adamw" and "eco", they are dense, and clipped together with those of params.
    """
    optimizer, layers = config.optimizer, feed_forwards(config)

    def adamw(peak: float, mask: Any = None) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate_schedule(config, peak),
            b1=optimizer.beta1,
            b2=optimizer.beta2,
            weight_decay=optimizer.weight_decay,
            mask=mask,
        )

    clip = optax.identity()
    if optimizer.clip_norm:
        clip = optax.clip_by_global_norm(optimizer.clip_norm)
    of_params = adamw(optimizer.learning_rate, partial(decayed, layers))

    def labels(tree: Any) -> Any:
        def label(path: Any, _: Any) -> str:
            return PARAMS if packed_storage(layers, path) is None else POOLS

        of_params = jax.tree_util.tree_map_with_path(label, tree[PARAMS], is_leaf=is_packed_matrix)
        return {PARAMS: of_params, POOLS: POOLS}

    if config.pool.rule in DENSE_RULES:
        of_pools = adamw(config.pool.learning_rate)
        if config.pool.rule == "eco":
            of_pools = eco(
                learning_rate_schedule(config, config.pool.learning_rate),
                b1=optimizer.beta1,
                b2=optimizer.beta2,
                weight_decay=optimizer.weight_decay,
                seed=config.seed,
            )
        both = optax.partition({PARAMS: of_params, POOLS: of_pools}, labels)
        return on_dense_gradients(optax.chain(clip, both))
    of_pools = int4_accumulation(
        learning_rate_schedule(config, config.pool.learning_rate),
        weight_decay=optimizer.weight_decay,
        beta2=config.pool.beta2,
        clip_norm=config.pool.clip_norm or None,
        seed=config.seed,
        accumulator_bits=config.pool.accumulator_bits,
        implementation=implementation_of(config),
        exchange=exchange_of(config),
    )
    return optax.partition({PARAMS: optax.chain(clip, of_params), POOLS: of_pools}, labels)


def state_of_pools(opt_state: Any) -> list[Any]:
    """Returns the optimizer state of pools, without the state of packed matrices."""

    def is_state(node: Any) -> bool:
        return isinstance(node, UpdateState | ExpertPool)

    found = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_state)
    return [leaf for path, leaf in found if jax.tree_util.DictKey(PARAMS) not in path]
