"""The train state, and the optimizer that moves it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Int, Key

from pallas_kernels.expert_update import UpdateState
from pallas_kernels.storage import BITS, ExpertPool
from peerjax.config import DENSE_RULES, implementation_of
from peerjax.layers.monet import BIASES, MATRICES
from peerjax.model import Decoder
from peerjax.optim import eco, int4_accumulation, is_packed_matrix, pack
from peerjax.routing.running_norm import STATS

PARAMS, POOLS = "params", "pools"
# Leaves that weight decay leaves alone: norms, embeddings.
UNDECAYED = ("scale", "bias", "embedding", *BIASES)


class Skipped(NamedTuple):
    """Steps that changed nothing, because their loss or gradient was not finite."""

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]

    @staticmethod
    def none() -> "Skipped":
        """The counts of a fresh run."""
        return Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
        params: float leaves, and matrices that are kept packed; differentiated as floats.
        pools: the expert pools, by run of blocks.
        opt_state: state of the optimizer over `{"params": params, "pools": pools}`.
        stats: running statistics of routers; the norm of each sub-key at step 0.
        step: number of steps made, skipped ones included.
        skipped: how many of them were skipped.
        rng: the run's random key.
    """

    params: Any
    pools: Any
    opt_state: Any
    stats: Any
    step: Int[Array, ""]
    skipped: Skipped
    rng: Key[Array, ""]

    @property
    def trained(self) -> dict[str, Any]:
        """The tree that the optimizer sees."""
        return {PARAMS: self.params, POOLS: self.pools}

    @property
    def variables(self) -> dict[str, Any]:
        """What the model reads."""
        return {**self.trained, STATS: self.stats}


def create_state(
    config: ml_collections.ConfigDict, model: Decoder, optimizer: optax.GradientTransformation
) -> TrainState:
    """Draws a fresh state from `config.seed`. To be called under `jax.jit`."""
    init_key, rng = jax.random.split(jax.random.key(config.seed))
    # Parameters do not depend on the batch: the smallest that splits over the devices will do.
    tokens = jnp.zeros((jax.device_count(), 1), jnp.int32)
    variables = model.init(init_key, tokens, tokens, tokens)
    params, pools = _packed(config, variables["params"]), variables.get("pools", {})
    return TrainState(
        params=params,
        pools=pools,
        opt_state=optimizer.init({PARAMS: params, POOLS: pools}),
        stats=variables.get(STATS, {}),
        step=jnp.zeros((), jnp.int32),
        skipped=Skipped.none(),
        rng=rng,
    )


def learning_rate_schedule(config: ml_collections.ConfigDict, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine to `final_fraction` of it at `config.steps`."""
    optimizer = config.optimizer
    warmup = min(optimizer.warmup_steps, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, config.steps, peak * optimizer.final_fraction
    )


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW over params, and the rule that `config.pool` names over pools.

    Under "rowwise" the gradients of pools are factored, and each row's step is bounded; under
    "adamw" and "eco" they are dense, and clipped together with those of params.
    """
    optimizer = config.optimizer

    def adamw(peak: float, mask: Any = None) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate_schedule(config, peak),
            b1=optimizer.beta1,
            b2=optimizer.beta2,
            weight_decay=optimizer.weight_decay,
            mask=mask,
        )

    clip = optax.clip_by_global_norm(optimizer.clip_norm)
    of_params = adamw(optimizer.learning_rate, _decayed)

    def labels(tree: Any) -> Any:
        def label(path: Any, _: Any) -> str:
            return POOLS if _is_to_be_packed(config, path) else PARAMS

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
        return optax.chain(clip, optax.partition({PARAMS: of_params, POOLS: of_pools}, labels))
    of_pools = int4_accumulation(
        learning_rate_schedule(config, config.pool.learning_rate),
        weight_decay=optimizer.weight_decay,
        beta2=config.pool.beta2,
        clip_norm=config.pool.clip_norm or None,
        seed=config.seed,
        accumulator_bits=config.pool.accumulator_bits,
        implementation=implementation_of(config),
    )
    return optax.partition({PARAMS: optax.chain(clip, of_params), POOLS: of_pools}, labels)


def state_of_pools(opt_state: Any) -> list[Any]:
    """What the optimizer keeps for pools; what it keeps for other packed matrices is left out."""

    def is_state(node: Any) -> bool:
        return isinstance(node, UpdateState | ExpertPool)

    found = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_state)
    return [leaf for path, leaf in found if jax.tree_util.DictKey(PARAMS) not in path]


def _packed(config: ml_collections.ConfigDict, params: Any) -> Any:
    """Params with Monet's matrices in codes, if they are kept so."""
    bits = BITS.get(config.monet.storage)

    def pack_leaf(path: Any, leaf: Any) -> Any:
        return pack(leaf, bits) if bits and _is_to_be_packed(config, path) else leaf

    return jax.tree_util.tree_map_with_path(pack_leaf, params)


def _is_to_be_packed(config: ml_collections.ConfigDict, path: Any) -> bool:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return config.monet.storage in BITS and names[-2:-1] == ["monet"] and names[-1] in MATRICES


def _decayed(tree: Any) -> Any:
    def is_decayed(path: Any, leaf: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) not in UNDECAYED

    return jax.tree_util.tree_map_with_path(is_decayed, tree)
