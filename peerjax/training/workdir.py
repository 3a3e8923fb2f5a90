"""What a run's folder says about the run, and whether the present command continues it."""

import json
from typing import Any

import ml_collections
from etils import epath

from peerjax.atomic import write_atomically
from peerjax.config import differences, from_json
from peerjax.data.tokenizer import Tokenizer
from peerjax.errors import ConfigError, DataError

CONFIG, DATA, TOKENIZER = "config.json", "data.json", "tokenizer.json"


def folder_of(workdir: str) -> epath.Path:
    """A workdir as an absolute path.

    Raises:
        ConfigError: if it is not in the file system: figures are appended to a file, step by step.
    """
    if "://" in workdir:
        raise ConfigError(f"{workdir} is not a folder of this machine; mount it, and name that")
    return epath.Path(workdir).absolute()


def check_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a folder that holds a run of another configuration.

    Raises:
        ConfigError: naming the fields that differ.
    """
    path = workdir / CONFIG
    if not path.exists():
        return
    changed = differences(read_config(workdir), config)
    if changed:
        raise ConfigError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}; "
            "choose another --workdir, or the old values"
        )


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """The configuration of the run in a folder.

    Raises:
        ConfigError: if there is no run, or one of another version.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run: there is no {CONFIG}")
    try:
        return from_json(path.read_text())
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def check_data(workdir: epath.Path, identity: dict[str, Any]) -> None:
    """Refuses to continue a run with another corpus or tokenizer.

    Raises:
        DataError: naming what differs.
    """
    path = workdir / DATA
    if not path.exists():
        return
    check_trained_here(workdir)
    old = json.loads(path.read_text())
    for name in ("vocabulary", "tokenizer", "corpus"):
        if old[name] != identity[name]:
            raise DataError(
                f"{workdir} was trained with another {name} ({old[name]}) than the present one "
                f"({identity[name]}); choose another --workdir, or the old text and tokenizer"
            )


def check_trained_here(workdir: epath.Path) -> None:
    """Refuses a run that was imported, where its own text is needed.

    Raises:
        DataError: if it has none.
    """
    if not json.loads((workdir / DATA).read_text())["corpus"]:
        raise DataError(
            f"the model in {workdir} was not trained here, and has no text of its own: evaluate it "
            "with --pattern, and train in another --workdir"
        )


def check_tokenizer(workdir: epath.Path, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that is not the one of the run in a folder.

    Raises:
        DataError: if it is another.
    """
    expected = tokenizer_digest(workdir)
    if tokenizer.digest != expected:
        raise DataError(
            f"{workdir} was trained with another tokenizer ({expected}) than the one there is now "
            f"({tokenizer.digest}); put the old one back as {workdir / TOKENIZER}"
        )


def tokenizer_digest(workdir: epath.Path) -> str:
    """The digest of the tokenizer of the run in a folder."""
    return json.loads((workdir / DATA).read_text())["tokenizer"]


def vocabulary_size(workdir: epath.Path) -> int:
    """Entries of the vocabulary of a run's model; its tokenizer may have more, that no text has."""
    return json.loads((workdir / DATA).read_text())["vocabulary"]


def identity_of_imported(tokenizer: Tokenizer, vocabulary: int) -> dict[str, Any]:
    """What a run is made of that was trained elsewhere; the rest is in `Corpus.identity`."""
    return {"corpus": "", "tokenizer": tokenizer.digest, "vocabulary": vocabulary}


def record(
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    tokenizer: Tokenizer,
    identity: dict[str, Any],
) -> None:
    """Writes down what the run is made of; its tokenizer too, so that the folder can be moved.

    The configuration comes last: a folder that has one has all.
    """
    write_atomically(workdir / TOKENIZER, tokenizer.json)
    write_atomically(workdir / DATA, json.dumps(identity, indent=1))
    write_atomically(workdir / CONFIG, json.dumps(config.to_dict(), indent=1))
