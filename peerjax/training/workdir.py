"""What a run's folder says about the run, and whether the present command continues it."""

import json
from typing import Any

import ml_collections
from etils import epath

from peerjax.atomic import write_atomically
from peerjax.config import differences
from peerjax.errors import ConfigError, DataError

CONFIG, DATA = "config.json", "data.json"


def check_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a folder that holds a run of another configuration.

    Raises:
        ConfigError: naming the fields that differ.
    """
    path = workdir / CONFIG
    if not path.exists():
        return
    old = ml_collections.ConfigDict(json.loads(path.read_text()))
    changed = differences(old, config)
    if changed:
        raise ConfigError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}; "
            "choose another --workdir, or the old values"
        )


def check_data(workdir: epath.Path, identity: dict[str, Any]) -> None:
    """Refuses to continue a run with another corpus or tokenizer.

    Raises:
        DataError: naming what differs.
    """
    path = workdir / DATA
    if not path.exists():
        return
    old = json.loads(path.read_text())
    for name in ("vocabulary", "tokenizer", "corpus"):
        if old[name] != identity[name]:
            raise DataError(
                f"{workdir} was trained with another {name} ({old[name]}) than the present one "
                f"({identity[name]}); choose another --workdir, or the old text and tokenizer"
            )


def record(
    workdir: epath.Path, config: ml_collections.ConfigDict, identity: dict[str, Any]
) -> None:
    """Writes down what the run is made of."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / CONFIG, json.dumps(config.to_dict(), indent=1))
    write_atomically(workdir / DATA, json.dumps(identity, indent=1))
