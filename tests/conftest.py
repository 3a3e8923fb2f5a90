"""Shared by all tests."""

import atexit
import importlib
import os
import shutil
import tempfile
from pathlib import Path

import jax
import ml_collections
import pytest

from peerjax.training.loop import train
from tests.training.tiny import SAVE_EVERY, tiny_config, write_corpus

REPOSITORY = Path(__file__).parent.parent


def _compile_quickly() -> None:
    """Compiling takes most of the time: optimise little, and every program only once.

    Processes that tests start do likewise. Programs for accelerators stay as users' are.
    """
    if "PEERJAX_TARGETS" in os.environ:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    cache = tempfile.mkdtemp(prefix="peerjax-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    settings = {
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


_compile_quickly()


def on_devices(count: int) -> dict[str, str]:
    """The environment of a process that sees so many CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


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
