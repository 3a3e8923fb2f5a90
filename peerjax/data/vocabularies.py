"""How the tokens of a BPE tokenizer stand for the bytes of a text.

Two kinds are known: byte-level vocabularies, as GPT-2's and those made here, and those of
SentencePiece that fall back to bytes, as Llama 2's.
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
# What newer tokenizers of Llama's have in place of a normalizer.
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
# The alphabet of byte-level vocabularies: printable bytes of Latin-1, and then all others.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(_OTHERS)
}
# Between words, at the end of words, and after ends of lines: where texts are cut.
CUT_WITHIN = re.compile(rf"[^{SPACE}]{SPACE}|\n.", re.DOTALL)


@runtime_checkable
class Vocabulary(Protocol):
    """What differs between kinds.

    Attributes:
        begin: the token that begins every document.
        ends: tokens after which a model's text has ended.
    """

    begin: str
    ends: tuple[str, ...]

    def adapted(self, parts: dict[str, Any]) -> str:
        """The tokenizer's JSON such that a text can be encoded in pieces."""

    def begun(self, piece: str) -> str:
        """What is encoded of the first piece of a document."""

    def bytes_of(self, token: str) -> bytes:
        """The bytes of text that a token stands for."""

    def fault(self, tokenizer: tokenizers.Tokenizer) -> str | None:
        """Why tokens would not stand for the text; `None` if they do."""


def vocabulary_of(parts: Mapping[str, Any]) -> Vocabulary:
    """The kind of a tokenizer, by the fields of its JSON."""
    if not parts["model"].get("byte_fallback"):
        return ByteLevel()
    first = parts.get("pre_tokenizer") or {}
    return ByteFallback(metaspace=first.get("type") == METASPACE["type"])


class ByteLevel:
    """Every byte is a character of the vocabulary's own alphabet."""

    begin = END_OF_TEXT
    ends: tuple[str, ...] = (END_OF_TEXT,)

    def adapted(self, parts: dict[str, Any]) -> str:
        """As it is."""
        return json.dumps(parts)

    def begun(self, piece: str) -> str:
        """As it is."""
        return piece

    def bytes_of(self, token: str) -> bytes:
        """One a character; none for a token that is written in other characters."""
        return bytes(BYTE_OF[each] for each in token) if BYTE_OF.keys() >= set(token) else b""

    def fault(self, tokenizer: tokenizers.Tokenizer) -> str | None:
        """Why tokens would not stand for the bytes of the text, one for one."""
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
                return f"its token {extra.content!r} swallows spaces"
        if end_of_text not in added or not added[end_of_text].special:
            return f"its token {END_OF_TEXT!r} is not special, so that texts could contain it"
        for token, number in vocabulary.items():
            if number not in added and not alphabet >= set(token):
                return f"its token {token!r} is not written in the byte-level alphabet"
        return None


class ByteFallback:
    """Characters, spaces written as "▁"; what has no token is spelt in tokens of one byte each.

    A document gets a space before it. A text's own "▁" are read as spaces.

    Attributes:
        metaspace: whether it is of the newer form: a document that begins with a space gets no
            other before it.
    """

    begin = "<s>"
    ends: tuple[str, ...] = ("<s>", "</s>")

    def __init__(self, metaspace: bool):
        self.metaspace = metaspace

    def adapted(self, parts: dict[str, Any]) -> str:
        """The space before a document is put there by whoever encodes it, and stays in decoding."""
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        rest = {"pre_tokenizer": None, "post_processor": None}
        return json.dumps(parts | {"normalizer": spaces} | rest)

    def begun(self, piece: str) -> str:
        """With its space; an empty document has none."""
        has_one = self.metaspace and piece.startswith((" ", SPACE))
        return piece if has_one or not piece else " " + piece

    def bytes_of(self, token: str) -> bytes:
        """That of a byte token, and else those of its characters, where "▁" is a space."""
        if BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    def fault(self, tokenizer: tokenizers.Tokenizer) -> str | None:
        """Why tokens would not stand for the text as Llama 2's do."""
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
                return f"its token {token!r} reaches over the end of a word or line"
        return None


def _fault_of_model(model: Mapping[str, Any]) -> str | None:
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    if model["dropout"]:
        return "it drops merges by chance"
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return "it marks parts of words"
    return None
