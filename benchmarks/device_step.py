"""Measures memory and time of the recipe for one accelerator, executed on this device.

`one_accelerator` only compiles these training steps. Here state, running statistics and steps are
executed, on batches of random tokens. JAX leaves a quarter of a GPU's memory unused unless
`XLA_PYTHON_CLIENT_MEM_FRACTION=0.95` is set.
"""

import math
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.recipes import config_of
from benchmarks.result import Figure, Result
from peerjax.objectives import language_model
from peerjax.planning.programs import VOCABULARY, step_of
from peerjax.planning.targets import GIB
from peerjax.pool import memory_report
from peerjax.training.optimizer import make_optimizer
from peerjax.training.state import create_state
from peerjax.training.step import set_by_first_batch

# Recipe, and the wanted number of expert parameters.
CHOICES = {
    "gpu": ("peer_60b_one_gpu", 60e9),
    "tpu": ("peer_12b_one_v5e", 12e9),
    "cpu": ("peer_1m_cpu", 0.5e9),
}
STEPS = 10


def run(quick: bool) -> Result:
    """Executes some steps. `quick` uses the small recipe for CPUs."""
    recipe, wanted = CHOICES["cpu" if quick else jax.default_backend()]
    found = execute(recipe, STEPS)
    parameters, seconds = found["expert_parameters"], found["seconds_per_step"]
    peak = found["peak_bytes"]
    rows = [
        [
            recipe,
            f"{parameters / 1e9:.1f}",
            f"{peak / GIB:.1f}" if peak else "",
            f"{1e3 * seconds:.0f}",
            f"{found['tokens_per_step'] / seconds:,.0f}",
            f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}",
        ]
    ]
    figures = [Figure.at_least(f"{recipe}: expert parameters trained", parameters, wanted)]
    figures += [Figure(f"{recipe}: peak GiB", peak / GIB)] if peak else []
    columns = ("recipe", "billion expert parameters", "peak GiB", "ms a step", "tokens/s", "loss")
    return Result(columns, rows, figures, {recipe: found})


def execute(recipe: str, steps: int) -> dict[str, Any]:
    """Executes steps of a recipe, and measures their time and memory.

    Args:
        recipe: the name of a file in `configs/`.
        steps: number of steps.

    Returns:
        "expert_parameters", "tokens_per_step", "seconds_per_step" (median), "losses" of all steps,
        and "peak_bytes" of the device. "peak_bytes" is `None` if the device does not count them.
    """
    config = config_of(recipe)
    task, optimizer = language_model(config, VOCABULARY), make_optimizer(config)
    step, _, shapes = step_of(config)
    state = jax.jit(lambda: create_state(config, task, optimizer))()

    @jax.jit
    def batch(number: Any) -> dict[str, Any]:
        shape = shapes["inputs"].shape
        tokens = jax.random.randint(jax.random.key(number), (shape[0], shape[1] + 1), 0, VOCABULARY)
        return {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
            "segments": jnp.ones(shape, jnp.int32),
        }

    state = jax.jit(partial(set_by_first_batch, task), donate_argnums=0)(state, batch(0))
    losses, seconds = [], []
    for number in range(1, steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch(number))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"losses of {recipe} are not all finite: {losses}")
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "expert_parameters": memory_report(state.pools, state.opt_state).parameters,
        "tokens_per_step": shapes["inputs"].size,
        "seconds_per_step": statistics.median(seconds[1:]),
        "losses": losses,
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }
