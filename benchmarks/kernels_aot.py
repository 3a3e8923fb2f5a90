"""Compiles every kernel for every accelerator, and shows its memory and traffic.

The accelerators need not be present. Nothing is executed, and times are theoretical bounds. One
bound is the bytes that a kernel moves divided by the bandwidth that the vendor states. On a TPU,
another is the cycles in which the kernel's loops start the copies of rows. The longer one counts.
"""

from typing import Any

from benchmarks.compiled_kernels import Compiled, implementation_for
from benchmarks.result import Figure, Result
from pallas_kernels.expert_lookup.api import KERNELS
from peerjax.planning.targets import TARGETS, missing, run_for

BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9, "tpu7x": 7370e9, "h100": 3350e9}
# Cycles per second: the stated peak in bfloat16, divided by the multiply-adds of a cycle.
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9}


def run(quick: bool) -> Result:
    """Compiles for all targets whose compiler is installed."""
    wanted = [target for target in TARGETS if implementation_for(target) in KERNELS]
    targets = [target for target in wanted if not missing(target)]

    def options(target: str) -> list[str]:
        # Libtpu takes minutes to write its instructions.
        return ["--quick"] if quick else ["--loops"] if target in CLOCK else []

    found = {
        target: [
            Compiled.of_json(each)
            for each in run_for(target, "benchmarks.compiled_kernels", *options(target))
        ]
        for target in targets
    }
    everything = [(target, each) for target in targets for each in found[target]]
    rows = [_row(target, each) for target, each in everything]
    figures = [
        Figure.at_least("targets compiled for", len(targets), len(wanted)),
        Figure.at_most(
            "largest temporary memory beyond vectors, over the pool",
            max(max(0, each.temp - each.images) / each.pool for _, each in everything),
            0.02,
        ),
        Figure.at_most("copies of a pool", sum(each.pool_copies for _, each in everything), 0),
        Figure.at_least(
            "least share of codes and accumulators rewritten in place",
            min(
                each.aliased / (2 * each.pool) for _, each in everything if each.kernel == "update"
            ),
            1,
        ),
    ]
    details = {target: [each._asdict() for each in found[target]] for target in targets}
    columns = (
        "target", "kernel", "D", "T", "K", "temp MiB", "on chip MiB", "rows", "cycles a copy",
        "least MB", "MB moved", "over the least", "least time, us",
    )  # fmt: skip
    return Result(columns=columns, rows=rows, figures=figures, details=details)


def moved(each: Compiled) -> int:
    """Returns the bytes that a kernel moves."""
    return each.row_bytes + each.vector_bytes + each.block_bytes


def cycles_per_copy(each: Compiled) -> float | None:
    """Returns the cycles that the scalar core of a TPU takes to start the copy of a row."""
    rates = [loop.bundles / loop.copies for loop in each.loops if loop.copies]
    return min(rates, default=None)


def least_seconds(target: str, each: Compiled) -> float:
    """Returns the longer bound on the time: by bandwidth, or by the start of copies."""
    by_bandwidth = moved(each) / BANDWIDTH[target]
    cycles = cycles_per_copy(each)
    if cycles is None or target not in CLOCK:
        return by_bandwidth
    return max(by_bandwidth, each.row_copies * cycles / CLOCK[target])


def _row(target: str, each: Compiled) -> list[str]:
    shape: Any = each.shape
    storage = "" if shape.storage == "int4" else f" {shape.storage}"
    cycles = cycles_per_copy(each)
    return [
        target,
        each.kernel + storage,
        str(shape.width),
        str(shape.tokens),
        str(shape.chosen),
        f"{each.temp / 2**20:.1f}",
        f"{each.on_chip / 2**20:.2f}",
        f"{each.row_copies:,}",
        f"{cycles:.1f}" if cycles else "",
        f"{each.least_bytes / 1e6:.2f}",
        f"{moved(each) / 1e6:.2f}",
        f"{moved(each) / each.least_bytes:.2f}",
        f"{least_seconds(target, each) * 1e6:.1f}",
    ]
