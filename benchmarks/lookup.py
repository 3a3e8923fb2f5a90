"""Compares the time of the lookup on this device with that of gather + einsum.

Both read the same packed codes. Gather + einsum writes them as a [T, K, D] array first. On a CPU
with native kernels, another program only reads the experts' words, at the same random places and on
all cores. Its speed is the bandwidth that the lookup is compared with.
"""

from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.result import Figure, Result
from benchmarks.timing import medians_in_turns
from pallas_kernels.dispatch import chosen, identity
from pallas_kernels.expert_lookup import lookup
from pallas_kernels.native_cpu.library import call
from pallas_kernels.storage import DOWN, UP, read_codes, words_per_expert
from peerjax.pool import initialize_pool

N, D, T, K = 1 << 20, 256, 512, 128
A_QUARTER = "lookup, a quarter of the experts active"


def gather_and_einsum(pool, ids, gates, x):
    """Computes the lookup as it is usually written."""
    codes = read_codes(pool.weights, pool.layer, ids, pool.width, pool.storage)
    down_scale, up_scale = (pool.scales[pool.layer, vector, ids] for vector in (DOWN, UP))
    down, up = (codes[:, :, vector].astype(jnp.float32) for vector in (DOWN, UP))
    hidden = jnp.einsum("tkd,td->tk", down, x) * down_scale
    mixing = gates * jax.nn.gelu(hidden, approximate=False) * up_scale
    return jnp.einsum("tk,tkd->td", mixing, up)


def only_read(pool, ids, gates, x):
    """Reads the words of the experts, and combines them by exclusive or."""
    size = words_per_expert(pool.width, pool.storage)
    return call("peer_read_rows", jax.ShapeDtypeStruct((1,), jnp.int32), pool.weights, ids,
                row_words=size)  # fmt: skip


def run(quick: bool) -> Result:
    """Times forward passes, and forward with backward, in turns."""
    size = N // 64 if quick else N
    make = jax.jit(lambda: initialize_pool(jax.random.key(0), 1, size, D, storage="int4"))
    pool = make().at_layer(jnp.int32(0))
    ids = jax.random.randint(jax.random.key(1), (T, K), 0, size)
    quarter = jnp.where(jnp.arange(K) % 4 == 0, ids, size)
    gates = jax.nn.softmax(jax.random.normal(jax.random.key(2), (T, K)))
    x = jax.random.normal(jax.random.key(3), (T, D))

    def lookup_by(implementation):
        return partial(lookup, activation="gelu", implementation=implementation)

    def with_backward(forward):
        def loss(gates, x, pool, ids):
            return jnp.sum(forward(pool, ids, gates, x) ** 2)

        return lambda pool, ids, gates, x: jax.grad(loss, argnums=(0, 1))(gates, x, pool, ids)

    forward = {
        "lookup": lookup_by(None),
        "lookup by XLA": lookup_by("xla"),
        "gather + einsum": gather_and_einsum,
    }
    programs = {
        **forward,
        A_QUARTER: lookup_by(None),
        **{f"{name}, with backward": with_backward(each) for name, each in forward.items()},
    }
    if chosen() == "native_cpu":
        programs["reading the experts' words"] = only_read
    arguments = (pool, ids, gates, x)
    compiled = {
        name: jax.jit(program).lower(*arguments).compile() for name, program in programs.items()
    }
    operands = {name: arguments for name in programs} | {A_QUARTER: (pool, quarter, gates, x)}
    difference = jnp.max(
        jnp.abs(compiled["lookup"](*arguments) - compiled["gather + einsum"](*arguments))
    )
    medians = medians_in_turns(
        {name: partial(program, *operands[name]) for name, program in compiled.items()},
        repeats=1 if quick else 9,
    )
    temp = {name: each.memory_analysis().temp_size_in_bytes for name, each in compiled.items()}
    rows = [[name, f"{1e3 * medians[name]:.2f}", f"{temp[name] / 2**20:.1f}"] for name in programs]
    slow, fast = medians["gather + einsum"], medians["lookup"]
    both = medians["gather + einsum, with backward"] / medians["lookup, with backward"]
    part = medians[A_QUARTER] / fast
    figures = [
        Figure.at_least("gather + einsum over lookup", slow / fast, 30),
        Figure("gather + einsum over lookup, with backward", both),
        Figure("XLA over lookup", medians["lookup by XLA"] / fast),
        Figure.at_most("a quarter of the experts active over all", part, 0.4),
        Figure.at_most("largest difference of their outputs", float(difference), 1e-4),
    ]
    if "reading the experts' words" in medians:
        reading = medians["reading the experts' words"]
        num_bytes = T * K * words_per_expert(D, "int4") * 4
        figures += [
            Figure("GB/s of random experts, reading alone", num_bytes / reading / 1e9),
            Figure.at_least("lookup's share of that bandwidth", reading / fast, 0.5),
        ]
    return Result(
        columns=(f"N = {size:,}, D = {D}, T = {T}, K = {K}", "ms", "temp MiB"),
        rows=rows,
        figures=figures,
        details={"kernels": identity(), "seconds": medians, "temp_bytes": temp},
    )
