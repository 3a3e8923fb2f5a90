"""`python ...` in a process of its own, forked from one that has imported what takes long.

Importing JAX, Flax and orbax takes several seconds; two dozen tests start a process.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import jax

from tests.conftest import REPOSITORY

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["peerjax.exchange.monet_run", "peerjax.inference.evaluating", "peerjax.training.loop"]
)


def python(
    *arguments: str, devices: int = 1, as_users: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs `python arguments...` in the repository, where JAX finds some CPU devices.

    Programs are compiled quickly, unless `as_users`: then they run fast.
    """
    readers, writers = zip(*(SERVER.Pipe(duplex=False) for _ in range(2)), strict=True)
    process = SERVER.Process(target=_become, args=(arguments, devices, as_users, writers))
    process.start()
    for writer in writers:
        writer.close()
    with ThreadPoolExecutor() as threads:
        outputs = [*threads.map(_read, readers)]
    process.join()
    status = process.exitcode
    process.close()
    assert status is not None
    return subprocess.CompletedProcess(arguments, status, *outputs)


def _read(reader: Connection) -> str:
    with reader, open(reader.fileno(), closefd=False) as file:
        return file.read()


def _become(
    arguments: tuple[str, ...], devices: int, as_users: bool, writers: tuple[Connection, ...]
) -> None:
    for descriptor, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), descriptor)
        writer.close()
    quickly = "" if as_users else os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{quickly} --xla_force_host_platform_device_count={devices}"
    jax.config.update("jax_platforms", "cpu")
    os.chdir(REPOSITORY)
    if arguments[0] == "-c":
        sys.argv = [*arguments[:1], *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*arguments]
        sys.path.insert(0, str(Path(arguments[0]).parent.absolute()))
        runpy.run_path(arguments[0], run_name="__main__")
