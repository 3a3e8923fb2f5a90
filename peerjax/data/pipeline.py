"""Turns a configuration into batches: documents, tokens, packed rows, grain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import ml_collections
import numpy as np

from peerjax.data.documents import (
    TRAIN,
    VALIDATION,
    Document,
    by_digest,
    corpus_digest,
    digest_in_order,
    order_digest,
    read_files,
    split_of,
    without_duplicates,
)
from peerjax.data.mixing import Rows, mixed_rows
from peerjax.data.packages import read_packages
from peerjax.data.packing import PackedRows, TokenStream
from peerjax.data.shards import TOKENIZER, ShardedTokens, ShardIndex
from peerjax.data.tokenizer import Tokenizer
from peerjax.errors import ConfigError, DataError

TRAINING_TEXT = "the training text"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Packed text, ready to be batched.

    Attributes:
        tokenizer: the tokenizer that made the tokens.
        train: training rows of all domains. Without `data.weights`, their documents are mixed
            before they are cut into rows.
        validation: validation rows by domain.
        digest: SHA-256 of the documents. It covers their order too, except for packages.
    """

    tokenizer: Tokenizer
    train: Rows
    validation: dict[str, PackedRows]
    digest: str

    @property
    def identity(self) -> dict[str, str | int]:
        """Properties of the text that must not change when a run is continued."""
        return {
            "corpus": self.digest,
            "tokenizer": self.tokenizer.digest,
            "vocabulary": self.tokenizer.vocab_size,
        }


def load_corpus(config: ml_collections.ConfigDict) -> Corpus:
    """Opens the text that `config.data` names, as packed rows.

    Text from packages and files is read, split and tokenized into memory. Shards, which
    `prepare.py` makes, are read during training. Renaming, moving or copying files within their
    domain does not change the rows.

    Raises:
        DataError: if text or tokenizer is missing or unreadable, or a split is too small for a row.
    """
    if config.data.source == "shards":
        return _open_shards(config)
    return _read_text(config)


def load_tokenizer(config: ml_collections.ConfigDict) -> Tokenizer:
    """Loads the tokenizer that `config.data` names, or the one of its shards.

    Raises:
        DataError: if the tokenizer is missing or cannot be used.
    """
    if config.data.source == "shards":
        return Tokenizer.load(str(Path(config.data.pattern) / TOKENIZER))
    return Tokenizer.load(config.data.tokenizer)


def _read_text(config: ml_collections.ConfigDict) -> Corpus:
    data = config.data
    tokenizer = load_tokenizer(config)
    if data.source == "packages":
        documents = without_duplicates(read_packages(data.domains))
        digest = corpus_digest(documents)
    else:
        documents = by_digest(without_duplicates(read_files(data.pattern, data.text_field)))
        digest = digest_in_order(corpus_digest(documents), order_digest(documents))
    parts: dict[str, list[Document]] = {TRAIN: [], VALIDATION: []}
    for document in documents:
        parts[split_of(document, data.validation_fraction)].append(document)

    def pack(part: list[Document], name: str) -> PackedRows:
        return _pack(part, name, tokenizer, data.sequence_length)

    def of_domain(split: str, domain: str) -> PackedRows:
        own = [document for document in parts[split] if document.domain == domain]
        return pack(own, _text_of(split, domain))

    order = np.random.default_rng(config.seed).permutation(len(parts[TRAIN]))
    parts[TRAIN] = [parts[TRAIN][index] for index in order]
    domains = list(dict.fromkeys(document.domain for document in documents))
    train: Rows
    if config.data.weights:
        train = mixed_rows(config.data.weights, domains, partial(of_domain, TRAIN))
    else:
        train = pack(parts[TRAIN], TRAINING_TEXT)
    validation = {domain: of_domain(VALIDATION, domain) for domain in domains}
    return Corpus(tokenizer, train, validation, digest)


def load_text(
    pattern: str, text_field: str, tokenizer: Tokenizer, length: int
) -> dict[str, PackedRows]:
    """Packs all text of the files that a pattern matches, by domain.

    Args:
        pattern: globs of the files, as in `data.pattern`.
        text_field: field of JSON lines that holds the text, as in `data.text_field`.
        tokenizer: the tokenizer to encode with.
        length: tokens of a row.

    Raises:
        DataError: if text is missing, unreadable, or too short for a row.
    """
    documents = without_duplicates(read_files(pattern, text_field))
    domains = dict.fromkeys(document.domain for document in documents)
    return {
        domain: _pack(
            [document for document in documents if document.domain == domain],
            f"the text of domain {domain!r}",
            tokenizer,
            length,
        )
        for domain in domains
    }


def _pack(part: list[Document], name: str, tokenizer: Tokenizer, length: int) -> PackedRows:
    tokens = np.concatenate([*tokenizer.encode([document.text] for document in part)])
    return _rows(tokens, len(part), name, tokenizer, length)


