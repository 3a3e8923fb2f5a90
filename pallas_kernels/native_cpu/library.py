"""The libraries of native kernels: loading the best that fits, and calling it from JAX.

XLA refuses a library that was compiled for a newer version of its interface, and then the CPU
backend does not start. So everything is checked before a function is registered.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pallas_kernels.native_cpu import build

FUNCTIONS = (
    "peer_lookup_forward",
    "peer_lookup_backward",
    "peer_top_pairs",
    "peer_score_gradient",
    "peer_update",
    "peer_read_rows",
)
REMEDY = "run `python -m pallas_kernels.native_cpu`"
# What each kind of processor adds to the older ones, as Linux names it.
OF_OLDER = {"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
OF_NEWER = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
NEEDED_FLAGS = {build.OLDER: OF_OLDER, build.NEWER: OF_OLDER | OF_NEWER}
# A variable of the environment that selects the library of an older kind of processor.
VARIABLE = "PEERJAX_PROCESSOR"


@functools.cache
def processor() -> str:
    """Returns the kind of processor whose library this process uses.

    It is the newest kind that this processor is of, or the one in `$PEERJAX_PROCESSOR`. Kinds add
    floats in different orders, so results differ between them in their last digits.

    Raises:
        ValueError: if the variable names no kind.
    """
    if name := os.environ.get(VARIABLE):
        if name not in build.PROCESSORS:
            raise ValueError(f"{VARIABLE}={name} is none of {', '.join(build.PROCESSORS)}")
        return name
    flags = _processor_flags()
    return next((each for each in build.PROCESSORS if NEEDED_FLAGS[each] <= flags), build.OLDER)


@functools.cache
def why_not() -> str | None:
    """Returns why native kernels cannot be used, or `None` if they can. Loads them at first."""
    try:
        path = build.library_for(processor())
    except ValueError as error:
        return str(error)
    reason = why_not_load(path)
    if reason is None:
        library = ctypes.CDLL(str(path))
        for name in FUNCTIONS:
            jax.ffi.register_ffi_target(
                name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu"
            )
    return reason


def why_not_load(path: pathlib.Path) -> str | None:
    """Returns why a library does not fit this processor, jaxlib and package, or `None`."""
    try:
        build.check_platform()
    except build.BuildError as error:
        return str(error)
    if not path.exists():
        return f"they are not compiled; {REMEDY}"
    if missing := NEEDED_FLAGS[processor()] - _processor_flags():
        return f"they need {processor()}, but this processor lacks {', '.join(sorted(missing))}"
    try:
        library = ctypes.CDLL(str(path))
        sources = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "peer_sources")))
        interface = tuple((ctypes.c_int32 * 2).in_dll(library, "peer_interface"))
    except (OSError, ValueError) as error:
        return f"{path} cannot be loaded ({error}); {REMEDY}"
    if sources.decode() != build.digest_of_sources():
        return f"{path} was compiled from other sources; {REMEDY}"
    here = build.version_of(pathlib.Path(jax.ffi.include_dir()))
    if interface[0] != here[0] or interface[1] > here[1]:
        found, wanted = (".".join(map(str, each)) for each in (interface, here))
        return (
            f"{path} was compiled for version {found} of XLA's interface, but this jaxlib has "
            f"{wanted}; {REMEDY}"
        )
    return None


def call(
    name: str,
    results: Any,
    *operands: Any,
    aliases: Mapping[int, int] | None = None,
    **attributes: Any,
) -> Any:
    """Calls a function of the library.

    Args:
        name: one of `FUNCTIONS`.
        results: shapes and dtypes of the results.
        *operands: arrays.
        aliases: operands that results may overwrite, by number.
        **attributes: integers, or tuples of floats.
    """
    constants = {
        key: np.array(value, np.float32) if isinstance(value, tuple) else np.int64(value)
        for key, value in attributes.items()
    }
    function = jax.ffi.ffi_call(
        name, results, input_output_aliases=dict(aliases or {}), vmap_method="sequential"
    )
    return function(*operands, **constants)


@functools.cache
def _processor_flags() -> set[str]:
    """Returns what the processor supports, as Linux lists it."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()
