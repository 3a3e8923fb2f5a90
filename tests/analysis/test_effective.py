"""The effective number of experts against the terms of the sum, computed one by one."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.storage import read_floats
from peerjax.analysis.effective import effective_experts, mean_effective_number
from peerjax.layers.look_up import LookUp
from tests.training.test_step import make, make_batch


def test_equal_terms_count_and_zeros_do_not():
    sizes = jnp.array([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert mean_effective_number(sizes) == 2.5
    np.testing.assert_allclose(mean_effective_number(sizes[:1] * 7), 4.0)


def test_it_is_that_of_the_terms(monkeypatch):
    _, task, _, state = make()
    batch, seen = make_batch(), {}
    variables = state.variables
    call = LookUp.__call__

    def record(self, x_TD, choice, context):
        jax.debug.callback(
            lambda layer, x, ids, gates: seen.update({int(layer): (x, ids, gates)}),
            context.layer, x_TD, choice.ids, choice.gates,
        )  # fmt: skip
        return call(self, x_TD, choice, context)

    monkeypatch.setattr(LookUp, "__call__", record)
    inputs = (batch["inputs"], batch["positions"], batch["segments"])
    task.model.apply(variables, *inputs)
    jax.effects_barrier()
    monkeypatch.undo()
    found = effective_experts(task.model, variables, batch)
    stack = next(name for name, pools in variables["pools"].items() if pools)
    pool = variables["pools"][stack]["pool"]
    assert len(found) == len(seen) > 0
    for number, of_layer in zip(sorted(seen), found.values(), strict=True):
        x, ids, gates = map(np.asarray, seen[number])
        numbers = []
        for token in range(len(x)):
            weights = np.asarray(read_floats(pool.at_layer(jnp.int32(number)), ids[token]))
            hidden = np.asarray(jax.nn.gelu(weights[:, 0] @ x[token], approximate=False))
            terms = np.linalg.norm((gates[token] * hidden)[:, None] * weights[:, 1], axis=-1)
            numbers.append(np.sum(terms) ** 2 / np.sum(terms**2))
        np.testing.assert_allclose(of_layer, np.mean(numbers), rtol=1e-4)
