"""The lookup for NVIDIA GPUs.

A block of 128 threads takes one token, or a part of one token's experts where tokens are few, and
walks the experts 64 at a time, in three steps. First it reads their rows, some at once so that many
loads are on their way, a word a thread and coalesced, and each thread keeps its part of the
product of codes and vector in shared memory. Then the parts of each product are added up, and 64
experts' scales, gates and activations are dealt with at once. At last the rows that are summed are
read, multiplied with what came out, and added up in registers, plane by plane. Where `down` and
`up` lie in units of their own, as they do at widths that are multiples of 1,024 in int4, forward
passes read every word once. Parts of a token are added up outside.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import activation_by_name
from pallas_kernels.expert_lookup.pairs import Pairs
from pallas_kernels.expert_lookup.xla import Cotangents
from pallas_kernels.pallas_compat import NO_BARRIERS, InterpretGPUParams, load_as
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.storage import DOWN, UNIT, UP, ExpertPool

BLOCKS = 1024  # enough to fill the multiprocessors of a large GPU several times
MAX_LANES = 1152  # nine words a thread: its sums take 72 registers
TILE = 64  # pairs whose products are added up together, by rows of a tile of registers
WORDS = 16  # of a thread, that are on their way together
MANTISSA = 0x4B000000  # the bits of the float 2^23, whose last one is worth 1
PADDING = 8  # words between products in shared memory, so that rows start in different banks


def cannot_look_up(pool: ExpertPool, ids: Int[Array, "T K"]) -> str | None:
    """Why the kernel cannot do this lookup; `None` if it can."""
    del ids
    if not pool.is_packed:
        return f"it reads packed pools, not {pool.storage}"
    lanes = RowLayout.of(pool.width, pool.storage).lanes
    if lanes > MAX_LANES:
        return f"a row of {lanes} words at width {pool.width} does not fit in registers"
    return None


def rows_at_once(layout: RowLayout, chosen: int) -> int:
    """How many rows are on their way together: a divisor of `TILE`."""
    most = min(WORDS // len(_units(layout, DOWN)), chosen)
    return 1 << (max(1, most).bit_length() - 1)


def parts_of(tokens: int, chosen: int, at_once: int) -> tuple[int, int]:
    """In how many parts the experts of a token are summed, and how many are in each.

    As many as fill a GPU with blocks.
    """
    most = pl.cdiv(BLOCKS, tokens)
    of_part = at_once * pl.cdiv(pl.cdiv(chosen, most), at_once)
    return pl.cdiv(chosen, of_part), of_part


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
    """See `pallas_kernels.expert_lookup.xla.forward`."""
    act = activation_by_name(activation)

    def weigh(pairs, products):
        return pairs.mixing(products[0], act), []

    pairs = Pairs.of(pool, ids, gates, hidden_bias)
    (y,) = _walk(weigh, pool, ids, pairs, {DOWN: x}, UP, 0, interpret)
    return y.astype(x.dtype)


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
    """See `pallas_kernels.expert_lookup.xla.backward`."""
    act = activation_by_name(activation)

    def weigh(pairs, products):
        return pairs.gradients(*products, act).c_down * pairs.down_scale, products

    pairs = Pairs.of(pool, ids, gates, hidden_bias)
    vectors = {DOWN: x, UP: dy}
    dx, code_x, code_dy = _walk(weigh, pool, ids, pairs, vectors, DOWN, 2, interpret)
    return Cotangents(dx.astype(x.dtype), pairs.gradients(code_x, code_dy, act))


def _walk(
    weigh: Callable[..., tuple[Array, Sequence[Array]]],
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    pairs: Pairs,
    vectors: dict[int, Float[Array, "T D"]],
    summed: int,
    num_written: int,
    interpret: Any,
) -> list[Array]:
    """Multiplies the codes of every pair with vectors, and sums them by what comes of it.

    Args:
        weigh: called with `Pairs` and products of some pairs; returns the weights of their codes in
            the sum, and numbers of the pairs to be written.
        pool: packed.
        ids: expert numbers.
        pairs: what is known of them.
        vectors: of tokens, which `down` (0), or `up` (1), is multiplied with.
        summed: which of both is summed.
        num_written: how many numbers of a pair are written.
        interpret: False, True, or parameters of the interpreter.

    Returns:
        The sums [T, D], and the numbers [T, K], which are 0 for pairs without an expert.
    """
    layout = RowLayout.of(pool.width, pool.storage)
    tokens, chosen = ids.shape
    at_once = rows_at_once(layout, chosen)
    parts, of_part = parts_of(tokens, chosen, at_once)
    padded = TILE * pl.cdiv(of_part, TILE)

    def by_part(array: Array) -> Array:
        """[T, K] as [T, parts, pairs of a part, padded to whole tiles]."""
        array = jnp.pad(array, ((0, 0), (0, parts * of_part - chosen)))
        array = array.reshape(tokens, parts, of_part)
        return jnp.pad(array, ((0, 0), (0, 0), (0, padded - of_part)))

    valid = (ids >= 0) & (ids < pool.num_experts)
    unit = by_part(jnp.where(valid, ids // layout.experts * layout.units, 0))
    slot = by_part(ids % layout.experts)
    known = [by_part(each) for each in pairs]
    alive = by_part(valid.astype(jnp.int32)).reshape(tokens, parts, -1, at_once)
    alive = jnp.max(alive, axis=-1)
    layer = jnp.asarray(0 if pool.layer is None else pool.layer, jnp.int32)
    words = pool.weights if pool.layer is not None else pool.weights[None]
    images = [_image(vector, which, layout) for which, vector in vectors.items()]
    units = {which: _units(layout, which) for which in (DOWN, UP)}
    planes = range(layout.planes)
    by_row = plgpu.Layout.WGMMA.reduce(1)

    sums_shape = (parts, tokens, len(units[summed]), layout.planes, UNIT)
    results = [jax.ShapeDtypeStruct(sums_shape, jnp.float32)]
    results += [jax.ShapeDtypeStruct(unit.shape, jnp.float32)] * num_written
    scratch = [
        plgpu.SMEM((TILE, UNIT + PADDING), jnp.float32),
        plgpu.SMEM((TILE,), jnp.float32),
    ]

    def kernel(scalars_ref, lanes_ref, words_ref, unit_ref, alive_ref, slot_ref, *refs):
        numbers = (len(known), len(images), 1, num_written, 2)
        ends = list(itertools.accumulate(numbers, initial=0))
        known_refs, image_refs, (sum_ref,), written_refs, (product_ref, weight_ref) = [
            refs[begin:end] for begin, end in itertools.pairwise(ends)
        ]
        token, part = jax.lax.axis_index("token"), jax.lax.axis_index("part")
        at = (token, part)
        layer, mantissa = scalars_ref[0], scalars_ref[1]
        slots = [lanes_ref[unit] for unit in range(layout.units)]

        def read(first, which):
            """The words of some pairs' `down` or `up`, unit by unit."""
            # After the last group, the last once more.
            first = jnp.minimum(first, of_part - at_once)
            rows = []
            for index in range(at_once):
                place = (*at, first + index)
                begin = unit_ref[place]
                row = [words_ref[layer, begin + unit] for unit in units[which]]
                if layout.experts > 1:
                    own = slot_ref[place]
                    row = [
                        jnp.where(slots[unit] == own, word, 0)
                        for unit, word in zip(units[which], row, strict=True)
                    ]
                rows.append(row)
            return rows

        # Zeros with the layout in registers of what is loaded.
        zero = (0 * slots[0]).astype(jnp.float32)

        def one_tile(tile, sums):
            start = tile * TILE
            groups = jnp.minimum(of_part - start, TILE) // at_once

            def is_alive(group):
                return alive_ref[(*at, tile * (TILE // at_once) + group)] > 0

            def products_with(which, image_ref):
                """The products of the tile's codes and an image."""
                image = [
                    [image_ref[token, unit, plane] for plane in planes]
                    for unit in range(len(units[which]))
                ]

                def multiply(group, rows):
                    following = read(start + (group + 1) * at_once, which)

                    def write(is_alive):
                        for index, row in enumerate(rows):
                            product = _product(row, image, mantissa, layout) if is_alive else zero
                            product_ref[group * at_once + index, pl.ds(0, UNIT)] = product

                    pl.when(is_alive(group))(functools.partial(write, True))
                    pl.when(~is_alive(group))(functools.partial(write, False))
                    return following

                # Rows are on their way while those before them are computed with.
                jax.lax.fori_loop(0, groups, multiply, read(start, which))
                plgpu.commit_smem()  # every thread waits for every other
                products = load(product_ref, (slice(None), pl.ds(0, UNIT)), plgpu.Layout.WGMMA)
                products = jnp.sum(products, axis=1)
                plgpu.commit_smem()
                return products

            def load(ref, index, form=by_row):
                return load_as(ref, index, form, interpret)

            products = [
                products_with(which, ref) for which, ref in zip(vectors, image_refs, strict=True)
            ]
            to_sum = read(start, summed)
            here = (*at, pl.ds(start, TILE))
            pairs = Pairs(*[load(ref, here) for ref in known_refs])
            weight_ref[...], written = weigh(pairs, products)
            for ref, value in zip(written_refs, written, strict=True):
                ref[here] = value
            plgpu.commit_smem()

            def add(group, carry):
                rows, sums = carry
                following = read(start + (group + 1) * at_once, summed)

                def add_alive(sums):
                    for index, row in enumerate(rows):
                        weight = weight_ref[group * at_once + index]
                        codes = [code for word in row for code in _codes(word, mantissa, layout)]
                        sums = [
                            total + weight * code for total, code in zip(sums, codes, strict=True)
                        ]
                    return tuple(sums)

                return following, jax.lax.cond(is_alive(group), add_alive, lambda sums: sums, sums)

            _, sums = jax.lax.fori_loop(0, groups, add, (to_sum, sums))
            return sums

        sums = (zero,) * (len(units[summed]) * layout.planes)
        sums = jax.lax.fori_loop(0, pl.cdiv(of_part, TILE), one_tile, sums)
        for place, total in enumerate(sums):
            sum_ref[part, token, place // layout.planes, place % layout.planes] = total

    call = plgpu.kernel(
        kernel,
        out_type=results,
        scratch_types=scratch,
        grid=(tokens, parts),
        grid_names=("token", "part"),
        compiler_params=NO_BARRIERS,
        interpret=InterpretGPUParams() if interpret is True else interpret,
    )
    slot_of_lane = layout.slot_of(jnp.arange(layout.lanes, dtype=jnp.int32)).reshape(-1, UNIT)
    total, *written = call(
        jnp.stack([layer, jnp.int32(MANTISSA)]),
        slot_of_lane,
        words,
        unit,
        alive,
        slot,
        *known,
        *images,
    )
    written = [
        jnp.where(valid, each[:, :, :of_part].reshape(tokens, -1)[:, :chosen], 0.0)
        for each in written
    ]
    return [_vector(jnp.sum(total, axis=0), summed, layout), *written]


def _product(
    row: list[Array], image: list[list[Array]], mantissa: Array, layout: RowLayout
) -> Array:
    """Each thread's part of the product of a row's codes and an image."""
    terms = [
        code * column
        for word, columns in zip(row, image, strict=True)
        for code, column in zip(_codes(word, mantissa, layout), columns, strict=True)
    ]
    return functools.reduce(jnp.add, terms)


def _units(layout: RowLayout, vector: int) -> range:
    """The units of a row that hold `down` (0) or `up` (1)."""
    span = layout.span(vector)
    return range(span.start // UNIT, span.stop // UNIT)


def _image(vector: Float[Array, "T D"], which: int, layout: RowLayout) -> Array:
    """A vector where the codes are that it is multiplied with, [T, units, planes, 128].

    Divided by the factors that `_codes` leaves in the codes.
    """
    image = layout.spread(vector.astype(jnp.float32), which)[:, :, layout.span(which)]
    image = image * _inverse_factors(layout)[:, None]
    return image.reshape(*image.shape[:2], -1, UNIT).swapaxes(1, 2)


def _vector(sums: Float[Array, "T units planes 128"], which: int, layout: RowLayout) -> Array:
    """The reverse: what all places of a column hold, added up; [T, D]."""
    image = sums.swapaxes(1, 2).reshape(sums.shape[0], layout.planes, -1)
    return layout.collect(image * _inverse_factors(layout)[:, None], which)


def _shift(plane: int, layout: RowLayout) -> tuple[int, int]:
    """By how many bits `_codes` moves a plane's codes down, and where they are then."""
    together = 20 // layout.bits
    return plane // together * together * layout.bits, plane % together * layout.bits


def _inverse_factors(layout: RowLayout) -> Float[Array, " planes"]:
    return jnp.array([2.0 ** -_shift(plane, layout)[1] for plane in range(layout.planes)])


def _codes(
    words: Int[Array, " 128"], mantissa: Int[Array, ""], layout: RowLayout
) -> list[Float[Array, " 128"]]:
    """The codes of words, plane by plane, times a power of two each.

    A code in two's complement, its sign flipped, is a positive number. Left where it is, among the
    low bits of the float 2^23, it is that number times a power of two, exactly: one bitwise
    instruction and a subtraction, where GPUs convert integers at a fraction of that speed.

    Args:
        words: of a row.
        mantissa: `MANTISSA`, not known when the kernel is compiled: there is room for one constant
            in an instruction, and that is the mask.
        layout: of the row.
    """
    signs = sum(1 << (layout.bits * plane + layout.bits - 1) for plane in range(layout.planes))
    words = words ^ (signs - (1 << 32))
    codes = []
    for plane in range(layout.planes):
        down, place = _shift(plane, layout)
        moved = jax.lax.shift_right_logical(words, down) if down else words
        number = (moved & (((1 << layout.bits) - 1) << place)) | mantissa
        sign = 1 << (layout.bits - 1 + place)
        codes.append(jax.lax.bitcast_convert_type(number, jnp.float32) - float((1 << 23) + sign))
    return codes
