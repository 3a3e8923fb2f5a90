"""The lookup for NVIDIA GPUs.

A block of 128 threads takes one token, or a part of one token's experts where tokens are few, and
reads their rows one after the other, a word a thread: loads of whole units, coalesced. Products of
codes with a vector stay in the thread that read the codes, and only their sum crosses threads. The
sums over experts are kept in registers, plane by plane, and parts are added up outside.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import activation_by_name
from pallas_kernels.expert_lookup.pairs import Pairs
from pallas_kernels.expert_lookup.xla import Cotangents
from pallas_kernels.pallas_compat import LANE_SEMANTICS, InterpretGPUParams
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.storage import DOWN, UP, ExpertPool

BLOCKS = 1024  # enough to fill the multiprocessors of a large GPU several times
MAX_LANES = 1152  # nine words a thread: its sums take 72 registers


def cannot_look_up(pool: ExpertPool, ids: Int[Array, "T K"]) -> str | None:
    """Why the kernel cannot do this lookup; `None` if it can."""
    del ids
    if not pool.is_packed:
        return f"it reads packed pools, not {pool.storage}"
    lanes = RowLayout.of(pool.width, pool.storage).lanes
    if lanes > MAX_LANES:
        return f"a row of {lanes} words at width {pool.width} does not fit in registers"
    return None


def parts_of(tokens: int, chosen: int) -> int:
    """In how many parts the experts of a token are summed, so that there are enough blocks."""
    most = min(chosen, pl.cdiv(BLOCKS, tokens))
    return pl.cdiv(chosen, pl.cdiv(chosen, most))


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
    layout = RowLayout.of(pool.width, pool.storage)
    act = activation_by_name(activation)

    def one_pair(pair, codes, images, write):
        (x_planes,) = images
        return pair.mixing(_dot(codes, x_planes), act)

    pairs = Pairs.of(pool, ids, gates, hidden_bias)
    images = [layout.spread(x.astype(jnp.float32), DOWN)]
    (y,) = _walk(one_pair, pool, ids, pairs, images, 0, interpret)
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
    """See `pallas_kernels.expert_lookup.xla.backward`."""
    layout = RowLayout.of(pool.width, pool.storage)
    act = activation_by_name(activation)

    def one_pair(pair, codes, images, write):
        code_x, code_dy = (_dot(codes, image) for image in images)
        write(0, code_x)
        write(1, code_dy)
        return pair.gradients(code_x, code_dy, act).c_down * pair.down_scale

    pairs = Pairs.of(pool, ids, gates, hidden_bias)
    images = [
        layout.spread(x.astype(jnp.float32), DOWN),
        layout.spread(dy.astype(jnp.float32), UP),
    ]
    dx, code_x, code_dy = _walk(one_pair, pool, ids, pairs, images, 2, interpret)
    dx = layout.collect(dx, DOWN).astype(x.dtype)
    return Cotangents(dx, pairs.gradients(code_x, code_dy, act))


def _walk(
    one_pair: Callable[..., Any],
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    pairs: Pairs,
    images: list[Float[Array, "T planes lanes"]],
    num_written: int,
    interpret: Any,
) -> list[Array]:
    """Calls `one_pair` for every pair that has an expert, and sums the experts by what it returns.

    Args:
        one_pair: called with a `Pairs` of scalars, the codes of the pair's row by plane (zero where
            the row's other experts are), the images of its token by plane, and a function that
            writes a number of the pair. Returns the weight of the codes in the sum.
        pool: packed.
        ids: expert numbers.
        pairs: what is known of them.
        images: vectors of tokens, which must be zero where they are not to be multiplied.
        num_written: how many numbers of a pair are written.
        interpret: False, True, or parameters of the interpreter.

    Returns:
        The sums [T, planes, lanes], and the numbers [T, K]; 0 for pairs without an expert.
    """
    layout = RowLayout.of(pool.width, pool.storage)
    tokens, chosen = ids.shape
    parts = parts_of(tokens, chosen)
    of_part = pl.cdiv(chosen, parts)

    def pad(array: Array, value: int = 0) -> Array:
        padding = ((0, 0), (0, parts * of_part - chosen))
        return jnp.pad(array, padding, constant_values=value)

    valid = (ids >= 0) & (ids < pool.num_experts)
    unit = pad(jnp.where(valid, ids // layout.experts * layout.units, -1), -1)
    slot = pad(ids % layout.experts)
    known = jnp.stack([pad(each) for each in pairs])
    layer = jnp.reshape(0 if pool.layer is None else pool.layer, (1,)).astype(jnp.int32)
    words = pool.weights if pool.layer is not None else pool.weights[None]

    image_shape = (parts, tokens, layout.planes, layout.lanes)
    results = [jax.ShapeDtypeStruct(image_shape, jnp.float32)]
    results += [jax.ShapeDtypeStruct(unit.shape, jnp.float32)] * num_written

    def kernel(layer_ref, lanes_ref, words_ref, unit_ref, slot_ref, known_ref, *refs):
        image_refs, (sum_ref, *written_refs) = refs[: len(images)], refs[len(images) :]
        token, part = jax.lax.axis_index("token"), jax.lax.axis_index("part")
        planes = range(layout.planes)
        of_token = [[ref[token, plane] for plane in planes] for ref in image_refs]
        slot_of_lane = lanes_ref[...]

        def add_pair(index, sums):
            place = part * of_part + index
            unit = unit_ref[token, place]

            def write(number, value):
                written_refs[number][token, place] = value

            def nothing(sums):
                for number in range(num_written):
                    write(number, jnp.float32(0))
                return sums

            def add(sums):
                row = words_ref[layer_ref[0], pl.ds(unit, layout.units)]
                row = row.reshape(layout.lanes)
                if layout.experts > 1:
                    row = jnp.where(slot_of_lane == slot_ref[token, place], row, 0)
                top = 32 - layout.bits
                codes = [
                    ((row << (top - layout.bits * plane)) >> top).astype(jnp.float32)
                    for plane in planes
                ]
                pair = Pairs(*[known_ref[field, token, place] for field in range(len(pairs))])
                weight = one_pair(pair, codes, of_token, write)
                return tuple(
                    total + weight * plane for total, plane in zip(sums, codes, strict=True)
                )

            return jax.lax.cond(unit >= 0, add, nothing, sums)

        # Zeros with the layout in registers of what is loaded.
        zeros = tuple((0 * slot_of_lane).astype(jnp.float32) for _ in planes)
        sums = jax.lax.fori_loop(0, of_part, add_pair, zeros)
        for plane in planes:
            sum_ref[part, token, plane] = sums[plane]

    call = plgpu.kernel(
        kernel,
        out_type=results,
        grid=(tokens, parts),
        grid_names=("token", "part"),
        compiler_params=LANE_SEMANTICS,
        interpret=InterpretGPUParams() if interpret is True else interpret,
    )
    slot_of_lane = layout.slot_of(jnp.arange(layout.lanes, dtype=jnp.int32))
    total, *written = call(layer, slot_of_lane, words, unit, slot, known, *images)
    return [jnp.sum(total, axis=0), *[each[:, :chosen] for each in written]]


def _dot(codes: list[Float[Array, " lanes"]], image: list[Float[Array, " lanes"]]) -> Any:
    """The product of codes and an image, over all planes and lanes."""
    products = [plane * vector for plane, vector in zip(codes, image, strict=True)]
    return jnp.sum(functools.reduce(jnp.add, products))
