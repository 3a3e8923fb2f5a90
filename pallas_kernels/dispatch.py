"""Which implementation of an operation runs.

Every operation has one in XLA, which always works, and kernels for accelerators. Unless a caller
names one, a program compiled for a TPU or an NVIDIA GPU takes the kernel for it, where the kernel
can do what is asked, and XLA otherwise.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pallas_kernels.platforms import by_platform, cannot_run_kernels, is_here

IMPLEMENTATIONS = ("xla", "mosaic_tpu", "mosaic_gpu")
PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}
logger = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """A kernel for one platform.

    Attributes:
        run: called with the operands, and with `interpret=True` where its platform is not.
        cannot: why the kernel cannot do what is asked; `None` if it can.
    """

    run: Callable[..., Any]
    cannot: str | None = None


def check_implementation(name: str | None) -> None:
    """Raises a ValueError unless `name` is an implementation, or `None`."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {name!r}; choose one of {', '.join(IMPLEMENTATIONS)}, or None"
        )


def dispatch(
    operation: str,
    implementation: str | None,
    xla: Callable[..., Any],
    kernels: Mapping[str, Kernel],
    *operands: Any,
) -> Any:
    """Runs an operation by the implementation that is named, or by the best that can.

    Args:
        operation: its name, for messages.
        implementation: one of `IMPLEMENTATIONS`. A kernel named here is interpreted, which is
            slow, in a process whose devices are of another platform. `None` chooses by the platform
            that a program is compiled for, be it here or not: one whose compiler is installed.
        xla: the implementation that always works.
        kernels: the kernels there are.
        *operands: arrays, or trees of them.

    Raises:
        ValueError: if a kernel is named that cannot do what is asked.
    """
    if implementation == "xla":
        return xla(*operands)
    if implementation is not None:
        kernel = kernels[implementation]
        if why := kernel.cannot or cannot_run_kernels(PLATFORMS[implementation]):
            raise ValueError(f"{implementation} cannot {operation}: {why}")
        return kernel.run(*operands, interpret=not is_here(PLATFORMS[implementation]))
    able = {}
    for name, kernel in kernels.items():
        if why := kernel.cannot or cannot_run_kernels(PLATFORMS[name]):
            _say_once(operation, name, why)
        else:
            able[PLATFORMS[name]] = kernel.run
    return by_platform(*operands, default=xla, **able)


@functools.cache
def _say_once(operation: str, name: str, reason: str) -> None:
    """Says in the log that XLA does what a kernel for the platform at hand cannot."""
    if is_here(PLATFORMS[name]):
        logger.warning("XLA will %s: %s cannot (%s)", operation, name, reason)
