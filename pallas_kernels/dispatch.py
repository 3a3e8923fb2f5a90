"""Selection of the implementation that computes an operation.

Every operation has an XLA implementation, which always works, and kernels for accelerators. A
caller may name one of them. Otherwise, a program compiled for a TPU or an NVIDIA GPU uses the
kernel for it if the kernel supports the arguments. In all other cases XLA computes the operation.
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
        run: function of the operands. It is called with `interpret=True` where its platform is
            absent.
        cannot: reason why the kernel does not support the arguments; `None` if it does.
    """

    run: Callable[..., Any]
    cannot: str | None = None


def check_implementation(name: str | None) -> None:
    """Raises a ValueError unless `name` is an implementation or `None`."""
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
    """Computes an operation with the named implementation, or with the best that supports it.

    Args:
        operation: name of the operation, for messages.
        implementation: one of `IMPLEMENTATIONS`, or `None`. If the devices of this process are of
            another platform, a kernel named here is interpreted, which is slow. `None` chooses by
            the platform that a program is compiled for. That platform may be absent, but its
            compiler must be installed.
        xla: implementation that always works.
        kernels: kernels by name.
        *operands: arrays, or trees of them.

    Raises:
        ValueError: if the named kernel does not support the arguments or the device.
    """
    if implementation == "xla":
        return xla(*operands)
    if implementation is not None:
        kernel = kernels[implementation]
        if why := kernel.cannot or cannot_run_kernels(PLATFORMS[implementation]):
            raise ValueError(f"{implementation} cannot {operation}: {why}; choose 'xla' instead")
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
    """Logs once that XLA replaces a kernel for the present platform."""
    if is_here(PLATFORMS[name]):
        logger.warning("XLA will %s, because %s cannot: %s", operation, name, reason)
