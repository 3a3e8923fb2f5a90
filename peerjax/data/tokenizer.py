"""The BPE tokenizer."""

from __future__ import annotations

import codecs
import hashlib
import importlib.resources
import json as json_module
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from peerjax.data.vocabularies import END_OF_TEXT, vocabulary_of
from peerjax.errors import DataError

# A piece is encoded as one string: its usual and its largest length, in characters. A batch is
# encoded by several threads: its largest size, in characters and in pieces.
PIECE, LONGEST_PIECE = 1 << 16, 1 << 20
BATCH, MOST_PIECES = 1 << 20, 4096
# Places that no token crosses: before a single space between words, and after a single newline
# between lines.
CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


# Tokenizers that come with peerjax: of the default text, and of all text packages.
DEFAULT, BUILTIN = "bpe_4096", ("bpe_4096", "bpe_8192")


class Tokenizer:
    """Encodes documents. Every document begins with the end-of-text token.

    That token occurs nowhere else. If a text contains its name, the name is encoded like any other
    text. `peerjax.data.vocabularies` describes the kinds of tokenizers.

    Attributes:
        json: the JSON that the tokenizer was made from.
        vocab_size: number of entries.
        end_of_text: id of the token that begins every document; -1 if there is none.
        ends: ids of the tokens that end the text of a model.
        digest: SHA-256 of the tokenizer's JSON.
    """

    def __init__(self, json: str):
        tokenizers.Tokenizer.from_str(json)  # fails here, with a clear message
        parts = json_module.loads(json)
        self._vocabulary = vocabulary_of(parts)
        self._tokenizer = tokenizers.Tokenizer.from_str(self._vocabulary.adapted(parts))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json = json
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        number = self._tokenizer.token_to_id(self._vocabulary.begin)
        self.end_of_text = -1 if number is None else number
        ends = map(self._tokenizer.token_to_id, self._vocabulary.ends)
        self.ends = frozenset(number for number in ends if number is not None)
        self._bytes = self._bytes_of_tokens()
        self.digest = hashlib.sha256(json.encode()).hexdigest()

    @staticmethod
    def load(path: str = "") -> Tokenizer:
        """Loads a tokenizer JSON, or one that comes with peerjax.

        Args:
            path: path of a JSON; a name in `BUILTIN`; or empty, for the first of these.

        Raises:
            DataError: if the file is missing, is not a tokenizer, has no end-of-text token, or is
                not a BPE tokenizer that keeps every byte.
        """
        path = path or DEFAULT
        own = importlib.resources.files("peerjax.data") / f"{path}.json"
        file = own if path in BUILTIN else Path(path)
        if not file.is_file():
            raise DataError(
                f"the tokenizer {path!r} does not exist; give a path or one of {', '.join(BUILTIN)}"
            )
        try:
            json = file.read_text(encoding="utf-8")
            tokenizer = Tokenizer(json)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer JSON: {error}") from None
        if tokenizer.end_of_text < 0:
            raise DataError(
                f"{path} has no token {tokenizer._vocabulary.begin!r} to put between documents; "
                "add it as a special token, or make a tokenizer with "
                "python -m peerjax.data.train_tokenizer"
            )
        fault = tokenizer._vocabulary.fault(tokenizers.Tokenizer.from_str(json))
        if fault:
            raise DataError(
                f"{path} cannot be used: {fault}; peerjax needs a BPE tokenizer that keeps every "
                "byte, such as Llama 2's or one made by python -m peerjax.data.train_tokenizer"
            )
        return tokenizer

    def encode(self, documents: Iterable[Iterable[str]]) -> Iterator[Int[np.ndarray, " n"]]:
        """Encodes documents one after another, in memory that does not grow with their sizes.

        Args:
            documents: the parts of each document's text. The choice of parts does not matter.

        Yields:
            Arrays of int32 tokens. Their boundaries are unrelated to those of documents.
        """
        batch: list[str] = []
        begins: list[bool] = []
        size = 0
        for blocks in documents:
            for number, piece in enumerate(pieces(blocks)):
                batch.append(piece if number else self._vocabulary.begun(piece))
                begins.append(number == 0)
                size += len(piece)
                if size >= BATCH or len(batch) == MOST_PIECES:
                    yield self._encode_pieces(batch, begins)
                    batch, begins, size = [], [], 0
        yield self._encode_pieces(batch, begins)

    def _encode_pieces(self, batch: Sequence[str], begins: Sequence[bool]) -> Int[np.ndarray, " n"]:
        ids: list[int] = []
        encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for begin, encoding in zip(begins, encodings, strict=True):
            if begin:
                ids.append(self.end_of_text)
            ids += encoding.ids
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens.

        Bytes that are not UTF-8, such as a character cut off at the end, become "\ufffd". The
        library's own decoding of `ByteFallback` tokens also replaces all bytes next to them.
        """
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")

    def stream(self) -> Callable[[int], str]:
        """Returns a function that takes tokens one by one and returns the text each completes.

        A character may need several tokens. The last of them completes it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self._bytes[token])

    def bytes_per_token(self) -> Int[np.ndarray, " vocab_size"]:
        """Returns the number of bytes of text of each token; 0 for special tokens."""
        return np.array([*map(len, self._bytes)], np.int32)

    def stays_below(self, size: int) -> bool:
        """Whether every text is encoded to ids below `size`.

        Ids from `size` on must be those of added special tokens.
        """
        own = self._tokenizer.get_vocab(with_added_tokens=False).values()
        added = self._tokenizer.get_added_tokens_decoder().items()
        beyond = [extra for number, extra in added if number >= size]
        return max(own) < size and self.end_of_text < size and all(x.special for x in beyond)

    def _bytes_of_tokens(self) -> list[bytes]:
        found = [b""] * self.vocab_size
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            found[number] = self._vocabulary.bytes_of(token)
        for number, added in self._tokenizer.get_added_tokens_decoder().items():
            found[number] = b"" if added.special else added.content.encode()
        return found


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Cuts a document into pieces that encode to the same tokens as the whole document.

    The document is cut where tokens end anyway. The cuts depend on the text alone, not on its
    division into blocks. If 2^20 characters have no such place, the document is cut after them.

    Args:
        blocks: parts of the text.

    Yields:
        At least one piece. Pieces have about 64 thousand characters.
    """
    text, start = "", 0
    for block in blocks:
        text, start = text[start:] + block, 0
        while True:
            end = start + LONGEST_PIECE
            # Two characters decide on a cut at the end. A longer search would take quadratic time.
            cut = CUT.search(text, start + PIECE, end + 2)
            if cut is not None and cut.start() <= end:
                end = cut.start()
            elif len(text) < end + 2:  # the characters that decide may be in the next block
                break
            yield text[start:end]
            start = end
    yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Trains a byte-level BPE tokenizer and returns its JSON."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()
