"""What devices exchange, and move to and from their memory, in one run of a compiled program, read
from the text of its HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices in one run of a program.

    Attributes:
        count: how often it happens, scanned layers counted one by one.
        bytes: sizes of the whole arrays exchanged, by one device, added up.
    """

    count: int
    bytes: int


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
# Groups of one device each, as an axis of size 1 makes.
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
_ARRAY_AND_LAYOUT = re.compile(_ARRAY.pattern + r"(\{[^}]*\})?")
# They move nothing, or something that another instruction stands for.
_UNMOVED = re.compile(
    r"constant|tuple|get-tuple-element|bitcast|opt-barrier|while|conditional|dynamic-update-slice|"
    r"\S+-start"
)


@dataclasses.dataclass
class _Computation:
    """One computation of an HLO module: its exchanges, what it calls how often, and its lines."""

    lines: list[str] = dataclasses.field(default_factory=list)
    found: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)


def collectives(hlo: str) -> dict[str, Collective]:
    """Counts what one device exchanges in one run of a compiled program.

    Args:
        hlo: the optimised module's text, of a TPU, GPU or CPU.

    Returns:
        By kind, its count and bytes, the bodies of loops taken as often as they run. A TPU's
        all-reduce whose result is at once cut into pieces counts as the reduce-scatter that it is.
    """
    module, entry = _read(hlo)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        for kind, size in module[name].found:
            counts[kind] += times
            sizes[kind] += times * size
        for called, calls in module[name].calls.items():
            visit(called, times * calls)

    visit(entry, 1)
    return {kind: Collective(counts[kind], sizes[kind]) for kind in counts}


def memory_traffic(hlo: str) -> int:
    """Bytes that one device moves to and from its main memory in one run, at least.

    Every argument is read, and every array that is made is written and read once, unless it stays
    on the chip (a TPU's VMEM, memory space 1) or is a result. That is less than is moved, where
    something is read again; the compiler's own count ("bytes accessed") is several times more,
    since it takes what stays on the chip for memory too.

    Args:
        hlo: the optimised module's text. What happens inside loops and branches is left out.
    """
    module, entry = _read(hlo)
    arguments = made = results = 0
    for line in module[entry].lines:
        name, shape, operation = _INSTRUCTION.match(line).groups()
        size = _in_main_memory(shape)
        if line.lstrip().startswith("ROOT"):
            results = size
        if operation == "parameter":
            arguments += size
        elif not _UNMOVED.fullmatch(operation) and "dynamic-update-slice" not in name:
            made += size
    return arguments + made + max(made - results, 0)


def _in_main_memory(shape: str) -> int:
    """Bytes of those arrays of a shape or tuple that do not stay on the chip."""
    arrays = _ARRAY_AND_LAYOUT.findall(shape)
    return sum(_bytes(kind, size) for kind, size, layout in arrays if "S(" not in layout)


def _read(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Reads a module: its computations by name, and the name of its entry."""
    module: dict[str, _Computation] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            module[name] = _Computation()
            entry = name if header[1] else entry
        elif _INSTRUCTION.match(line):
            module[name].lines.append(line)
    for name, computation in module.items():
        computation.found = _exchanges(name, computation.lines)
        for line in computation.lines:
            computation.calls.update(_calls(line, module))
    return module, entry


def _calls(line: str, module: dict[str, _Computation]) -> dict[str, int]:
    """The computations that an instruction runs, and how often."""
    if _INSTRUCTION.match(line)[3] != "while":
        branches = [n.strip(" %") for names in _BRANCHES.findall(line) for n in names.split(",")]
        return Counter(_CALLED.findall(line) + branches)
    condition, body = (re.search(rf"{key}=%?([\w.-]+)", line)[1] for key in ("condition", "body"))
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return {body: int(known[1])}
    # A scan counts up to a constant that its condition compares with.
    bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(module[condition].lines))
    return {body: max(map(int, bounds), default=1)}


def _exchanges(name: str, lines: list[str]) -> list[tuple[str, int]]:
    """Kind and bytes of every exchange that begins in the computation called `name`."""
    # A TPU spreads one gather over the computations it overlaps with; only the first one counts.
    if name.startswith("async_collective_fusion") or any("AsyncCollectiveDone" in x for x in lines):
        return []
    instructions = [_INSTRUCTION.match(line).groups() for line in lines]
    shapes = {name: shape for name, shape, _ in instructions}
    found = []
    for line, (_, shape, operation) in zip(lines, instructions, strict=True):
        kind = operation.removesuffix("-start")
        if not re.fullmatch(_KINDS, kind) or _ALONE.search(line):
            continue
        if kind == "reduce-scatter":
            operands = re.search(rf" {operation}\(([^)]*)\)", line)[1].split(", ")
            shape = " ".join(shapes[operand.split("%")[-1]] for operand in operands)
        arrays = [_bytes(*array) for array in _ARRAY.findall(shape) if array[0] != "u32"]
        if operation.endswith("-start") and kind not in ("all-reduce", "reduce-scatter"):
            arrays = arrays[len(arrays) // 2 :]  # Operands come first, then results.
        if name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        found.append((kind, sum(arrays)))
    return found


def _bytes(kind: str, shape: str) -> int:
    """Bytes of an array that HLO writes as `kind[shape]`."""
    bits = 8 if kind == "pred" or kind.startswith("f8") else int(re.search(r"\d+", kind)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
