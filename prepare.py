"""Makes shards of your text: python prepare.py --pattern='web=corpus/**/*.txt' --output=shards."""

import os
import signal
import sys

import rich
from absl import flags

from peerjax import script
from peerjax.data.prepare import Settings, prepare

PATTERN = flags.DEFINE_string(
    "pattern", None, "Text files and .jsonl files: globs, each with DOMAIN= before it or without."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder of the shards; what is found there goes on.")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "A tokenizer JSON; empty: that of peerjax.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Where JSON lines hold their text.")
VALIDATION_FRACTION = flags.DEFINE_float("validation_fraction", 0.05, "Of the documents.")
SHARD_MB = flags.DEFINE_float("shard_mb", 64, "Megabytes of text in a shard.")
WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: none but this one and its threads.")
SKIP_BAD_FILES = flags.DEFINE_bool("skip_bad_files", False, "Skip files that cannot be used.")
flags.mark_flags_as_required(["pattern", "output"])


def main() -> None:
    """Prepares what the flags say."""
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
    """Ends at once: nothing is lost by it, and workers end with this process."""
    rich.get_console().show_cursor(True)
    print("stopped; run the same command again to go on", file=sys.stderr)
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    script.run(main)
