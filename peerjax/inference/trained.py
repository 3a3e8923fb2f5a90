"""A model as a run left it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from peerjax.config import model_config, validate
from peerjax.data.pipeline import load_tokenizer
from peerjax.data.tokenizer import Tokenizer
from peerjax.model import Decoder
from peerjax.objectives.task import drawn_variables
from peerjax.sharding import state_shardings
from peerjax.training.checkpoint import abstract, find_checkpoint, restore_part
from peerjax.training.workdir import (
    TOKENIZER,
    check_tokenizer,
    folder_of,
    read_config,
    vocabulary_size,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run with a checkpoint.

    Attributes:
        config: of the run.
        tokenizer: of the run.
        model: the decoder.
        folder: the run's.
        checkpoint: the folder of a step.
    """

    config: ml_collections.ConfigDict
    tokenizer: Tokenizer
    model: Decoder
    folder: epath.Path
    checkpoint: epath.Path

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return int(self.checkpoint.name)


def open_run(workdir: str, step: int | None = None) -> Run:
    """Finds a run's checkpoint, and reads what is small; nothing outside its folder is needed.

    Kernels are those of the present device, whatever the run was trained with: one that is not of
    it would be interpreted.

    Args:
        workdir: of the run, which may still be going on.
        step: of the checkpoint; the newest intact one by default.

    Raises:
        ConfigError: if the folder holds no run that this version can read.
        DataError: if the run's tokenizer is not what it was.
        CheckpointError: if there is no such checkpoint.
    """
    folder = folder_of(workdir)
    config = read_config(folder)
    validate(config)
    config.kernels.implementation = "auto"
    own = folder / TOKENIZER
    # Runs of earlier versions have none.
    tokenizer = Tokenizer.load(str(own)) if own.exists() else load_tokenizer(config)
    check_tokenizer(folder, tokenizer)
    model = Decoder(model_config(config, vocabulary_size(folder)))
    return Run(config, tokenizer, model, folder, find_checkpoint(folder, step))


def restore(run: Run, mesh: Mesh) -> dict[str, Any]:
    """Reads the model's collections "params", "pools" (packed ones stay packed) and "stats".

    What only training needs, such as accumulators, is not read.
    """
    shapes = jax.eval_shape(partial(drawn_variables, run.model), jax.random.key(0))
    # A collection that is empty was not saved.
    part = {name: tree for name, tree in shapes.items() if tree}
    return shapes | restore_part(run.checkpoint, abstract(part, state_shardings(mesh, part)))
