"""Machine code of NVIDIA GPUs, read: instructions, loops, and what a kernel does once, in each tile and in each step.

Every 128-bit instruction carries the compiler's own schedule: how many cycles the warp waits before its next instruction, which
of six scoreboards the instruction sets when its result is there, and which it waits for (Jia and others, "Dissecting the NVIDIA
Volta GPU Architecture via Microbenchmarking", 2018; later architectures kept the layout).
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MATRIX = ("HMMA", "IMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
COPIES = ("UTMALDG", "LDGSTS")  # global to shared memory, without passing through registers
SHORTEST = 3  # jumps from the first instruction of a loop to its last
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;?\s*/\*\s*0x[0-9a-f]{16}\s*\*/")
_HIGH = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/\s*$")
_LABEL = re.compile(r"^(\.L\w+):")


class Unreadable(ValueError):
    """The machine code has not the form that this file knows."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp.

    Attributes:
        name: the operation with its modifiers, as ``LDG.E.128``.
        predicate: of a conditional instruction, as ``!P0``; empty if it is always executed.
        stall: cycles before the warp's next instruction may issue.
        results: the scoreboard that is set once its result is there, if any.
        reads: the scoreboard that is set once its operands are read, if any.
        waits: scoreboards that must be set before it may issue.
        target: the address to which it branches.
    """

    address: int
    name: str
    operands: str
    predicate: str
    stall: int
    results: int | None
    reads: int | None
    waits: tuple[int, ...]
    target: int | None

    @property
    def operation(self) -> str:
        return self.name.split(".")[0]

    @property
    def multiplies(self) -> bool:
        return self.operation in MATRIX

    @property
    def copies(self) -> bool:
        return self.operation in COPIES

    @property
    def wide(self) -> bool:
        """Whether a warp moves 16 bytes for each thread to or from global memory."""
        return self.operation in ("LDG", "STG") and ".128" in self.name


@dataclass(frozen=True)
class Loop:
    """Instructions ``first`` to ``last``, of which the last jumps back."""

    first: int
    last: int

    def of(self, code: Sequence[Instruction]) -> Sequence[Instruction]:
        return code[self.first : self.last + 1]

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class Search:
    """The parts of a search kernel.

    Attributes:
        step: one passage of the main loop: the products of ``BLOCK_K`` channels.
        prologue, epilogue: what every tile does before and after its steps.
        prefetched: whether the copies of the next tile start before the epilogue of this one.
    """

    step: tuple[Instruction, ...]
    prologue: tuple[Instruction, ...]
    epilogue: tuple[Instruction, ...]
    prefetched: bool


@dataclass(frozen=True)
class Rows:
    """The parts of a kernel that goes through rows: what it does once, and its loops over the channels of a row."""

    once: tuple[Instruction, ...]
    loops: tuple[tuple[Instruction, ...], ...]


def tool(name: str) -> Path:
    """A program that Triton brings with it."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"Triton {triton.__version__} brings no {name}: {path} is missing; 3.6 and 3.7 have it")
    return path


@functools.cache
def disassembled(cubin: bytes) -> str:
    """What ``nvdisasm`` prints of a compiled kernel, with the encoding of each instruction."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool("nvdisasm"), "-c", "-hex", path], capture_output=True, text=True, check=True).stdout


@functools.cache
def registers(cubin: bytes) -> int:
    """Registers of each thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"REG:(\d+)", usage)[-1])


@functools.cache
def instructions(text: str) -> tuple[Instruction, ...]:
    """The instructions of the first kernel in the output of ``nvdisasm -c -hex``."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found: list[tuple[int, str, str, str, int]] = []
    last = None
    for line in text.split("\t.section\t.text.")[-1].splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif start := _LINE.match(line):
            address = int(start[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting, last = [], (address, start[3], start[4], start[2] or "")
        elif last is not None and (high := _HIGH.match(line)):
            found.append((*last, int(high[1], 16)))
            last = None
    if not found:
        raise Unreadable("found no instruction with its encoding in what nvdisasm printed")
    return tuple(_instruction(*one, labels) for one in found)


def _instruction(address: int, name: str, operands: str, predicate: str, high: int, labels: dict[str, int]) -> Instruction:
    control = high >> 41
    results, reads = (board if board < 6 else None for board in ((control >> 5) & 7, (control >> 8) & 7))
    waits = tuple(i for i in range(6) if control >> 11 + i & 1)
    target = None
    if name.split(".")[0] in ("BRA", "JMP") and (label := re.search(r"`\((\.L\w+)\)", operands)):
        target = labels.get(label[1])
    return Instruction(address, name, operands, predicate, control & 15, results, reads, waits, target)


# --- control flow ------------------------------------------------------------------------------------------------


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Natural loops, outer ones first; without those of a few instructions, which only ask again whether something is there."""
    index = {one.address: i for i, one in enumerate(code)}
    blocks = _blocks(code, index)
    dominators = _dominators(blocks)
    found: dict[int, int] = {}
    for start, (end, following) in blocks.items():
        for header in following:
            if header in dominators[start] and header <= start and end - header >= SHORTEST:
                found[header] = max(found.get(header, 0), end)
    return sorted((Loop(*pair) for pair in found.items()), key=lambda loop: (loop.first, -loop.last))


