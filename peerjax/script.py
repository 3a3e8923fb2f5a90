"""What the scripts at the top of the repository share."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from peerjax.errors import UserError

USER_ERROR_STATUS = 2


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main`; a user's mistake becomes one line and exit status 2."""

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            # What ml_collections raises for overrides it cannot apply.
            _fail(str(error).strip("'\""))

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; flags begin with --")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.FATAL)  # what orbax logs, it also raises
        try:
            main()
        except UserError as error:
            _fail(str(error))

    app.run(guarded, flags_parser=parse)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)
