"""Measures the time of a step.

A step of one layer of a million experts is compared with PEER-pytorch. Lookup and update are also
timed in pools of four sizes. The largest pool is 64 times as large as the smallest. The hits in all
pools are those of the smallest one, mapped injectively.
"""

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import layer_step
from benchmarks.result import REPOSITORY, Figure, Result
from pallas_kernels.dispatch import identity
from pallas_kernels.expert_lookup import lookup
from pallas_kernels.expert_update import Hyperparameters, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from peerjax.pool import initialize_pool

SIZES = (1 << 14, 1 << 15, 1 << 17, 1 << 20)
SMALL, LARGE = SIZES[0], SIZES[-1]
T, K, D = 512, 128, 256


def run(quick: bool) -> Result:
    """Measures every arm in its own processes, in turns."""
    rounds, steps = (1, 1) if quick else (3, 4)
    measured: dict[str, dict[str, Any]] = {
        arm: {"seconds": [], "peak_bytes": 0} for arm in layer_step.ARMS
    }
    for _ in range(rounds):
        for arm, so_far in measured.items():
            # A fast step is measured more often than a slow one.
            count = steps * (5 if arm in (layer_step.INT4, layer_step.ROUTER) else 1)
            found = _in_a_process(arm, count)
            so_far["seconds"] += found["seconds"]
            so_far["peak_bytes"] = max(so_far["peak_bytes"], found["peak_bytes"])
    medians = {arm: statistics.median(found["seconds"]) for arm, found in measured.items()}
    ours = medians[layer_step.INT4]
    rows = [
        [
            arm,
            f"{1e3 * medians[arm]:,.0f}",
            f"{medians[arm] / ours:.1f}",
            f"{found['peak_bytes'] / 1e9:.1f}",
        ]
        for arm, found in measured.items()
    ]
    sizes = measure_sizes(repeats=3 if quick else 20)
    ratio = sizes["time"][str(LARGE)] / sizes["time"][str(SMALL)]
    temp = sizes["temp"][str(LARGE)] / sizes["temp"][str(SMALL)]
    for size in SIZES:
        milliseconds = 1e3 * sizes["time"][str(size)]
        rows.append([f"lookup, backward, update: N = {size:,}", f"{milliseconds:,.0f}", "", ""])
    return Result(
        columns=("", "ms", "times peerjax int4", "peak GB"),
        rows=rows,
        figures=[
            Figure.at_most("time of lookup and update, N = 2^20 over 2^14", ratio, 1.2),
            Figure.at_most("their temporary memory, N = 2^20 over 2^14", temp, 1.05),
            Figure.at_least(
                "step: PEER-pytorch SparseAdam over int4",
                medians[layer_step.TORCH_SPARSE] / ours,
                12,
            ),
            Figure.at_least(
                "step: PEER-pytorch AdamW over int4", medians[layer_step.TORCH_ADAMW] / ours, 70
            ),
        ],
        details={"kernels": identity(), "arms": measured, "medians": medians, "sizes": sizes},
    )


def _in_a_process(arm: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.layer_step", arm, str(steps)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def measure_sizes(repeats: int) -> dict[str, dict[str, float]]:
    """Measures lookup, backward pass and update in pools of `SIZES` experts, in turns.

    From the second size on, no two experts that are hit share a unit.
    """
    ids = jax.random.randint(jax.random.key(0), (T, K), 0, SMALL)
    spread = {size: ids * (size // SMALL) + (ids * 37) % (size // SMALL) for size in SIZES}
    gates = jnp.full((T, K), 1 / K)
    x = jax.random.normal(jax.random.key(1), (T, D))
    rule = Hyperparameters(1e-2)

    def step(pool, state, ids, number):
        def loss(x, gates, tap):
            y = lookup(pool.at_layer(jnp.int32(0)), ids, gates, x, activation="gelu", tap=tap)
            return jnp.sum(y**2)

        dx, dgates, tap = jax.grad(loss, argnums=(0, 1, 2))(x, gates, Tap.zeros_for(ids, x))
        gradient = jax.tree.map(lambda leaf: leaf[None], FactoredGradient.from_tap(ids, tap))
        return (*update(pool, state, gradient, rule, seed=0, step=number)[:2], dx, dgates)

    found: dict[str, dict[str, float]] = {"time": {}, "temp": {}}
    programs, states, seconds = {}, {}, {}
    for size, own_ids in spread.items():
        make = jax.jit(
            lambda size: initialize_pool(jax.random.key(0), 1, size, D, storage="int4"),
            static_argnums=0,
        )
        pool = make(size)
        state = UpdateState.zeros_for(pool)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(pool, state, own_ids, 0)
        programs[size] = lowered.compile()
        found["temp"][str(size)] = programs[size].memory_analysis().temp_size_in_bytes
        states[size], seconds[size] = (pool, state), []
    for number in range(repeats + 1):
        for size, own_ids in spread.items():
            start = time.perf_counter()
            *state, _, _ = programs[size](*states[size], own_ids, number)
            states[size] = jax.block_until_ready(state)
            seconds[size].append(time.perf_counter() - start)
    for size, times in seconds.items():
        found["time"][str(size)] = statistics.median(times[1:])
    return found
