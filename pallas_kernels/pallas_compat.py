"""Names of Pallas that moved between JAX 0.10 and 0.12."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

if hasattr(plgpu, "InterpretGPUParams"):
    InterpretGPUParams = plgpu.InterpretGPUParams
else:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

# Lane semantics were the default in JAX 0.10. The later default searches for layouts in registers
# and finds none for these kernels. Stores wait for no other thread. All threads of a block wait for
# each other in `plgpu.commit_smem` and in sums over lanes. Interpreters have no threads within a
# block, so they cannot detect that a barrier is missing.
NO_BARRIERS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
)


def rewrite_in_place(
    kernel: Callable[..., None],
    arrays: tuple[Any, ...],
    *,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    interpret: Any,
) -> tuple[Any, ...]:
    """Runs a kernel for GPUs on references to arrays, and returns their values afterwards.

    A thread must not read what another thread has written.

    XLA keeps such arrays in place. `plgpu.kernel` takes references since JAX 0.11, and `core_map`
    is deprecated in JAX 0.12.
    """

    def stateful(refs: tuple[Any, ...]) -> None:
        if jax.__version_info__ < (0, 11):
            mesh = plgpu.Mesh(grid=grid, grid_names=grid_names)
            run = pl.core_map(mesh, compiler_params=NO_BARRIERS, interpret=interpret)
            run(partial(kernel, *refs))
        else:
            plgpu.kernel(
                kernel,
                out_type=(),
                grid=grid,
                grid_names=grid_names,
                compiler_params=NO_BARRIERS,
                interpret=interpret,
            )(*refs)

    return pl.run_state(stateful)(arrays)


def load_as(ref: Any, index: tuple[Any, ...], layout: Any, interpret: Any) -> jax.Array:
    """Loads part of a reference into registers with a layout, which interpreters ignore."""
    if interpret:
        return ref[index]
    place = {"idx": ()} if jax.__version_info__ < (0, 11) else {}
    return plgpu.load(ref.at[index], **place, layout=layout, optimized=False)


__all__ = ["NO_BARRIERS", "InterpretGPUParams", "load_as", "rewrite_in_place"]
