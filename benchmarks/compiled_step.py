"""Compiles a whole training step for a target, and tells what the compiled program keeps.

    python -m benchmarks.compiled_step TARGET N

prints JSON. TARGET is "cpu" or "h100"; a GPU is not needed. One process a target.
"""

import json
import math
import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from configs import peer_1m_cpu
from peerjax.config import model_config
from peerjax.model import Decoder
from peerjax.pool import memory_report
from peerjax.training.state import create_state, make_optimizer
from peerjax.training.step import make_train_step

VOCABULARY = 4096
# What XLA must know of a GPU to compile for it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Program(NamedTuple):
    """Figures of a compiled step.

    Attributes:
        temp: bytes of temporary memory.
        aliased: bytes of arguments that are rewritten in place.
        pools: bytes of the pools and of what the optimizer keeps for them.
        largest_float: elements of the largest float array anywhere in the program.
        largest_other: elements of the largest array of another type that is not as large as the
            words of the pools (which the program also views in other shapes).
        tokens: T.
        chosen: K.
        heads: H.
        width: D.
    """

    temp: int
    aliased: int
    pools: int
    largest_float: int
    largest_other: int
    tokens: int
    chosen: int
    heads: int
    width: int


def compile_step(
    num_experts: int, device: jax.Device | None = None, recipe: ModuleType = peer_1m_cpu
) -> Program:
    """Compiles the step of a recipe with another number of experts, a square."""
    config = recipe.get_config()
    root = round(num_experts**0.5)
    config.peer.num_experts = (root, root)
    model = Decoder(model_config(config, VOCABULARY))
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda: create_state(config, model, optimizer))
    rows, length = config.data.batch_size, config.data.sequence_length
    names = ("inputs", "targets", "positions", "segments")
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}
    if device is not None:
        place = jax.sharding.SingleDeviceSharding(device)
        state, batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            (state, batch),
        )
    step = jax.jit(make_train_step(config, model, optimizer), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    memory_of_pools = memory_report(state.pools, state.opt_state)
    words = jax.tree.leaves(state.pools)[0].size
    largest = _largest_arrays(compiled.as_text(), words)
    return Program(
        temp=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        pools=memory_of_pools.kept,
        largest_float=largest[True],
        largest_other=largest[False],
        tokens=rows * length,
        chosen=config.peer.heads * config.peer.experts_per_head,
        heads=config.peer.heads,
        width=config.model.width,
    )


def _largest_arrays(program: str, words: int) -> dict[bool, int]:
    """Elements of the largest array anywhere in a program's text: of floats, and of others."""
    largest = {True: 0, False: 0}
    for kind, dimensions in set(re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]+)\]", program)):
        is_float, size = kind.startswith(("f", "bf")), math.prod(map(int, dimensions.split(",")))
        if is_float or size != words:
            largest[is_float] = max(largest[is_float], size)
    return largest


def target_device(target: str) -> Any:
    """A device to compile for, which need not exist; `None` for the CPU at hand."""
    if target == "cpu":
        return None
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology="1x1x1", topology_name=""
    )
    return topology.devices[0]


if __name__ == "__main__":
    found = compile_step(int(sys.argv[2]), target_device(sys.argv[1]))
    print(json.dumps(found._asdict()))
