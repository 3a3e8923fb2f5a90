"""Selection of the implementation that computes an operation.

Every operation has an XLA implementation, which always works, and kernels for some platforms. A
caller may name one of them. Otherwise, a program compiled for a TPU, an NVIDIA GPU or a CPU uses
the kernel for it if the kernel can be used and supports the arguments. In all other cases XLA
computes the operation.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pallas_kernels.native_cpu import library
from pallas_kernels.platforms import by_platform, cannot_run_kernels, is_here

IMPLEMENTATIONS = ("xla", "native_cpu", "mosaic_tpu", "mosaic_gpu")
PLATFORMS = {"native_cpu": "cpu", "mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}
INTERPRETED = ("mosaic_tpu", "mosaic_gpu")  # kernels that Pallas interprets on other platforms
logger = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """A kernel for one platform.

    Attributes:
        run: function of the operands. A kernel of Pallas also takes `interpret`, which is `True`
            where its platform is absent.
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
            another platform, a kernel of Pallas named here is interpreted, which is slow. `None`
            chooses by the platform that a program is compiled for. That platform may be absent, but
            its compiler must be installed. XLA computes operations that the named implementation
            has no kernel for.
        xla: implementation that always works.
        kernels: kernels by name.
        *operands: arrays, or trees of them.

    Raises:
        ValueError: if the named kernel does not support the arguments or the device.
    """
    if implementation is not None:
        check_implementation(implementation)
        kernel = kernels.get(implementation)
        if kernel is None:
            return xla(*operands)
        if why := kernel.cannot or cannot_run(implementation):
            raise ValueError(f"{implementation} cannot {operation}: {why}; choose 'xla' instead")
        if implementation not in INTERPRETED:
            return kernel.run(*operands)
        return kernel.run(*operands, interpret=not is_here(PLATFORMS[implementation]))
    able = {}
    for name, kernel in kernels.items():
        if kernel.cannot:
            _say_once(operation, name, kernel.cannot)
        elif cannot_run(name) is None:
            able[PLATFORMS[name]] = kernel.run
    return by_platform(*operands, default=xla, **able)


def chosen(implementation: str | None = None) -> str:
    """Returns the implementation that this process uses, where it supports the arguments.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or `None` as in `dispatch`.
    """
    if implementation is not None:
        return implementation
    here = [name for name, platform in PLATFORMS.items() if is_here(platform)]
    return next((name for name in here if cannot_run(name) is None), "xla")


def identity(implementation: str | None = None) -> str:
    """Returns the implementation that this process uses, with all that its results depend on.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or `None` as in `dispatch`.
    """
    name = chosen(implementation)
    return f"{name} ({library.processor()})" if name == "native_cpu" else name


def describe(implementation: str | None = None) -> str:
    """Returns a line about the implementation that this process uses, and how to get another.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or `None` as in `dispatch`.
    """
    name = chosen(implementation)
    if name != "xla":
        return f"kernels: {identity(implementation)}; 'xla' leaves everything to XLA"
    if implementation == "xla":
        return "kernels: xla, as chosen"
    reasons = [cannot_run(name) for name, platform in PLATFORMS.items() if is_here(platform)]
    return f"kernels: xla; others cannot be used here: {'; '.join(filter(None, reasons))}"


def cannot_run(name: str) -> str | None:
    """Returns why this process cannot run the kernels of an implementation, or `None` if it can.

    Kernels of Pallas run in any process, because they can be interpreted. A process with a GPU that
    is too old does not use them.
    """
    if name != "native_cpu":
        return cannot_run_kernels(PLATFORMS[name])
    if not is_here("cpu"):
        return "it runs on CPUs, and this process has other devices"
    return library.why_not()


@functools.cache
def _say_once(operation: str, name: str, reason: str) -> None:
    """Logs once that XLA replaces a kernel for the present platform."""
    if is_here(PLATFORMS[name]):
        logger.warning("XLA will %s, because %s cannot: %s", operation, name, reason)
