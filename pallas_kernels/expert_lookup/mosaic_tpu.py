"""The lookup for TPUs.

A grid step processes a few tokens. The lines (a `row` in code) of their experts are copied from HBM
to VMEM one by one. The lines of the next step are copied while this step computes. Lines are
unpacked in VMEM plane by plane, so no array of size [T, K, D] exists. Both products run on the MXU,
whose inputs are bfloat16. Codes are exact in bfloat16, and a float32 number is the sum of three
bfloat16 numbers.

The known numbers of a pair of token and expert lie along lanes, and the MXU keeps them there. A
vector times the transposed lines gives hidden values along lanes. Hidden values times the lines
give the output.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import activation_by_name
from pallas_kernels.codes import why_no_kernel_reads
from pallas_kernels.expert_lookup.pairs import Pairs
from pallas_kernels.expert_lookup.xla import Cotangents
from pallas_kernels.row_copies import for_each, wait_for
from pallas_kernels.row_layout import RowLayout, units_in
from pallas_kernels.storage import DOWN, UNIT, UP, ExpertPool

CHUNK = 128  # experts multiplied at a time, the side of an MXU
ROWS_IN_FLIGHT = 256  # copies of lines started ahead, unless one token has more
BUFFER_BYTES = 8 << 20  # VMEM for the lines of a step and of the next step
PARTS = 3  # bfloat16 numbers whose sum is a float32 number
PAIR_ROWS = 8  # rows of a tile: gate, bias, two scales and slot; the others are unused


class Block(NamedTuple):
    """Work of a grid step: some tokens, each with K experts padded to whole chunks."""

    tokens: int
    chosen: int

    @staticmethod
    def of(tokens: int, chosen: int) -> "Block":
        """Returns a block with enough tokens for many copies in flight.

        The block has one token if that token has many experts. A decoding step of few tokens is a
        single grid step, so all its lines are in flight at once.
        """
        multiple = 8 if chosen <= CHUNK else CHUNK
        padded = -(-chosen // multiple) * multiple
        return Block(min(tokens, max(1, ROWS_IN_FLIGHT // padded)), padded)

    @property
    def pairs(self) -> int:
        """Pairs of a grid step."""
        return self.tokens * self.chosen

    @property
    def chunk(self) -> int:
        """Experts multiplied at a time."""
        return min(self.chosen, CHUNK)


def cannot_look_up(pool: ExpertPool, ids: Int[Array, "T K"]) -> str | None:
    """Returns why the kernel cannot do this lookup, or `None` if it can."""
    if not pool.is_packed:
        return f"it reads packed pools, not {pool.storage}"
    if why := why_no_kernel_reads(pool.storage):
        return why
    layout = RowLayout.of(pool.width, pool.storage)
    size = 2 * Block.of(*ids.shape).pairs * layout.lanes * 4
    if size > BUFFER_BYTES:
        return (
            f"at width {pool.width}, {ids.shape[1]} experts per token take {size >> 20} MiB of "
            f"VMEM, more than {BUFFER_BYTES >> 20} MiB"
        )
    return None


def forward(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    hidden_bias: Float[Array, "T K"],
    *,
    activation: str,
    interpret: Any = False,
) -> Float[Array, "T D"]:
    """Does the same as `pallas_kernels.expert_lookup.xla.forward`."""
    layout = RowLayout.of(pool.width, pool.storage)
    act = activation_by_name(activation)
    down, up = layout.span(DOWN), layout.span(UP)

    def one_chunk(pairs, slot, rows, x_ref, y_ref):
        hidden = _dot(x_ref, rows(down), slot, layout)
        y_ref[...] += _mix(pairs.mixing(hidden, act), rows(up), slot, layout)

    pairs = Pairs.of(pool, ids, gates, hidden_bias)
    images = [layout.spread(x.astype(jnp.float32), DOWN)[:, :, down]]
    results = [(layout.planes, up.stop - up.start)]
    (y,) = _walk(one_chunk, pool, ids, pairs, images, results, interpret)
    return layout.collect(y, UP).astype(x.dtype)


def backward(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    hidden_bias: Float[Array, "T K"],
    dy: Float[Array, "T D"],
    *,
    activation: str,
    interpret: Any = False,
) -> Cotangents:
    """Does the same as `pallas_kernels.expert_lookup.xla.backward`.

    The kernel reads the lines once more. It returns dx, and the products of codes with x and with
    dy. The rest is arithmetic of [T, K] numbers.
    """
    layout = RowLayout.of(pool.width, pool.storage)
    act = activation_by_name(activation)
    down, up = layout.span(DOWN), layout.span(UP)

    def one_chunk(pairs, slot, rows, x_ref, dy_ref, dx_ref, code_x_ref, code_dy_ref):
        code_x, code_dy = (
            _dot(ref, rows(span), slot, layout) for ref, span in ((x_ref, down), (dy_ref, up))
        )
        code_x_ref[...], code_dy_ref[...] = code_x, code_dy
        c_down = pairs.gradients(code_x, code_dy, act).c_down
        dx_ref[...] += _mix(c_down * pairs.down_scale, rows(down), slot, layout)

    pairs = Pairs.of(pool, ids, gates, hidden_bias)
    images = [
        layout.spread(x.astype(jnp.float32), DOWN)[:, :, down],
        layout.spread(dy.astype(jnp.float32), UP)[:, :, up],
    ]
    results = [(layout.planes, down.stop - down.start), None, None]
    dx, code_x, code_dy = _walk(one_chunk, pool, ids, pairs, images, results, interpret)
    dx = layout.collect(dx, DOWN).astype(x.dtype)
    return Cotangents(dx, pairs.gradients(code_x, code_dy, act))


def _walk(
    one_chunk: Callable[..., None],
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    pairs: Pairs,
    images: list[Float[Array, "T planes _"]],
    results: Sequence[tuple[int, int] | None],
    interpret: Any,
) -> list[Array]:
    """Calls `one_chunk` for every token and every chunk of its experts, with their lines in VMEM.

    Args:
        one_chunk: function of the pairs [1, chunk], their slots in their lines (-1 for no expert),
            a function from a span of lanes to words [chunk, lanes], and references. There is one
            reference to each image [planes, lanes] and one to each result. A result is an image to
            add to, or numbers of pairs [1, chunk].
        pool: packed pool.
        ids: expert numbers.
        pairs: numbers of the pairs that are known before experts are read.
        images: images of the tokens' vectors.
        results: shapes of the images that result; `None` for numbers of pairs [T, K].
        interpret: argument of `pallas_call`.
    """
    layout = RowLayout.of(pool.width, pool.storage)
    tokens, chosen = ids.shape
    block = Block.of(tokens, chosen)
    steps = pl.cdiv(tokens, block.tokens)

    def pad(array: Array, last: int = 0) -> Array:
        first = steps * block.tokens - tokens
        return jnp.pad(array, [(0, first), *[(0, 0)] * (array.ndim - 2), (0, last)])

    # Units and slots are counted from 1, so that padding means "no expert".
    valid = (ids >= 0) & (ids < pool.num_experts)
    unit = jnp.where(valid, 1 + ids // layout.experts * layout.units, 0)
    slot = jnp.where(valid, 1 + ids % layout.experts, 0).astype(jnp.float32)
    unit = pad(unit, block.chosen - chosen).reshape(steps, 1, block.pairs)
    rows = jnp.sum(unit > 0, axis=-1, keepdims=True, dtype=unit.dtype)
    unit_and_rows = jnp.concatenate([unit, rows], axis=-1)
    nothing = [jnp.zeros_like(slot)] * (PAIR_ROWS - 5)
    known = pad(jnp.stack([*pairs, slot, *nothing], axis=1), block.chosen - chosen)
    images = [pad(image) for image in images]
    layer = jnp.reshape(0 if pool.layer is None else pool.layer, (1,)).astype(jnp.int32)
    words = pool.weights if pool.layer is not None else pool.weights[None]

    def by_token(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((block.tokens, *shape), lambda step, _: (step, 0, 0))

    def in_smem(ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, block.pairs + 1),
            lambda step, _: (jnp.minimum(step + ahead, steps - 1), 0, 0),
            memory_space=pltpu.SMEM,
        )

    shapes = [(1, block.chosen) if shape is None else shape for shape in results]
    kernel = partial(
        _kernel, one_chunk=one_chunk, block=block, layout=layout, is_image=[*map(bool, results)]
    )
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[
                in_smem(0),
                in_smem(1),
                pl.BlockSpec(memory_space=pl.ANY),
                by_token(PAIR_ROWS, block.chosen),
                *[by_token(*image.shape[1:]) for image in images],
            ],
            out_specs=[by_token(*shape) for shape in shapes],
            scratch_shapes=[
                pltpu.VMEM((2, layout.units, block.pairs, UNIT), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((steps * block.tokens, *shape), jnp.float32) for shape in shapes
        ],
        # Units of valid ids are within the pool. Checks would be half the time of issuing a copy.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="expert_lookup",
    )(layer, unit_and_rows, unit_and_rows, words, known, *images)
    return [
        result[:tokens] if shape else result[:tokens, 0, :chosen]
        for result, shape in zip(found, results, strict=True)
    ]


def _kernel(
    layer_ref,
    unit_ref,
    next_unit_ref,
    words_ref,
    known_ref,
    *refs,
    one_chunk,
    block,
    layout,
    is_image,
):
    *refs, rows_ref, arrived = refs
    step, last = pl.program_id(0), pl.num_programs(0) - 1
    layer, turn = layer_ref[0], step % 2

    def fetch(unit_ref, turn):
        """Starts the copy of each line of a step. Pairs without an expert have none."""

        def start(pair):
            unit = unit_ref[0, 0, pair] - 1

            @pl.when(unit >= 0)
            def _():
                row = words_ref.at[layer, pl.ds(unit, layout.units)]
                pltpu.make_async_copy(row, rows_ref.at[turn, :, pair], arrived.at[turn]).start()

        for_each(block.pairs, start)

    @pl.when(step == 0)
    def _():
        # Places without a copied line are unpacked too, so they must hold numbers.
        rows_ref[...] = jnp.zeros_like(rows_ref)
        fetch(unit_ref, turn)

    @pl.when(step < last)
    def _():
        fetch(next_unit_ref, 1 - turn)

    one, all_rows = rows_ref.at[turn, :, 0], rows_ref.at[turn]
    wait_for(unit_ref[0, 0, block.pairs], block.pairs, one, all_rows, arrived.at[turn])

    def one_token(token, _):
        outputs = refs[len(refs) - len(is_image) :]
        for ref, image in zip(outputs, is_image, strict=True):
            if image:
                ref[token] = jnp.zeros(ref.shape[1:], ref.dtype)
        for begin in range(0, block.chosen, block.chunk):
            chunk = pl.ds(begin, block.chunk)
            place = pl.ds(pl.multiple_of(token * block.chosen, 8) + begin, block.chunk)

            def rows(span, place=place):
                units = [rows_ref[turn, unit, place] for unit in units_in(span)]
                return jnp.concatenate(units, axis=1)

            known = known_ref[token, :, chunk]
            *pairs, slot = (known[row : row + 1] for row in range(5))
            of_token = [ref.at[token] for ref in refs[: len(refs) - len(is_image)]]
            of_token += [
                ref.at[token] if image else ref.at[token, :, chunk]
                for ref, image in zip(outputs, is_image, strict=True)
            ]
            slot = slot.astype(jnp.int32) - 1
            one_chunk(Pairs(*pairs), slot, rows, *of_token)
        return 0

    jax.lax.fori_loop(0, block.tokens, one_token, 0)


def _dot(
    image_ref: Any, rows: Int[Array, "chunk lanes"], slot: Int[Array, "1 chunk"], layout: RowLayout
) -> Float[Array, "1 chunk"]:
    """Returns the product of an image with every line, within the lanes of the line's slot."""
    lane_slot = layout.slot_of(jax.lax.broadcasted_iota(jnp.int32, (1, rows.shape[1]), 1))
    products = [
        _multiply(_by_slot(image_ref[plane : plane + 1], lane_slot, layout), codes, contract=1)
        for plane, codes in enumerate(_planes(rows, layout))
    ]
    return _of_slot(sum(products[1:], products[0]), slot, layout)


