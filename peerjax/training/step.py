"""One training step and one evaluation step: pure functions of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool, Float

from pallas_kernels.expert_update import UpdateState
from pallas_kernels.factored_gradient import FactoredGradient
from peerjax.config import DENSE_RULES
from peerjax.model import Decoder
from peerjax.optim import apply_updates, dequantize
from peerjax.pool import ExpertPool
from peerjax.routing.auxiliary import ROUTING
from peerjax.routing.running_norm import IN_BATCH, MOMENTS, pooled, updated
from peerjax.sharding.batches import split_rows
from peerjax.training.gradients import (
    Batch,
    all_finite,
    dense_gradients,
    inputs_of,
    layer_by_run,
    loss_and_gradients,
    whole_gradients,
)
from peerjax.training.state import PARAMS, POOLS, Skipped, TrainState, learning_rate_schedule

Metrics = dict[str, Array]


def make_train_step(
    config: ml_collections.ConfigDict, model: Decoder, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step. The gradient of a pool leaves the model in factored form, by its tap.

    A step whose loss or gradient is not finite changes nothing but the counts of steps.
    """
    schedule = learning_rate_schedule(config, config.optimizer.learning_rate)
    microbatches = config.optimizer.microbatches
    dense = config.pool.rule in DENSE_RULES

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, (grads, factored, moments, terms) = loss_and_gradients(
            model, state.variables, batch, microbatches
        )
        finite = all_finite((loss, grads, factored))
        # Pools are rewritten in place, so there is no old one to go back to. They, and whatever
        # else moves row by row, are passed over by a gradient that hits nobody.
        factored = {run: gradient.only_if(finite) for run, gradient in factored.items()}
        pool_gradients = (dense_gradients if dense else whole_gradients)(state.pools, factored)
        gradient_norm = optax.tree.norm((grads, pool_gradients) if dense else grads)
        grads = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), grads)
        gradients = {PARAMS: grads, POOLS: pool_gradients}
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        trained = apply_updates(state.trained, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": schedule(state.step - state.skipped.total),
            **{f"losses/{name}": term for name, term in terms.items()},
            **hit_shares(state.pools, factored),
        }
        if not dense:
            metrics |= update_metrics(state.pools, opt_state)
        new_state = state._replace(
            params=trained[PARAMS],
            pools=trained[POOLS],
            opt_state=opt_state,
            stats=updated(state.stats, moments, config.model.routing_momentum),
        )
        new_state = _accept(finite, new_state, state, in_place=not dense)
        skipped = Skipped(
            total=state.skipped.total + ~finite,
            in_a_row=jnp.where(finite, 0, state.skipped.in_a_row + 1),
        )
        metrics |= {f"skipped/{name}": count for name, count in skipped._asdict().items()}
        return new_state._replace(step=state.step + 1, skipped=skipped), metrics

    return train_step


def _accept(finite: Bool[Array, ""], new: Any, old: Any, in_place: bool) -> Any:
    """The new tree, or the old one after a step that is skipped.

    Pools `in_place`, and accumulators, are taken as they are: nothing hit them.
    """

    def is_of_pool(node: Any) -> bool:
        return in_place and isinstance(node, ExpertPool | UpdateState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_of_pool(new) else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_of_pool)


def make_first_statistics(
    config: ml_collections.ConfigDict, model: Decoder
) -> Callable[[TrainState, Batch], TrainState]:
    """Builds what starts the running statistics of routers: those of the first batch.

    Every router is normalised by the batch itself there, so that those behind it see what they
    will see.
    """
    in_batch = Decoder(dataclasses.replace(model.config, routing_statistics=IN_BATCH))

    def first_statistics(state: TrainState, batch: Batch) -> TrainState:
        def moments_of(part: Batch) -> Any:
            variables = dequantize(state.variables)
            return in_batch.apply(variables, *inputs_of(part), mutable=[MOMENTS])[1]

        parts = jax.lax.map(moments_of, split_rows(batch, config.optimizer.microbatches))
        moments = pooled(parts).get(MOMENTS, {})
        return state._replace(stats=updated(state.stats, moments, momentum=1.0))

    return first_statistics


def make_eval_step(model: Decoder) -> Callable[[dict[str, Any], Batch], dict[str, Any]]:
    """Builds the evaluation step: sums over a batch, each row counted `batch["weight"]` times."""
    num_experts = model.config.experts_by_run()

    def eval_step(variables: dict[str, Any], batch: Batch) -> dict[str, Any]:
        logits, kept = model.apply(dequantize(variables), *inputs_of(batch), mutable=[ROUTING])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], losses.shape)
        gates = {
            run: gate_sums(layer, weight_BL.reshape(-1), num_experts[run])
            for run, layer in layer_by_run(kept.get(ROUTING, {})).items()
        }
        return {"nats": jnp.sum(losses * weight_BL), "gate_sums": gates}

    return eval_step


def gate_sums(
    routing: dict[str, Array], weight: Float[Array, " T"], num_experts: int
) -> Float[Array, "layers N"]:
    """Sums each expert's gates over the tokens: z of the PEER paper, before normalisation.

    Args:
        routing: what `peerjax.routing.auxiliary` keeps, stacked over layers: `ids` and `gates`
            [layers, T, K], or the factors `g1` and `g2` [layers, T, H, n].
        weight: of each token.
        num_experts: N.
    """
    if "g1" in routing:
        weighted = routing["g1"] * weight[None, :, None, None]
        sums = jnp.einsum("lthi,lthj->lij", weighted, routing["g2"])
        return sums.reshape(-1, num_experts)
    ids = routing["ids"]
    weighted = routing["gates"] * weight[None, :, None]
    zeros = jnp.zeros((ids.shape[0], num_experts), jnp.float32)
    layer = jnp.arange(ids.shape[0])[:, None, None]
    return zeros.at[layer, ids].add(weighted, mode="drop")


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
            metrics[f"pool_grown/{run}"] = counts.grown / jnp.maximum(counts.rows, 1)
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
