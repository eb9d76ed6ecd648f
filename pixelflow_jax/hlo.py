"""Reads a compiled program (HLO text): which collectives run how often, and how many bytes they move."""

import collections
import dataclasses
import re

ITEM_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
ITEM_BYTES |= {"s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of KINDS.
      times: how often a step runs it; loop bodies count by their loop's length.
      bytes: of the whole array, once: what a gather gives, what a reduction takes in.
      source: the JAX operation it comes from.
    """

    kind: str
    times: int
    bytes: int
    source: str


def array_bytes(text: str) -> int:
    """Bytes of all arrays whose shapes stand in a piece of HLO."""
    total = 0
    for dtype, dims in _ARRAY.findall(text):
        size = ITEM_BYTES.get(dtype, 0)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    On TPU one asynchronous collective can stand in pieces in several fusions; pieces share a channel
    and count once.
    """
    computations, entry = _split(text)
    times = _times(computations, entry)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for instruction, line in lines:
            kind, opcode = _kind(line)
            if kind is None or not times[name]:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            piece = channel and ("chain_id" in line or "async_collective" in line)
            key = f"{kind} {channel.group(1)}" if piece else f"{name} {instruction}"
            source = re.search(r'op_name="([^"]*)"', line)
            result, _, operands = line.partition(f" {opcode}(")
            operands = operands.split(")")[0]
            size = array_bytes(result)
            if opcode.endswith("-start"):  # (operands, results, ...): the larger half
                size = max((array_bytes(part) for part in _top_level(result)), default=size)
            if kind == "reduce-scatter":
                size = array_bytes(operands) or size * _group_size(line)
            one = Collective(kind, times[name], size, source.group(1) if source else "")
            if key not in found or found[key].bytes < one.bytes:
                found[key] = one
    return list(found.values())


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
    """For each kind: how many stand in the program, how often a step runs them, bytes a step."""
    result = {}
    for kind in KINDS:
        ours = [one for one in found if one.kind == kind]
        result[kind] = {
            "ops": len(ours),
            "runs": sum(one.times for one in ours),
            "bytes": sum(one.times * one.bytes for one in ours),
        }
    return result


def _kind(line: str) -> tuple[str | None, str]:
    match = _OPCODE.search(line)
    opcode = match.group(1) if match else ""
    kind = opcode.removesuffix("-start")
    return (kind, opcode) if kind in KINDS else (None, opcode)


def _split(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Computations as lists of (instruction's name, the rest of its line), and the entry's name."""
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
    """How often one run of the program runs each computation."""
    times = collections.defaultdict(int)

    def visit(name, factor):
        times[name] += factor
        for _, line in computations.get(name, ()):
            called = set(_CALLED.findall(line))
            inner = factor * (_trip_count(line, computations) if " while(" in line else 1)
            for other in called:
                visit(other, inner)

    visit(entry, 1)
    return times


def _trip_count(line: str, computations) -> int:
    """The length of a loop: as annotated, or the constant that its condition compares with."""
    known = re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', line)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line).group(1)
    constants = [
        int(value)
        for _, inner in computations.get(condition, ())
        for value in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", inner)
    ]
    return max(constants, default=1)


def _top_level(shape: str) -> list[str]:
    """The elements of a tuple shape; nested tuples stay whole."""
    parts, depth, begin = [], 0, 1
    for place, char in enumerate(shape):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            parts.append(shape[begin:place])
            begin = place + 1
    return parts


def _group_size(line: str) -> int:
    """Devices in one group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(iota.group(1)) if iota else 1