def _open_shards(config: ml_collections.ConfigDict) -> Corpus:
    folder = Path(config.data.pattern)
    index = ShardIndex.load(folder)
    tokenizer = load_tokenizer(config)
    if tokenizer.digest != index.tokenizer:
        raise DataError(
            f"{folder / TOKENIZER} is not the tokenizer that the shards were made with; run the "
            "prepare.py command of the shards again to restore it"
        )
    if config.data.validation_fraction != index.validation_fraction:
        raise DataError(
            f"data.validation_fraction={config.data.validation_fraction}, but the shards in "
            f"{folder} were split by {index.validation_fraction}; use that value or make new shards"
        )

    def pack(split: str, domains: list[str], name: str) -> PackedRows:
        shards = [each for each in index.shards if each.split == split and each.domain in domains]
        tokens = ShardedTokens(folder, shards, index.token_bytes)
        documents = sum(shard.documents for shard in shards)
        return _rows(tokens, documents, name, tokenizer, config.data.sequence_length)

    domains = list(dict.fromkeys(shard.domain for shard in index.shards))

    def of_domain(split: str, domain: str) -> PackedRows:
        return pack(split, [domain], _text_of(split, domain))

    train: Rows
    if config.data.weights:
        train = mixed_rows(config.data.weights, domains, partial(of_domain, TRAIN))
    else:
        train = pack(TRAIN, domains, TRAINING_TEXT)
    validation = {domain: of_domain(VALIDATION, domain) for domain in domains}
    return Corpus(tokenizer, train, validation, index.digest)


def _rows(
    tokens: TokenStream, documents: int, name: str, tokenizer: Tokenizer, length: int
) -> PackedRows:
    rows = PackedRows(tokens, length, tokenizer.end_of_text)
    if not len(rows):
        raise DataError(
            f"{name} has {documents} documents with {len(tokens)} tokens, too few for one row of "
            f"data.sequence_length={length}; give more text or change data.validation_fraction"
        )
    return rows


def _text_of(split: str, domain: str) -> str:
    kind = "training" if split == TRAIN else "validation"
    return f"the {kind} text of domain {domain!r}"


def train_batches(
    config: ml_collections.ConfigDict, rows: Rows, next_batch: int = 0
) -> grain.DatasetIterator:
    """Returns an endless iterator over this process's part of each batch.

    Rows are shuffled again in every epoch. With `data.weights`, every domain has epochs of its own,
    and grain's mix sets the domain of each row by weight. Process p of P takes the p-th of P equal
    blocks of every batch, so a step uses the same rows in the same order for any P. The state of
    the iterator is the number of batches taken, which does not depend on the number of processes
    and workers.
    `next_batch` continues a run from that number.

    Raises:
        ConfigError: if the batch cannot be divided over the devices.
    """
    data, processes = config.data, jax.process_count()
    devices, microbatches = jax.device_count(), config.optimizer.microbatches
    if data.batch_size % (devices * microbatches):
        times = f" times optimizer.microbatches={microbatches}" if microbatches > 1 else ""
        raise ConfigError(
            f"data.batch_size={data.batch_size} is not divisible by the {devices} devices{times}"
        )
    dataset = _order(rows, config.seed).map(rows.__getitem__)
    if processes > 1:
        own = BlockOfBatches(dataset, data.batch_size, jax.process_index(), processes)
        dataset = grain.MapDataset.source(own)
    dataset = dataset.batch(data.batch_size // processes)
    dataset = dataset[next_batch:]
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
    if data.workers:
        options = grain.MultiprocessingOptions(num_workers=data.workers)
        batches = batches.mp_prefetch(options)
    return iter(batches)


class BlockOfBatches(Sequence[Any]):
    """The rows of one block of every batch, as a sequence.

    Args:
        rows: all rows, in the order of the batches.
        batch_size: rows of a batch.
        block: number of the block.
        blocks: number of blocks of a batch. It divides the batch.
    """

    def __init__(self, rows: Sequence[Any], batch_size: int, block: int, blocks: int):
        self._rows, self._batch, self._block = rows, batch_size, block
        self._size = batch_size // blocks

    def __len__(self) -> int:
        return len(self._rows) // self._batch * self._size

    def __getitem__(self, index: Any) -> Any:
        batch, place = divmod(int(index), self._size)
        return self._rows[batch * self._batch + self._block * self._size + place]


def row_order(config: ml_collections.ConfigDict, rows: Rows, reads: int) -> list[int]:
    """Returns the numbers of the rows that training reads first, in order and each once.

    Args:
        config: configuration of the run.
        rows: the training text.
        reads: number of rows that training reads, some of them perhaps several times.
    """
    if len(rows.mix) == 1:
        reads = min(reads, len(rows))  # later epochs read the same rows
    order = _order(rows, config.seed)
    return list(dict.fromkeys(int(order[place]) for place in range(reads)))


def _order(rows: Rows, seed: int) -> grain.MapDataset:
    """Returns the endless order in which row numbers are read."""
    shuffled = [
        grain.MapDataset.source(numbers).seed(seed).shuffle().repeat() for numbers, _ in rows.mix
    ]
    if len(shuffled) == 1:
        return shuffled[0]
    return grain.MapDataset.mix(shuffled, [weight for _, weight in rows.mix])


def validation_rows(rows: PackedRows, count: int | None) -> list[int]:
    """Returns the numbers of at most `count` evenly spread rows; all rows if `count` is `None`.

    The choice is always the same.
    """
    count = len(rows) if count is None else min(count, len(rows))
    return [index * len(rows) // count for index in range(count)]
