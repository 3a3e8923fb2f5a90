"""The configuration of a student, from a recipe and its teacher."""

from __future__ import annotations

import ml_collections

from peerjax.config import (
    MONET,
    OWN,
    PLAIN,
    ROUNDED,
    SEARCHED,
    model_config,
    validate,
    with_fields_of,
)
from peerjax.data.pipeline import Corpus
from peerjax.distillation.from_monet import FROM_TEACHER, give_fields
from peerjax.errors import ConfigError
from peerjax.inference.trained import Run
from peerjax.model import Decoder
from peerjax.objectives.distillation import Distillation
from peerjax.training.start import first_difference
from peerjax.training.workdir import TOKENIZER

# Number of likely tokens of a cache, if the configuration does not say it.
TOP_K_OF_CACHE = 64


def student_config(
    recipe: ml_collections.ConfigDict, teacher: Run, path: str, cached: bool
) -> ml_collections.ConfigDict:
    """Returns the whole configuration of a student.

    Args:
        recipe: configuration in which `None` can mean the teacher's value; see
            `peerjax.config.config_of_student`.
        teacher: the teacher.
        path: the teacher's workdir or checkpoint, as the user gave it.
        cached: whether a cache has the teacher's predictions.

    Raises:
        ConfigError: if a field is invalid, or does not fit the teacher.
    """
    given = teacher.config.copy_and_resolve_references()
    if given.data.source != "shards":
        given.data.tokenizer = str(teacher.folder / TOKENIZER)
    from_monet = recipe.distill.start in (MONET, PLAIN)
    if from_monet:
        try:
            give_fields(given, plain=recipe.distill.start == PLAIN)
        except ValueError as error:
            raise ConfigError(f"distill.start={recipe.distill.start!r}: {error}") from None
    config = with_fields_of(given, recipe)
    for name in FROM_TEACHER if from_monet else ():
        own, needed = config.peer[name], given.peer[name]
        if own != needed:
            raise ConfigError(
                f"peer.{name}={own!r} cannot hold the experts of {path}, which need {needed!r}; "
                "leave it out"
            )
    config.distill.teacher = path
    if cached and config.distill.top_k is None:
        config.distill.top_k = TOP_K_OF_CACHE
    validate(config)
    if config.init_from and config.distill.start != OWN:
        raise ConfigError(
            f"init_from={config.init_from} and distill.start={config.distill.start!r} both name "
            f"first weights; leave init_from empty, or set distill.start={OWN!r}"
        )
    student = Decoder(model_config(config, teacher.model.config.vocab_size))
    try:
        weights_of(config).check(student.config, teacher.model.config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    different = first_difference(teacher.model, student)
    if config.distill.start in (ROUNDED, SEARCHED) and different is not None:
        raise ConfigError(
            f"the student cannot take the weights of {path}: {different}; leave out the fields of "
            f"the model, or set distill.start={OWN!r}"
        )
    return config


def weights_of(config: ml_collections.ConfigDict) -> Distillation:
    """Returns the weights of the loss."""
    distill = config.distill
    return Distillation(
        tuple(distill.alpha), tuple(distill.temperature), tuple(distill.beta), distill.top_k
    )


def check_text(teacher: Run, corpus: Corpus) -> None:
    """Checks that a student's text has the teacher's tokens.

    Raises:
        ConfigError: if the tokenizer or the size of the vocabulary differs.
    """
    if corpus.tokenizer.digest != teacher.tokenizer.digest:
        raise ConfigError(
            f"the text has another tokenizer ({corpus.tokenizer.digest}) than the teacher in "
            f"{teacher.folder} ({teacher.tokenizer.digest}); set "
            f"data.tokenizer={teacher.folder / TOKENIZER}, or make shards with it"
        )
    size = teacher.model.config.vocab_size
    if corpus.tokenizer.vocab_size != size:
        raise ConfigError(
            f"the tokenizer has {corpus.tokenizer.vocab_size} entries, but the teacher in "
            f"{teacher.folder} has a vocabulary of {size}; such a model cannot be distilled"
        )
