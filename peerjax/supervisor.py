"""A parent process that says in one sentence that another process of the run was lost.

When a process of a run dies, JAX ends the others from a thread of its own, with a stack of C++ and
SIGABRT. No code in these processes can prevent it. Therefore every process of a run with several is
the child of one that waits for it, passes on what it prints, and reports how it ended.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

CHILD = "PEERJAX_SUPERVISED"
# The first line of what JAX prints before it ends the process, and lines of its collectives.
END = re.compile(r"coordination_service|JAX distributed service detected fatal errors")
NOISE = re.compile(r"^\[Gloo\] Rank \d+ is connected")
LOST = (
    "error: another process of the run was lost, so this one ended too; run the same command for "
    "all processes again to continue from the last checkpoint"
)
# What JAX was doing when it ended a process whose partners never came.
REGISTERING = "CoordinationService/RegisterTask"
MISSING = (
    "error: the other processes of the run did not come in time; start all of them, with the same "
    "--coordinator and --processes"
)


def is_child() -> bool:
    """Returns whether this process has a supervisor."""
    return CHILD in os.environ


def supervise(arguments: Sequence[str]) -> int:
    """Runs `python arguments...` with the present environment.

    Returns:
        The exit status for this process: 1 if another process of the run was lost or did not come,
        else that of the child.
    """
    child = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, CHILD: "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_end_with_parent,
    )
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child too
    assert child.stderr is not None
    lost, held = _pass_on(child.stderr)
    status = child.wait()
    if lost and status == -signal.SIGABRT:
        print(MISSING if REGISTERING in held else LOST, file=sys.stderr)
        return 1
    sys.stderr.write(held)
    return status if status >= 0 else 128 - status


def _pass_on(lines: IO[str]) -> tuple[bool, str]:
    """Prints lines up to a traceback or the end of a process by JAX.

    Returns:
        Whether JAX ended the process, and the lines from the traceback on. The loss of another
        process can also raise an error.
    """
    lost, held = False, ""
    for line in lines:
        lost = lost or bool(END.search(line))
        if NOISE.search(line):
            continue
        if lost or held or line.startswith("Traceback "):
            held += line
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    return lost, held


def _end_with_parent() -> None:
    """Has Linux kill this process when its parent ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
