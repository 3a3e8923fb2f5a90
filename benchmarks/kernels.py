"""The lookup on the device at hand: bytes, time, and share of the bandwidth of a plain copy.

Beside the kernel of the platform stand XLA on the same packed int4 pool, and gather + einsum on a
bfloat16 pool. Where there is no accelerator, XLA is timed alone, on the smaller sizes.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compiled_kernels import Shape, least_bytes
from benchmarks.result import Figure, Result
from pallas_kernels.activations import activation_by_name
from pallas_kernels.expert_lookup import lookup
from pallas_kernels.storage import ExpertPool, packed_shape

WIDTHS, EXPERTS = (256, 1024, 2048), (1 << 16, 1 << 20)
TOKENS, CHOSEN = (1, 32, 4096), (64, 128, 512)
REPEATS = 10
COPIED = {"cpu": 1 << 27, "gpu": 1 << 30, "tpu": 1 << 30}  # bytes
GATHERED = {"cpu": 1 << 30, "gpu": 24 << 30, "tpu": 4 << 30}  # bytes of [T, K, 2, D], at most
KERNEL = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}


def gather_and_einsum(weights: Any, ids: Any, gates: Any, x: Any) -> Any:
    """The lookup as it is usually written, on bfloat16 [N, 2, D]."""
    experts = weights[ids]
    hidden = jnp.einsum("tkd,td->tk", experts[:, :, 0], x, preferred_element_type=jnp.float32)
    mixing = (gates * activation_by_name("gelu")(hidden)).astype(x.dtype)
    return jnp.einsum("tk,tkd->td", mixing, experts[:, :, 1])


def run(quick: bool) -> Result:
    """Times every size, or the smallest ones."""
    platform = jax.default_backend()
    bandwidth = _copy_bandwidth(COPIED[platform])
    sizes = list(itertools.product(WIDTHS, EXPERTS, TOKENS, CHOSEN))
    sizes = [(256, 1 << 16, tokens, 64) for tokens in TOKENS[:2]] if quick else sizes
    rows, details = [], []
    for width, num_experts, tokens, chosen in sizes:
        if tokens * chosen * 4 * width > GATHERED[platform]:
            continue  # of float32, where nothing is fused
        shape = Shape(width, num_experts, tokens, chosen)
        seconds = _seconds(shape, KERNEL.get(platform))
        size = least_bytes("lookup", shape)
        fastest = seconds.get("kernel", seconds["xla"])
        share = size / fastest / bandwidth
        details.append({"shape": shape._asdict(), "bytes": size, "seconds": seconds})
        times = [
            f"{1e6 * seconds[name]:.0f}" if name in seconds else ""
            for name in ("kernel", "xla", "gather")
        ]
        ratio = f"{seconds['gather'] / fastest:.1f}" if "gather" in seconds else ""
        label = [str(width), f"{num_experts:,}", str(tokens), str(chosen)]
        rows.append([*label, f"{size / 1e6:.2f}", *times, f"{share:.0%}", ratio])
    shares = [each["bytes"] / min(each["seconds"].values()) / bandwidth for each in details]
    times = ("kernel us", "XLA us", "gather us")
    columns = ("D", "N", "T", "K", "MB", *times, "of copy", "faster than gather")
    figures = [Figure("bandwidth of a copy, GB/s", bandwidth / 1e9)]
    if "kernel" in details[0]["seconds"]:
        figures.append(Figure.at_least("largest share of the copy's bandwidth", max(shares), 0.7))
    return Result(columns=columns, rows=rows, figures=figures, details={"sizes": details})


def _seconds(shape: Shape, kernel: str | None) -> dict[str, float]:
    width, num_experts, tokens, chosen, storage = shape
    keys = jax.random.split(jax.random.key(0), 4)
    ids = jax.random.randint(keys[0], (tokens, chosen), 0, num_experts)
    gates = jax.random.uniform(keys[1], (tokens, chosen))
    x = jax.random.normal(keys[2], (tokens, width), jnp.bfloat16)
    words = jax.random.bits(keys[3], packed_shape(num_experts, width, storage))
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    scales = jnp.full((2, num_experts), 0.01)
    pool = ExpertPool(words, scales, None, storage, num_experts, width)
    names = {"xla": "xla"} | ({"kernel": kernel} if kernel else {})
    found = {}
    for label, name in names.items():
        program = partial(lookup, activation="gelu", implementation=name)
        found[label] = _median_seconds(program, pool, ids, gates, x)
    del pool, words
    weights = jnp.zeros((num_experts, 2, width), jnp.bfloat16)
    found["gather"] = _median_seconds(gather_and_einsum, weights, ids, gates, x)
    return found


def _copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written, of adding 1 to every word of an array."""
    words = jnp.zeros(size // 4, jnp.int32)
    return 2 * size / _median_seconds(lambda words: words + 1, words)


def _median_seconds(program: Callable[..., Any], *arguments: Any) -> float:
    compiled = jax.jit(program).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
