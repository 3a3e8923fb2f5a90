"""Bytes that chips exchange in a compiled step, read from the text of the program.

A loop counts as often as it runs, and a conditional as the branch that exchanges less: the other
one is for steps that overflow a capacity. A loop whose number of iterations is not a constant
counts once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
RINGS = ("all-gather", "all-reduce", "reduce-scatter")  # the kinds in which chips pass bytes on
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4}
BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\(")
_CALLS = re.compile(
    r"(?:body|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)


class Count(NamedTuple):
    """How often exchanges run, the bytes that a chip sends, and the bytes of the largest one."""

    times: int = 0
    bytes: int = 0
    largest: int = 0

    def plus(self, other: Count, times: int = 1) -> Count:
        """Adds exchanges that run a number of times."""
        return Count(
            self.times + times * other.times,
            self.bytes + times * other.bytes,
            max(self.largest, other.largest),
        )


Counts = dict[tuple[str, str], Count]  # by kind and axes


class Collective(NamedTuple):
    """Exchanges of one kind between the chips along some axes of the mesh.

    Attributes:
        kind: one of `KINDS`.
        axes: axes of the mesh, such as "expert" or "fsdp, expert".
        times: how often a step runs them.
        bytes: bytes that a chip sends in a step. Rings are assumed: to gather n bytes from g chips,
            a chip sends n (g - 1) / g.
        largest: bytes of the largest array that one of them gives or takes on a chip.
    """

    kind: str
    axes: str
    times: int
    bytes: int
    largest: int


def collectives(program: str, mesh: dict[str, int]) -> list[Collective]:
    """Returns the exchanges of a program, most bytes first.

    Args:
        program: text of the compiled program.
        mesh: sizes of the axes of the mesh, in order.
    """
    computations, entry = _computations(program)
    memo: dict[str, Counts] = {}

    def of(name: str) -> Counts:
        if name not in memo:
            total: Counts = defaultdict(Count)
            memo[name] = total
            for line in computations.get(name, ()):
                for key, times, count in _of_line(name, line):
                    total[key] = total[key].plus(count, times)
        return memo[name]

    def _of_line(name: str, line: str) -> Iterator[tuple[tuple[str, str], int, Count]]:
        found = _INSTRUCTION.match(line)
        if found is None:
            return
        _, shape, operation = found.groups()
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            groups = _first_group(line, math.prod(mesh.values()))
            if len(groups) > 1:
                size = _size(shape, operation)
                if kind == "reduce-scatter":  # its result is a part
                    size *= len(groups)
                sent = _sent(_kind_in(kind, name), size, len(groups))
                yield (_kind_in(kind, name), _axes(groups, mesh)), 1, Count(1, sent, size)
            return
        called = [each for names in _CALLS.findall(line) for each in _names(names)]
        if operation == "conditional":
            branches = [of(each) for each in called]
            cheapest = min(branches, key=lambda branch: sum(each.bytes for each in branch.values()))
            yield from ((key, 1, count) for key, count in cheapest.items())
            return
        times = _iterations(line, computations) if operation == "while" else 1
        for each in called:
            yield from ((key, times, count) for key, count in of(each).items())

    found = [Collective(*key, *count) for key, count in of(entry).items()]
    return sorted(found, key=lambda each: -each.bytes)


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of every computation of a program, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in program.splitlines():
        if begin := _COMPUTATION.match(line):
            name = begin[1]
            found[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            name = ""
        elif name:
            found[name].append(line)
    return found, entry


def _names(names: str) -> list[str]:
    return [name.strip().lstrip("%") for name in names.strip("{}").split(",")]


def _iterations(line: str, computations: dict[str, list[str]]) -> int:
    """Returns how often a loop runs: a count that XLA states, or the constant it is compared to."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    constants = {
        found[1]: int(found[2])
        for each in lines
        if (found := re.match(r"\s+%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)", each))
    }
    for each in lines:
        compared = re.search(r"compare\(([^)]*)\), direction=LT", each)
        names = (
            [name.split()[-1].lstrip("%") for name in compared[1].split(",")] if compared else []
        )
        if names and names[-1] in constants:
            return constants[names[-1]]
    return 1


def _kind_in(kind: str, computation: str) -> str:
    """Returns the kind of an exchange. On TPUs, a fusion scatters the result of an all-reduce."""
    return "reduce-scatter" if "all-reduce-scatter" in computation else kind


def _size(shape: str, operation: str) -> int:
    """Returns the bytes of the result of an exchange."""
    parts = [
        BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
        if kind in BYTES
    ]
    if operation in ("all-gather-start", "reduce-scatter-start", "all-to-all-start"):
        return sum(parts[len(parts) // 2 :])  # operands, then results
    return parts[0] if operation == "collective-permute-start" else sum(parts)


def _sent(kind: str, size: int, group: int) -> int:
    """Returns the bytes that a chip of a ring of `group` chips sends."""
    if kind == "collective-permute":
        return size
    times = 2 if kind == "all-reduce" else 1
    return times * size * (group - 1) // group


def _first_group(line: str, devices: int) -> Sequence[int]:
    """Returns the chips of the first group that exchange with each other."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return _ring(pairs[1])
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(each) for each in explicit[1].split(",")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sizes = (_integers(each) for each in iota.groups()[:2])
        order = _integers(iota[3]) if iota[3] else range(len(sizes))
        return (
            np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape)[0].tolist()
        )
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        kept = set(re.findall(r"'(\w+)'", named[2]))
        index = tuple(slice(None) if name in kept else 0 for name, _ in axes)
        numbers = np.arange(math.prod(int(size) for _, size in axes))
        return numbers.reshape([int(size) for _, size in axes])[index].ravel().tolist()
    return list(range(devices))


def _ring(pairs: str) -> list[int]:
    """Returns the chips that are reached from the first one along pairs `{from,to}`."""
    to: dict[int, int] = dict(map(_integers, re.findall(r"\d+,\d+", pairs)))  # type: ignore[arg-type]
    chip = next(iter(to))
    found = [chip]
    while (chip := to.get(chip, found[0])) != found[0]:
        found.append(chip)
    return found


def _integers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _axes(chips: Sequence[int], mesh: dict[str, int]) -> str:
    """Returns the axes of the mesh along which the places of some chips differ."""
    places = np.stack(np.unravel_index(np.asarray(chips), tuple(mesh.values())))
    differ = np.ptp(places, axis=1) > 0
    return ", ".join(name for name, each in zip(mesh, differ, strict=True) if each)
