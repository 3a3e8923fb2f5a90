"""Several processes on one machine, joined by JAX's runtime."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peerjax import processes as joining
from peerjax.errors import ConfigError
from peerjax.processes import Place, join
from tests.conftest import REPOSITORY
from tests.training.tiny import write_recipe

STEPS = 200


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def recipe(corpus, tmp_path):
    every = {"checkpoint.every": 50, "eval.every": 100}
    fields = {"peer.num_experts": (32, 32), "steps": STEPS, **every}
    return write_recipe(tmp_path / "recipe.py", corpus, **fields)


def of_slurm(count, index):
    """What Slurm tells a task of a step, of which all are on this machine."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),  # the coordinator's port depends on it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def start(recipe, workdir, count, devices, *flags, per_process=(), script="train.py", slurm=False):
    """Starts processes that work together; one alone is given no coordinator."""
    options = f"--xla_force_host_platform_device_count={devices} {os.environ['XLA_FLAGS']}"
    environment = {**os.environ, "XLA_FLAGS": options, "JAX_PLATFORMS": "cpu"}
    port, processes = free_port(), []
    for index in range(count):
        joint = (f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}")
        own = per_process[index] if per_process else ()
        of_recipe = [f"--config={recipe}"] if recipe else []
        command = [sys.executable, script, *of_recipe, f"--workdir={workdir}", *flags]
        processes.append(
            subprocess.Popen(
                [*command, *(joint if count > 1 and not slurm else ()), *own],
                cwd=REPOSITORY,
                env={**environment, **(of_slurm(count, index) if slurm else {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes):
    """Waits for all; returns their outputs and statuses."""
    outputs = [process.communicate(timeout=300) for process in processes]
    statuses = [process.returncode for process in processes]
    return [(status, *output) for status, output in zip(statuses, outputs, strict=True)]


def losses(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return {each["step"]: each["loss"] for each in map(json.loads, lines) if "loss" in each}


def wait_for_step(workdir, step, processes):
    path = Path(workdir) / "metrics.jsonl"
    for _ in range(2400):  # four minutes
        if path.exists() and len(path.read_text().splitlines()) > step:
            return
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.1)
    raise TimeoutError


@pytest.mark.slow
def test_two_processes_train_as_one_and_survive_a_signal_and_a_loss(recipe, tmp_path):
    ((status, _, error),) = finish(start(recipe, tmp_path / "one", 1, 1))
    assert not status, error
    alone = losses(tmp_path / "one")
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.expert=2")
    two = finish(start(recipe, tmp_path / "two", 2, 2, *mesh))
    assert [status for status, _, _ in two] == [0, 0], two
    assert "nats/token" in two[0][1]
    assert "nats/token" not in two[1][1]  # only process 0 prints
    together = losses(tmp_path / "two")
    assert together.keys() == alone.keys()
    for step in range(20):
        assert abs(together[step + 1] - alone[step + 1]) < 1e-3 * alone[step + 1]

    # SIGTERM to one process stops all, after one common step.
    processes = start(recipe, tmp_path / "long", 2, 2, *mesh)
    wait_for_step(tmp_path / "long", 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    found = finish(processes)
    assert [status for status, _, _ in found] == [0, 0], found
    (line,) = (each for each in found[0][1].splitlines() if each.startswith("stopped and saved"))
    stopped = int(line.split("after step ")[1].split(";")[0])
    assert (tmp_path / "long" / "checkpoints" / str(stopped)).exists()

    # A lost process ends the others with one sentence, and the same command goes on.
    processes = start(recipe, tmp_path / "long", 2, 2, *mesh)
    wait_for_step(tmp_path / "long", stopped + 4, processes)
    begun = time.monotonic()
    processes[1].kill()
    (status, _, error), _ = finish(processes)
    assert time.monotonic() - begun < 60
    assert status == 1
    assert error.strip().splitlines()[-1].startswith("error: another process of the run was lost")
    assert "stack trace" not in error
    assert "Traceback" not in error

    # In the end, nothing differs from the run that was not interrupted. In a step of Slurm,
    # processes find each other without flags.
    resumed = finish(start(recipe, tmp_path / "long", 2, 2, *mesh, slurm=True))
    assert [status for status, _, _ in resumed] == [0, 0], resumed
    assert losses(tmp_path / "long") == together


@pytest.mark.slow
def test_a_run_goes_on_in_other_numbers_of_processes(recipe, tmp_path):
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.expert=2")
    for count, devices, steps in ((2, 2, 4), (4, 1, 6), (1, 1, 8)):
        flags = (f"--config.steps={steps}", *(mesh if count > 1 else ()))
        results = finish(start(recipe, tmp_path / "run", count, devices, *flags))
        assert [status for status, _, _ in results] == [0] * count, results
    assert list(losses(tmp_path / "run")) == list(range(1, 9))


@pytest.mark.slow
def test_processes_that_disagree_stop(recipe, tmp_path):
    different = (("--config.seed=1",), ("--config.seed=2",))
    found = finish(start(recipe, tmp_path / "run", 2, 1, per_process=different))
    for status, _, error in found:
        assert status == 2
        assert "the processes do not agree: the configuration of some differs" in error
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}"):
            join(Place(f"127.0.0.1:{port}", 2, 0))


def test_a_coordinator_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(joining, "TIMEOUT", 1)
    port = free_port()
    with pytest.raises(ConfigError, match=f"does not answer at 127.0.0.1:{port} for 1 seconds"):
        join(Place(f"127.0.0.1:{port}", 2, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "go together"),
        (("127.0.0.1:1", 2, 2), r"--process=2 is not in \[0, 2\)"),
        (("localhost", 2, 0), "is not an address"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        join(Place(*arguments))


@pytest.mark.slow
def test_a_first_process_that_stays_alone_ends_with_one_sentence():
    alone = (
        "import peerjax.processes as joining; joining.TIMEOUT = 2; "
        f"joining.join(joining.Place('127.0.0.1:{free_port()}', 2, 0))"
    )
    parent = (
        "import sys; from peerjax.supervisor import supervise; "
        f"sys.exit(supervise(['-c', {alone!r}]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", parent], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "the other processes of the run did not come in time" in found.stderr.splitlines()[-1]
    assert "stack trace" not in found.stderr
