"""Makes `peerjax/data/bpe_4096.json` from the training split of the default text.

    python -m peerjax.data.train_tokenizer OUTPUT.json

Byte-identical whenever it is run again with the same packages.
"""

import sys
from pathlib import Path

from peerjax.config import default_config
from peerjax.data.documents import (
    TEXT_PACKAGES,
    TRAIN,
    read_packages,
    split_of,
    without_duplicates,
)
from peerjax.data.tokenizer import train_bpe

VOCAB_SIZE = 4096


def main(output: str) -> None:
    """Trains the tokenizer and writes it to `output`."""
    fraction = default_config().data.validation_fraction
    documents = without_duplicates(read_packages(list(TEXT_PACKAGES)))
    texts = [document.text for document in documents if split_of(document, fraction) == TRAIN]
    Path(output).write_text(train_bpe(texts, VOCAB_SIZE), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
