"""One training step: a pure function of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool

from pallas_kernels.expert_update import UpdateState
from peerjax.model import ModelConfig
from peerjax.objectives.task import Batch, Task, inputs_of
from peerjax.optim import apply_updates, dequantize
from peerjax.pool import ExpertPool
from peerjax.routing.auxiliary import by_module
from peerjax.routing.running import FIRST, Active, updated, with_first
from peerjax.sharding.lookups import overflows
from peerjax.sharding.rules import in_place
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
            **active_metrics(task.model.config, moments),
            **update_metrics(task.model.config, state.pools, opt_state),
            **overflow_metrics(task.model.config, state.pools, factored),
        }
        new_state = state._replace(
            params=trained[PARAMS],
            pools=trained[POOLS],
            opt_state=opt_state,
            stats=updated(state.stats, moments, config.model.routing_momentum),
        )
        new_state = in_place(_accept(finite, new_state, state))
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


def set_by_first_batch(task: Task, state: TrainState, batch: Batch) -> TrainState:
    """Returns the state with the values that routers take from the first batch.

    These are running statistics, and thresholds and scales of gates. In the pass that computes
    them, every router already uses its own. So later routers read the inputs that they will read in
    training.

    The whole batch is computed together, so that the values do not depend on microbatches. Nothing
    is kept for a backward pass, and no logits are computed. With very many microbatches, a step can
    still take less memory than this pass.
    """
    variables = dequantize(state.variables)
    sown = task.model.apply(variables, *inputs_of(batch), mutable=[FIRST], with_head=False)[1]
    first = sown.get(FIRST, {})
    return state._replace(
        params=with_first(state.params, first), stats=with_first(state.stats, first)
    )


def active_metrics(config: ModelConfig, moments: Any) -> Metrics:
    """Returns the mean number of active experts a token of layers with adaptive gates, by stack."""
    metrics = {}
    for path, values in by_module(moments).items():
        for counts in values.values():
            if isinstance(counts, Active):
                by_layer = jnp.sum(counts.experts, axis=-1) / counts.tokens
                metrics[f"active/{config.stack_name(path[0])}"] = jnp.mean(by_layer)
    return metrics


def overflow_metrics(config: ModelConfig, pools: Any, factored: Any) -> Metrics:
    """Returns the share of chunks of tokens for which dispatching did not suffice, by stack."""
    metrics = {}
    for stack, of_stack in factored.items():
        for own_name, gradient in of_stack.items():
            name = config.stack_name(stack) + config.pool_name(stack, own_name)
            num_experts = pools[stack][own_name].num_experts
            share = overflows(gradient.ids, gradient.x, num_experts, config.exchange)
            if share is not None:
                metrics[f"gathered/{name}"] = share
    return metrics


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
