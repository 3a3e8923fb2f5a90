"""The strict interpreter of Pallas kernels for TPUs."""

from contextlib import contextmanager

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


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
