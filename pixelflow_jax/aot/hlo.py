"""Reads a compiled program (HLO text): its collectives, and how many bytes it moves."""

import collections
import dataclasses
import re

import numpy as np

ITEM_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
ITEM_BYTES |= {"s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of KINDS.
      times: how often a step runs it; loop bodies count by their loop's length.
      bytes: of the whole array, once: what a gather gives, what a reduction takes in.
      source: the JAX operation it comes from.
      group: the devices, by their place in the mesh, of the first of the groups that work together.
    """

    kind: str
    times: int
    bytes: int
    source: str
    group: tuple[int, ...] = ()


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
                size = array_bytes(operands) or size * max(1, len(_first_group(line)))
            origin = source.group(1) if source else ""
            one = Collective(kind, times[name], size, origin, _first_group(line))
            if key not in found or found[key].bytes < one.bytes:
                found[key] = one
    return list(found.values())


# These move no bytes of their own
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
}
_FREE |= {"after-all", "partition-id", "replica-id", "iota", "opt-barrier"}


def hbm_bytes(text: str) -> int:
    """Bytes that one run of a compiled program moves to and from a device's main memory.

    Every instruction reads its operands and writes its result, fusions as one; what the compiler has
    placed in the chip's own memory (`S(1)` in a layout) is free, the copies there are not. Of an array
    that a fusion only takes a slice of, or writes a slice into, as loops over layers do, the slice
    counts. Loop bodies count by their length.
    """
    computations, entry = _split(text)
    times = _times(computations, entry, fusions=False)
    total = 0
    for name, lines in computations.items():
        if not times[name]:
            continue
        shapes = {instruction: _result(line) for instruction, line in lines}
        total += times[name] * sum(_moved(line, shapes, computations) for _, line in lines)
    return total


def _moved(line: str, shapes: dict[str, str], computations) -> int:
    """Bytes of main memory that one instruction reads and writes."""
    opcode = _opcode(line)
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    operands = _operands(line, opcode)
    read = [_main_bytes(shapes.get(name, "")) for name in operands]
    written = _main_bytes(_result(line))
    if opcode.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
        result = _top_level(_result(line))[1] if opcode.endswith("-start") else _result(line)
        read, written = [array_bytes(result) if read[0] else 0], _main_bytes(result)
    elif opcode == "dynamic-update-slice":
        read, written = [0], 2 * min(read[:2])
    elif opcode == "copy-start":  # (where to, where from, ...)
        written = _main_bytes(_top_level(_result(line))[0])
    elif opcode.endswith("-start"):  # its result holds the operands again
        written = sum(read)
    elif opcode == "fusion":
        body = computations.get(re.search(r"calls=%?([\w.\-]+)", line).group(1), ())
        taken, updated = _slices(body)
        read = [min(size, taken.get(place, size)) for place, size in enumerate(read)]
        written = min(written, updated or written)
    return sum(read) + written


def _slices(body: list[tuple[str, str]]) -> tuple[dict[int, int], int]:
    """Of a fusion: bytes of parameters that are only sliced, and those of updates that it ends with."""
    users, parameters, shapes, updated = {}, {}, {}, 0
    for name, line in body:
        opcode = _opcode(line)
        shapes[name] = _result(line)
        if opcode == "parameter":
            parameters[name] = int(re.search(r"parameter\((\d+)\)", line).group(1))
            continue
        operands = _operands(line, opcode)
        for place, operand in enumerate(operands):
            users.setdefault(operand, []).append((opcode, place, name))
        if opcode == "dynamic-update-slice":
            updated += array_bytes(shapes.get(operands[1], ""))
    taken = {}
    for name, number in parameters.items():
        size = 0
        for opcode, place, user in users.get(name, ()):
            if opcode in ("dynamic-slice", "slice") and place == 0:
                size += array_bytes(shapes[user])
            elif opcode != "dynamic-update-slice" or place != 0:
                break
        else:
            taken[number] = size
    return taken, updated


def _opcode(line: str) -> str:
    match = _OPCODE.search(line)
    return match.group(1) if match else ""


def _result(line: str) -> str:
    """The shape that an instruction gives."""
    return line.partition(f" {_opcode(line)}(")[0]


def _operands(line: str, opcode: str) -> list[str]:
    """Names of an instruction's operands."""
    inside = line.partition(f" {opcode}(")[2]
    return _OPERAND.findall(inside.partition("), ")[0])


def _main_bytes(shape: str) -> int:
    """Bytes of a shape's arrays that stand in main memory."""
    return array_bytes(re.sub(r"\b[a-z]+\d*\[[\d,]*\]\{[^{}]*S\(\d+\)[^{}]*\}", "", shape))


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
    opcode = _opcode(line)
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


def _times(computations, entry: str, fusions: bool = True) -> dict[str, int]:
    """How often one run of the program runs each computation; without what stands inside fusions."""
    times = collections.defaultdict(int)

    def visit(name, factor):
        times[name] += factor
        for _, line in computations.get(name, ()):
            if not fusions and _opcode(line) not in ("while", "conditional", "call"):
                continue
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


def _first_group(line: str) -> tuple[int, ...]:
    """The devices in the first group of a collective."""
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
