"""What is done differently on different platforms, chosen when a program is compiled.

The platform that a program is compiled for need not be the one that compiles it. But what is meant
for a platform that this process has no compiler for is not even traced: every choice would have the
rest of a program traced once more, and kernels are long.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

# Packages of which one must be installed to compile for a platform that is not here.
COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
MOSAIC_GPU_NEEDS = 9.0  # compute capability: Hopper's


def by_platform(
    *operands: Any, default: Callable[..., Any], **functions: Callable[..., Any]
) -> Any:
    """Calls the function of the platform that the program is compiled for.

    Args:
        *operands: arrays, or trees of them.
        default: called where no other is.
        **functions: by platform: "cpu", "tpu" or "cuda".
    """
    if jax.default_backend() == "cpu" and not any(map(can_compile_for, COMPILERS)):
        return functions.get("cpu", default)(*operands)
    possible = {name: each for name, each in functions.items() if can_compile_for(name)}
    return jax.lax.platform_dependent(*operands, default=default, **possible)


@functools.cache
def can_compile_for(platform: str) -> bool:
    """Whether this process has a compiler for a platform."""
    return (
        is_here(platform)
        or platform == "cpu"
        or any(importlib.util.find_spec(package) for package in COMPILERS[platform])
    )


def cannot_run_kernels(platform: str) -> str | None:
    """Why the devices of a platform that are here cannot run its kernels; `None` if they can."""
    if platform != "cuda" or not is_here("cuda"):
        return None
    device = jax.devices()[0]
    capability = device.compute_capability  # of AMD's GPUs "gfx..."
    if not capability.startswith("gfx") and float(capability) >= MOSAIC_GPU_NEEDS:
        return None
    needed = f"Mosaic needs compute capability {MOSAIC_GPU_NEEDS}"
    return f"{needed}; {device.device_kind} has {capability}"


def is_here(platform: str) -> bool:
    """Whether this process's devices are of a platform."""
    return jax.default_backend() == {"cuda": "gpu"}.get(platform, platform)
