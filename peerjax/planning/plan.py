"""FLOPs, memory and exchanges of a configuration on a target, which need not be present."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import rich.console
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.storage import is_pool, splits_into
from peerjax import plots
from peerjax.config import model_config, validate
from peerjax.errors import ConfigError
from peerjax.flops import forward_flops
from peerjax.objectives import language_model
from peerjax.planning.collectives import RINGS
from peerjax.planning.programs import Program, on_one_device, program_for, with_mesh
from peerjax.planning.targets import (
    FLOPS,
    GIB,
    MEMORY,
    MEMORY_RATE,
    check_target,
    chips_of,
    kind_of,
    network_rate,
)
from peerjax.pool import memory_report
from peerjax.sharding import state_shardings
from peerjax.sharding.rules import AXES, EXPERT, complete_sizes
from peerjax.tables import print_table
from peerjax.training.checkpoint import abstract
from peerjax.training.gradients import gradient_shapes
from peerjax.training.optimizer import make_optimizer, state_of_pools
from peerjax.training.state import create_state


class Plan(NamedTuple):
    """FLOPs, memory and exchanges of a configuration.

    Attributes:
        target: name of the target.
        mesh: sizes of the axes of the mesh.
        flops: forward FLOPs a token by part of the model.
        state: bytes of the train state on a chip, by part, and of the factored gradient of the
            chip's tokens.
        program: measurements of the compiled step; `None` if it was not compiled.
        limit: memory of a chip in bytes; `None` if it is unknown.
        seconds: least seconds of a step by each resource of a chip, at the rates that the makers of
            the chips state. Nothing was run.
        largest: estimate of the largest number of experts of a pool that fits; `None` if the step
            was not compiled, the limit is unknown, or the model has not exactly one size of pools.
    """

    target: str
    mesh: dict[str, int]
    flops: dict[str, float]
    state: dict[str, int]
    program: Program | None
    limit: int | None
    seconds: dict[str, float]
    largest: int | None


def plan(
    config: ml_collections.ConfigDict, target: str, vocabulary: int, *, compile: bool = True
) -> Plan:
    """Computes FLOPs, memory and exchanges of a configuration.

    Args:
        config: configuration of a run; see `peerjax.config`.
        target: name of a target; see `peerjax.planning.targets.check_target`. The target need not
            be present.
        vocabulary: number of entries of the tokenizer.
        compile: whether to compile the step too, to find its temporary memory and its exchanges.

    Raises:
        UserError: if the configuration is not valid, does not fit the number of chips, the target
            is unknown, or its compiler is not installed.
    """
    validate(config)
    check_target(target)
    mesh = _mesh_for(config, target)
    config = with_mesh(config, mesh)
    task, optimizer = language_model(config, vocabulary), make_optimizer(config)
    shapes = jax.eval_shape(lambda: create_state(config, task, optimizer))
    state = on_one_device(abstract(shapes, state_shardings(mesh, shapes)))
    tokens = config.data.batch_size * config.data.sequence_length // mesh.size
    of_pools = memory_report(
        state.pools, state_of_pools(state.opt_state), gradient_shapes(task, tokens)
    )
    parameters, moments = _bytes_of(state.params), _bytes_of(state.opt_state)
    kept = of_pools.kept - _bytes_of(state.pools)  # optimizer state of pools
    parts = {
        "parameters": parameters,
        "optimizer state of parameters": moments - kept,
        **{f"pools: {part}": size for part, size in of_pools.parts.items()},
    }
    flops = forward_flops(model_config(config, vocabulary), config.data.sequence_length)
    program = program_for(target, config, vocabulary) if compile else None
    limit = MEMORY.get(kind_of(target))
    return Plan(
        target,
        dict(mesh.shape),
        flops,
        parts,
        program,
        limit,
        _seconds(config, target, tokens, flops, parts, _bytes_of_weight(shapes.pools), program),
        _largest(program, shapes.pools, limit, mesh.shape[EXPERT]),
    )


def _mesh_for(config: ml_collections.ConfigDict, target: str) -> Any:
    chips = chips_of(target)
    try:
        sizes = complete_sizes((config.mesh.data, config.mesh.fsdp, config.mesh.expert), chips)
    except ValueError as error:
        raise ConfigError(
            f"{error} ({target}); set mesh.data=-1, other sizes, or another target"
        ) from None
    if config.data.batch_size % chips:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} is not divisible by the {chips} chips of "
            f"{target}; choose a multiple"
        )
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _seconds(
    config: ml_collections.ConfigDict,
    target: str,
    tokens: int,
    flops: dict[str, float],
    parts: dict[str, int],
    bytes_of_weight: float,
    program: Program | None,
) -> dict[str, float]:
    """Returns the least seconds of a step by resource, for `tokens` tokens of a chip.

    The backward pass computes twice the FLOPs of the forward pass, which `model.remat` repeats. The
    chip reads the weights in every pass, and reads and writes the state of parameters once. Reads
    of experts are counted as if every token read its own.
    """
    kind = kind_of(target)
    if kind not in FLOPS:
        return {}
    passes = 4 if config.model.remat else 3
    of_a_token = sum(flops.values())
    moved: float = sum(2 * parts[name] for name in ("parameters", "optimizer state of parameters"))
    moved += passes * parts["parameters"]
    # A weight of an expert takes a multiply-add, and is read forward and backward.
    bytes_read = flops.get("lookup", 0.0) / 2 * bytes_of_weight
    moved += 2 * tokens * bytes_read + 4 * parts.get("pools: factored gradient", 0)
    found = {
        "computing": passes * of_a_token * tokens / FLOPS[kind],
        "memory": moved / MEMORY_RATE[kind],
    }
    if program is not None:
        found["network"] = sum(
            each.bytes / network_rate(target, is_ring=each.kind in RINGS)
            for each in program.collectives
        )
    return found


def _largest(program: Program | None, pools: Any, limit: int | None, parts: int) -> int | None:
    """Returns the largest N that fits if everything but the pools takes the same memory.

    N is a square that can be split into the parts.
    """
    sizes = {pool.num_experts for of_stack in pools.values() for pool in of_stack.values()}
    if program is None or limit is None or len(sizes) != 1:
        return None
    room = limit - (program.total - program.pools)
    most = int(sizes.pop() * max(room, 0) / program.pools)
    side = math.isqrt(most)
    return next((n * n for n in range(side, 0, -1) if splits_into(n * n, parts)), None)


def write_plan(found: Plan, folder: str) -> None:
    """Writes `plan.json`, and `experts.png` if the largest number of experts is known."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "plan.json").write_text(json.dumps(record_of(found), indent=1) + "\n")
    if found.largest is not None:
        chips = math.prod(found.mesh.values())
        counts = [2**power for power in range(12)]
        fits = [found.largest * count / found.mesh[EXPERT] for count in counts]
        plots.plot_largest_pools(Path(folder) / "experts.png", counts, fits, found.target, chips)


