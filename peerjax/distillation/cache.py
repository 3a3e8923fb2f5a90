"""Predictions of a teacher in files, so that training needs no teacher.

The folder has `index.json` and shards. A shard is an ArrayRecord file with the predictions for a
number of rows of training text, in the order in which the first epoch reads them. A longer run adds
shards. A shard appears under its name when it is complete.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array

from peerjax.atomic import alone_in, make_folder, write_atomically
from peerjax.data.mixing import Rows
from peerjax.data.pipeline import Corpus, row_order
from peerjax.data.records import count_records, open_records, write_records
from peerjax.data.shards import token_bytes_for
from peerjax.errors import ConfigError, DataError
from peerjax.evaluation.evaluate import whole_batches
from peerjax.inference.trained import Run
from peerjax.model import Decoder
from peerjax.objectives.distillation import Distillation, Prediction, predictions
from peerjax.objectives.soft_targets import TEMPERATURES, SoftTargets
from peerjax.objectives.task import Batch
from peerjax.optim import dequantize
from peerjax.processes import is_first, share
from peerjax.sharding.batches import get_whole
from peerjax.training.checkpoint import CHECKSUMS

INDEX = "index.json"
ROWS_PER_SHARD = 256
# Fields that predictions add to a batch.
IDS, LOG_PROBS, RESTS = "teacher_ids", "teacher_log_probs", "teacher_rests"
LAYER_OUTPUTS = "teacher_outputs"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a cache is of. Two caches of equal contents have equal shards.

    Attributes:
        teacher: SHA-256 of the teacher's checkpoint.
        text: SHA-256 of the training text, and of its tokenizer.
        order: seed that orders the rows, with the weights of domains if there are any.
        sequence_length: L, tokens of a row.
        top_k: number of likely tokens.
        token_bytes: bytes of a token's number.
        outputs: number of layers and width of the outputs, (0, 0) without outputs.
    """

    teacher: str
    text: str
    order: int | str
    sequence_length: int
    top_k: int
    token_bytes: int
    outputs: tuple[int, int]

    @staticmethod
    def of(
        config: ml_collections.ConfigDict, teacher: Run, corpus: Corpus, weights: Distillation
    ) -> Contents:
        """Returns what the cache of a student has to be of."""
        model = teacher.model.config
        assert weights.top_k is not None
        return Contents(
            teacher=_sha256((teacher.checkpoint / CHECKSUMS).read_text()),
            text=_sha256(json.dumps(corpus.identity)),
            order=_order_of(config),
            sequence_length=config.data.sequence_length,
            top_k=weights.top_k,
            token_bytes=token_bytes_for(model.vocab_size),
            outputs=(model.depth, model.width) if weights.reads_outputs else (0, 0),
        )

    @property
    def fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Types and shapes of the fields of a row, in the order of the files."""
        length, k, (layers, width) = self.sequence_length, self.top_k, self.outputs
        fields = {
            IDS: (f"<u{self.token_bytes}", (length, k)),
            LOG_PROBS: ("<f4", (length, k)),
            RESTS: ("<f4", (length, len(TEMPERATURES))),
        }
        return fields | ({LAYER_OUTPUTS: ("<f4", (layers, length, width))} if layers else {})

    @property
    def bytes_per_row(self) -> int:
        """Bytes of the files for each row of text."""
        return sum(_bytes_of(*form) for form in self.fields.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the files for each token of text."""
        return self.bytes_per_row // self.sequence_length


