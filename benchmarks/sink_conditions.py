"""Finds conditions under which attention sinks emerge, for `benchmarks.attention_sink`.

Sinks emerge with depth and training, and at a first token that is always the same. Small models are
trained under growing conditions, until the share of sinks is large enough to compare arms.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.result import REPOSITORY
from benchmarks.sweep import ROOT, Settings
from peerjax.data.packages import DEFAULT_DOMAINS, read_packages

RECIPE = "quickstart"
PIECES = ROOT / "pieces"
LEAST_RATE = 0.1  # of the pairs (head, context) that begin a document
# Smaller than the quickstart, with its rates, because there are many long runs. All feed-forward
# layers are sparse, and a token uses 16 experts of each.
COMMON: Settings = {
    "model.width": 64, "model.heads": 4, "mlp.hidden": 256, "peer.num_experts": (64, 64),
    "peer.heads": 2, "peer.experts_per_head": 8, "peer.key_width": 16,
    "monet.num_experts": 32**2, "monet.expert_width": 4, "monet.heads": 2, "monet.top_k": 4,
    "checkpoint.every": 1000, "eval.rows": 96,
}  # fmt: skip


class Condition(NamedTuple):
    """A condition of training.

    Attributes:
        short_documents: whether documents are pieces of about 500 characters. Most contexts then
            begin with the end-of-text token.
        depth: number of layers.
        steps: number of steps.
    """

    short_documents: bool
    depth: int
    steps: int

    def settings(self, kind: str = "peer") -> Settings:
        """Returns the fields of a run without a remedy against sinks."""
        text: Settings = {}
        if self.short_documents:
            pattern = ";".join(
                f"{domain}={PIECES.relative_to(REPOSITORY) / domain}.jsonl"
                for domain in DEFAULT_DOMAINS
            )
            text = {"data.source": "files", "data.pattern": pattern}
        return {
            **COMMON, **text, "model.layers": ((kind, self.depth),), "steps": self.steps,
            "eval.every": self.steps,
        }  # fmt: skip


# In the order in which they are tried.
CONDITIONS = (
    Condition(short_documents=False, depth=4, steps=3000),
    Condition(short_documents=True, depth=4, steps=3000),
    Condition(short_documents=True, depth=8, steps=3000),
    Condition(short_documents=True, depth=8, steps=10_000),
)


def write_pieces(characters: int = 500) -> None:
    """Writes the default text as documents of whole lines, each of at least `characters`."""
    for domain in DEFAULT_DOMAINS:
        path = PIECES / f"{domain}.jsonl"
        if path.exists():
            continue
        PIECES.mkdir(parents=True, exist_ok=True)
        texts = (document.text for document in read_packages([domain]))
        pieces = [piece for text in texts for piece in _pieces_of(text, characters)]
        unfinished = path.with_suffix(".part")
        unfinished.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
        unfinished.rename(path)


def _pieces_of(text: str, characters: int) -> Iterator[str]:
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= characters:
            yield piece
            piece = ""
