"""Several processes that train one model together, on one host or many."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import pallas_kernels
from peerjax.errors import ConfigError

# Seconds until a process gives up on a coordinator that does not answer, and on a lost process.
TIMEOUT, HEARTBEAT = 120, 30


class Place(NamedTuple):
    """Place of a process among those that train together.

    Attributes:
        coordinator: "host:port", which process 0 opens; the same for all.
        processes: number of processes.
        process: number of this process.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    @property
    def is_joint(self) -> bool:
        """Whether this is one of several processes."""
        return any(value is not None for value in self) or _is_in_cluster()


def join(place: Place) -> None:
    """Joins the other processes of a run. Call this before JAX looks for devices.

    On TPU pods and in a step of Slurm, JAX finds the processes by itself, and the place is empty. A
    process that is alone joins nothing.

    Args:
        place: place of this process.

    Raises:
        ConfigError: if only some of the place is given, the port is taken, or the coordinator does
            not answer.
    """
    if place == Place():
        if place.is_joint:
            _initialize({})
        return
    address, count, index = place
    if address is None or count is None or index is None:
        raise ConfigError(
            "--coordinator, --processes and --process go together; give all three to each process"
        )
    if not 0 <= index < count:
        raise ConfigError(f"--process={index} is not in [0, {count}), the range of --processes")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator={address} is not an address such as 10.0.0.1:4321")
    if index == 0:
        _check_port(host, int(port))
    else:
        _wait_for_port(host, int(port))
    _initialize(
        {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
            # By default JAX would open the port to all networks.
            "coordinator_bind_address": address,
        }
    )


def _initialize(arguments: Mapping[str, object]) -> None:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **arguments,  # type: ignore[arg-type]
            initialization_timeout=TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the processes did not find each other within {TIMEOUT} seconds ({reason}); check "
            "that all of them run, and that they reach --coordinator"
        ) from None


def _is_in_cluster() -> bool:
    """Returns whether the environment describes several processes that JAX can find by itself."""
    # SLURM_PROCID is absent in an allocation that has not started a step.
    tasks = int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1
    return (
        tasks > 1
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1
    )


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"the coordinator cannot listen at {host}:{port} ({error.strerror}); choose another "
            "port for --coordinator"
        ) from None


def _wait_for_port(host: str, port: int) -> None:
    """Waits until the coordinator listens. JAX would end the process with a stack of C++."""
    begin = time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError as error:
            if time.monotonic() - begin > TIMEOUT:
                raise ConfigError(
                    f"the coordinator does not answer at {host}:{port} for {TIMEOUT} seconds "
                    f"({error}); start process 0, or correct --coordinator"
                ) from None
            time.sleep(0.5)
        else:
            return


def check_agreement(facts: Mapping[str, str]) -> None:
    """Checks that all processes have the same facts.

    Args:
        facts: texts by name, such as the configuration and the digest of the text.

    Raises:
        ConfigError: if they differ. The message names the first fact that does.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in facts.values()]
    own = np.array([np.frombuffer(digest, np.int32) for digest in digests])
    every = np.asarray(multihost_utils.process_allgather(own))
    for number, name in enumerate(facts):
        if (every[:, number] != every[0, number]).any():
            raise ConfigError(
                f"the processes do not agree: {name} of some differs from that of process 0; start "
                "all of them with the same command, code and files"
            )


def code_digest() -> str:
    """Returns the SHA-256 of the sources of peerjax and its kernels."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(pallas_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def share(what: str) -> None:
    """Waits until every process has reached the point of a name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def is_first() -> bool:
    """Returns whether this process writes what is written once."""
    return jax.process_index() == 0
