"""Prints tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from peerjax.evaluation import ALL, FURTHER_PROBES, PROBES


def print_table(
    console: rich.console.Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints a table. All columns except the first have numbers."""
    table = rich.table.Table(title=title, box=rich.box.SIMPLE, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_probes(console: rich.console.Console, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a table for each probe that has results.

    Figures of texts have one row per text. Figures of layers have one row per layer, for all texts
    together. If the probe is `by_text`, they have one for each text.

    Args:
        console: the console to print to.
        texts: results by text, then by probe.
    """
    for name, of_all in texts[ALL].items():
        if not of_all:
            continue
        probe = {**PROBES, **FURTHER_PROBES}[name]
        if not all(isinstance(value, Mapping) for value in of_all.values()):
            found, first = {text: found[name] for text, found in texts.items()}, "text"
        elif not probe.by_text:
            found, first = of_all, "layer"
        else:
            found, first = {}, "layer, text"
            for layer in of_all:
                found |= {f"{layer}, {text}": each[name][layer] for text, each in texts.items()}
        _print_probe(console, name, probe.columns, first, found)


def _print_probe(
    console: rich.console.Console,
    name: str,
    columns: Mapping[str, tuple[str, str]],
    first: str,
    found: Mapping[str, Mapping[str, Any]],
) -> None:
    columns = columns or {
        figure: (figure.replace("_", " "), ".4g")
        for figure, value in next(iter(found.values())).items()
        if not isinstance(value, Mapping)
    }
    rows = [
        [row, *(format(of_row[figure], form) for figure, (_, form) in columns.items())]
        for row, of_row in found.items()
    ]
    print_table(console, name, (first, *(label for label, _ in columns.values())), rows)
