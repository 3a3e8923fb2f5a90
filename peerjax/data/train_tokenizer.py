"""Trains a tokenizer on a user's own text.

    python -m peerjax.data.train_tokenizer --output=tok.json --pattern='corpus/**/*.txt'

Without a pattern it makes `peerjax/data/bpe_4096.json` from the training split of the default
text. The same packages give a byte-identical file. This command makes `bpe_8192.json`:

    python -m peerjax.data.train_tokenizer --output=bpe_8192.json --domains=all --vocab_size=8192 \
        --characters_per_domain=4_000_000
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from peerjax.atomic import make_folder, write_atomically
from peerjax.data.documents import TRAIN, by_digest, split_of, without_duplicates
from peerjax.data.packages import DEFAULT_DOMAINS, TEXT_PACKAGES, read_packages
from peerjax.data.plan import make_plan, read_planned, scan
from peerjax.data.text_files import find_files
from peerjax.data.tokenizer import pieces, train_bpe
from peerjax.errors import ConfigError, DataError

BUILTIN_SIZE, OWN_SIZE = 4096, 8192
SMALLEST_SIZE = 257  # every byte, and the end-of-text token


def train_tokenizer(
    output: str,
    pattern: str = "",
    vocab_size: int | None = None,
    text_field: str = "text",
    validation_fraction: float = 0.05,
    domains: Sequence[str] = DEFAULT_DOMAINS,
    characters_per_domain: int | None = None,
) -> None:
    """Trains a byte-level BPE tokenizer and writes its JSON to `output`.

    Text of the validation split and later copies of equal documents are left out.

    Args:
        output: path of the JSON. Its folder is made if it does not exist.
        pattern: globs of the text files, as in `find_files`; empty for the text packages.
        vocab_size: number of entries; `None` for 4096 from the packages and 8192 from files. Little
            text may give fewer.
        text_field: field of JSON lines that holds the text.
        validation_fraction: share of the documents held out for validation.
        domains: domains to read from the text packages.
        characters_per_domain: bound on the text of each of these domains. Documents with the lowest
            digests are taken. `None` means all text.

    Raises:
        ConfigError: if `vocab_size` is too small for the bytes, or `output` is a folder.
        DataError: if text is missing or cannot be used.
        UserError: if `output` cannot be written.
    """
    target = Path(output)
    size = vocab_size or (OWN_SIZE if pattern else BUILTIN_SIZE)
    if size < SMALLEST_SIZE:
        raise ConfigError(
            f"vocab_size={size} is less than {SMALLEST_SIZE} (256 bytes and the end-of-text token)"
        )
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction={validation_fraction} is not in (0, 1)")
    if pattern and (tuple(domains) != DEFAULT_DOMAINS or characters_per_domain is not None):
        raise ConfigError(
            "domains and characters_per_domain are of the text packages; leave them out with a "
            "pattern"
        )
    if characters_per_domain is not None and characters_per_domain < 1:
        raise ConfigError(f"characters_per_domain={characters_per_domain} is less than 1")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file in it")
    make_folder(target.parent)
    if pattern:
        texts = _files(pattern, text_field, validation_fraction)
    else:
        texts = _packages(domains, characters_per_domain, validation_fraction)
    write_atomically(target, train_bpe(texts, size))


def _packages(domains: Sequence[str], limit: int | None, fraction: float) -> Iterator[str]:
    for domain in domains:
        documents = without_duplicates(read_packages([domain]))
        taken = 0
        for document in documents if limit is None else by_digest(documents):
            if split_of(document, fraction) == TRAIN:
                taken += len(document.text)
                if limit is not None and taken > limit:
                    break
                yield document.text


def _files(pattern: str, text_field: str, validation_fraction: float) -> Iterator[str]:
    files = find_files(pattern)
    documents, faults = scan(list(enumerate(files)), text_field, lambda size: None)
    if faults:
        raise DataError(faults[0][1])
    plan = make_plan(files, [documents], [], validation_fraction, shard_bytes=1 << 62)
    for shard in plan.shards:
        if shard.split == TRAIN:
            part = plan.documents.at(slice(shard.first, shard.stop))
            for blocks in read_planned(files, part, text_field, lambda size: None):
                yield from pieces(blocks)


if __name__ == "__main__":
    from absl import flags

    from peerjax import script

    output_flag = flags.DEFINE_string("output", None, "Path of the tokenizer JSON to write.")
    pattern_flag = flags.DEFINE_string(
        "pattern",
        "",
        "Globs of text files, as in prepare.py. By default, the text packages are used.",
    )
    size_flag = flags.DEFINE_integer(
        "vocab_size", None, "Number of entries. Default: 4096 from packages, 8192 from files."
    )
    field_flag = flags.DEFINE_string(
        "text_field", "text", "Field of JSON lines that holds the text."
    )
    fraction_flag = flags.DEFINE_float(
        "validation_fraction",
        0.05,
        "Share of the documents held out for validation. They are not used here.",
    )
    domains_flag = flags.DEFINE_list(
        "domains", list(DEFAULT_DOMAINS), "Domains of the text packages, or all."
    )
    characters_flag = flags.DEFINE_integer(
        "characters_per_domain", None, "Bound on the text of a domain of the packages."
    )
    flags.mark_flag_as_required("output")
    script.run(
        lambda: train_tokenizer(
            str(output_flag.value),
            str(pattern_flag.value),
            size_flag.value,
            str(field_flag.value),
            fraction_flag.value,
            list(TEXT_PACKAGES) if domains_flag.value == ["all"] else domains_flag.value,
            characters_flag.value,
        )
    )
