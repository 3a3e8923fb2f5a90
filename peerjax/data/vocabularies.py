"""Maps the tokens of a BPE tokenizer to the bytes of a text.

Two kinds are supported: byte-level vocabularies, such as GPT-2's and those made here, and
SentencePiece vocabularies with byte fallback, such as Llama 2's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import tokenizers

END_OF_TEXT = "<|endoftext|>"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"
# Newer Llama tokenizers have this pre-tokenizer instead of a normalizer.
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
# The alphabet of byte-level vocabularies: printable bytes of Latin-1, and then all others.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(_OTHERS)
}
# Matches a token that crosses a place where texts are cut: the end of a word or of a line.
CUT_WITHIN = re.compile(rf"[^{SPACE}]{SPACE}|\n.", re.DOTALL)


@runtime_checkable
class Vocabulary(Protocol):
    """Interface of a kind of vocabulary.

    Attributes:
        begin: the token that begins every document.
        ends: the tokens that end the text of a model.
    """

    begin: str
    ends: tuple[str, ...]

    def adapted(self, parts: dict[str, Any]) -> str:
        """Returns the tokenizer's JSON, changed so that a text can be encoded in pieces."""

    def begun(self, piece: str) -> str:
        """Returns the text to encode for the first piece of a document."""

    def bytes_of(self, token: str) -> bytes:
        """Returns the bytes of text that a token represents."""

    def fault(self, tokenizer: tokenizers.Tokenizer) -> str | None:
        """Returns why the tokens would not represent the text; `None` if they do."""


def vocabulary_of(parts: Mapping[str, Any]) -> Vocabulary:
    """Returns the kind of a tokenizer's vocabulary, from the fields of its JSON."""
    if not parts["model"].get("byte_fallback"):
        return ByteLevel()
    first = parts.get("pre_tokenizer") or {}
    return ByteFallback(metaspace=first.get("type") == METASPACE["type"])


class ByteLevel:
    """Writes every byte as a character of the vocabulary's own alphabet."""

    begin = END_OF_TEXT
    ends: tuple[str, ...] = (END_OF_TEXT,)

    def adapted(self, parts: dict[str, Any]) -> str:
        """Returns the JSON unchanged."""
        return json.dumps(parts)

    def begun(self, piece: str) -> str:
        """Returns the piece unchanged."""
        return piece

    def bytes_of(self, token: str) -> bytes:
        """Returns one byte per character, or no bytes for a token with other characters."""
        return bytes(BYTE_OF[each] for each in token) if BYTE_OF.keys() >= set(token) else b""

    def fault(self, tokenizer: tokenizers.Tokenizer) -> str | None:
        """Returns why the tokens would not represent the bytes of the text one to one."""
        parts = json.loads(tokenizer.to_str())
        model, first = parts["model"], parts["pre_tokenizer"] or {}
        steps: list[dict[str, Any]] = first.get("pretokenizers", [first])
        kinds = [step.get("type") for step in steps]
        alphabet = BYTE_OF.keys()
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        added = tokenizer.get_added_tokens_decoder()
        end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        if problem := _fault_of_model(model):
            return problem
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
            if number != end_of_text and (extra.lstrip or extra.rstrip):
                return f"its token {extra.content!r} removes the spaces next to it"
        if end_of_text not in added or not added[end_of_text].special:
            return f"its token {END_OF_TEXT!r} is not special, so that texts could contain it"
        for token, number in vocabulary.items():
            if number not in added and not alphabet >= set(token):
                return f"its token {token!r} is not written in the byte-level alphabet"
        return None


class ByteFallback:
    """Writes spaces as "▁", and characters without a token as tokens of one byte each.

    A space is put before each document. A "▁" in a text is read as a space.

    Attributes:
        metaspace: whether the tokenizer has the newer form, in which a document that begins with a
            space gets no second one.
    """

    begin = "<s>"
    ends: tuple[str, ...] = ("<s>", "</s>")

    def __init__(self, metaspace: bool):
        self.metaspace = metaspace

    def adapted(self, parts: dict[str, Any]) -> str:
        """Returns a JSON that only writes spaces as "▁".

        `begun` puts the space before a document, and decoding keeps it.
        """
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        rest = {"pre_tokenizer": None, "post_processor": None}
        return json.dumps(parts | {"normalizer": spaces} | rest)

    def begun(self, piece: str) -> str:
        """Returns the piece with the space of its document; an empty document has no space."""
        has_one = self.metaspace and piece.startswith((" ", SPACE))
        return piece if has_one or not piece else " " + piece

    def bytes_of(self, token: str) -> bytes:
        """Returns the byte of a byte token, or the bytes of its characters, with "▁" as a space."""
        if BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    def fault(self, tokenizer: tokenizers.Tokenizer) -> str | None:
        """Returns why the tokens would not represent the text as Llama 2's do."""
        parts = json.loads(tokenizer.to_str())
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        added = tokenizer.get_added_tokens_decoder()
        if problem := _fault_of_model(parts["model"]):
            return problem
        first, normalizer = parts["pre_tokenizer"], parts["normalizer"] or {}
        if first and first != METASPACE:
            return f"it has a pre_tokenizer ({first['type']}) that is not Llama's"
        steps = {
            (step["type"], step.get("prepend") or step.get("content"))
            for step in normalizer.get("normalizers", [normalizer])
            if step
        }
        if steps != (set() if first else {("Prepend", SPACE), ("Replace", SPACE)}):
            return f"its normalizer does not just write spaces as {SPACE!r} and put one in front"
        for extra in added.values():
            if self.metaspace and not extra.special:  # a text that begins with it gets no space
                return f"its added token {extra.content!r} is not special"
        lacking = 256 - sum(bool(BYTE.fullmatch(token)) for token in vocabulary)
        if lacking:
            return f"its vocabulary lacks {lacking} of the 256 bytes"
        for token in self.ends:
            number = tokenizer.token_to_id(token)
            if number is None or number not in added or not added[number].special:
                return f"it has no special token {token!r}"
        for token, number in vocabulary.items():
            if number not in added and CUT_WITHIN.search(token):
                return f"its token {token!r} crosses the end of a word or line"
        return None


def _fault_of_model(model: Mapping[str, Any]) -> str | None:
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    if model["dropout"]:
        return "it drops merges at random"
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return "it marks parts of words"
    return None
