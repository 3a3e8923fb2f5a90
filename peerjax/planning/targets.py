"""Accelerators to compile for. None of them needs to be present.

A separate process compiles for each target. `environment` returns its environment variables.
"""

import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.platforms import can_compile_for
from peerjax.errors import UserError
from peerjax.sharding import make_mesh

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
GPUS = ("h100",)
TARGETS = (*TPUS, *GPUS)
GIB = 1 << 30
# Peak rates of a chip, as their makers state them. A GPU sends over NVLink within a host of 8, and
# over a link of InfiniBand of its own beyond it.
FLOPS = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "tpu7x": 2307e12, "h100": 989e12}  # bfloat16
MEMORY_RATE = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9, "tpu7x": 7380e9, "h100": 3350e9}
NETWORK_RATE = {"v5e": 200e9, "v5p": 600e9, "v6e": 448e9, "tpu7x": 1200e9, "h100": 450e9}
BETWEEN_HOSTS, GPUS_OF_HOST = 50e9, 8
MEMORY = {"v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 96 * GIB, "h100": 79 * GIB}
# Description of a GPU that XLA needs to compile for it.
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


def check_target(target: str) -> None:
    """Checks the name of a target: "cpu", a key of `MEMORY`, or several chips.

    Several TPU chips are such as "v5p:4x4x4", several GPUs such as "h100:64".

    Raises:
        UserError: if there is no such target.
    """
    kind, _, chips = target.partition(":")
    if target == "cpu" or (kind in TARGETS and not chips):
        return
    form = r"\d+(x\d+)+" if kind in TPUS else r"[1-9]\d*"
    if kind not in TARGETS or not re.fullmatch(form, chips):
        raise UserError(
            f"target {target!r} is unknown; choose cpu, {', '.join(TARGETS)}, chips of a TPU such "
            "as v5p:4x4x4, or GPUs such as h100:64"
        )


def chips_of(target: str) -> int:
    """Returns the number of chips of a target."""
    chips = target.partition(":")[2]
    return math.prod(map(int, chips.split("x"))) if chips else 1


def network_rate(target: str, is_ring: bool) -> float:
    """Returns the bytes a second that a chip of a target can send to the others.

    Args:
        target: the target.
        is_ring: whether chips pass the same bytes on in a ring, as in an all-gather or a reduction.
            Between hosts of GPUs, a ring then uses the links of all GPUs of a host for the bytes of
            one. In other exchanges every GPU sends its own.
    """
    kind = kind_of(target)
    if kind not in GPUS or chips_of(target) <= GPUS_OF_HOST:
        return NETWORK_RATE[kind]
    return min(NETWORK_RATE[kind], BETWEEN_HOSTS * (GPUS_OF_HOST if is_ring else 1))


def kind_of(target: str) -> str:
    """Returns the kind of accelerator of a target, without the number of chips."""
    return target.partition(":")[0]


def device_of(target: str) -> Any:
    """Returns a device to compile for, or `None` for the local CPU."""
    if target == "cpu":
        return None
    if target in TPUS:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
    else:
        topology = _gpus(1)
    return topology.devices[0]


def mesh_of(target: str, **sizes: int) -> jax.sharding.Mesh:
    """Returns a mesh of one device of a target, or of all chips in its name. None need exist.

    Args:
        target: name of a target; see `check_target`.
        **sizes: sizes of the axes; see `peerjax.sharding.make_mesh`.

    Raises:
        ValueError: if the sizes do not fit the number of devices.
    """
    kind, _, chips = target.partition(":")
    if not chips:
        devices = [device_of(target) or jax.devices()[0]]
    elif kind in TPUS:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    else:
        devices = _gpus(int(chips)).devices
    return make_mesh(devices, **sizes)


def _gpus(count: int) -> Any:
    """Returns a number of GPUs, 8 on each host."""
    hosts, on_host = (count // 8, 8) if count % 8 == 0 else (1, count)
    return topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x{hosts}x{on_host}", topology_name=""
    )


def on(device: Any, tree: Any) -> Any:
    """Returns the shapes of a tree of arrays, placed on a device that need not exist."""
    if device is None:
        return tree
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
    )


def missing(target: str) -> str | None:
    """Returns the extra that is needed to compile for a target, or `None` if none is missing."""
    if target == "cpu":
        return None
    platform, extra = ("tpu", "compile-tpu") if kind_of(target) in TPUS else ("cuda", "compile-gpu")
    return None if can_compile_for(platform) else extra


def environment(target: str) -> dict[str, str]:
    """Returns environment variables for a process that compiles for a target without hardware."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if kind_of(target) in TPUS:
        # These turn off queries to a metadata server, the lock between processes, and logs.
        variables |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_LOG_DIR": "disabled",
            "TPU_MIN_LOG_LEVEL": "3",
        }
    elif target != "cpu":
        variables["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    return variables


def run_for(target: str, module: str, *arguments: str) -> Any:
    """Runs `python -m module target arguments...` and returns the JSON in its last line of output.

    The process starts in the current directory.

    Raises:
        UserError: if the compiler of the target is not installed.
        RuntimeError: if the process fails. The message has the end of its output.
    """
    if extra := missing(target):
        raise UserError(f"compiling for {target} needs an extra: pip install 'peerjax[{extra}]'")
    found = subprocess.run(
        [sys.executable, "-m", module, target, *arguments],
        env=environment(target),
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise RuntimeError(f"{module} {target} {' '.join(arguments)}: {found.stderr[-3000:]}")
    return json.loads(found.stdout.splitlines()[-1])
