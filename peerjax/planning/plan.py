"""FLOPs of a configuration by formula, and the memory of a target's chip by part."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import ml_collections
import rich.console

from peerjax.config import model_config, validate
from peerjax.errors import UserError
from peerjax.flops import forward_flops
from peerjax.objectives import language_model
from peerjax.planning.programs import Program, program_for
from peerjax.planning.targets import GIB, MEMORY, check_target, kind_of
from peerjax.pool import memory_report
from peerjax.tables import print_table
from peerjax.training.gradients import gradient_shapes
from peerjax.training.optimizer import make_optimizer, state_of_pools
from peerjax.training.state import create_state


class Plan(NamedTuple):
    """FLOPs and memory of a configuration.

    Attributes:
        target: name of the target.
        flops: forward FLOPs a token by part of the model.
        state: bytes of the train state on a chip, by part.
        program: measurements of the compiled step; `None` if it was not compiled.
        limit: memory of a chip in bytes; `None` if it is unknown.
    """

    target: str
    flops: dict[str, float]
    state: dict[str, int]
    program: Program | None
    limit: int | None


def plan(
    config: ml_collections.ConfigDict, target: str, vocabulary: int, *, compile: bool = True
) -> Plan:
    """Computes FLOPs and memory of a configuration.

    Args:
        config: configuration of a run; see `peerjax.config`.
        target: name of a target; see `peerjax.planning.targets.check_target`. The target need not
            be present.
        vocabulary: number of entries of the tokenizer.
        compile: whether to compile the step too, to find its temporary memory.

    Raises:
        UserError: if the configuration is not valid, the target is unknown, or its compiler is not
            installed.
    """
    validate(config)
    check_target(target)
    if (config.mesh.fsdp, config.mesh.expert) != (1, 1):
        raise UserError(
            f"mesh.fsdp={config.mesh.fsdp} and mesh.expert={config.mesh.expert} cannot be planned "
            "yet; leave both at 1"
        )
    task, optimizer = language_model(config, vocabulary), make_optimizer(config)
    state = jax.eval_shape(lambda: create_state(config, task, optimizer))
    of_pools = memory_report(
        state.pools,
        state_of_pools(state.opt_state),
        gradient_shapes(task, config.data.batch_size * config.data.sequence_length),
    )
    parameters, moments = _bytes_of(state.params), _bytes_of(state.opt_state)
    kept = of_pools.kept - _bytes_of(state.pools)  # optimizer state of pools
    parts = {
        "parameters": parameters,
        "optimizer state of parameters": moments - kept,
        **{f"pools: {part}": size for part, size in of_pools.parts.items()},
    }
    return Plan(
        target,
        forward_flops(model_config(config, vocabulary), config.data.sequence_length),
        parts,
        program_for(target, config, vocabulary) if compile else None,
        MEMORY.get(kind_of(target)),
    )


def print_plan(found: Plan) -> None:
    """Prints a plan as tables, and whether it fits into the memory of a chip."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    rows = [[part, f"{each / 1e6:,.2f}"] for part, each in found.flops.items()]
    rows.append(["all", f"{sum(found.flops.values()) / 1e6:,.2f}"])
    print_table(console, "Forward FLOPs a token", ("part", "MFLOPs"), rows)
    sizes = dict(found.state)
    if found.program is not None:
        sizes["temporary memory, the gradient included"] = found.program.temp
        sizes["all, by the compiled step"] = found.program.total
    rows = [[part, f"{size / GIB:,.3f}"] for part, size in sizes.items()]
    print_table(console, f"Memory of a chip ({found.target})", ("part", "GiB"), rows)
    if found.program is not None and found.limit is not None:
        used = found.program.total
        verdict = "fits" if used <= found.limit else "does not fit"
        console.print(
            f"{verdict}: {used / GIB:,.1f} of {found.limit / GIB:,.0f} GiB on each of "
            f"{found.program.chips} chip{'s' if found.program.chips > 1 else ''}, "
            f"{found.program.rows} rows a chip"
        )


def _bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
