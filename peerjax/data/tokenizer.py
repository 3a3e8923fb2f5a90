"""The byte-level BPE tokenizer."""

from __future__ import annotations

import hashlib
import importlib.resources
import json as json_module
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from peerjax.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Characters that are encoded as one string; a batch of them is shared out among threads.
PIECE, LONGEST_PIECE = 1 << 16, 1 << 20
BATCH, MOST_PIECES = 1 << 20, 4096
# Where no token of a byte-level tokenizer reaches across: before a single space between words,
# after a single newline between lines.
CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


class Tokenizer:
    """Encodes documents; every document begins with the end-of-text token.

    That token stands nowhere else: where a text spells it out, it is encoded as any other text.

    Attributes:
        json: what it was made from.
        vocab_size: number of entries.
        end_of_text: number of the token that stands between documents; -1 if there is none.
        digest: SHA-256 of the tokenizer's JSON.
    """

    def __init__(self, json: str):
        self._tokenizer = tokenizers.Tokenizer.from_str(json)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json = json
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        number = self._tokenizer.token_to_id(END_OF_TEXT)
        self.end_of_text = -1 if number is None else number
        self.digest = hashlib.sha256(json.encode()).hexdigest()

    @staticmethod
    def load(path: str = "") -> Tokenizer:
        """Loads a tokenizer JSON; the one that comes with peerjax if `path` is empty.

        Raises:
            DataError: if the file is missing, is no tokenizer, has no end-of-text token or is not
                a byte-level BPE tokenizer that keeps every byte.
        """
        if path and not Path(path).is_file():
            raise DataError(f"the tokenizer {path!r} does not exist")
        builtin = importlib.resources.files("peerjax.data") / "bpe_4096.json"
        try:
            json = (Path(path) if path else builtin).read_text(encoding="utf-8")
            tokenizer = Tokenizer(json)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer JSON: {error}") from None
        if tokenizer.end_of_text < 0:
            raise DataError(
                f"{path} has no token {END_OF_TEXT!r} to put between documents; add it as a "
                "special token, or make a tokenizer with python -m peerjax.data.train_tokenizer"
            )
        fault = tokenizer._fault()
        if fault:
            raise DataError(
                f"{path} cannot be used: {fault}; peerjax needs a byte-level BPE tokenizer that "
                "keeps every byte, as python -m peerjax.data.train_tokenizer makes"
            )
        return tokenizer

    def encode(self, documents: Iterable[Iterable[str]]) -> Iterator[Int[np.ndarray, " n"]]:
        """Encodes documents end to end, in memory that does not grow with their sizes.

        Args:
            documents: each as parts of its text, however it is parted.

        Yields:
            int32 tokens; their boundaries say nothing about those of documents.
        """
        batch: list[str] = []
        begins: list[bool] = []
        size = 0
        for blocks in documents:
            for number, piece in enumerate(pieces(blocks)):
                batch.append(piece)
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
        lengths = np.zeros(self.vocab_size, np.int32)
        # The byte-level alphabet writes every byte as one character; added tokens are plain text.
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[number] = len(token)
        for number, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[number] = len(added.content.encode())
        lengths[self.end_of_text] = 0
        return lengths

    def _fault(self) -> str | None:
        """Why tokens would not stand for the bytes of the text, one for one; `None` if they do."""
        parts = json_module.loads(self._tokenizer.to_str())
        model, first = parts["model"], parts["pre_tokenizer"] or {}
        steps: list[dict[str, Any]] = first.get("pretokenizers", [first])
        kinds = [step.get("type") for step in steps]
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        added = self._tokenizer.get_added_tokens_decoder()
        if model["type"] != "BPE":
            return f"its model is {model['type']}, not BPE"
        if model["dropout"]:
            return "it drops merges by chance"
        if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
            return "it marks parts of words"
        if parts["normalizer"]:
            return (
                f"it changes text before it encodes it (normalizer {parts['normalizer']['type']})"
            )
        if "ByteLevel" not in kinds:
            return "its pre_tokenizer is not byte-level"
        for step in steps:
            if step["type"] not in ("ByteLevel", "Split", "Digits"):
                return f"its pre_tokenizer has the step {step['type']}"
            if step.get("behavior") == "Removed" or step.get("add_prefix_space"):
                return "its pre_tokenizer adds or removes characters"
        lacking = len(alphabet - vocabulary.keys())
        if lacking:
            return f"its vocabulary lacks {lacking} of the 256 bytes"
        for number, extra in added.items():
            if number != self.end_of_text and (extra.lstrip or extra.rstrip):
                return f"its token {extra.content!r} swallows spaces"
        if self.end_of_text not in added or not added[self.end_of_text].special:
            return f"its token {END_OF_TEXT!r} is not special, so that texts could contain it"
        for token, number in vocabulary.items():
            if number not in added and not alphabet.issuperset(token):
                return f"its token {token!r} is not written in the byte-level alphabet"
        return None


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Cuts a document where tokens end anyway, into pieces that encode to the same tokens.

    Where a piece begins depends on the text alone, not on how it is parted into blocks. Only a
    megabyte without a place to cut is cut anywhere.

    Args:
        blocks: parts of the text.

    Yields:
        Pieces of some 64 thousand characters, at least one.
    """
    text, start = "", 0
    for block in blocks:
        text, start = text[start:] + block, 0
        while True:
            cut = CUT.search(text, start + PIECE)
            end = start + LONGEST_PIECE
            if cut is not None and cut.start() <= end:
                end = cut.start()
            elif len(text) < end + 2:  # what would tell of a cut at the end may not be there yet
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