class Cache:
    """A folder with predictions for the first rows of a run.

    Args:
        folder: the folder, which `fill` makes.
        contents: what the cache is of.
        config: configuration of the run.
        rows: its training text.

    Raises:
        ConfigError: if the folder is a cache of something else.
    """

    def __init__(
        self,
        folder: epath.Path,
        contents: Contents,
        config: ml_collections.ConfigDict,
        rows: Rows,
    ):
        self.folder, self.contents = Path(folder), contents
        read = config.steps * config.data.batch_size
        whole = -(-read // ROWS_PER_SHARD) * ROWS_PER_SHARD
        order = row_order(config, rows, whole)
        self._places = {row: place for place, row in enumerate(order)}
        self._shards = [
            order[first : first + ROWS_PER_SHARD] for first in range(0, len(order), ROWS_PER_SHARD)
        ]
        self._records = open_records(
            [self._path(number) for number in range(len(self._shards))],
            [len(shard) for shard in self._shards],
        )
        if (self.folder / INDEX).exists():
            self._check_index()

    def missing(self) -> list[int]:
        """Returns the numbers of the shards that are not there or not complete."""

        def is_complete(number: int) -> bool:
            found = count_records(self._path(number))
            return found == (len(self._shards[number]), self.contents.bytes_per_row)

        return [number for number in range(len(self._shards)) if not is_complete(number)]

    def fill(self, model: Decoder, variables: Any, rows: Rows, mesh: Mesh, batch_size: int) -> None:
        """Makes the shards that are missing, and prints a line for each.

        All processes compute predictions together, and process 0 writes them.

        Args:
            model: the teacher.
            variables: its variables.
            rows: the training text.
            mesh: the current mesh.
            batch_size: rows that the teacher reads at a time.

        Raises:
            UserError: if the folder cannot be used, another process fills it, or a file cannot be
                written.
        """
        missing = self.missing()
        share("the cache is read")  # before process 0 writes
        make_folder(self.folder)
        with alone_in(self.folder) if is_first() else contextlib.nullcontext():
            if is_first():
                text = json.dumps(dataclasses.asdict(self.contents), indent=1)
                write_atomically(self.folder / INDEX, text)
            predict = jax.jit(partial(_fields, model, self.contents))
            variables = jax.jit(dequantize)(variables)
            for done, number in enumerate(missing):
                if is_first():
                    print(
                        f"caching the teacher's predictions, {self.contents.bytes_per_token:,} "
                        f"bytes a token: {done} of {len(missing)} shards",
                        flush=True,
                    )
                batches = whole_batches(rows, self._shards[number], batch_size, mesh)
                found = (
                    self._as_record({name: leaf[place] for name, leaf in fields.items()})
                    for batch, count in batches
                    for fields in [get_whole(predict(variables, batch))]
                    for place in range(count)
                )
                if is_first():
                    write_records(self._path(number), found)
                else:
                    collections.deque(found, maxlen=0)  # takes part in the computation
        share("the cache is complete")

    def read(self, row: int) -> dict[str, np.ndarray]:
        """Returns the fields of a row of text.

        Raises:
            DataError: if the file with the row is damaged.
        """
        try:
            data = self._records[self._places[row]]
        except (RuntimeError, OSError) as error:  # such as a wrong checksum
            raise DataError(
                f"a file in the cache {self.folder} is damaged or missing ({error}); delete it and "
                "run the same command again to restore it"
            ) from None
        fields, begin = {}, 0
        for name, (kind, shape) in self.contents.fields.items():
            size = _bytes_of(kind, shape)
            fields[name] = np.frombuffer(data[begin : begin + size], kind).reshape(shape)
            begin += size
        return {**fields, IDS: fields[IDS].astype(np.int32)}

    def _as_record(self, fields: dict[str, np.ndarray]) -> bytes:
        forms = self.contents.fields
        return b"".join(fields[name].astype(kind).tobytes() for name, (kind, _) in forms.items())

    def _path(self, number: int) -> Path:
        return self.folder / f"teacher-{number:06d}.array_record"

    def _check_index(self) -> None:
        path = self.folder / INDEX
        try:
            fields = json.loads(path.read_text())
            found = Contents(**{**fields, "outputs": tuple(fields["outputs"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}); choose another folder for the cache"
            ) from None
        for field in dataclasses.fields(Contents):
            old, new = (getattr(each, field.name) for each in (found, self.contents))
            if old != new:
                raise ConfigError(
                    f"the cache in {self.folder} has another {field.name} ({old}) than this run "
                    f"({new}); choose another folder for the cache"
                )


def _fields(
    model: Decoder, contents: Contents, variables: Any, batch: dict[str, Array]
) -> dict[str, Array]:
    """Returns the predictions of the teacher for a batch, as fields of its rows."""
    predicted = predictions(model, variables, batch, contents.top_k, any(contents.outputs))
    assert isinstance(predicted.tokens, SoftTargets)
    fields = dict(zip((IDS, LOG_PROBS, RESTS), predicted.tokens, strict=True))
    if predicted.outputs is None:
        return fields
    return {**fields, LAYER_OUTPUTS: predicted.outputs.astype(jnp.float32).swapaxes(0, 1)}


def _order_of(config: ml_collections.ConfigDict) -> int | str:
    weights = config.data.weights
    return f"{config.seed}, weights {json.dumps(weights)}" if weights else config.seed


def _bytes_of(kind: str, shape: tuple[int, ...]) -> int:
    return np.dtype(kind).itemsize * math.prod(shape)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class RowsWithPredictions:
    """Rows of text with the fields of a cache, indexed like the text."""

    def __init__(self, rows: Any, cache: Cache):
        self._rows, self._cache = rows, cache

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def mix(self) -> list[tuple[range, float]]:
        """Numbers and weights of the text's rows."""
        return self._rows.mix

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {**self._rows[index], **self._cache.read(int(index))}


class CachedTeacher(NamedTuple):
    """Predictions that were computed before training.

    Attributes:
        cache: the cache.
        frozen: no arrays.
    """

    cache: Cache
    frozen: Any = ()

    def rows(self, source: Any) -> RowsWithPredictions:
        """Returns a source of rows with the fields of the cache."""
        return RowsWithPredictions(source, self.cache)

    def predict(self, batch: Batch, frozen: Any, weights: Distillation) -> Prediction:
        """Returns the predictions that the batch contains."""
        tokens = SoftTargets(batch[IDS], batch[LOG_PROBS], batch[RESTS])
        outputs = None
        if weights.reads_outputs:
            outputs = batch[LAYER_OUTPUTS].swapaxes(0, 1)
        return Prediction(tokens, outputs)
