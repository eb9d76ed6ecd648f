"""Read the collectives of a compiled program from its HLO text."""

import collections
import dataclasses
import math
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bits of an item, sides
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      times: runs per step; a loop body runs once per iteration.
      bytes: size of the whole array: the result of a gather, the input of a reduction.
      source: the JAX operation that it comes from.
      group: positions in the mesh of the devices in its first replica group.
    """

    kind: str
    times: int
    bytes: int
    source: str
    group: tuple[int, ...] = ()


def array_bytes(text: str) -> int:
    """Return the total size in bytes of the array shapes in a piece of HLO."""
    return sum(
        int(bits or 8) * math.prod(int(n) for n in dims.split(",") if n) // 8
        for bits, dims in _ARRAY.findall(text)
    )


def collectives(text: str) -> list[Collective]:
    """Return the collectives of a compiled program.

    On TPU, an asynchronous collective can be split over several fusions. The pieces share a channel and
    count once.
    """
    computations, entry = _split(text)
    times = _times(computations, entry)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for instruction, line in lines:
            opcode = match[1] if (match := _OPCODE.search(line)) else ""
            kind = opcode.removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            piece = channel and ("chain_id" in line or "async_collective" in line)
            key = f"{kind} {channel.group(1)}" if piece else f"{name} {instruction}"
            source, group = re.search(r'op_name="([^"]*)"', line), _first_group(line)
            result, _, operands = line.partition(f" {opcode}(")
            size = array_bytes(result)
            if opcode.endswith("-start"):  # (operands, results, ...): the larger half
                size = max((array_bytes(part) for part in _top_level(result)), default=size)
            if kind == "reduce-scatter":
                size = array_bytes(operands.split(")")[0]) or size * max(1, len(group))
            one = Collective(kind, times[name], size, source[1] if source else "", group)
            if key not in found or found[key].bytes < one.bytes:
                found[key] = one
    return list(found.values())


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Return, per kind, the operations in the program, and their runs and bytes per step."""
    result = {kind: {"ops": 0, "runs": 0, "bytes": 0} for kind in KINDS}
    for one in found:
        result[one.kind]["ops"] += 1
        result[one.kind]["runs"] += one.times
        result[one.kind]["bytes"] += one.times * one.bytes
    return result


def _split(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Return {computation: [(instruction, rest of its line)]} and the name of the entry."""
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(1), [])
            entry = header.group(1) if line.startswith("ENTRY") else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append(instruction.groups())
    return computations, entry


def _times(computations, entry: str) -> dict[str, int]:
    """Return how often one run of the program runs each computation."""
    times = collections.defaultdict(int)

    def visit(name, factor):
        times[name] += factor
        for _, line in computations.get(name, ()):
            inner = factor * (_trip_count(line, computations) if " while(" in line else 1)
            for other in set(_CALLED.findall(line)):
                visit(other, inner)

    visit(entry, 1)
    return times


def _trip_count(line: str, computations) -> int:
    """Return a loop's length: as annotated, or the constant that its condition compares with."""
    known = re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', line)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line).group(1)
    inside = " ".join(inner for _, inner in computations.get(condition, ()))
    return max(map(int, re.findall(r"s32\[\][^ ]* constant\((\d+)\)", inside)), default=1)


def _top_level(shape: str) -> list[str]:
    """Split a tuple shape into its elements; nested tuples stay whole."""
    parts, depth, begin = [], 0, 1
    for place, char in enumerate(shape):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            parts.append(shape[begin:place])
            begin = place + 1
    return parts


def _first_group(line: str) -> tuple[int, ...]:
    """Return the devices in the first replica group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return tuple(map(int, listed.group(1).split(",")))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if not iota:
        return ()
    groups, size, dims, order = iota.groups()
    places = np.arange(int(groups) * int(size)).reshape([int(n) for n in dims.split(",")])
    if order:
        places = places.transpose([int(n) for n in order.split(",")])
    return tuple(places.reshape(int(groups), int(size))[0].tolist())
