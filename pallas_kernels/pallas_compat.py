"""Names of Pallas that moved between JAX 0.10 and 0.12."""

from jax.experimental.pallas import mosaic_gpu as plgpu

if hasattr(plgpu, "InterpretGPUParams"):
    InterpretGPUParams = plgpu.InterpretGPUParams
else:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

__all__ = ["InterpretGPUParams"]
