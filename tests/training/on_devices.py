"""Trains a few steps of a mixture, beside a pool, whose rows are spread over all devices.

It is evaluated with all experts, and without every second one. Pools under AdamW are trained too,
with a threshold gate and a shared path.

python -m tests.training.on_devices OUTPUT.npz
"""

import dataclasses
import sys

import jax
import numpy as np

from peerjax.evaluation import evaluate
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.removal import removed_collection
from peerjax.evaluation.usage import GateSums
from peerjax.sharding import make_mesh
from peerjax.sharding.batches import put_batch
from peerjax.training.gradients import loss_and_gradients
from peerjax.training.step import make_train_step, set_by_first_batch
from tests.training.test_step import ROWS, VOCABULARY, as_rows, make, make_batch

STEPS = 3
EXPERTS = {"layer_0": 8, "layer_1": 64}


def main(output: str) -> None:
    mesh = make_mesh()
    config, task, optimizer, state = make(
        **{"model.layers": (("moe", 1), ("peer", 1)), "optimizer.warmup_steps": 1}
    )
    step = jax.jit(make_train_step(config, task, optimizer))
    with jax.set_mesh(mesh):
        batches = [put_batch(mesh, make_batch(number)) for number in range(STEPS)]
        differentiate = jax.jit(lambda *operands: loss_and_gradients(task, *operands))
        _, gradients = differentiate(state.variables, batches[0])
        steps = []
        for batch in batches:
            state, metrics = step(state, batch)
            steps.append(metrics)
        removed = {name: np.arange(count) % 2 == 0 for name, count in EXPERTS.items()}
        given = removed_collection(task.model, removed)
        loss = Loss((1,) * VOCABULARY)
        probes = {
            "loss": loss,
            "without": dataclasses.replace(loss, given=given),
            "gates": GateSums(),
        }
        text = {"text": as_rows(make_batch(STEPS))}
        found = evaluate(
            task.model,
            state.variables,
            text,
            probes,
            mesh,
            rows=lambda text: range(ROWS),
            batch_size=ROWS,
        )["all"]
        sums = {
            **{name: found[name]["nats_per_token"] for name in ("loss", "without")},
            **found["gates"],
        }
        config, task, optimizer, state = make(
            "float32", "adamw", **{
                "model.layers": (("peer", 1),), "model.shared_mlp": 8, "peer.always_on": 3,
                "peer.gate": "threshold", "peer.target": 5.0, "optimizer.warmup_steps": 1,
            }
        )  # fmt: skip
        state = jax.jit(set_by_first_batch, static_argnums=0)(task, state, batches[0])
        step = jax.jit(make_train_step(config, task, optimizer))
        thresholds = []
        for batch in batches:
            state, _ = step(state, batch)
            thresholds.append(state.stats["run_0"]["block"]["peer"]["gate"]["active"].value)
    everything = (gradients.params, steps, sums, state.pools, thresholds)
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(everything)
    }
    np.savez(output, devices=jax.device_count(), **leaves)


if __name__ == "__main__":
    main(sys.argv[1])
