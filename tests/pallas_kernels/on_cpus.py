"""The implementations that a CPU computes without an interpreter."""

import pytest

from pallas_kernels.native_cpu import library

WHY_NOT = library.why_not()
ON_CPUS = ["xla"] if WHY_NOT else ["xla", "native_cpu"]
on_cpus = pytest.mark.parametrize("implementation", ON_CPUS)
needs_native = pytest.mark.skipif(
    WHY_NOT is not None, reason=f"native kernels cannot be used: {WHY_NOT}"
)
