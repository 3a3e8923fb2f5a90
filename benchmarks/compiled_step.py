"""Compiles a whole training step for a target, and tells what the compiled program keeps.

    python -m benchmarks.compiled_step TARGET RECIPE [FIELD=VALUE ...]

prints JSON. TARGET is "cpu" or one of `benchmarks.targets`, which need not be there; RECIPE is one
of `configs/`; fields are those of the configuration, their values Python.
"""

import ast
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from benchmarks.targets import device_of, on
from configs import peer_1m_cpu
from peerjax.config import validate
from peerjax.objectives import language_model
from peerjax.pool import memory_report
from peerjax.training.optimizer import make_optimizer
from peerjax.training.state import TrainState, create_state
from peerjax.training.step import make_train_step

VOCABULARY = 4096


class Program(NamedTuple):
    """Figures of a compiled step.

    Attributes:
        temp: bytes of temporary memory.
        total: bytes of arguments, results and temporary memory together.
        aliased: bytes of arguments that are rewritten in place.
        pools: bytes of the pools and of what the optimizer keeps for them.
        expert_parameters: weights of all experts.
        words: words of the codes of all pools.
        largest_float: elements of the largest float array anywhere in the program.
        largest_other: elements of the largest array of another type that is not as large as the
            words of the pools (which the program also views in other shapes).
        pool_copies: instructions that copy an array with as many words as the pools.
        kernels: calls of Pallas kernels, a loop's counted once.
        tokens: T.
        chosen: K.
        heads: H.
        width: D.
    """

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
    tokens: int
    chosen: int
    heads: int
    width: int


def config_of(recipe: str, changes: Sequence[str]) -> ml_collections.ConfigDict:
    """A recipe with fields changed as a command line says, FIELD=VALUE."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    for change in changes:
        field, value = change.split("=", 1)
        config.update_from_flattened_dict({field: ast.literal_eval(value)})
    return config


def million(num_experts: int) -> ml_collections.ConfigDict:
    """`configs/peer_1m_cpu.py` with another number of experts, a square."""
    config = peer_1m_cpu.get_config()
    root = round(num_experts**0.5)
    config.peer.num_experts = (root, root)
    return config


def compile_step(
    config: ml_collections.ConfigDict,
    device: Any = None,
    compile: Callable[[jax.stages.Lowered], jax.stages.Compiled] = jax.stages.Lowered.compile,
) -> Program:
    """Compiles the step of a configuration for a device, or for the CPU at hand."""
    step, state, batch = step_of(config)
    state, batch = on(device, (state, batch))
    compiled = compile(step.lower(state, batch))
    memory = compiled.memory_analysis()
    of_pools = memory_report(state.pools, state.opt_state)
    words = jax.tree.leaves(state.pools)[0].size
    rows, length = config.data.batch_size, config.data.sequence_length
    text = compiled.as_text()
    largest = _largest_arrays(text, words)
    return Program(
        temp=memory.temp_size_in_bytes,
        total=total_bytes(memory),
        aliased=memory.alias_size_in_bytes,
        pools=of_pools.kept,
        expert_parameters=of_pools.parameters,
        words=words,
        largest_float=largest[True],
        largest_other=largest[False],
        pool_copies=pool_copies(text, words),
        kernels=len(re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu)', text)),
        tokens=rows * length,
        chosen=config.peer.heads * config.peer.experts_per_head,
        heads=config.peer.heads,
        width=config.model.width,
    )


def step_of(
    config: ml_collections.ConfigDict, vocabulary: int = VOCABULARY
) -> tuple[Any, TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The step of a configuration, and shapes of what it takes."""
    validate(config)
    task, optimizer = language_model(config, vocabulary), make_optimizer(config)
    state = jax.eval_shape(lambda: create_state(config, task, optimizer))
    rows, length = config.data.batch_size, config.data.sequence_length
    names = ("inputs", "targets", "positions", "segments")
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}
    return jax.jit(make_train_step(config, task, optimizer), donate_argnums=0), state, batch


def total_bytes(memory: Any) -> int:
    """Bytes of a compiled program's arguments, results and temporary memory together."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def pool_copies(program: str, words: int) -> int:
    """How many instructions of a program's text copy an array of that many words."""
    copies = re.findall(r"= s32\[([\d,]+)\]\S* copy(?:-start)?\(", program)
    return sum(math.prod(map(int, shape.split(","))) == words for shape in copies)


def _largest_arrays(program: str, words: int) -> dict[bool, int]:
    """Elements of the largest array anywhere in a program's text: of floats, and of others."""
    largest = {True: 0, False: 0}
    for kind, dimensions in set(re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]+)\]", program)):
        is_float, size = kind.startswith(("f", "bf")), math.prod(map(int, dimensions.split(",")))
        if is_float or size != words:
            largest[is_float] = max(largest[is_float], size)
    return largest


if __name__ == "__main__":
    target, recipe, *changes = sys.argv[1:]
    print(json.dumps(compile_step(config_of(recipe, changes), device_of(target))._asdict()))
