"""Measures the time of lookup and update against the number of active experts a token.

Experts that are not active have the id that lookups skip. A token retrieves K experts in any case.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure

from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.sweep import ROOT
from benchmarks.timing import medians_in_turns
from pallas_kernels import dispatch
from pallas_kernels.expert_lookup import lookup
from pallas_kernels.expert_update import Hyperparameters, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from peerjax.pool import initialize_pool

N, D, T, K = 1 << 20, 256, 512, 128
ACTIVE = (0, 8, 16, 32, 64, 96, 128)
FORWARD, BACKWARD, UPDATE = PROGRAMS = ("lookup", "lookup with backward", "update")


def run(quick: bool) -> Result:
    """Times every program with every number of active experts, in turns."""
    implementations = [dispatch.chosen()]
    if implementations != ["xla"]:
        implementations.append("xla")
    seconds: dict[str, dict[str, list[float]]] = {}
    for implementation in implementations:
        found = medians_in_turns(
            _programs(N // 64 if quick else N, implementation), repeats=1 if quick else 3
        )
        seconds[implementation] = {
            name: [found[f"{name}, {active}"] for active in ACTIVE] for name in PROGRAMS
        }
    plot(seconds, ROOT / "gates" if quick else REPOSITORY / "docs" / "gates")
    rows = [
        [f"{name}, {implementation}", *(f"{1e3 * each:.2f}" for each in times)]
        for implementation, of_programs in seconds.items()
        for name, times in of_programs.items()
    ]
    figures = []
    for name, times in seconds[implementations[0]].items():
        for active in (0, 32):
            ratio = times[ACTIVE.index(active)] / times[-1]
            figures.append(Figure(f"{name}: time with {active} of {K} experts over all", ratio))
    return Result(
        columns=(f"ms; N = {N:,}, D = {D}, T = {T}", *(f"{active} of {K}" for active in ACTIVE)),
        rows=rows,
        figures=figures,
        details={"active": ACTIVE, "seconds": seconds},
    )


def _programs(num_experts: int, implementation: str) -> dict[str, Callable[[], Any]]:
    keys = jax.random.split(jax.random.key(0), 4)
    make = jax.jit(lambda: initialize_pool(keys[0], 1, num_experts, D, storage="int4"))
    pool = make()
    ids = jax.random.randint(keys[1], (T, K), 0, num_experts)
    gates = jax.nn.softmax(jax.random.normal(keys[2], (T, K)))
    x = jax.random.normal(keys[3], (T, D))
    own = pool.at_layer(jnp.int32(0))

    @jax.jit
    def forward(pool, ids, gates, x):
        return lookup(pool, ids, gates, x, activation="gelu", implementation=implementation)

    @jax.jit
    def backward(pool, ids, gates, x):
        def loss(gates, x, tap):
            y = lookup(
                pool, ids, gates, x, activation="gelu", tap=tap, implementation=implementation
            )
            return jnp.sum(y**2)

        return jax.grad(loss, (0, 1, 2))(gates, x, Tap.zeros_for(ids, x))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(pool, state, gradient, number):
        rates = Hyperparameters(learning_rate=1e-2)
        return update(
            pool, state, gradient, rates, seed=0, step=number, implementation=implementation
        )[:2]

    # All updates rewrite one pool in place.
    trained = {"state": (make(), jax.jit(UpdateState.zeros_for)(pool)), "number": 0}

    def update_once(gradient: FactoredGradient) -> Any:
        trained["number"] += 1
        trained["state"] = step(*trained["state"], gradient, trained["number"])
        return trained["state"]

    programs: dict[str, Callable[[], Any]] = {}
    for active in ACTIVE:
        chosen = jnp.where(jnp.arange(K) < active, ids, num_experts)
        weights = jnp.where(jnp.arange(K) < active, gates, 0)
        operands = (own, chosen, weights, x)
        gradient = FactoredGradient.from_tap(chosen, backward(*operands)[2])
        stacked = jax.tree.map(lambda leaf: leaf[None], gradient)
        programs[f"{FORWARD}, {active}"] = partial(forward, *operands)
        programs[f"{BACKWARD}, {active}"] = partial(backward, *operands)
        programs[f"{UPDATE}, {active}"] = partial(update_once, stacked)
    return programs


def plot(seconds: dict[str, dict[str, list[float]]], folder: Any) -> None:
    """Draws the times of every implementation."""
    figure = matplotlib.figure.Figure(figsize=(4.5 * len(seconds), 4), layout="constrained")
    panels = figure.subplots(1, len(seconds), squeeze=False)[0]
    for axes, (implementation, of_programs) in zip(panels, seconds.items(), strict=True):
        for name, times in of_programs.items():
            axes.plot(ACTIVE, [1e3 * each for each in times], marker="o", label=name)
        axes.set(title=implementation, xlabel="active experts a token", ylabel="ms", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "active_experts.png", dpi=100)
