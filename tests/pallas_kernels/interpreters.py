"""The strict interpreters of Pallas kernels."""

from contextlib import contextmanager

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pallas_compat import InterpretGPUParams


@contextmanager
def no_races_on_tpu():
    """Gives interpreter parameters under which a kernel must not race.

    Copies arrive only when they are waited for, and memory that was never written is NaN.
    """
    try:
        yield pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@contextmanager
def no_races_on_gpu():
    """Gives interpreter parameters under which warpgroups of a block must not race.

    Memory that was never written is NaN. Blocks run one after the other: what they must not share
    has to be tested apart. A warpgroup is one thread to the interpreter: barriers that are missing
    within it, only a GPU shows.
    """
    try:
        yield InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
        assert not gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
