"""Prints tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from peerjax.evaluation import ALL, PROBES


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

    Figures of texts have one row per text. Figures of layers are for all texts together.

    Args:
        console: the console to print to.
        texts: results by text, then by probe.
    """
    for name, of_all in texts[ALL].items():
        if not of_all:
            continue
        by_row = all(isinstance(value, Mapping) for value in of_all.values())
        found = of_all if by_row else {text: found[name] for text, found in texts.items()}
        _print_probe(console, name, "layer" if by_row else "text", found)


def _print_probe(
    console: rich.console.Console, name: str, first: str, found: Mapping[str, Mapping[str, Any]]
) -> None:
    figures = list(next(iter(found.values())))
    columns = PROBES[name].columns or {
        figure: (figure.replace("_", " "), ".4g") for figure in figures
    }
    rows = [
        [row, *(format(of_row[figure], form) for figure, (_, form) in columns.items())]
        for row, of_row in found.items()
    ]
    print_table(console, name, (first, *(label for label, _ in columns.values())), rows)
