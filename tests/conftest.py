"""Shared by all tests."""

import atexit
import importlib
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import jax
import ml_collections
import pytest

from peerjax.training.loop import train
from tests.training.tiny import SAVE_EVERY, tiny_config, write_corpus

REPOSITORY = Path(__file__).parent.parent


def _compile_quickly() -> None:
    """Compiling takes most of the time: optimise little, and compile every program only once.

    All workers and the processes that tests start share one cache. Programs for accelerators, and
    those that `compile_as_users_do` compiles, have the options that users have.
    """
    if "PEERJAX_TARGETS" in os.environ:
        return
    options = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if HAS_LOOP_EMITTERS:
        options.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *options])
    if "PEERJAX_TESTS_CACHE" not in os.environ:  # the first process; its workers find the folder
        cache = os.environ["PEERJAX_TESTS_CACHE"] = tempfile.mkdtemp(prefix="peerjax-tests-")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    settings = {
        "jax_compilation_cache_dir": os.environ["PEERJAX_TESTS_CACHE"],
        # A limit makes JAX lock the folder; it then reads all entries whenever it adds one.
        "jax_compilation_cache_max_size": 1 << 34,
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


# Before JAX 0.11, XLA compiles loops for CPUs twice as fast without its fusion emitters; later
# ones refuse the flag.
HAS_LOOP_EMITTERS = jax.version.__version_info__ < (0, 11)
_compile_quickly()
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")


def compile_as_users_do(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles with the options of users, for tests that look at the compiled program."""
    options: dict[str, bool | int] = {"xla_backend_optimization_level": 3}
    if HAS_LOOP_EMITTERS:
        options["xla_cpu_use_fusion_emitters"] = True
    return lowered.compile(compiler_options=options)


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
