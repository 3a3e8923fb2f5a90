"""The train state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Int, Key

from peerjax.objectives.task import Task
from peerjax.routing.running import STATS

PARAMS, POOLS = "params", "pools"


class Skipped(NamedTuple):
    """Counts of steps that changed nothing, because their loss or gradient was not finite."""

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]

    @staticmethod
    def none() -> "Skipped":
        """Returns the counts of a fresh run."""
        return Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
        params: float leaves and packed matrices. Packed matrices are differentiated as floats.
        pools: the expert pools, by stack and name.
        opt_state: state of the optimizer over `{"params": params, "pools": pools}`.
        stats: running statistics of routers, and the norm of each sub-key at step 0.
        step: number of steps made, skipped ones included.
        skipped: counts of skipped steps.
    """

    params: Any
    pools: Any
    opt_state: Any
    stats: Any
    step: Int[Array, ""]
    skipped: Skipped

    @property
    def trained(self) -> dict[str, Any]:
        """The tree that the optimizer updates."""
        return {PARAMS: self.params, POOLS: self.pools}

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that the model reads."""
        return {**self.trained, STATS: self.stats}


def create_state(
    config: ml_collections.ConfigDict, task: Task, optimizer: optax.GradientTransformation
) -> TrainState:
    """Draws a fresh state from `config.seed`. Call it under `jax.jit`."""
    return state_of(task.init(init_key(config)), optimizer)


def init_key(config: ml_collections.ConfigDict) -> Key[Array, ""]:
    """Returns the random key for the initial variables of a run."""
    return jax.random.split(jax.random.key(config.seed))[0]


def state_of(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of a run before its first step, with the given variables."""
    trained = {PARAMS: variables[PARAMS], POOLS: variables[POOLS]}
    return TrainState(
        **trained,
        opt_state=optimizer.init(trained),
        stats=variables[STATS],
        step=jnp.zeros((), jnp.int32),
        skipped=Skipped.none(),
    )
