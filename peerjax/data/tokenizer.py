"""The byte-level BPE tokenizer."""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from peerjax.errors import DataError

END_OF_TEXT = "<|endoftext|>"
DOCUMENTS_PER_CALL = 64


class Tokenizer:
    """Encodes documents; every document begins with the end-of-text token.

    Attributes:
        vocab_size: number of entries.
        end_of_text: number of the token that stands between documents.
        digest: SHA-256 of the tokenizer's JSON.
    """

    def __init__(self, json: str):
        self._tokenizer = tokenizers.Tokenizer.from_str(json)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.end_of_text = self._tokenizer.token_to_id(END_OF_TEXT)
        self.digest = hashlib.sha256(json.encode()).hexdigest()

    @staticmethod
    def load(path: str = "") -> Tokenizer:
        """Loads a tokenizer JSON; the one that comes with peerjax if `path` is empty.

        Raises:
            DataError: if the file is missing, is no tokenizer or has no end-of-text token.
        """
        if path and not Path(path).is_file():
            raise DataError(f"data.tokenizer={path!r} does not exist")
        builtin = importlib.resources.files("peerjax.data") / "bpe_4096.json"
        json = (Path(path) if path else builtin).read_text(encoding="utf-8")
        try:
            tokenizer = Tokenizer(json)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer JSON: {error}") from None
        if tokenizer.end_of_text is None:
            raise DataError(f"{path} has no token {END_OF_TEXT!r} to put between documents")
        return tokenizer

    def encode_documents(self, texts: Sequence[str]) -> list[Int[np.ndarray, " length"]]:
        """Encodes texts as int32 arrays, each beginning with the end-of-text token."""
        arrays = []
        for first in range(0, len(texts), DOCUMENTS_PER_CALL):
            batch = texts[first : first + DOCUMENTS_PER_CALL]
            for encoding in self._tokenizer.encode_batch_fast(batch):
                arrays.append(np.array([self.end_of_text, *encoding.ids], np.int32))
        return arrays

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token numbers; end-of-text tokens are left out."""
        return self._tokenizer.decode(list(ids))

    def stream(self) -> Callable[[int], str]:
        """A function that takes tokens one by one and returns the text that each completes.

        A character may need several tokens: it comes with the last of them.
        """
        decoding = decoders.DecodeStream(skip_special_tokens=True)
        return lambda token: decoding.step(self._tokenizer, token) or ""

    def bytes_per_token(self) -> Int[np.ndarray, " vocab_size"]:
        """How many bytes of text each token stands for; 0 for end-of-text."""
        # The byte-level alphabet writes every byte as one character.
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, number in self._tokenizer.get_vocab().items():
            lengths[number] = 0 if number == self.end_of_text else len(token)
        return lengths


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
