"""Functions that differ between platforms, selected when a program is compiled.

The platform that a program is compiled for need not be the one that compiles it. Functions for
platforms without an installed compiler are not traced. For every additional function, JAX traces
the rest of a program once more, and kernels are long.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

# To compile for an absent platform, one of its packages must be installed.
COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
MOSAIC_GPU_NEEDS = 9.0  # compute capability of Hopper


def by_platform(
    *operands: Any, default: Callable[..., Any], **functions: Callable[..., Any]
) -> Any:
    """Calls the function of the platform that the program is compiled for.

    Args:
        *operands: arrays, or trees of them.
        default: function for all other platforms.
        **functions: functions by platform, which is "cpu", "tpu" or "cuda".
    """
    if jax.default_backend() == "cpu" and not any(map(can_compile_for, COMPILERS)):
        return functions.get("cpu", default)(*operands)
    possible = {name: each for name, each in functions.items() if can_compile_for(name)}
    return jax.lax.platform_dependent(*operands, default=default, **possible)


@functools.cache
def can_compile_for(platform: str) -> bool:
    """Returns whether this process has a compiler for a platform."""
    return (
        is_here(platform)
        or platform == "cpu"
        or any(importlib.util.find_spec(package) for package in COMPILERS[platform])
    )


def cannot_run_kernels(platform: str) -> str | None:
    """Returns why present devices of a platform cannot run its kernels, or `None` if they can."""
    if platform != "cuda" or not is_here("cuda"):
        return None
    device = jax.devices()[0]
    capability = device.compute_capability  # "gfx..." on AMD GPUs
    if not capability.startswith("gfx") and float(capability) >= MOSAIC_GPU_NEEDS:
        return None
    needed = f"Mosaic needs compute capability {MOSAIC_GPU_NEEDS}"
    return f"{needed}, but {device.device_kind} has {capability}"


def is_here(platform: str) -> bool:
    """Returns whether the devices of this process are of a platform."""
    return jax.default_backend() == {"cuda": "gpu"}.get(platform, platform)
