"""Clean stop of training on a signal."""

import os
import signal
import threading
from types import FrameType

import jax
from orbax.checkpoint import utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Inside this context, the training loop saves and ends after SIGTERM or the first Ctrl-C.

    With several processes, JAX's preemption service has a handler of SIGTERM, and finds a step that
    no process has reached yet. All of them stop there.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        # Handlers can be set only in the main thread. In other threads signals keep their effect.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS if jax.process_count() == 1 else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def requested(self, step: int) -> bool:
        """Returns whether to stop after `step`."""
        if jax.process_count() > 1:
            return utils.reached_preemption(step)
        return self._received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        self._restore()  # a second Ctrl-C ends the process at once

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
