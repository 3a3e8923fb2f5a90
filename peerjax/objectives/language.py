"""Language modelling: the cross-entropy of the next token."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import ml_collections
import optax
from jaxtyping import Array, Float

from peerjax.config import model_config, pool_parts_of
from peerjax.data.pipeline import Corpus
from peerjax.errors import ConfigError
from peerjax.model import Decoder
from peerjax.objectives.task import Batch, Task, drawn_variables


def language(config: ml_collections.ConfigDict, corpus: Corpus) -> Task:
    """Returns the task of `train.py`, which is to predict the next token of a corpus.

    Raises:
        ConfigError: if the configuration has a teacher.
    """
    if config.distill.teacher:
        raise ConfigError(
            f"distill.teacher={config.distill.teacher} is set, and train.py has no teacher; run "
            "distill.py, or leave it empty"
        )
    return language_model(config, corpus.tokenizer.vocab_size)


def language_model(config: ml_collections.ConfigDict, vocab_size: int) -> Task:
    """Returns the next-token task for any text with a vocabulary of `vocab_size` entries.

    Pools have room for as many experts as the mesh of the configuration needs to split them.
    """
    sizes = model_config(config, vocab_size)
    model = Decoder(dataclasses.replace(sizes, pool_parts=pool_parts_of(config)))
    return Task(model, partial(drawn_variables, model), next_token_loss)


def next_token_loss(
    logits_BLV: Float[Array, "B L V"], kept: Any, batch: Batch, frozen: Any, step: Any
) -> Float[Array, "B L"]:
    """Returns the cross-entropy of every target."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch["targets"])
