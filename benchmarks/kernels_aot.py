"""Every kernel compiled for every accelerator, none of which is there: what it keeps and moves.

Times are bounds on paper: what must move over the bandwidth that the vendor states, and, on a TPU,
the instruction bundles of the kernel's loops, one a cycle. Nothing here was executed.
"""

from typing import Any

from benchmarks.compiled_kernels import Compiled, Shape, implementation_for
from benchmarks.result import Figure, Result
from benchmarks.targets import TARGETS, TPUS, missing, run_for
from pallas_kernels.expert_lookup.api import KERNELS

BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9, "tpu7x": 7370e9, "h100": 3350e9}


def run(quick: bool) -> Result:
    """Compiles; targets whose compiler is not installed are named and left out."""
    wanted = [target for target in TARGETS if implementation_for(target) in KERNELS]
    targets = [target for target in wanted if not missing(target)]
    options = ["--quick"] if quick else ["--loops"]
    found = {
        target: [
            Compiled(**{**each, "shape": Shape(*each["shape"])})
            for each in run_for(target, "benchmarks.compiled_kernels", *options)
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
        "target", "kernel", "D", "T", "K", "temp MiB", "on chip MiB", "row copies", "MB moved",
        "over the least", "least time, us",
    )  # fmt: skip
    return Result(columns=columns, rows=rows, figures=figures, details=details)


def moved(each: Compiled) -> int:
    """Bytes that a kernel moves."""
    return each.row_bytes + each.vector_bytes + each.block_bytes


def _row(target: str, each: Compiled) -> list[str]:
    shape: Any = each.shape
    storage = "" if shape.storage == "int4" else f" {shape.storage}"
    known = target in TPUS
    return [
        target,
        each.kernel + storage,
        str(shape.width),
        str(shape.tokens),
        str(shape.chosen),
        f"{each.temp / 2**20:.1f}",
        f"{each.vmem / 2**20:.1f}",
        f"{each.row_copies:,}" if known else "",
        f"{moved(each) / 1e6:.1f}" if known else "",
        f"{moved(each) / each.least_bytes:.2f}" if known else "",
        f"{each.least_bytes / BANDWIDTH[target] * 1e6:.1f}",
    ]
