"""The update for TPUs.

The (token, expert) pairs of a layer are sorted by expert and processed a block at a time. The
gradient of a line (a `row` in code) is summed over its pairs in float32, in ascending order of
tokens. The sum continues from block to block. In the block of a line's last pair, VMEM holds the
codes and accumulators of the line. They are copied while the block before is computed. The rule is
applied to eight lines at a time, and they are copied back. A line is read and written once. Lines
of experts that are not hit are never touched.

Scales and second moments are a few numbers per expert. XLA gathers them before the kernel. After
it, XLA scatters their new values, which follow from sums over each line that the kernel returns.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.codes import why_no_kernel_updates
from pallas_kernels.counter_hash import Purpose, hash_words
from pallas_kernels.expert_update.row_rule import COLUMNS, rewrite_rows, segment_of_lanes
from pallas_kernels.expert_update.rows import RowSums, SortedRows, finish, gather
from pallas_kernels.expert_update.rule import Hyperparameters
from pallas_kernels.expert_update.xla import Carry, Part
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.row_copies import for_each, wait_for
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.sorted_pairs import sort_pairs
from pallas_kernels.storage import UNIT, ExpertPool

BLOCK = 128  # pairs per grid step
GROUP = 8  # lines that are rewritten together, the sublanes of a register
RESIDENT_BYTES = 16 << 20  # x and dy stay in VMEM up to this size; above, they are fetched by pair
VMEM_BYTES = 48 << 20

# Integers of a pair. ROWS has the lines to rewrite in each group, and in all groups at its end.
TOKEN, SLOT, UNIT_OF_LAST, ROWS = range(4)


def cannot_update(
    pool: ExpertPool, gradient: FactoredGradient, accumulator_bits: int
) -> str | None:
    """Returns why the kernel cannot do this update, or `None` if it can."""
    del gradient
    if not pool.is_packed:
        return f"it rewrites packed pools, not {pool.storage}"
    if why := why_no_kernel_updates(pool.storage, accumulator_bits):
        return why
    layout = RowLayout.of(pool.width, pool.storage)
    if len(RowSums._fields) * 2 * layout.experts > COLUMNS:
        return f"at width {pool.width}, {layout.experts} experts share a line, too many to add up"
    size = BLOCK * layout.lanes * 4 * (4 + 3 * layout.planes)
    if size + RESIDENT_BYTES > VMEM_BYTES:
        return f"at width {pool.width}, lines of experts take {size >> 20} MiB of VMEM, too much"
    return None


def update_stack(
    carry: Carry,
    gradient: FactoredGradient,
    rule: Hyperparameters,
    seed: Any,
    step: Any,
    part: Part,
    *,
    num_experts: int,
    storage: str,
    accumulator_bits: int,
    interpret: Any = False,
) -> Carry:
    """Does the same as `pallas_kernels.expert_update.xla.update_stack`."""
    del accumulator_bits  # they are as wide as the codes; see `cannot_update`
    count, _, width = gradient.x.shape
    layout = RowLayout.of(width, storage)

    def one_layer(number: Array, carry: Carry) -> Carry:
        layer = part.first_layer + number
        ids, c_down, c_up, x, dy = (leaf[number] for leaf in gradient)
        rows = SortedRows.of(sort_pairs(ids, c_down, c_up, num_experts), layout)
        prefix = hash_words(seed, Purpose.POOL_STEP, step, layer, jnp.arange(2))
        images = layout.joined(x, dy).astype(jnp.float32)
        codes, accumulators, sums = _rewrite(
            carry, layer, rows, images, rule, prefix, part, layout, interpret
        )
        carry = carry._replace(weights=codes, accumulators=accumulators)
        return finish(carry, layer, rows, sums, rule, layout)

    return jax.lax.fori_loop(0, count, one_layer, carry)


def _rewrite(
    carry: Carry,
    layer: Array,
    rows: SortedRows,
    images: Float[Array, "T planes lanes"],
    rule: Hyperparameters,
    prefix: Array,
    part: Part,
    layout: RowLayout,
    interpret: Any,
) -> tuple[Array, Array, RowSums]:
    """Rewrites codes and accumulators in place. Returns them, and the sums of each line."""
    size = rows.row.shape[0]
    steps, segments = pl.cdiv(size, BLOCK), 2 * layout.experts

    def in_blocks(array: Array) -> Array:
        """Returns [..., P] as [steps, numbers, BLOCK], with zeros at the end."""
        numbers = array.reshape(-1, size)
        padded = jnp.pad(numbers, ((0, 0), (0, steps * BLOCK - size)))
        return padded.reshape(-1, steps, BLOCK).swapaxes(0, 1)

    # Units are counted from 1, so that padding means "not the last pair of a line".
    unit = jnp.where(rows.is_last, 1 + rows.row * layout.units, 0)
    is_last = in_blocks(rows.is_last.astype(jnp.int32))
    of_group = jnp.sum(is_last.reshape(steps, 1, -1, GROUP), axis=-1)
    gap = jnp.zeros((steps, 1, BLOCK - 1 - of_group.shape[-1]), jnp.int32)
    of_all = jnp.sum(of_group, axis=-1, keepdims=True)
    of_group = jnp.concatenate([of_group, gap, of_all], axis=-1)
    by_pair = in_blocks(jnp.stack([rows.pairs.token, rows.slot, unit]))
    integers = jnp.concatenate([by_pair, of_group], axis=1)
    coefficients = in_blocks(jnp.stack([rows.pairs.c_down, rows.pairs.c_up]))
    # Numbers of lines that the kernel needs by column. Halves of integers are exact in float32.
    experts = rows.experts(layout)
    scales, moments = (
        gather(each, layer, experts).reshape(segments, size)
        for each in (carry.scales, carry.moments)
    )
    row = rows.row + part.first_expert // layout.experts  # in the whole pool
    halves = jnp.stack([row >> 16, row & 0xFFFF]).astype(jnp.float32)
    known = in_blocks(jnp.concatenate([scales, moments, halves]))
    known = jnp.pad(known, ((0, 0), (0, -known.shape[1] % 8), (0, 0)))

    scalars = jnp.stack([layer, rows.num_pairs, *prefix.astype(jnp.int32)]).astype(jnp.int32)
    of_rule = jnp.stack([jnp.asarray(each, jnp.float32) for each in rule])
    images = images[:, :, None]
    is_resident = images.size * 4 <= RESIDENT_BYTES
    sums_rows = -(-len(RowSums._fields) * segments // 8) * 8

    def in_smem(rows: int, ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, rows, BLOCK),
            lambda step, *_: (jnp.clip(step + ahead, 0, steps - 1), 0, 0),
            memory_space=pltpu.SMEM,
        )

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    image_buffer = images.shape if is_resident else (2, BLOCK, *images.shape[1:])
    codes, accumulators, sums = pl.pallas_call(
        partial(_kernel, layout=layout, is_resident=is_resident),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps,),
            in_specs=[
                in_smem(4, -1),
                in_smem(4, 0),
                in_smem(4, 1),
                in_smem(2, 0),
                pl.BlockSpec((1, known.shape[1], BLOCK), lambda step, *_: (step, 0, 0)),
                in_hbm,
                in_hbm,
                in_hbm,
            ],
            out_specs=[
                in_hbm,
                in_hbm,
                pl.BlockSpec((1, sums_rows, BLOCK), lambda step, *_: (step, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, 2, layout.units, BLOCK, UNIT), jnp.int32),
                pltpu.VMEM(image_buffer, jnp.float32),
                pltpu.VMEM((layout.planes, 1, layout.lanes), jnp.float32),
                pltpu.VMEM((layout.planes, BLOCK, layout.lanes), jnp.float32),
                pltpu.VMEM((BLOCK, COLUMNS), jnp.float32),
                pltpu.VMEM((BLOCK, COLUMNS), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(carry.weights.shape, jnp.int32),
            jax.ShapeDtypeStruct(carry.accumulators.shape, jnp.int32),
            jax.ShapeDtypeStruct((steps, sums_rows, BLOCK), jnp.float32),
        ],
        input_output_aliases={8: 0, 9: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # lines of valid ids are within the pool
        ),
        interpret=interpret,
        name="expert_update",
    )(
        scalars,
        of_rule,
        integers,
        integers,
        integers,
        coefficients,
        known,
        images,
        carry.weights,
        carry.accumulators,
    )
    sums = sums.swapaxes(0, 1).reshape(sums_rows, -1)[: len(RowSums._fields) * segments, :size]
    return codes, accumulators, RowSums(*sums.reshape(-1, layout.experts, 2, size))


def _kernel(
    scalars_ref,
    rule_ref,
    before_ref,
    now_ref,
    after_ref,
    coefficients_ref,
    known_ref,
    images_ref,
    _codes_in,
    _accumulators_in,
    codes_ref,
    accumulators_ref,
    sums_out_ref,
    words_ref,
    image_ref,
    running_ref,
    gradient_ref,
    known_columns_ref,
    sum_columns_ref,
    rows_copied,
    images_copied,
    *,
    layout,
    is_resident,
):
    step, last = pl.program_id(0), pl.num_programs(0) - 1
    layer, turn = scalars_ref[0], step % 2

    def pairs_of(step):
        return jnp.clip(scalars_ref[1] - step * BLOCK, 0, BLOCK)

    def copy_row(integers_ref, pair, turn, *, back):
        """Starts to copy codes and accumulators of a line, if the pair is the line's last."""
        unit = integers_ref[0, UNIT_OF_LAST, pair] - 1

        @pl.when(unit >= 0)
        def _():
            for kind, ref in enumerate((codes_ref, accumulators_ref)):
                there = ref.at[layer, pl.ds(unit, layout.units)]
                here = words_ref.at[turn, kind, :, pair]
                source, target = (here, there) if back else (there, here)
                pltpu.make_async_copy(source, target, rows_copied.at[int(back), turn]).start()

    def wait_for_rows(integers_ref, turn, *, back):
        count = integers_ref[0, ROWS, BLOCK - 1]
        one, all_rows = words_ref.at[turn, :, :, 0], words_ref.at[turn]
        wait_for(count, BLOCK, one, all_rows, rows_copied.at[int(back), turn])

    def fetch(integers_ref, step, turn):
        """Starts to copy all that a step needs."""
        for_each(BLOCK, lambda pair: copy_row(integers_ref, pair, turn, back=False))
        if not is_resident:

            def fetch_image(pair, _):
                source = images_ref.at[integers_ref[0, TOKEN, pair]]
                target, fetched = image_ref.at[turn, pair], images_copied.at[turn]
                pltpu.make_async_copy(source, target, fetched).start()
                return 0

            jax.lax.fori_loop(0, pairs_of(step), fetch_image, 0)

    @pl.when(step == 0)
    def _():
        # Absent lines are computed with the others of their group, to no effect.
        words_ref[...] = jnp.zeros_like(words_ref)
        gradient_ref[...] = jnp.zeros_like(gradient_ref)
        running_ref[...] = jnp.zeros_like(running_ref)
        if is_resident:
            all_images = pltpu.make_async_copy(images_ref, image_ref, images_copied.at[0])
            all_images.start()
            all_images.wait()
        fetch(now_ref, step, turn)

    @pl.when(step > 0)
    def _():
        wait_for_rows(before_ref, 1 - turn, back=True)

    @pl.when(step < last)
    def _():
        fetch(after_ref, step + 1, 1 - turn)

    if not is_resident:
        one, every = image_ref.at[turn, 0], image_ref.at[turn]
        wait_for(pairs_of(step), BLOCK, one, every, images_copied.at[turn])
    segment = segment_of_lanes(layout)

    def add_pair(pair, running):
        slot = now_ref[0, SLOT, pair]
        down = jnp.where(segment == 2 * slot, coefficients_ref[0, 0, pair], 0.0)
        both = jnp.where(segment == 2 * slot + 1, coefficients_ref[0, 1, pair], down)
        image = image_ref[now_ref[0, TOKEN, pair]] if is_resident else image_ref[turn, pair]
        total = running + both[None] * image
        gradient_ref[:, pl.ds(pair, 1)] = total
        return jnp.where(now_ref[0, UNIT_OF_LAST, pair] > 0, 0.0, total)

    running_ref[...] = jax.lax.fori_loop(0, pairs_of(step), add_pair, running_ref[...])
    known = known_ref[0]
    missing = jnp.zeros((COLUMNS - known.shape[0], BLOCK), jnp.float32)
    known_columns_ref[...] = jnp.concatenate([known, missing], axis=0).T
    wait_for_rows(now_ref, turn, back=False)
    rule = Hyperparameters(*[rule_ref[index] for index in range(len(Hyperparameters._fields))])

    def rewrite_group(group, _):
        @pl.when(now_ref[0, ROWS, group] > 0)
        def _():
            begin = pl.multiple_of(group * GROUP, GROUP)
            rows = pl.ds(begin, GROUP)
            words = [
                jnp.concatenate(
                    [words_ref[turn, kind, unit, rows] for unit in range(layout.units)], axis=1
                )
                for kind in range(2)
            ]
            known = known_columns_ref[rows]
            prefix = [scalars_ref[2 + vector].astype(jnp.uint32) for vector in range(2)]
            *words, sums = rewrite_rows(*words, gradient_ref[:, rows], known, prefix, rule, layout)
            for kind in range(2):
                for unit in range(layout.units):
                    lanes = slice(unit * UNIT, (unit + 1) * UNIT)
                    words_ref[turn, kind, unit, rows] = words[kind][:, lanes]
            sum_columns_ref[rows] = sums
            for_each(GROUP, lambda index: copy_row(now_ref, begin + index, turn, back=True))

        return 0

    jax.lax.fori_loop(0, BLOCK // GROUP, rewrite_group, 0)
    sums_out_ref[0] = sum_columns_ref[...].T[: sums_out_ref.shape[1]]

    @pl.when(step == last)
    def _():
        wait_for_rows(now_ref, turn, back=True)