def print_plan(found: Plan) -> None:
    """Prints a plan as tables, and whether it fits into the memory of a chip."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    rows = [[part, f"{each / 1e6:,.2f}"] for part, each in found.flops.items()]
    rows.append(["all", f"{sum(found.flops.values()) / 1e6:,.2f}"])
    print_table(console, "Forward FLOPs a token", ("part", "MFLOPs"), rows)
    sizes, program = dict(found.state), found.program
    if program is not None:
        sizes["temporary memory, the gradient included"] = program.temp
        sizes["all, by the compiled step"] = program.total
    rows = [[part, f"{size / GIB:,.3f}"] for part, size in sizes.items()]
    print_table(console, f"Memory of a chip ({found.target})", ("part", "GiB"), rows)
    if program is not None and program.collectives:
        rows = [
            [f"{each.kind} over {each.axes}", f"{each.times:,}", f"{each.bytes / GIB:,.3f}"]
            for each in program.collectives
        ]
        columns = ("exchange", "times", "GiB that a chip sends")
        print_table(console, "Exchanges of a step", columns, rows)
    if found.seconds:
        rows = [[name, f"{1e3 * each:,.1f}"] for name, each in found.seconds.items()]
        title = "Roofline estimate of a step (not measured)"
        print_table(console, title, ("resource", "least ms"), rows)
    if program is not None and found.limit is not None:
        used = program.total
        verdict = "fits" if used <= found.limit else "does not fit"
        console.print(
            f"{verdict}: {used / GIB:,.1f} of {found.limit / GIB:,.0f} GiB on each of "
            f"{program.chips} chip{'s' if program.chips > 1 else ''}, {program.rows} "
            f"row{'s' if program.rows > 1 else ''} a chip"
        )
    if found.largest is not None:
        console.print(f"about {found.largest:,} experts a pool fit, everything else being the same")


def record_of(found: Plan) -> dict[str, Any]:
    """Returns a plan as a tree that JSON can hold."""
    record = found._asdict()
    if found.program is not None:
        exchanges = [each._asdict() for each in found.program.collectives]
        record["program"] = {**found.program._asdict(), "collectives": exchanges}
    return record


def _bytes_of_weight(pools: Any) -> float:
    """Returns the bytes that a weight of an expert takes, without scales; 0 without experts."""
    every = jax.tree.leaves(pools, is_leaf=is_pool)
    weights = sum(pool.num_parameters for pool in every)
    return sum(_bytes_of(pool.weights) for pool in every) / weights if weights else 0.0


def _bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
