"""Compiles every kernel for a target, and prints the memory and traffic of the kernels.

    python -m benchmarks.compiled_kernels TARGET [--quick | --quick=N] [--loops]

The output is JSON, a list of `Compiled`. The target (`peerjax.planning.targets`) need not be
present. `--quick` takes the first N of `QUICK_SHAPES`, or all. With `--loops`, libtpu writes its
instructions to files, which takes some time.
"""

import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.expert_lookup import api as lookup_api
from pallas_kernels.expert_lookup import mosaic_gpu as lookup_gpu
from pallas_kernels.expert_update import Hyperparameters, UpdateState, update
from pallas_kernels.expert_update import mosaic_tpu as update_tpu
from pallas_kernels.expert_update.rows import RowSums
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.storage import DOWN, UNIT, ExpertPool, packed_shape
from peerjax.planning.programs import pool_copies
from peerjax.planning.targets import TPUS, device_of, on

LAYERS = 12  # layers of the stack. A lookup reads one of them, an update rewrites all.


class Shape(NamedTuple):
    """Sizes that a kernel is compiled for."""

    width: int
    num_experts: int
    tokens: int
    chosen: int
    storage: str = "int4"


SHAPES = (
    Shape(256, 1 << 21, 512, 128),
    Shape(1024, 1 << 19, 512, 128),
    Shape(1024, 1 << 19, 1, 128),  # decoding
    Shape(2048, 1 << 18, 512, 128),
    Shape(1024, 1 << 19, 32, 64),
    Shape(576, 1 << 19, 64, 64),  # eight experts in nine units
    Shape(1024, 1 << 18, 512, 128, "int8"),
)
# Covers every path through a kernel, with few pairs. Most of the compile time for a TPU goes
# into the sort of the pairs.
QUICK_SHAPES = (
    Shape(256, 1 << 21, 32, 128),
    Shape(1024, 1 << 19, 1, 128),
    Shape(1024, 1 << 19, 32, 128),
)
GPU_CACHE_BYTES = 40 << 20  # four fifths of the second-level cache of an H100


# Matches a copy between HBM and VMEM, and its size in granules of 32 bytes.
COPY = r"dma\.(?:hbm_to_vmem|vmem_to_hbm)[^\n]*?size_in_granules=\*/(\d+)"


class Loop(NamedTuple):
    """Figures of one pass through a loop of a compiled kernel.

    Attributes:
        bundles: bundles of instructions, one per cycle.
        copies: copies that it starts between HBM and VMEM.
        copy_bytes: bytes of one copy.
    """

    bundles: int
    copies: int
    copy_bytes: int


class Compiled(NamedTuple):
    """Figures of a compiled kernel and of the program around it.

    Attributes:
        kernel: "lookup", "lookup backward" or "update".
        shape: the sizes it is compiled for.
        pool: bytes of the codes of all layers.
        temp: bytes of temporary memory.
        images: bytes of temporary memory for the tokens' vectors, spread over planes and lanes.
        aliased: bytes rewritten in place.
        pool_copies: number of instructions that copy an array of the size of the codes.
        on_chip: bytes of VMEM or of shared memory that the kernel allocates.
        row_copies: number of DMAs of pool rows if all pairs hit different rows.
        row_bytes: bytes that these DMAs move.
        vector_bytes: bytes of the tokens' vectors that other copies of the kernel move.
        block_bytes: bytes that the pipeline of the grid moves; on a GPU, the numbers of pairs.
        least_bytes: the fewest bytes that must be moved.
        loops: the kernel's innermost loops, in order; TPUs only.
    """

    kernel: str
    shape: Shape
    pool: int
    temp: int
    images: int
    aliased: int
    pool_copies: int
    on_chip: int
    row_copies: int
    row_bytes: int
    vector_bytes: int
    block_bytes: int
    least_bytes: int
    loops: list[Loop]

    @staticmethod
    def of_json(record: dict[str, Any]) -> "Compiled":
        """Makes a value from the JSON that `main` prints."""
        shape, loops = Shape(*record["shape"]), [Loop(*loop) for loop in record["loops"]]
        return Compiled(**{**record, "shape": shape, "loops": loops})


def implementation_for(target: str) -> str:
    """Returns the name of the kernels for a target."""
    return "mosaic_tpu" if target in TPUS else "mosaic_gpu"


