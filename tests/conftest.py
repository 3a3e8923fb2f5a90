"""Shared by all tests."""

import importlib
import os
from pathlib import Path

import ml_collections
import pytest

from peerjax.training.loop import train
from tests.training.tiny import SAVE_EVERY, tiny_config, write_corpus

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def reference():
    """Imports a reference implementation; where CI is set, a missing one is a failure."""

    def load(name: str):
        if os.environ.get("CI"):
            return importlib.import_module(name)
        return pytest.importorskip(name, reason=f"{name} comes with 'peerjax[compare]'")

    return load


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """A pattern that matches a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def config_of_finished(corpus: str) -> ml_collections.ConfigDict:
    """What the run of the fixture `finished` is."""
    config = tiny_config(corpus)
    config.steps = 2 * SAVE_EVERY
    config.peer.query_norm = "batchnorm"
    return config


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """The folder of a run of a few steps, not to be changed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config_of_finished(corpus), str(workdir))
    return workdir
