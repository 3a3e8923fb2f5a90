"""Times lookup, backward pass and update on this device, and compares them with a copy.

The platform's kernel is compared with XLA on the same packed int4 pool, and with gather + einsum on
a bfloat16 pool. Without an accelerator there is no kernel, and shapes with many tokens are left
out. Shares of the copy's bandwidth count the fewest bytes that must be moved, not those that a
kernel moves.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compiled_kernels import Shape, least_bytes
from benchmarks.result import Figure, Result
from pallas_kernels.activations import activation_by_name
from pallas_kernels.expert_lookup import api, xla
from pallas_kernels.expert_update import Hyperparameters, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.storage import ExpertPool, packed_shape

EXPERTS = 1 << 20
SHAPES = tuple(
    Shape(width, EXPERTS, tokens, 128)
    for width, tokens in (
        (1024, 4096),
        (1024, 512),
        (1024, 32),
        (1024, 1),
        (2048, 4096),
        (256, 4096),
    )
)
QUICK = (Shape(256, 1 << 16, 1, 64), Shape(256, 1 << 16, 32, 64))
CPU_TOKENS = 512
REPEATS, SCANS = 5, 4
INPUTS = 4  # used in turns, so that a cache does not hold the rows of the previous call
COPIED = {"cpu": 1 << 27, "gpu": 1 << 30, "tpu": 1 << 30}  # bytes
GATHERED = {"cpu": 1 << 30, "gpu": 24 << 30, "tpu": 2 << 30}  # bytes of [T, K, 2, D] in bfloat16
KERNEL = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
OURS, XLA, GATHER = WAYS = ("kernel", "XLA", "gather")


def gather_and_einsum(weights: Any, ids: Any, gates: Any, x: Any) -> Any:
    """Computes the lookup as it is usually written, on bfloat16 weights [N, 2, D]."""
    experts = weights[ids]
    hidden = jnp.einsum("tkd,td->tk", experts[:, :, 0], x, preferred_element_type=jnp.float32)
    mixing = (gates * activation_by_name("gelu")(hidden)).astype(x.dtype)
    return jnp.einsum("tk,tkd->td", mixing, experts[:, :, 1])


def run(quick: bool) -> Result:
    """Times every shape, or two small ones."""
    platform = jax.default_backend()
    bandwidth = _copy_bandwidth(COPIED[platform])
    shapes: Sequence[Shape] = QUICK if quick else SHAPES
    if platform == "cpu":
        shapes = [shape for shape in shapes if shape.tokens <= CPU_TOKENS]
    rows: list[list[str]] = []
    details: list[dict[str, Any]] = []
    for shape in shapes:
        found = _seconds(shape, KERNEL.get(platform))
        for operation, seconds in found.items():
            size = least_bytes(operation, shape)
            fastest = seconds.get(OURS, seconds[XLA])
            share = size / fastest / bandwidth
            details.append(
                {
                    "operation": operation,
                    "shape": shape._asdict(),
                    "bytes": size,
                    "seconds": seconds,
                    "share": share,
                }
            )
            times = [f"{1e6 * seconds[name]:.0f}" if name in seconds else "" for name in WAYS]
            label = [operation, str(shape.width), str(shape.tokens), str(shape.chosen)]
            rows.append([*label, f"{size / 1e6:.2f}", *times, f"{share:.0%}"])
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    lookups = [each["share"] for each in details if each["operation"] == "lookup"]
    figures = [Figure("bandwidth of a copy, GB/s", bandwidth / 1e9)]
    if platform in KERNEL:
        figures.append(Figure.at_least("lookup: largest share of a copy", max(lookups), 0.7))
    return Result(
        columns=("", "D", "T", "K", "MB", *(f"{way} us" for way in WAYS), "of a copy"),
        rows=rows,
        figures=figures,
        details={"num_experts": shapes[0].num_experts, "timed": details},
    )


def _seconds(shape: Shape, kernel: str | None) -> dict[str, dict[str, float]]:
    """Returns the seconds per call, by operation and by implementation."""
    width, num_experts, tokens, chosen, storage = shape

    @jax.jit
    def make_words() -> Any:
        bits = jax.random.bits(jax.random.key(0), (1, *packed_shape(num_experts, width, storage)))
        return jax.lax.bitcast_convert_type(bits, jnp.int32)

    def inputs(key: Any) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        ids = jax.random.randint(keys[0], (tokens, chosen), 0, num_experts)
        gates = jax.random.uniform(keys[1], (tokens, chosen))
        return ids, gates, *jax.random.normal(keys[2], (2, tokens, width), jnp.bfloat16)

    every = [jax.jit(inputs)(key) for key in jax.random.split(jax.random.key(1), INPUTS)]
    scales = jnp.full((1, 2, num_experts), 0.01)
    stack = ExpertPool(make_words(), scales, None, storage, num_experts, width)
    pool = stack.at_layer(jnp.int32(0))
    found: dict[str, dict[str, float]] = {"lookup": {}, "lookup backward": {}, "update": {}}
    implementations = {XLA: "xla"} | ({OURS: kernel} if kernel else {})
    for label, name in implementations.items():
        module = api.KERNELS.get(name, xla)
        forward, backward = (
            partial(each, activation="gelu") for each in (module.forward, module.backward)
        )
        forwards = [(ids, gates, x, gates) for ids, gates, x, _ in every]
        found["lookup"][label] = _median_seconds(forward, (pool,), forwards)
        backwards = [(ids, gates, x, gates, dy) for ids, gates, x, dy in every]
        found["lookup backward"][label] = _median_seconds(backward, (pool,), backwards)
    gradients = [
        (jax.tree.map(lambda leaf: leaf[None], FactoredGradient(ids, gates, gates, x, dy)),)
        for ids, gates, x, dy in every
    ]
    for label, name in implementations.items():
        step = partial(_update, implementation=name)
        carried = (jax.tree.map(jnp.copy, stack), UpdateState.zeros_for(stack))
        found["update"][label] = _median_seconds(step, carried, gradients, carry=True)
        del carried
    del pool, stack
    if tokens * chosen * 4 * width > GATHERED[jax.default_backend()]:
        return found
    # XLA for CPUs has no bfloat16 and would convert the whole pool to float32.
    dtype = jnp.bfloat16 if kernel else jnp.float32
    weights = jnp.zeros((num_experts, 2, width), dtype)
    gathers = [(ids, gates, x.astype(dtype)) for ids, gates, x, _ in every]
    found["lookup"][GATHER] = _median_seconds(gather_and_einsum, (weights,), gathers)
    return found


def _update(pool: Any, state: Any, gradient: Any, *, implementation: str) -> Any:
    rule = Hyperparameters(1e-3)
    return update(pool, state, gradient, rule, seed=0, step=1, implementation=implementation)[:2]


def _copy_bandwidth(size: int) -> float:
    """Returns the bytes per second, read and written, of adding a number to an array."""

    def add(words: Any, number: Any) -> tuple[Any]:
        return (words + number,)

    numbers = [(jnp.int32(each),) for each in range(INPUTS)]
    words = jnp.zeros(size // 4, jnp.int32)
    return 2 * size / _median_seconds(add, (words,), numbers, carry=True)


def _median_seconds(
    program: Callable[..., Any],
    first: tuple[Any, ...],
    rest: Sequence[tuple[Any, ...]],
    carry: bool = False,
) -> float:
    """Returns the median seconds per call. Calls are in a scan, like the layers of a model.

    Args:
        program: the function to call.
        first: arguments of every call.
        rest: further arguments, one tuple for each call.
        carry: whether the program returns the next call's `first`, in place.
    """

    def calls(first: Any, rest: Any) -> Any:
        if carry:
            return jax.lax.scan(lambda first, each: (program(*first, *each), None), first, rest)[0]
        return jax.lax.map(lambda each: program(*first, *each), rest)

    stacked = jax.tree.map(lambda *each: jnp.stack(each), *rest)
    compiled = jax.jit(calls, donate_argnums=(0,) if carry else ()).lower(first, stacked).compile()
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for _ in range(SCANS):
            result = compiled(first, stacked)
            first = result if carry else first
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / (SCANS * len(rest)))
    return statistics.median(seconds[1:])