def _mix(
    weights: Float[Array, "1 chunk"],
    rows: Int[Array, "chunk lanes"],
    slot: Int[Array, "1 chunk"],
    layout: RowLayout,
) -> Float[Array, "planes lanes"]:
    """Returns the weighted sum of lines, each within the lanes of its slot."""
    lane_slot = layout.slot_of(jax.lax.broadcasted_iota(jnp.int32, (1, rows.shape[1]), 1))
    by_slot = _by_slot(weights, slot, layout)
    products = [_multiply(by_slot, codes, contract=0) for codes in _planes(rows, layout)]
    return jnp.concatenate([_of_slot(each, lane_slot, layout) for each in products], axis=0)


def _multiply(parts: Array, codes: Array, contract: int) -> Float[Array, "parts n"]:
    """Multiplies on the MXU, and sums over the lines (0) or the lanes (1) of codes."""
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(parts, codes, dimensions, preferred_element_type=jnp.float32)


def _planes(rows: Int[Array, "chunk lanes"], layout: RowLayout) -> list[Array]:
    """Returns the codes of each plane in bfloat16, in which they are exact."""
    top = 32 - layout.bits
    planes = [(rows << (top - layout.bits * plane)) >> top for plane in range(layout.planes)]
    return [codes.astype(jnp.float32).astype(jnp.bfloat16) for codes in planes]


def _by_slot(vector: Float[Array, "1 n"], place: Int[Array, "1 n"], layout: RowLayout) -> Array:
    """Returns, for each slot, the vector where `place` is the slot, in parts that sum to it.

    Returns:
        bfloat16 [PARTS * experts, n]: the first parts of all slots, the second parts, ...
    """
    slots = jax.lax.broadcasted_iota(jnp.int32, (layout.experts, 1), 0)
    left = jnp.where(place == slots, vector, 0.0)
    parts = []
    for _ in range(PARTS):
        parts.append(left.astype(jnp.bfloat16))
        left = left - parts[-1].astype(jnp.float32)
    return jnp.concatenate(parts, axis=0)


def _of_slot(
    products: Float[Array, "parts n"], place: Int[Array, "1 n"], layout: RowLayout
) -> Float[Array, "1 n"]:
    """Returns the products of the slot that `place` names, with their parts added up."""
    slots = jax.lax.broadcasted_iota(jnp.int32, (layout.experts, 1), 0)
    total = sum(
        products[part * layout.experts : (part + 1) * layout.experts] for part in range(1, PARTS)
    )
    total = total + products[: layout.experts]
    return jnp.sum(jnp.where(place == slots, total, 0.0), axis=0, keepdims=True)
