"""Opens the trained model of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections
from etils import epath
from jax.sharding import Mesh

from peerjax.config import model_config, validate
from peerjax.data.pipeline import load_tokenizer
from peerjax.data.tokenizer import Tokenizer
from peerjax.model import Decoder
from peerjax.training.checkpoint import find_checkpoint
from peerjax.training.start import restore_variables
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
        config: configuration of the run.
        tokenizer: tokenizer of the run.
        model: the decoder.
        folder: folder of the run.
        checkpoint: folder of the checkpoint.
    """

    config: ml_collections.ConfigDict
    tokenizer: Tokenizer
    model: Decoder
    folder: epath.Path
    checkpoint: epath.Path

    @property
    def step(self) -> int:
        """Training step of the checkpoint."""
        return int(self.checkpoint.name)


def open_run(workdir: str, step: int | None = None) -> Run:
    """Finds a checkpoint of a run, and reads configuration and tokenizer but no weights.

    No files outside the run's folder are needed. Kernels are chosen for the present device,
    whatever the run was trained with. A kernel for another device would be interpreted.

    Args:
        workdir: folder of the run, which may still be training.
        step: training step of the checkpoint; by default, the newest intact one.

    Raises:
        ConfigError: if the folder holds no run that this version can read.
        DataError: if the run's tokenizer has changed.
        CheckpointError: if there is no such checkpoint.
    """
    folder = folder_of(workdir)
    config = read_config(folder)
    validate(config)
    config.kernels.implementation = "auto"
    own = folder / TOKENIZER
    # Runs of earlier versions do not have this file.
    tokenizer = Tokenizer.load(str(own)) if own.exists() else load_tokenizer(config)
    check_tokenizer(folder, tokenizer)
    model = Decoder(model_config(config, vocabulary_size(folder)))
    return Run(config, tokenizer, model, folder, find_checkpoint(folder, step))


def restore(run: Run, mesh: Mesh) -> dict[str, Any]:
    """Reads the model's collections "params", "pools" and "stats".

    Packed pools stay packed. State that only training needs, such as accumulators, is not read.
    """
    return restore_variables(run.checkpoint, run.model, mesh)
