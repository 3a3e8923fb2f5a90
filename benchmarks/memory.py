"""Measures the memory of experts in training, and the other memory of the compiled step."""

from typing import Any

import jax

from benchmarks.recipes import config_of, with_experts
from benchmarks.result import Figure, Result
from pallas_kernels.expert_update import UpdateState
from peerjax.planning.programs import compile_step
from peerjax.pool import initialize_pool, memory_report

WIDTHS = (256, 576, 1024, 1536)
SMALL, LARGE = 1 << 14, 1 << 20


def run(quick: bool) -> Result:
    """Adds up the live arrays of pools and their state, and compiles a whole step twice."""
    reports = {width: live_bytes(width, 1 << (10 if quick else 14)) for width in WIDTHS}
    rows = [
        [
            f"D = {width}",
            *(f"{report[part]:.3f}" for part in ("codes", "accumulators", "scales")),
            f"{report['row statistics']:.3f}",
            f"{report['all']:.3f}",
            f"{report['experts_per_gb']:,.0f}",
        ]
        for width, report in reports.items()
    ]
    small, large = compile_step(with_experts(SMALL)), compile_step(with_experts(LARGE))
    config = config_of("peer_1m_cpu")
    tokens = config.data.batch_size * config.data.sequence_length
    scores = 4 * tokens * config.peer.heads * 2 * round(LARGE**0.5) * 4
    more = large.temp - small.temp
    chosen = config.peer.heads * config.peer.experts_per_head
    gathered = tokens * chosen * config.model.width
    return Result(
        columns=(
            "bytes per parameter",
            "codes",
            "accumulators",
            "scales",
            "row statistics",
            "all",
            "experts per GB",
        ),
        rows=rows,
        figures=[
            Figure.at_most("bytes per expert parameter at D = 1024", reports[1024]["all"], 1.02),
            Figure.at_most(
                "temp of a step, N = 2^20 beyond 2^14 (MiB)", more / 2**20, scores / 2**20
            ),
            Figure.at_least(
                "share of pools and their state rewritten in place",
                min(1.0, large.aliased / large.pools),
                1.0,
            ),
            Figure.at_most(
                "largest float array of the step, in [T, K, D] arrays",
                large.largest_float / gathered,
                0.5,
            ),
        ],
        details={
            "bytes_per_parameter": reports,
            "step": {str(SMALL): small._asdict(), str(LARGE): large._asdict()},
        },
    )


def live_bytes(width: int, num_experts: int) -> dict[str, Any]:
    """Returns the bytes per parameter of a live int4 pool and its update state, by part."""

    def make():
        pool = initialize_pool(jax.random.key(0), 1, num_experts, width, storage="int4")
        return pool, UpdateState.zeros_for(pool)

    pool, state = jax.block_until_ready(jax.jit(make)())
    report = memory_report(pool, state)
    live = sum(leaf.nbytes for leaf in jax.tree.leaves((pool, state)))
    if live != report.kept:
        raise RuntimeError(
            f"the report counts {report.kept} bytes, but the live arrays take {live}"
        )
    return {
        **{part: size / report.parameters for part, size in report.parts.items()},
        "all": report.bytes_per_parameter,
        "experts_per_gb": report.experts_per_gb,
    }
