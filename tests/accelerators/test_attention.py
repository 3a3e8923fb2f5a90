"""Attention and its gradients compiled for TPUs that are not there."""

import subprocess
import sys

import pytest

from peerjax.planning.targets import environment
from tests.accelerators.test_whole_step import require
from tests.conftest import REPOSITORY

B, L, HEADS, KV_HEADS, DIM = 2, 1024, 8, 2, 64
PROGRAM = f"""
import sys
import jax, jax.numpy as jnp
from peerjax.layers.attend import Seen, attend
from peerjax.planning.targets import device_of, on

def loss(query, key, value, sink, documents):
    mixed = attend(query, key, value, Seen.in_documents(documents), sink)
    return jnp.sum(jnp.sin(mixed.astype(jnp.float32)))

def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)

operands = (
    shape({B}, {L}, {HEADS}, {DIM}),
    shape({B}, {L}, {KV_HEADS}, {DIM}),
    shape({B}, {L}, {KV_HEADS}, {DIM}),
    shape({HEADS}, dtype="float32"),
    shape({B}, {L}, dtype="int32"),
)
differentiate = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
compiled = differentiate.lower(*on(device_of(sys.argv[1]), operands)).compile()
print(compiled.as_text().count("tpu_custom_call"), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parametrize("target", ["v5e", "tpu7x"])
def test_kernels_compute_it_without_an_array_of_all_pairs(target):
    require(target)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, target],
        cwd=REPOSITORY,
        env=environment(target),
        capture_output=True,
        text=True,
        check=True,
    )
    kernels, memory = map(int, found.stdout.split())
    assert kernels >= 3  # forward pass, queries, keys and values
    assert memory < B * HEADS * L * L * 2 / 4
