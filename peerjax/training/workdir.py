"""The files that identify a run in its folder, and checks that a command may continue the run."""

import json
from typing import Any

import ml_collections
from etils import epath

from peerjax.atomic import write_atomically
from peerjax.config import differences, from_json
from peerjax.data.tokenizer import Tokenizer
from peerjax.errors import ConfigError, DataError

CONFIG, DATA, TOKENIZER = "config.json", "data.json", "tokenizer.json"
KERNELS = "kernels.json"


def folder_of(workdir: str) -> epath.Path:
    """Returns a workdir as an absolute path.

    Raises:
        ConfigError: if it is not in the file system. Metrics are appended to a file at every step.
    """
    if "://" in workdir:
        raise ConfigError(f"{workdir} is not a folder of this machine; mount it and give its path")
    return epath.Path(workdir).absolute()


def workdir_and_step(path: str) -> tuple[epath.Path, int | None]:
    """Returns the workdir and the step that a path names. Without a step, it is `None`.

    Args:
        path: a workdir, or one of its checkpoints such as "runs/a/checkpoints/500".

    Raises:
        ConfigError: if it is not in the file system.
    """
    folder = folder_of(path)
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        return folder.parent.parent, int(folder.name)
    return folder, None


def check_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a folder has no run, or a run with the same configuration.

    Raises:
        ConfigError: if configurations differ. The message names the fields.
    """
    path = workdir / CONFIG
    if not path.exists():
        return
    changed = differences(read_config(workdir), config)
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with another configuration: {'; '.join(changed)}; "
            "choose another --workdir, or use the old values"
        )


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """Returns the configuration of the run in a folder.

    Raises:
        ConfigError: if there is no run, or its configuration cannot be read.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run: there is no {CONFIG}")
    try:
        return from_json(path.read_text())
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def check_data(workdir: epath.Path, identity: dict[str, Any]) -> None:
    """Checks that a folder has no run, or a run with the same corpus and tokenizer.

    Raises:
        DataError: if they differ, or the run was imported. The message names the difference.
    """
    path = workdir / DATA
    if not path.exists():
        return
    check_trained_here(workdir)
    old = json.loads(path.read_text())
    for name in ("vocabulary", "tokenizer", "corpus"):
        if old[name] != identity[name]:
            raise DataError(
                f"{workdir} was trained with another {name} ({old[name]}) than the current one "
                f"({identity[name]}); choose another --workdir, or use the old text and tokenizer"
            )


def check_trained_here(workdir: epath.Path) -> None:
    """Checks that a run was not imported, and so has text of its own.

    Raises:
        DataError: if the run was imported.
    """
    if not json.loads((workdir / DATA).read_text())["corpus"]:
        raise DataError(
            f"the model in {workdir} was not trained here, and has no text of its own; evaluate it "
            "with --pattern, and train in another --workdir"
        )


def check_tokenizer(workdir: epath.Path, tokenizer: Tokenizer) -> None:
    """Checks that a tokenizer is the one of the run in a folder.

    Raises:
        DataError: if the tokenizers differ.
    """
    expected = tokenizer_digest(workdir)
    if tokenizer.digest != expected:
        raise DataError(
            f"{workdir} was trained with another tokenizer ({expected}) than the current one "
            f"({tokenizer.digest}); put the old one back as {workdir / TOKENIZER}"
        )


def tokenizer_digest(workdir: epath.Path) -> str:
    """Returns the digest of the tokenizer of the run in a folder."""
    return json.loads((workdir / DATA).read_text())["tokenizer"]


def vocabulary_size(workdir: epath.Path) -> int:
    """Returns the number of entries in the vocabulary of a run's model.

    The tokenizer may have more entries, which occur in no text.
    """
    return json.loads((workdir / DATA).read_text())["vocabulary"]


def identity_of_imported(tokenizer: Tokenizer, vocabulary: int) -> dict[str, Any]:
    """Returns the identity of an imported run. `Corpus.identity` is that of other runs."""
    return {"corpus": "", "tokenizer": tokenizer.digest, "vocabulary": vocabulary}


def record_kernels(workdir: epath.Path, implementation: str) -> str | None:
    """Writes down the implementation that computes a run from now on.

    Returns:
        The implementation until now; `None` if the run is new or an earlier version wrote it.
    """
    path = workdir / KERNELS
    before = json.loads(path.read_text())["implementation"] if path.exists() else None
    if before != implementation:
        write_atomically(path, json.dumps({"implementation": implementation}))
    return before


def record(
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    tokenizer: Tokenizer,
    identity: dict[str, Any],
) -> None:
    """Writes the files that identify a run, and its tokenizer, so that the folder can be moved.

    The configuration is written last. A folder that has one therefore has all files.
    """
    write_atomically(workdir / TOKENIZER, tokenizer.json)
    write_atomically(workdir / DATA, json.dumps(identity, indent=1))
    write_atomically(workdir / CONFIG, json.dumps(config.to_dict(), indent=1))
