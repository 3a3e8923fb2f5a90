"""Makes shards of your text: python prepare.py --pattern='web=corpus/**/*.txt' --output=shards."""

import os
import signal
import sys

import rich
from absl import flags

from peerjax import script
from peerjax.data.prepare import Settings, prepare

PATTERN = flags.DEFINE_string(
    "pattern",
    None,
    "Globs of text files and .jsonl files, separated by ';'. DOMAIN= may precede each glob.",
)
OUTPUT = flags.DEFINE_string(
    "output", None, "Output folder. If it holds unfinished shards, preparation resumes."
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "Tokenizer JSON. Default: the one that comes with peerjax."
)
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of JSON lines that holds the text.")
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.05, "Share of the documents held out for validation."
)
SHARD_MB = flags.DEFINE_float("shard_mb", 64, "Megabytes of text in a shard.")
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Number of worker processes. 0 uses this process and its threads."
)
SKIP_BAD_FILES = flags.DEFINE_bool(
    "skip_bad_files",
    False,
    "Report and skip files that cannot be used. Otherwise they are an error.",
)
flags.mark_flags_as_required(["pattern", "output"])


def main() -> None:
    """Prepares the text that the flags name."""
    signal.signal(signal.SIGINT, stop)
    settings = Settings(
        pattern=PATTERN.value,
        tokenizer=TOKENIZER.value,
        text_field=TEXT_FIELD.value,
        validation_fraction=VALIDATION_FRACTION.value,
        shard_mb=SHARD_MB.value,
        skip_bad_files=SKIP_BAD_FILES.value,
    )
    prepare(settings, OUTPUT.value, WORKERS.value)


def stop(*_: object) -> None:
    """Ends this process at once, and its workers with it. Finished shards are kept."""
    rich.get_console().show_cursor(True)
    print("stopped; run the same command again to resume", file=sys.stderr)
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    script.run(main)
