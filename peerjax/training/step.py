"""One training step: a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool

from pallas_kernels.expert_update import UpdateState
from peerjax.model import Decoder, ModelConfig
from peerjax.objectives.task import Batch, Task, inputs_of
from peerjax.optim import apply_updates, dequantize
from peerjax.pool import ExpertPool
from peerjax.routing.running_norm import IN_BATCH, MOMENTS, pooled, updated
from peerjax.sharding.batches import split_rows
from peerjax.training.gradients import all_finite, loss_and_gradients, only_if
from peerjax.training.optimizer import learning_rate_schedule
from peerjax.training.state import PARAMS, POOLS, Skipped, TrainState

Metrics = dict[str, Array]


def make_train_step(
    config: ml_collections.ConfigDict, task: Task, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the step, with the signature `(state, batch, frozen=()) -> (state, metrics)`.

    The step computes gradients, updates the state and counts skipped steps. The model returns the
    gradient of a pool in factored form, through its tap. A step with a non-finite loss or gradient
    changes only the counts of steps. The metric `gradient_norm` covers all parameters but pools.
    """
    schedule = learning_rate_schedule(config, config.optimizer.learning_rate)

    def train_step(state: TrainState, batch: Batch, frozen: Any = ()) -> tuple[TrainState, Metrics]:
        loss, (grads, factored, moments, terms) = loss_and_gradients(
            task,
            state.variables,
            batch,
            frozen=frozen,
            microbatches=config.optimizer.microbatches,
            seed=config.seed,
            step=state.step,
        )
        finite = all_finite((loss, grads, factored))
        # Pools are rewritten in place, so the old ones cannot be restored. Gradients of a skipped
        # step are set to zero, so that pools and other packed parameters do not change.
        factored = only_if(finite, factored)
        gradient_norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), grads)
        gradients = {PARAMS: grads, POOLS: factored}
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        trained = apply_updates(state.trained, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": schedule(state.step - state.skipped.total),
            **{f"losses/{name}": term for name, term in terms.items()},
            **update_metrics(task.model.config, state.pools, opt_state),
        }
        new_state = state._replace(
            params=trained[PARAMS],
            pools=trained[POOLS],
            opt_state=opt_state,
            stats=updated(state.stats, moments, config.model.routing_momentum),
        )
        new_state = _accept(finite, new_state, state)
        skipped = Skipped(
            total=state.skipped.total + ~finite,
            in_a_row=jnp.where(finite, 0, state.skipped.in_a_row + 1),
        )
        metrics |= {f"skipped/{name}": count for name, count in skipped._asdict().items()}
        return new_state._replace(step=state.step + 1, skipped=skipped), metrics

    return train_step


def _accept(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns the new tree, or the old one after a skipped step.

    Pools and their update states are always taken from the new tree. A skipped step did not change
    them.
    """

    def is_of_pool(node: Any) -> bool:
        return isinstance(node, ExpertPool | UpdateState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_of_pool(new) else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_of_pool)


def make_first_statistics(
    config: ml_collections.ConfigDict, task: Task
) -> Callable[[TrainState, Batch], TrainState]:
    """Builds the function that sets the running statistics of routers from the first batch.

    Every router is normalised by the batch itself, so that later routers read the inputs that they
    will read in training.
    """
    in_batch = Decoder(dataclasses.replace(task.model.config, routing_statistics=IN_BATCH))

    def first_statistics(state: TrainState, batch: Batch) -> TrainState:
        def moments_of(part: Batch) -> Any:
            variables = dequantize(state.variables)
            return in_batch.apply(variables, *inputs_of(part), mutable=[MOMENTS])[1]

        parts = jax.lax.map(moments_of, split_rows(batch, config.optimizer.microbatches))
        moments = pooled(parts).get(MOMENTS, {})
        return state._replace(stats=updated(state.stats, moments, momentum=1.0))

    return first_statistics


def update_metrics(config: ModelConfig, pools: Any, opt_state: Any) -> Metrics:
    """Returns statistics of the last update of pools, as means over the layers of each stack.

    Rules with dense gradients have none.
    """
    statistics = optax.tree.get(opt_state, "statistics", {}).get(POOLS, {})
    metrics = {}
    for stack, of_stack in statistics.items():
        for own_name, of_layers in of_stack.items():
            name = config.stack_name(stack) + config.pool_name(stack, own_name)
            pool, counts = pools[stack][own_name], jax.tree.map(jnp.mean, of_layers)
            metrics[f"experts_hit/{name}"] = counts.experts / pool.num_experts
            weights = jnp.maximum(counts.rows * pool.width, 1)
            metrics[f"pool_step/{name}"] = counts.step_size / weights
            if pool.is_packed:
                metrics[f"pool_clipped/{name}"] = counts.clipped / weights
                metrics[f"pool_grown/{name}"] = counts.grown / jnp.maximum(counts.rows, 1)
    return metrics