def programs(
    target: str, shape: Shape
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]:
    """Returns the kernels of a target: functions, shapes of arguments, and which are donated."""
    device, name = device_of(target), implementation_for(target)
    kernels = lookup_api.KERNELS[name]

    def array(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return on(device, jax.ShapeDtypeStruct(sizes, dtype))

    width, num_experts, tokens, chosen, storage = shape
    words = array(jnp.int32, LAYERS, *packed_shape(num_experts, width, storage))
    by_row = array(jnp.float32, LAYERS, 2, num_experts)
    stack = ExpertPool(words, by_row, None, storage, num_experts, width)
    pool = stack.at_layer(array(jnp.int32))
    ids, gates = array(jnp.int32, tokens, chosen), array(jnp.float32, tokens, chosen)
    x = array(jnp.bfloat16, tokens, width)
    state = UpdateState(words, by_row)
    gradient = FactoredGradient(
        *[array(leaf.dtype, LAYERS, *leaf.shape) for leaf in (ids, gates, gates, x, x)]
    )

    def one_update(pool: Any, state: Any, gradient: Any, step: Any) -> Any:
        rule = Hyperparameters(1e-2)
        return update(pool, state, gradient, rule, seed=0, step=step)

    forward = functools.partial(kernels.forward, activation="gelu")
    backward = functools.partial(kernels.backward, activation="gelu")
    return {
        "lookup": (forward, (pool, ids, gates, x, gates), ()),
        "lookup backward": (backward, (pool, ids, gates, x, gates, x), ()),
        "update": (one_update, (stack, state, gradient, array(jnp.int32)), (0, 1)),
    }


def least_bytes(kernel: str, shape: Shape) -> int:
    """Returns the fewest bytes that a layer must move.

    x and dy are in bfloat16, and all pairs are in different rows.
    """
    width, _, tokens, chosen, storage = shape
    pairs, vectors = tokens * chosen, tokens * width * 2
    codes = pairs * 2 * width * RowLayout.of(width, storage).bits // 8
    if kernel == "lookup":  # codes, two scales; ids, gates; x, y
        return codes + pairs * (8 + 8) + 2 * vectors
    if kernel == "lookup backward":  # also dy, dx, gradients of gates, c_down, c_up
        return codes + pairs * (8 + 8 + 12) + 3 * vectors
    # Codes, accumulators, scales and moments of both vectors, read and written; coefficients.
    return 2 * (2 * codes + pairs * 16) + pairs * 12 + 2 * vectors


def _vector_bytes(target: str, kernel: str, shape: Shape) -> int:
    """Returns the bytes that a kernel moves of x, dy and similar vectors.

    The vectors are spread over the places of a row. The update reads them once if VMEM, or the
    second-level cache of a GPU, holds all of them, and otherwise once per pair. TPU lookups have
    them in their blocks. On a GPU, every part of a token reads them and writes a sum. The sum is
    read once more.
    """
    layout = RowLayout.of(shape.width, shape.storage)
    image = layout.planes * layout.lanes * 4
    if kernel == "update":
        kept = update_tpu.RESIDENT_BYTES if target in TPUS else GPU_CACHE_BYTES
        is_kept = shape.tokens * image <= kept
        return image * (shape.tokens if is_kept else shape.tokens * shape.chosen)
    if target in TPUS:
        return 0
    read = 2 if kernel == "lookup backward" else 1
    at_once = lookup_gpu.rows_at_once(layout, shape.chosen)
    parts, _ = lookup_gpu.parts_of(shape.tokens, shape.chosen, at_once)
    image = 4 * layout.planes * UNIT * len(layout.units_of(DOWN))
    return image * shape.tokens * (read + 2 * parts)


def _gpu_pair_bytes(kernel: str, shape: Shape) -> int:
    """Returns the bytes of the numbers of pairs that a GPU kernel reads and writes."""
    pairs = shape.tokens * shape.chosen
    segments = 2 * RowLayout.of(shape.width, shape.storage).experts
    # Lookup: unit, slot, gate, bias, two scales; backward also two products. Update: ends, token,
    # slot, row, coefficients; also scale, moment and the fields of `RowSums` of each segment.
    words = {"lookup": 6, "lookup backward": 8, "update": 7 + segments * (2 + len(RowSums._fields))}
    return 4 * pairs * words[kernel]


def compile_all(target: str, shapes: Sequence[Shape], dump: Path | None = None) -> list[Compiled]:
    """Compiles every kernel for some shapes.

    Args:
        target: the target to compile for.
        shapes: the sizes to compile for.
        dump: folder that libtpu writes instructions to; `None` if it writes none.
    """
    found = []
    for shape in shapes:
        for kernel, (function, arguments, donated) in programs(target, shape).items():
            compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
            memory = compiled.memory_analysis()
            layout = RowLayout.of(shape.width, shape.storage)
            words = arguments[0].weights.size
            calls = _pallas_calls(jax.make_jaxpr(function)(*arguments).jaxpr)
            copies = shape.tokens * shape.chosen * (4 if kernel == "update" else 1)
            images = shape.tokens * layout.planes * layout.lanes * 4
            found.append(
                Compiled(
                    kernel=kernel,
                    shape=shape,
                    pool=4 * words,
                    temp=memory.temp_size_in_bytes,
                    images=2 * images if kernel == "lookup backward" else images,
                    aliased=memory.alias_size_in_bytes,
                    pool_copies=pool_copies(compiled.as_text(), words),
                    on_chip=sum(_vmem(call) for call in calls),
                    row_copies=copies,
                    row_bytes=copies * layout.lanes * 4,
                    vector_bytes=_vector_bytes(target, kernel, shape),
                    block_bytes=sum(_block_bytes(call) for call in calls)
                    if target in TPUS
                    else _gpu_pair_bytes(kernel, shape),
                    least_bytes=least_bytes(kernel, shape),
                    loops=_innermost_loops(dump),
                )
            )
    return found


def _pallas_calls(jaxpr: Any) -> list[Any]:
    """Returns the equations of all TPU kernels in a program, at any depth."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation)
            continue
        for parameter in equation.params.values():
            for each in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner = getattr(each, "jaxpr", each)
                found += _pallas_calls(inner) if hasattr(inner, "eqns") else []
    return found


def _vmem(call: Any) -> int:
    """Returns the bytes of VMEM that a kernel allocates: scratch, and its blocks twice."""
    total = 0
    for variable in call.params["jaxpr"].invars:
        space = getattr(variable.aval, "memory_space", None)
        space = getattr(space, "value", str(space)).lower()
        size = int(np.prod(variable.aval.shape)) * 4
        total += {"vmem": size, "default": 2 * size}.get(space, 0)
    return total


def _block_bytes(call: Any) -> int:
    """Returns the bytes that the pipeline moves over the grid: a block of each array a step."""
    grid = call.params["grid_mapping"]
    blocks = [each.transformed_block_aval for each in grid.block_mappings]
    moved = [each for each in blocks if "any" not in str(each.memory_space).lower()]
    return int(np.prod(grid.grid)) * sum(int(np.prod(each.shape)) * 4 for each in moved)


def _write_instructions_to(folder: str) -> None:
    """Makes libtpu write the instructions it compiles to files. It must not be loaded yet."""
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def _innermost_loops(folder: Path | None) -> list[Loop]:
    """Returns the innermost loops of the kernel compiled last, and empties the folder."""
    if folder is None:
        return []
    text = "".join(
        path.read_text()
        for path in folder.glob("*expert_*-final_bundles.txt")
        if "schedule" not in path.name
    )
    for path in folder.iterdir():
        path.unlink()
    return innermost_loops(text)


def innermost_loops(text: str) -> list[Loop]:
    """Reads the innermost loops from the instructions that libtpu writes for a kernel."""
    # A bundle begins with its address, a mark, and one ">" for each loop around it.
    marks = list(re.finditer(r"0x[0-9a-f]+[^:{\n]*:([ >]*){", text))
    depths = [mark[1].count(">") for mark in marks]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    loops: list[Loop] = []
    deepest, before = max(depths, default=0), 0
    for mark, depth, end in zip(marks, depths, ends, strict=True):
        if depth == deepest:
            sizes = re.findall(COPY, text[mark.start() : end])
            bundles, copies, size = (0, 0, 0) if before != deepest else loops.pop()
            found = 32 * int(sizes[0]) if sizes else size
            loops.append(Loop(bundles + 1, copies + len(sizes), found))
        before = depth
    return loops


def main() -> None:
    """Compiles the kernels for the target on the command line, and prints their figures."""
    target, *options = sys.argv[1:]
    quick = [option for option in options if option.startswith("--quick")]
    count = int(quick[0].partition("=")[2] or len(QUICK_SHAPES)) if quick else 0
    shapes = QUICK_SHAPES[:count] if quick else SHAPES
    with tempfile.TemporaryDirectory() as folder:
        wanted = target in TPUS and "--loops" in options
        if wanted:
            _write_instructions_to(folder)
        found = compile_all(target, shapes, Path(folder) if wanted else None)
    print(json.dumps([each._asdict() for each in found]))


if __name__ == "__main__":
    main()
