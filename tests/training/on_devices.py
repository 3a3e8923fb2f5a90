"""Trains a few steps of a mixture, beside a pool, whose rows are spread over all devices.

It is evaluated with all experts, and without every second one. A pool under AdamW is trained too.

python -m tests.training.on_devices OUTPUT.npz
"""

import sys

import jax
import numpy as np

from peerjax.inference.removal import removed_collection
from peerjax.sharding import make_mesh
from peerjax.training.evaluation import put_batch
from peerjax.training.gradients import loss_and_gradients
from peerjax.training.step import make_eval_step, make_train_step
from tests.training.test_step import ROWS, make, make_batch

STEPS = 3
EXPERTS = {"run_0.0": 8, "run_1.0": 64}


def main(output: str) -> None:
    mesh = make_mesh()
    config, model, optimizer, state = make(
        **{"model.layers": (("moe", 1), ("peer", 1)), "optimizer.warmup_steps": 1}
    )
    step = jax.jit(make_train_step(config, model, optimizer))
    with jax.set_mesh(mesh):
        batches = [put_batch(mesh, make_batch(number)) for number in range(STEPS)]
        differentiate = jax.jit(lambda *operands: loss_and_gradients(model, *operands))
        _, gradients = differentiate(state.variables, batches[0])
        steps = []
        for batch in batches:
            state, metrics = step(state, batch)
            steps.append(metrics)
        weighted = {**make_batch(STEPS), "weight": np.ones(ROWS, np.float32)}
        removed = {name: np.arange(count) % 2 == 0 for name, count in EXPERTS.items()}
        eval_step, weighted = jax.jit(make_eval_step(model)), put_batch(mesh, weighted)
        without = state.variables | removed_collection(model, removed)
        sums = [eval_step(variables, weighted) for variables in (state.variables, without)]
        config, model, optimizer, state = make(
            "float32", "adamw", **{"model.layers": (("peer", 1),), "optimizer.warmup_steps": 1}
        )
        step = jax.jit(make_train_step(config, model, optimizer))
        for batch in batches:
            state, _ = step(state, batch)
    everything = (gradients.params, steps, sums, state.pools)
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(everything)
    }
    np.savez(output, devices=jax.device_count(), **leaves)


if __name__ == "__main__":
    main(sys.argv[1])
