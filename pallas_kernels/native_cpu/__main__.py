"""`python -m pallas_kernels.native_cpu` compiles the native kernels where they are loaded from."""

import sys

from pallas_kernels.native_cpu.build import FOLDER, BuildError, build

try:
    build()
except BuildError as error:
    sys.exit(str(error))
print(f"native kernels for CPUs are in {FOLDER}")
