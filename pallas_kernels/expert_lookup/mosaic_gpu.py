"""The lookup for NVIDIA GPUs.

A block of 128 threads processes one token, or a part of one token's experts where tokens are few.
It processes 64 experts at a time, in three steps:

1. It reads the lines (a `row` in code) of the experts, coalesced and with one word per thread. Some
   lines are read at once, so that many loads are in flight. Each thread writes its part of the
   product of codes and vector to shared memory.
2. It adds up the parts of each product. It applies the scales, gates and activations of all 64
   experts at once.
3. It reads the lines that are summed, multiplies them with the results of step 2, and adds them up
   in registers, plane by plane.

Where `down` and `up` lie in separate units, forward passes read every word once. In int4 this holds
at widths that are multiples of 1,024. The parts of a token are added up outside the kernel.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import activation_by_name
from pallas_kernels.codes import why_no_kernel_reads
from pallas_kernels.expert_lookup.gpu_rows import (
    MANTISSA,
    Rows,
    codes_of,
    image_of,
    product_of,
    vector_of,
)
from pallas_kernels.expert_lookup.pairs import Pairs
from pallas_kernels.expert_lookup.xla import Cotangents
from pallas_kernels.pallas_compat import NO_BARRIERS, InterpretGPUParams, load_as
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.storage import DOWN, UNIT, UP, ExpertPool

BLOCKS = 1024  # enough to fill the multiprocessors of a large GPU several times
MAX_LANES = 1152  # nine words per thread; their sums take 72 registers
TILE = 64  # pairs whose products are added up together, as the rows of a register tile
WORDS = 16  # words that a thread loads at the same time
PADDING = 8  # words between products in shared memory, so that they start in different banks


def cannot_look_up(pool: ExpertPool, ids: Int[Array, "T K"]) -> str | None:
    """Returns why the kernel cannot do this lookup, or `None` if it can."""
    del ids
    if not pool.is_packed:
        return f"it reads packed pools, not {pool.storage}"
    if why := why_no_kernel_reads(pool.storage):
        return why
    lanes = RowLayout.of(pool.width, pool.storage).lanes
    if lanes > MAX_LANES:
        return f"at width {pool.width}, a line of {lanes} words does not fit in registers"
    return None


def rows_at_once(layout: RowLayout, chosen: int) -> int:
    """Returns how many lines are loaded at the same time, a divisor of `TILE`."""
    most = min(WORDS // len(layout.units_of(DOWN)), chosen)
    return 1 << (max(1, most).bit_length() - 1)


def parts_of(tokens: int, chosen: int, at_once: int) -> tuple[int, int]:
    """Returns the number of parts that a token's experts are summed in, and the experts per part.

    There are as many parts as fill a GPU with blocks. A part has no fewer experts than are read
    together.
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
    """Does the same as `pallas_kernels.expert_lookup.xla.forward`."""
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
    """Does the same as `pallas_kernels.expert_lookup.xla.backward`."""
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
    """Multiplies the codes of every pair with vectors, and sums codes with weights that result.

    Args:
        weigh: function of `Pairs` and products of some pairs. It returns the weights of their codes
            in the sum, and numbers of the pairs to write.
        pool: packed pool.
        ids: expert numbers.
        pairs: numbers of the pairs that are known before experts are read.
        vectors: vectors of tokens. The key is the vector of the expert that they are multiplied
            with, `down` (0) or `up` (1).
        summed: vector that is summed, `down` (0) or `up` (1).
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
        """Returns [T, K] as [T, parts, pairs of a part, padded to whole tiles]."""
        array = jnp.pad(array, ((0, 0), (0, parts * of_part - chosen)))
        array = array.reshape(tokens, parts, of_part)
        return jnp.pad(array, ((0, 0), (0, 0), (0, padded - of_part)))

    valid = (ids >= 0) & (ids < pool.num_experts)
    unit = by_part(jnp.where(valid, ids // layout.experts * layout.units, 0))
    slot = by_part(ids % layout.experts)
    alive = by_part(valid.astype(jnp.int32)).reshape(tokens, parts, -1, at_once)
    alive = jnp.max(alive, axis=-1)
    known = [by_part(each) for each in pairs]
    images = [image_of(vector, which, layout) for which, vector in vectors.items()]
    layer = jnp.asarray(0 if pool.layer is None else pool.layer, jnp.int32)
    words = pool.weights if pool.layer is not None else pool.weights[None]
    planes, num_units = range(layout.planes), len(layout.units_of(summed))
    by_row = plgpu.Layout.WGMMA.reduce(1)

    results = [jax.ShapeDtypeStruct((parts, tokens, num_units, layout.planes, UNIT), jnp.float32)]
    results += [jax.ShapeDtypeStruct(unit.shape, jnp.float32)] * num_written
    scratch = [
        plgpu.SMEM((TILE, UNIT + PADDING), jnp.float32),
        plgpu.SMEM((TILE,), jnp.float32),
    ]

    def kernel(scalars_ref, lanes_ref, words_ref, unit_ref, slot_ref, alive_ref, *refs):
        numbers = (len(known), len(images), 1, num_written, 2)
        ends = list(itertools.accumulate(numbers, initial=0))
        known_refs, image_refs, (sum_ref,), written_refs, (product_ref, weight_ref) = [
            refs[begin:end] for begin, end in itertools.pairwise(ends)
        ]
        token, part = jax.lax.axis_index("token"), jax.lax.axis_index("part")
        block = (token, part)
        mantissa = scalars_ref[1]
        slots = [lanes_ref[unit] for unit in range(layout.units)]
        rows = Rows(
            words_ref, scalars_ref[0], unit_ref, slot_ref, slots, block, of_part, at_once, layout
        )
        # Zeros that have the register layout of loaded values.
        zero = (0 * slots[0]).astype(jnp.float32)

        def load(ref, index, form):
            return load_as(ref, index, form, interpret)

        def one_tile(tile, sums):
            start = tile * TILE
            groups = jnp.minimum(of_part - start, TILE) // at_once

            def is_alive(group):
                return alive_ref[(*block, tile * (TILE // at_once) + group)] > 0

            def products_with(which, image_ref):
                """Returns the products of the tile's codes and an image."""
                image = [
                    [image_ref[token, unit, plane] for plane in planes]
                    for unit in range(len(layout.units_of(which)))
                ]

                def multiply(group, words_of_pairs, nothing):
                    # Products of a group without experts are not used, so they are not written.
                    @pl.when(is_alive(group))
                    def _():
                        for index, row in enumerate(words_of_pairs):
                            product = product_of(row, image, mantissa, layout)
                            product_ref[group * at_once + index, pl.ds(0, UNIT)] = product

                    return nothing

                rows.walk(multiply, start, groups, which, rows.read(start, which), ())
                plgpu.commit_smem()  # all threads wait for each other
                everything = (slice(None), pl.ds(0, UNIT))
                return jnp.sum(load(product_ref, everything, plgpu.Layout.WGMMA), axis=1)

            products = []
            for which, ref in zip(vectors, image_refs, strict=True):
                if products:
                    plgpu.commit_smem()  # before products are overwritten
                products.append(products_with(which, ref))
            first_to_sum = rows.read(start, summed)
            here = (*block, pl.ds(start, TILE))
            pairs = Pairs(*[load(ref, here, by_row) for ref in known_refs])
            weight_ref[...], written = weigh(pairs, products)
            for ref, value in zip(written_refs, written, strict=True):
                ref[here] = value
            plgpu.commit_smem()

            def add(group, words_of_pairs, sums):
                def add_alive(sums):
                    for index, row in enumerate(words_of_pairs):
                        weight = weight_ref[group * at_once + index]
                        codes = [code for word in row for code in codes_of(word, mantissa, layout)]
                        sums = [
                            total + weight * code for total, code in zip(sums, codes, strict=True)
                        ]
                    return tuple(sums)

                return jax.lax.cond(is_alive(group), add_alive, lambda sums: sums, sums)

            return rows.walk(add, start, groups, summed, first_to_sum, sums)

        sums = (zero,) * (num_units * layout.planes)
        sums = jax.lax.fori_loop(0, pl.cdiv(of_part, TILE), one_tile, sums)
        for place, total in enumerate(sums):
            sum_ref[part, token, place // layout.planes, place % layout.planes] = total

    call = plgpu.kernel(
        kernel,
        out_type=results,
        scratch_types=scratch,
        # The last axis may be the longest, with 2^31 blocks.
        grid=(parts, tokens),
        grid_names=("part", "token"),
        compiler_params=NO_BARRIERS,
        interpret=InterpretGPUParams() if interpret is True else interpret,
    )
    scalars = jnp.stack([layer, jnp.int32(MANTISSA)])
    slot_of_lane = layout.slot_of(jnp.arange(layout.lanes, dtype=jnp.int32)).reshape(-1, UNIT)
    total, *written = call(scalars, slot_of_lane, words, unit, slot, alive, *known, *images)
    written = [
        jnp.where(valid, each[:, :, :of_part].reshape(tokens, -1)[:, :chosen], 0.0)
        for each in written
    ]
    return [vector_of(jnp.sum(total, axis=0), summed, layout), *written]
