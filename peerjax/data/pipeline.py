"""From a configuration to batches: documents, tokens, packed rows, grain."""

from __future__ import annotations

import dataclasses

import grain
import jax
import ml_collections
import numpy as np

from peerjax.data.documents import (
    TRAIN,
    VALIDATION,
    Document,
    corpus_digest,
    read_files,
    read_packages,
    split_of,
    without_duplicates,
)
from peerjax.data.packing import PackedRows
from peerjax.data.tokenizer import Tokenizer
from peerjax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Packed text, ready to be batched.

    Attributes:
        tokenizer: what the tokens mean.
        train: rows of all domains mixed.
        validation: rows by domain.
        digest: SHA-256 of the documents.
    """

    tokenizer: Tokenizer
    train: PackedRows
    validation: dict[str, PackedRows]
    digest: str

    @property
    def identity(self) -> dict[str, str | int]:
        """What a continued run must find unchanged."""
        return {
            "corpus": self.digest,
            "tokenizer": self.tokenizer.digest,
            "vocabulary": self.tokenizer.vocab_size,
        }


def load_corpus(config: ml_collections.ConfigDict) -> Corpus:
    """Reads, splits, tokenizes and packs the text that `config.data` names.

    Raises:
        DataError: if text or tokenizer is missing or unreadable, or a split too small for a row.
    """
    data = config.data
    tokenizer = Tokenizer.load(data.tokenizer)
    if data.source == "packages":
        documents = without_duplicates(read_packages(data.domains))
    else:
        documents = without_duplicates(read_files(data.pattern))
    parts: dict[str, list[Document]] = {TRAIN: [], VALIDATION: []}
    for document in documents:
        parts[split_of(document, data.validation_fraction)].append(document)

    def pack(part: list[Document], name: str) -> PackedRows:
        return _pack(part, name, tokenizer, data.sequence_length)

    order = np.random.default_rng(config.seed).permutation(len(parts[TRAIN]))
    domains = dict.fromkeys(document.domain for document in documents)
    validation = {
        domain: pack(
            [document for document in parts[VALIDATION] if document.domain == domain],
            f"the validation text of domain {domain!r}",
        )
        for domain in domains
    }
    train = pack([parts[TRAIN][index] for index in order], "the training text")
    return Corpus(tokenizer, train, validation, corpus_digest(documents))


def load_text(pattern: str, tokenizer: Tokenizer, length: int) -> dict[str, PackedRows]:
    """Packs all text of some files, by domain.

    Args:
        pattern: as `data.pattern`.
        tokenizer: to encode with.
        length: of a row, in tokens.

    Raises:
        DataError: if text is missing or unreadable, or too little for a row.
    """
    documents = without_duplicates(read_files(pattern))
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
    rows = PackedRows(tokenizer.encode_documents([document.text for document in part]), length)
    if not len(rows):
        raise DataError(
            f"{name} has {len(part)} documents with {len(rows.tokens)} tokens, too few for one row "
            f"of data.sequence_length={length}; give more text or change data.validation_fraction"
        )
    return rows


def train_batches(
    config: ml_collections.ConfigDict, rows: PackedRows, next_batch: int = 0
) -> grain.DatasetIterator:
    """An endless iterator over this process's part of each batch.

    Rows are shuffled anew every epoch. Process p of P takes every P-th row, so that a step sees
    the same rows whatever P is. The whole state of the iterator is the number of batches taken,
    the same for any number of processes and workers: a run is continued with `next_batch`.

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
    dataset = grain.MapDataset.source(rows).seed(config.seed).shuffle().repeat()
    dataset = dataset[jax.process_index() :: processes].batch(data.batch_size // processes)
    dataset = dataset[next_batch:]
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
    if data.workers:
        options = grain.MultiprocessingOptions(num_workers=data.workers)
        batches = batches.mp_prefetch(options)
    return iter(batches)


def validation_rows(rows: PackedRows, count: int) -> list[int]:
    """Chooses at most `count` rows, spread evenly over all; always the same ones."""
    count = min(count, len(rows))
    return [index * len(rows) // count for index in range(count)]
