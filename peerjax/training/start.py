"""The initial state of a run that takes its weights from another run."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import ml_collections
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from pallas_kernels.expert_update import UpdateState
from pallas_kernels.storage import is_pool
from peerjax.config import model_config, validate
from peerjax.data.tokenizer import Tokenizer
from peerjax.errors import ConfigError
from peerjax.layers.parameters import packed
from peerjax.model import Decoder
from peerjax.objectives.task import Task, drawn_variables
from peerjax.optim import dequantize, is_packed_matrix
from peerjax.pool import stored_as, with_places
from peerjax.sharding import state_shardings
from peerjax.training.checkpoint import abstract, find_checkpoint, restore_part
from peerjax.training.state import TrainState, state_of
from peerjax.training.workdir import (
    TOKENIZER,
    read_config,
    tokenizer_digest,
    vocabulary_size,
    workdir_and_step,
)

# Settings in `config.pool` on which accumulators depend.
OF_ACCUMULATORS = ("rule", "storage", "accumulator_bits")


class Source:
    """The checkpoint in `init_from`, from which a new run takes its weights.

    Args:
        config: configuration of the new run.

    Raises:
        ConfigError: if `init_from` has no run that this version can read.
        CheckpointError: if the checkpoint is missing or damaged.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        workdir, step = workdir_and_step(config.init_from)
        self._new, self._old = config, read_config(workdir)
        validate(self._old)
        self._workdir = workdir
        self._model = Decoder(model_config(self._old, vocabulary_size(workdir)))
        self._checkpoint = find_checkpoint(workdir, step)

    def check(self, model: Decoder, tokenizer: Tokenizer) -> None:
        """Checks that the weights fit the new run.

        Raises:
            ConfigError: if the tokenizer, the vocabulary, the layers, the width or the shape of an
                array differs. The message names the first difference. Storages may differ.
        """
        for name, old, new in (
            ("tokenizer", tokenizer_digest(self._workdir), tokenizer.digest),
            ("vocabulary", vocabulary_size(self._workdir), model.config.vocab_size),
            ("model.layers", tuple(self._old.model.layers), tuple(self._new.model.layers)),
            ("model.width", self._old.model.width, self._new.model.width),
        ):
            if old != new:
                hint = f"set data.tokenizer={self._workdir / TOKENIZER}"
                raise ConfigError(
                    f"init_from={self._new.init_from} has another {name} ({old}) than this run "
                    f"({new}); {hint if name == 'tokenizer' else 'change it'}, or start from "
                    "another run"
                )
        if (different := first_difference(self._model, model)) is not None:
            raise ConfigError(
                f"init_from={self._new.init_from} does not fit this run: {different}; set the "
                "fields of the layers to the values of that run"
            )

    def state(self, task: Task, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
        """Returns the state of a run before its first step, with the checkpoint's weights.

        Parameters, pools and running statistics are those of the checkpoint. They are rounded to
        nearest if the new run stores them otherwise. Accumulators are taken too, if both runs have
        the same `pool.rule`, `pool.storage` and `pool.accumulator_bits`. Moments, the step and the
        schedule start anew.
        """
        variables = restore_variables(self._checkpoint, self._model, mesh)

        def make(variables: dict[str, Any]) -> TrainState:
            return state_of(as_stored(variables, self._model, task.model), optimizer)

        shardings = state_shardings(mesh, jax.eval_shape(make, variables))
        state = jax.jit(make, out_shardings=shardings)(variables)
        if any(self._old.pool[name] != self._new.pool[name] for name in OF_ACCUMULATORS):
            return state
        return state._replace(opt_state=self._with_accumulators(state.opt_state, mesh))

    def _with_accumulators(self, opt_state: Any, mesh: Mesh) -> Any:
        """Returns an optimizer state with the accumulators of the checkpoint, if it has any."""
        shapes = jax.eval_shape(lambda: opt_state)
        placed = abstract(shapes, state_shardings(mesh, shapes))
        wanted = jax.tree.map(_only_accumulators, placed, is_leaf=_is_update_state)
        if all(each is ocp.PLACEHOLDER for each in jax.tree.leaves(wanted)):
            return opt_state
        try:
            read = restore_part(self._checkpoint, {"opt_state": wanted})
        except (KeyError, ValueError):  # an imported model has no accumulators
            return opt_state

        def choose(new: Any, old: Any) -> Any:
            if _is_update_state(old) and old.accumulators is not None:
                return old._replace(accumulators=new.accumulators)
            return old

        return jax.tree.map(choose, read["opt_state"], opt_state, is_leaf=_is_update_state)


def restore_variables(checkpoint: epath.Path, model: Decoder, mesh: Mesh) -> dict[str, Any]:
    """Reads the collections "params", "pools" and "stats" of a model from a checkpoint.

    State that only training needs, such as accumulators, is not read.
    """
    shapes = _drawn(model)
    # Checkpoints do not contain empty collections.
    wanted = {name: tree for name, tree in shapes.items() if jax.tree.leaves(tree)}
    return shapes | restore_part(checkpoint, abstract(wanted, state_shardings(mesh, wanted)))


def first_difference(old: Decoder, new: Decoder) -> str | None:
    """Returns the first array that differs between two models, or `None`.

    Storages may differ. Shapes may not, and neither may the numbers that experts have in pools.
    """
    for (own, _), (other, _) in zip(old.config.layers, new.config.layers, strict=False):
        if own.spread_of_pool != other.spread_of_pool:
            return f"peer.spread is {own.spread_of_pool} there and {other.spread_of_pool} here"
    new = Decoder(dataclasses.replace(new.config, pool_parts=1))  # without the room for others
    found, wanted = _shapes(_drawn(old)), _shapes(_drawn(new))
    for path in sorted(found.keys() | wanted.keys()):
        there, here = (each.get(path, "missing") for each in (found, wanted))
        if there != here:
            return f"{path} is {there} there and {here} here"
    return None


def as_stored(variables: dict[str, Any], old: Decoder, new: Decoder) -> dict[str, Any]:
    """Returns the variables of a model in the storages of another one of the same shape.

    Pools and packed matrices are rounded to nearest, each vector with the scale that training aims
    at. What both models store alike does not change. Pools get the room that the new model needs.

    Args:
        variables: the collections "params", "pools" and "stats".
        old: the model whose variables they are.
        new: the model to convert them for.
    """
    params, storage = variables["params"], new.config.pool_storage
    storages = [
        tuple(spec.packed_storage for spec, _ in model.config.layers) for model in (old, new)
    ]
    if storages[0] != storages[1]:
        params = dequantize(params)
    pools = jax.tree.map(
        lambda pool: pool if pool.storage == storage else stored_as(pool, storage),
        variables["pools"],
        is_leaf=is_pool,
    )
    pools = with_room(pools, new)
    return {**variables, "params": packed(new.config.layers, params), "pools": pools}


def with_room(pools: Any, model: Decoder) -> Any:
    """Returns the pools of a model with room for as many experts as the model needs."""
    return jax.tree.map(
        lambda pool: with_places(pool, model.config.places(pool.num_experts)),
        pools,
        is_leaf=is_pool,
    )


def _drawn(model: Decoder) -> dict[str, Any]:
    """Returns the shapes of a model's variables."""
    return jax.eval_shape(partial(drawn_variables, model), jax.random.key(0))


def _shapes(variables: dict[str, Any]) -> dict[str, str]:
    """Returns the shape of every array by path. Packed matrices and pools have those of floats."""

    def shape(leaf: Any) -> list[int]:
        if is_pool(leaf):
            return [leaf.weights.shape[0], leaf.num_experts, 2, leaf.width]
        return list(leaf.shape)

    leaves = jax.tree_util.tree_leaves_with_path(
        variables, is_leaf=lambda node: is_packed_matrix(node) or is_pool(node)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(shape(leaf))
        for path, leaf in leaves
    }


def _is_update_state(node: Any) -> bool:
    return isinstance(node, UpdateState)


def _only_accumulators(node: Any) -> Any:
    if not _is_update_state(node):
        return ocp.PLACEHOLDER
    return UpdateState(node.accumulators, ocp.PLACEHOLDER)
