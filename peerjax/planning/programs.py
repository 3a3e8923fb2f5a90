"""Memory and kernels of whole training steps, compiled for a target that need not be present.

This command prints a `Program` as JSON:

    python -m peerjax.planning.programs TARGET CONFIG.json VOCABULARY

`program_for` runs it in a separate process.
"""

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from peerjax.config import from_json, validate
from peerjax.objectives import language_model
from peerjax.planning.collectives import Collective, collectives
from peerjax.planning.targets import check_target, mesh_of, run_for
from peerjax.pool import memory_report
from peerjax.sharding import BATCH, sharding_of, state_shardings
from peerjax.training.checkpoint import abstract
from peerjax.training.optimizer import make_optimizer, state_of_pools
from peerjax.training.state import TrainState, create_state
from peerjax.training.step import make_train_step

VOCABULARY = 4096


class Program(NamedTuple):
    """Measurements of a compiled step. Bytes and elements are those of one chip.

    Attributes:
        chips: number of chips that run the step.
        rows: rows of a batch on each chip.
        temp: bytes of temporary memory.
        total: bytes of arguments, results and temporary memory together.
        aliased: bytes of arguments that are rewritten in place.
        pools: bytes of the pools and of their optimizer state.
        expert_parameters: number of weights of all experts.
        words: number of words of the codes of the first stack of pools, on a chip.
        largest_float: elements of the largest float array anywhere in the program.
        largest_other: elements of the largest array of another type. Arrays as large as the words
            of the pools are not counted, because the program also views these in other shapes.
        pool_copies: number of instructions that copy an array with as many words as the pools.
        kernels: number of calls of Pallas kernels. A call in a loop counts once.
        peak: largest number of bytes in use at any time, by the compiler; 0 if it does not say.
        collectives: what the chips exchange.
    """

    chips: int
    rows: int
    temp: int
    total: int
    aliased: int
    pools: int
    expert_parameters: int
    words: int
    largest_float: int
    largest_other: int
    pool_copies: int
    kernels: int
    peak: int = 0
    collectives: tuple[Collective, ...] = ()


def program_for(
    target: str, config: ml_collections.ConfigDict, vocabulary: int = VOCABULARY
) -> Program:
    """Compiles the step of a configuration for a target, in a separate process.

    Args:
        target: name of a target; see `peerjax.planning.targets.check_target`.
        config: configuration of a run; see `peerjax.config`.
        vocabulary: number of entries of the tokenizer.

    Raises:
        UserError: if the target is unknown, its compiler is not installed, or the configuration
            is not valid.
        RuntimeError: if the step does not compile. The message has the end of the output.
    """
    check_target(target)
    validate(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config.to_dict()))
        found = run_for(target, "peerjax.planning.programs", str(path), str(vocabulary))
    exchanges = tuple(Collective(*each) for each in found.pop("collectives"))
    return Program(**found, collectives=exchanges)


def compile_step(
    config: ml_collections.ConfigDict,
    target: str = "cpu",
    vocabulary: int = VOCABULARY,
    compile: Callable[[jax.stages.Lowered], jax.stages.Compiled] = jax.stages.Lowered.compile,
) -> Program:
    """Compiles the step of a configuration in this process; see `program_for`."""
    mesh = mesh_of(target, **config.mesh)
    config = with_mesh(config, mesh)
    step, state, batch = step_of(config, vocabulary)
    state = abstract(state, state_shardings(mesh, state))
    batch = abstract(batch, jax.tree.map(lambda _: sharding_of(mesh, BATCH), batch))
    with jax.set_mesh(mesh):
        compiled = compile(step.lower(state, batch))
    memory: Any = compiled.memory_analysis()
    of_pools = memory_report(state.pools, state_of_pools(state.opt_state))
    on_chip = on_one_device(state)
    kept = memory_report(on_chip.pools, state_of_pools(on_chip.opt_state)).kept
    pools = jax.tree.leaves(on_chip.pools)
    words = pools[0].size if pools else 0
    text = compiled.as_text() or ""
    largest = _largest_arrays(text, words)
    return Program(
        chips=mesh.size,
        rows=config.data.batch_size // mesh.size,
        temp=memory.temp_size_in_bytes,
        total=total_bytes(memory),
        aliased=memory.alias_size_in_bytes,
        pools=kept,
        expert_parameters=of_pools.parameters,
        words=words,
        largest_float=largest[True],
        largest_other=largest[False],
        pool_copies=pool_copies(text, words),
        peak=memory.peak_memory_in_bytes,
        collectives=tuple(collectives(text, dict(mesh.shape))),
        kernels=len(re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu)', text)),
    )


def with_mesh(config: ml_collections.ConfigDict, mesh: Any) -> ml_collections.ConfigDict:
    """Returns a configuration with the sizes of a mesh, for a process without its devices."""
    config = config.copy_and_resolve_references()
    config.mesh = ml_collections.ConfigDict(dict(mesh.shape))
    return config


def step_of(
    config: ml_collections.ConfigDict, vocabulary: int = VOCABULARY
) -> tuple[Any, TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the step of a configuration, and the shapes of its arguments."""
    validate(config)
    task, optimizer = language_model(config, vocabulary), make_optimizer(config)
    state = jax.eval_shape(lambda: create_state(config, task, optimizer))
    shape = (config.data.batch_size, config.data.sequence_length)
    names = ("inputs", "targets", "positions", "segments")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["row"] = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return jax.jit(make_train_step(config, task, optimizer), donate_argnums=0), state, batch


def on_one_device(placed: Any) -> Any:
    """Returns the shapes that arrays have on one device, from shapes with shardings."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), placed
    )


def total_bytes(memory: Any) -> int:
    """Returns the bytes of a program's arguments, results and temporary memory together."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def pool_copies(program: str, words: int) -> int:
    """Counts the instructions of a program's text that copy an array of `words` words."""
    copies = re.findall(r"= s32\[([\d,]+)\]\S* copy(?:-start)?\(", program)
    return sum(math.prod(map(int, shape.split(","))) == words for shape in copies)


def _largest_arrays(program: str, words: int) -> dict[bool, int]:
    """Returns the elements of the largest array in a program's text, by whether it has floats."""
    largest = {True: 0, False: 0}
    for kind, dimensions in set(re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]+)\]", program)):
        is_float, size = kind.startswith(("f", "bf")), math.prod(map(int, dimensions.split(",")))
        if is_float or size != words:
            largest[is_float] = max(largest[is_float], size)
    return largest


if __name__ == "__main__":
    target, path, vocabulary = sys.argv[1:]
    config = from_json(Path(path).read_text())
    print(json.dumps(compile_step(config, target, int(vocabulary))._asdict()))
