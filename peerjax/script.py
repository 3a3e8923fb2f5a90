"""Shared code of the scripts at the top of the repository."""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import absl.logging
import ml_collections
from absl import app, flags

from peerjax.errors import CheckpointError, UserError
from peerjax.processes import Place, join
from peerjax.supervisor import is_child, supervise


class Joint(NamedTuple):
    """Flags of a script that several processes can run together."""

    coordinator: flags.FlagHolder[str | None]
    processes: flags.FlagHolder[int | None]
    process: flags.FlagHolder[int | None]

    @staticmethod
    def define() -> "Joint":
        """Defines the flags."""
        return Joint(
            flags.DEFINE_string(
                "coordinator", None, "host:port of process 0, for a run with several processes."
            ),
            flags.DEFINE_integer("processes", None, "Number of processes of the run.", 1),
            flags.DEFINE_integer("process", None, "Number of this process, from 0.", 0),
        )


def run(
    main: Callable[[], None],
    config: flags.FlagHolder[ml_collections.ConfigDict] | None = None,
    joint: Joint | None = None,
) -> None:
    """Parses flags, loads the configuration that the flag `config` names, and calls `main`.

    With the flags `joint`, the process first joins the other processes of the run.

    A user's mistake prints one line and gives exit status 2. A diverged run gives exit status 3.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if config is not None:
                config.value.keys()  # raises an error if the configuration did not load
            return rest
        except (AttributeError, KeyError) as error:
            _fail(_unknown_field(error, argv))
        except (flags.Error, OSError, TypeError, ValueError) as error:
            _fail(str(error))

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; flags begin with --")
        if not flags.FLAGS["verbosity"].present:
            _silence_background_saves()
        try:
            if joint is not None:
                place = Place(joint.coordinator.value, joint.processes.value, joint.process.value)
                if place.is_joint and not is_child():
                    sys.exit(supervise(sys.argv))
                join(place)
            main()
        except CheckpointError as error:
            sys.unraisablehook = lambda _: (
                None
            )  # hides errors of the failed save when it is collected
            _fail(str(error))
        except UserError as error:
            _fail(str(error), error.exit_status)

    app.run(guarded, flags_parser=parse)


def _silence_background_saves() -> None:
    """Hides log messages of failed saves. Orbax also raises one of the errors that it logs.

    When a save fails, each write that it abandons would otherwise print a traceback.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    for ours in ("peerjax", "pallas_kernels"):
        logging.getLogger(ours).setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


def _unknown_field(error: AttributeError | KeyError, argv: Sequence[str]) -> str:
    """Names the override that ml_collections could not apply, and suggests a similar field."""
    text = str(error.args[0])
    words = re.findall(r"\w+", text)
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    for override in overrides:
        name = override[2:].split("=")[0]
        if words and words[0] in name.split("."):
            meant = re.search(r'Did you mean "(\w+)"', text)
            hint = f"; did you mean {meant[1]!r}?" if meant else ""
            return f"{name}: the configuration has no field {words[0]!r}{hint}"
    return text


def _fail(message: str, status: int = UserError.exit_status) -> NoReturn:
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(status)
