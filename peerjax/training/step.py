"""One training step and one evaluation step: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int

from pallas_kernels.factored_gradient import FactoredGradient
from peerjax.model import Decoder
from peerjax.optim import apply_updates
from peerjax.pool import ExpertPool
from peerjax.sharding.pools import dense_pool_gradient, gather_tokens
from peerjax.training.state import PARAMS, POOLS, TrainState, learning_rate_schedule

Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_train_step(
    config: ml_collections.ConfigDict, model: Decoder, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step. The gradient of a pool leaves the model in factored form, by its tap."""
    schedule = learning_rate_schedule(config, config.optimizer.learning_rate)

    def loss_of(params: Any, taps: Any, pools: Any, batch: Batch) -> tuple[Array, Any]:
        variables = {"params": params, "taps": taps, "pools": pools}
        logits, kept = model.apply(variables, *_inputs(batch), mutable=["routing"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return losses.mean(), kept.get("routing", {})

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        taps = _zero_taps(model, batch)
        (loss, routing), (grads, tap_grads) = jax.value_and_grad(
            loss_of, argnums=(0, 1), has_aux=True
        )(state.params, taps, state.pools, batch)
        factored = factored_gradients(routing, tap_grads)
        dense = config.pool.rule == "adamw"
        pool_gradients = (dense_gradients if dense else whole_gradients)(state.pools, factored)
        gradients = {PARAMS: grads, POOLS: pool_gradients}
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        trained = apply_updates(state.trained, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients if dense else grads),
            "learning_rate": schedule(state.step),
            **hit_shares(state.pools, factored),
        }
        if not dense:
            metrics |= update_metrics(state.pools, opt_state)
        new_state = state._replace(
            params=trained[PARAMS],
            pools=trained[POOLS],
            opt_state=opt_state,
            step=state.step + 1,
        )
        return new_state, metrics

    return train_step


def make_eval_step(model: Decoder) -> Callable[[Any, Any, Batch], dict[str, Any]]:
    """Builds the evaluation step: sums over a batch, each row counted `batch["weight"]` times."""

    def eval_step(params: Any, pools: Any, batch: Batch) -> dict[str, Any]:
        variables = {"params": params, "pools": pools}
        logits, kept = model.apply(variables, *_inputs(batch), mutable=["routing"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], losses.shape)
        gates = {
            run: gate_sums(layer["ids"], layer["gates"], weight_BL.reshape(-1), pools[run]["pool"])
            for run, layer in _pool_layers(kept.get("routing", {})).items()
        }
        return {"nats": jnp.sum(losses * weight_BL), "gate_sums": gates}

    return eval_step


def gate_sums(
    ids: Int[Array, "layers T K"],
    gates: Float[Array, "layers T K"],
    weight: Float[Array, " T"],
    pool: ExpertPool,
) -> Float[Array, "layers N"]:
    """Sums each expert's gates over the tokens: z of the PEER paper, before normalisation."""
    weighted = gates * weight[None, :, None]
    zeros = jnp.zeros((ids.shape[0], pool.num_experts), jnp.float32)
    layer = jnp.arange(ids.shape[0])[:, None, None]
    return zeros.at[layer, ids].add(weighted, mode="drop")


def factored_gradients(routing: Any, tap_grads: Any) -> dict[str, FactoredGradient]:
    """Joins the ids that the forward pass kept with the cotangents of its taps, by run."""
    taps = _pool_layers(tap_grads)
    return {
        run: FactoredGradient.from_tap(layer["ids"], taps[run]["pool"])
        for run, layer in _pool_layers(routing).items()
    }


def gradient_shapes(
    config: ml_collections.ConfigDict, model: Decoder
) -> dict[str, FactoredGradient]:
    """Shapes of the factored gradients of one step, by run."""

    def gradients() -> dict[str, FactoredGradient]:
        tokens = jnp.zeros((config.data.batch_size, config.data.sequence_length), jnp.int32)
        variables = model.init(jax.random.key(0), tokens, tokens, tokens)
        return factored_gradients(variables.get("routing", {}), variables.get("taps", {}))

    return jax.eval_shape(gradients)


def dense_gradients(pools: Any, factored: dict[str, FactoredGradient]) -> Any:
    """The gradients of float pools as trees like the pools themselves."""
    gradients = {}
    for run, gradient in factored.items():
        pool = pools[run]["pool"]
        weights = dense_pool_gradient(gradient, pool.num_experts).astype(pool.weights.dtype)
        gradients[run] = {"pool": ExpertPool.of_floats(weights)}
    return gradients


def whole_gradients(pools: Any, factored: dict[str, FactoredGradient]) -> Any:
    """Factored gradients as a tree like the pools, with the tokens of all devices."""
    return {run: {"pool": gather_tokens(factored[run])} for run in pools}


def update_metrics(pools: Any, opt_state: Any) -> Metrics:
    """What the last update did to the pools of each run, mean over its layers."""
    metrics = {}
    statistics = optax.tree.get(opt_state, "statistics")[POOLS]
    for run, tree in statistics.items():
        pool, counts = pools[run]["pool"], jax.tree.map(jnp.mean, tree["pool"])
        weights = jnp.maximum(counts.rows * pool.width, 1)
        metrics[f"pool_step/{run}"] = counts.step_size / weights
        if pool.is_packed:
            metrics[f"pool_clipped/{run}"] = counts.clipped / weights
            metrics[f"pool_doubled/{run}"] = counts.doubled / jnp.maximum(counts.rows, 1)
    return metrics


def hit_shares(pools: Any, factored: dict[str, FactoredGradient]) -> Metrics:
    """The share of experts that this batch chose, mean over the layers of each run."""
    shares = {}
    for run, gradient in factored.items():
        layers, num_experts = gradient.ids.shape[0], pools[run]["pool"].num_experts
        hit = jnp.zeros((layers, num_experts), bool)
        layer = jnp.arange(layers)[:, None, None]
        hit = hit.at[layer, gradient.ids].set(True, mode="drop")
        shares[f"experts_hit/{run}"] = hit.mean()
    return shares


def _pool_layers(collection: Any) -> dict[str, Any]:
    """Takes `{run: {"block": {layer name: leaves}}}` apart, one layer with a pool a run."""
    return {run: next(iter(tree["block"].values())) for run, tree in collection.items()}


def _inputs(batch: Batch) -> tuple[Array, Array, Array]:
    return batch["inputs"], batch["positions"], batch["segments"]


def _zero_taps(model: Decoder, batch: Batch) -> Any:
    """Zeros for the model's taps; their shapes depend on the batch."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *_inputs(batch))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get("taps", {}))
