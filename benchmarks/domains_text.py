"""Shards of all text packages, with equal parts of every domain, to measure specialisation."""

import json

from benchmarks.result import REPOSITORY
from benchmarks.sweep import ROOT, Settings
from peerjax.data.documents import Document, by_digest, without_duplicates
from peerjax.data.packages import TEXT_PACKAGES, read_packages
from peerjax.data.prepare import Settings as OfPreparation
from peerjax.data.prepare import prepare

FOLDER = ROOT / "domains"
# Of each domain: the documents with the lowest digests. The smallest domain has 2.7 million.
CHARACTERS = 2_500_000
VALIDATION_FRACTION = 0.1


def settings() -> Settings:
    """Returns the fields of a run that reads the shards, after they are made."""
    pattern = ";".join(f"{domain}={FOLDER}/text/{domain}.jsonl" for domain in TEXT_PACKAGES)
    for domain in TEXT_PACKAGES:
        path = FOLDER / "text" / f"{domain}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            lines = (json.dumps({"text": document.text}) + "\n" for document in _part_of(domain))
            unfinished.write_text("".join(lines))
            unfinished.rename(path)
    shards = OfPreparation(
        pattern, tokenizer="bpe_8192", validation_fraction=VALIDATION_FRACTION, shard_mb=8
    )
    prepare(shards, str(FOLDER / "shards"))
    return {
        "data.source": "shards",
        "data.pattern": str((FOLDER / "shards").relative_to(REPOSITORY)),
        "data.tokenizer": "",
        "data.validation_fraction": VALIDATION_FRACTION,
        "data.weights": tuple((domain, 1.0) for domain in TEXT_PACKAGES),
    }


def _part_of(domain: str) -> list[Document]:
    documents, size = [], 0
    for document in by_digest(without_duplicates(read_packages([domain]))):
        if size + len(document.text) <= CHARACTERS:
            documents.append(document)
            size += len(document.text)
    return documents
