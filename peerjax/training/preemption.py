"""Clean stop of training on a signal."""

import signal
import threading
from types import FrameType

import jax
from orbax.checkpoint import utils


class StopSignals:
    """Inside this context, the training loop saves and ends after SIGTERM or the first Ctrl-C.

    With several processes, JAX's preemption service finds a common step for all machines.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        # Handlers can be set only in the main thread. In other threads signals keep their effect.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
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
        self._restore()  # a second Ctrl-C ends the process at once

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