def _blocks(code: Sequence[Instruction], index: dict[int, int]) -> dict[int, tuple[int, list[int]]]:
    """Basic blocks that can be reached: start -> end and the blocks that may follow."""
    jumps = [i for i, one in enumerate(code) if one.operation in ("BRA", "JMP", "EXIT", "RET", "BREAK")]
    starts = {0, *(i + 1 for i in jumps if i + 1 < len(code))}
    starts |= {index[one.target] for one in code if one.target is not None}
    ordered = sorted(starts)
    blocks: dict[int, tuple[int, list[int]]] = {}
    for start, following in zip(ordered, [*ordered[1:], len(code)], strict=True):
        last = code[following - 1]
        after = [index[last.target]] if last.target is not None else []
        conditional = bool(last.predicate) or re.match(r"!?U?P\d", last.operands) is not None
        if (conditional or following - 1 not in jumps) and following < len(code):
            after.append(following)
        blocks[start] = (following - 1, after)
    reached, todo = set(), [0]
    while todo:
        if (block := todo.pop()) not in reached:
            reached.add(block)
            todo += blocks[block][1]
    return {start: blocks[start] for start in ordered if start in reached}


def _dominators(blocks: dict[int, tuple[int, list[int]]]) -> dict[int, set[int]]:
    before: dict[int, list[int]] = {start: [] for start in blocks}
    for start, (_, following) in blocks.items():
        for block in following:
            before[block].append(start)
    found = {start: set(blocks) for start in blocks} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for start in blocks:
            if start and before[start]:
                new = {start} | set.intersection(*(found[b] for b in before[start]))
                changed |= new != found[start]
                found[start] = new
    return found


def skipped(code: Sequence[Instruction], within: Loop) -> list[Loop]:
    """Stretches that a conditional branch inside of ``within`` jumps over."""
    index = {one.address: i for i, one in enumerate(code)}
    found = []
    for i in range(within.first, within.last + 1):
        target = code[i].target
        if target is not None and i < index[target] - 1 and index[target] <= within.last + 1:
            found.append(Loop(i + 1, index[target] - 1))
    return found


def search_of(code: Sequence[Instruction]) -> Search:
    """The parts of a search kernel, whose innermost loop with matrix instructions is the main loop.

    Around it lies the loop over tiles. Where the compiler made one loop of the two, the main loop jumps over what it does once
    for each tile: stretches without products or copies, of which one takes maxima.
    """
    found = loops(code)
    multiplying = [loop for loop in found if any(one.multiplies for one in loop.of(code))]
    main = next((a for a in multiplying if not any(a.holds(b) for b in multiplying)), None)
    if main is None:
        raise Unreadable(f"no loop with matrix instructions among {len(found)} loops")
    apart = [part for part in skipped(code, main) if not any(one.multiplies or one.copies for one in part.of(code))]
    apart = [part for part in apart if not any(other.holds(part) for other in apart)]
    if any(_reduces(part.of(code)) for part in apart):
        once = {i for part in apart for i in range(part.first, part.last + 1)}
        step = tuple(code[i] for i in range(main.first, main.last + 1) if i not in once)
        return Search(step, (), tuple(code[i] for i in sorted(once)), True)
    around = [loop for loop in found if loop.holds(main)]
    if not around:
        raise Unreadable("no loop over tiles around the main loop, and no stretch of the main loop that takes maxima")
    tile = min(around, key=lambda loop: loop.last - loop.first)
    prologue, epilogue = code[tile.first : main.first], code[main.last + 1 : tile.last + 1]
    return Search(tuple(main.of(code)), tuple(prologue), tuple(epilogue), not any(one.copies for one in prologue))


def _reduces(code: Sequence[Instruction]) -> bool:
    return any(one.operation.startswith("FMNMX") for one in code)


def rows_of(code: Sequence[Instruction]) -> Rows:
    """The parts of a kernel that goes through rows, on the path of ordinary input.

    The rare path (searching again for rows of extreme magnitude) is the largest stretch that is jumped over, that holds a loop
    within a loop, and that does not hold the first access to a row. Where a row fits into the registers there is no loop over it.
    """
    found = loops(code)
    wide = [i for i, one in enumerate(code) if one.wide]
    if not wide:
        raise Unreadable("no access to rows, 16 bytes for each thread")
    inner = [loop for loop in found if not any(loop.holds(other) for other in found)]
    row_loops = [loop for loop in inner if any(loop.first <= i <= loop.last for i in wide)]
    nests = [loop for loop in found if loop not in inner]
    rare = [
        part
        for part in skipped(code, Loop(0, len(code) - 1))
        if any(part.first <= nest.first and nest.last <= part.last for nest in nests) and not part.first <= wide[0] <= part.last
    ]
    dropped = max(rare, key=lambda part: part.last - part.first, default=Loop(0, -1))
    usual = [loop for loop in row_loops if not dropped.first <= loop.first <= dropped.last]
    gone = {i for part in [*usual, dropped] for i in range(part.first, part.last + 1)}
    reached = _blocks(code, {one.address: i for i, one in enumerate(code)})
    once = tuple(code[i] for start, (end, _) in reached.items() for i in range(start, end + 1) if i not in gone)
    return Rows(once, tuple(tuple(loop.of(code)) for loop in usual))
