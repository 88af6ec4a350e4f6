"""A static model of a call's time on a GPU, from its compiled kernels alone. What it says is a prediction, never a measurement.

* One scheduler is simulated over the machine code: the compiler's own stalls and scoreboards, the lanes of each unit, and
  block barriers.
* Search: the processor with the most tiles sets the time. A tile is its steps, each as long as the slowest of the matrix units, the
  instructions and the L2 cache, then what of prologue, refill and epilogue nothing hides.
* Rows (norms, merge), and the kernels of guidance: the slowest of memory, L2 cache, instructions and the chain of dependent loads.
* The bare product: a kernel whose steps are as fast as the machine allows and whose epilogues are hidden, with the best of
  some tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from negengine.bench import sass
from negengine.bench.launches import Launch
from negengine.bench.machines import Latencies, Machine
from negengine.bench.sass import Instruction
from negengine.bench.shapes import Shape

PRODUCT_TILES = ((256, 128), (128, 256), (192, 128), (128, 128), (128, 64), (64, 64))  # of the libraries' kernels

Schedule = Callable[[Launch, Shape, int], int]


@dataclass(frozen=True)
class Tile:
    """Cycles of one tile of the search.

    Attributes:
        step: of ``BLOCK_K`` channels, nothing else running on the processor.
        limit: of a step, what one processor needs for it however many blocks it runs.
        exposed: what a tile adds that its own block does not hide.
        busy: of ``exposed``, what other blocks of the processor cannot use.
    """

    step: float
    limit: float
    exposed: float
    busy: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of the parts of a call, and of the bare product of the same sources and references.

    Attributes:
        fill: mean load of the processors over the largest.
        ratio: bare product over whole call; 1 is the speed of light of an exact search.
    """

    norms: float
    match: float
    merge: float
    product: float
    launches: int
    launching: float
    fill: float

    @property
    def whole(self) -> float:
        return self.norms + self.match + self.merge + self.launches * self.launching

    @property
    def ratio(self) -> float:
        return self.product / self.whole


# --- one scheduler -----------------------------------------------------------------------------------------------


def cycles(code: Sequence[Instruction], warps: int, machine: Machine, narrow: int = 0, wide: int = 0) -> float:
    """Until ``warps`` warps of one scheduler, which begin together, have executed straight-line code. Branches are not taken.

    Args:
        narrow, wide: cycles of a load from global memory, of single numbers and of rows; those of the L2 cache if zero.
    """
    loaded = (narrow or machine.latencies.cache, wide or machine.latencies.cache)
    costs = [(unit(one), occupied(one, machine), latency(one, machine.latencies, loaded[one.wide])) for one in code]
    ready = [0.0] * warps
    position = [0] * warps
    boards = [[0.0] * 6 for _ in range(warps)]
    groups: list[list[float]] = [[] for _ in range(warps)]  # when each group of asynchronous products is done
    free: dict[str, float] = {}
    issue = 0.0
    barriers: dict[int, list[float]] = {}
    while True:
        possible = [
            (max(ready[w], *(boards[w][b] for b in code[position[w]].waits), 0.0), w)
            for w in range(warps)
            if position[w] < len(code)
        ]
        if not possible:
            return max([*ready, *free.values()])
        earliest, w = min(
            (max(t, issue, 0.0 if _queued(code[position[w]]) else free.get(costs[position[w]][0], 0.0)), w) for t, w in possible
        )
        one, (which, cost, result) = code[position[w]], costs[position[w]]
        done = max(earliest, free.get(which, 0.0)) + cost
        issue, free[which] = earliest + 1, done
        ready[w] = earliest + max(one.stall, 1)
        if one.results is not None:
            boards[w][one.results] = max(done, earliest + result)
        if one.reads is not None:
            boards[w][one.reads] = max(boards[w][one.reads], done + machine.latencies.operands)
        if _queued(one) and "gsb" in one.operands:
            groups[w].append(done)
        elif one.name == "WARPGROUP.DEPBAR.LE":
            pending = int(one.operands.split(",")[1], 16)
            if len(groups[w]) > pending:
                ready[w] = max(ready[w], groups[w][-1 - pending])
        elif one.name.startswith("BAR.") and not one.name.startswith("BAR.ARV"):
            arrived = barriers.setdefault(position[w], [])
            arrived.append(earliest)
            ready[w] = math.inf
            if len(arrived) == warps:
                for other in range(warps):
                    ready[other] = max(arrived) + machine.latencies.barrier
        position[w] += 1


def _queued(one: Instruction) -> bool:
    """Products that are handed to the matrix units without waiting for them."""
    return one.multiplies and one.operation[1:] == "GMMA"


def steady(code: Sequence[Instruction], warps: int, machine: Machine) -> float:
    """Cycles of one passage of a loop that runs long."""
    few, more = 2, 4
    near = machine.latencies.near
    return (cycles([*code] * more, warps, machine, near) - cycles([*code] * few, warps, machine, near)) / (more - few)


FULL = ("FADD", "FMUL", "FFMA", "IMAD", "FADD2", "FMUL2", "FFMA2")
QUICK = ("CS2R", "R2UR")
SPECIAL = ("MUFU", "F2I", "I2F", "F2F", "I2I", "F2FP", "I2FP", "FRND", "FLO", "POPC", "BREV", "REDUX", "S2R", "S2UR", *QUICK)
SHARED = ("LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "SYNCS", "LDGSTS", "LDC", "VOTE", "VOTEU", "ELECT", "MATCH")
GLOBAL = ("LDG", "STG", "ATOM", "ATOMG", "RED", "UTMALDG", "LD", "ST")
TENSOR = ("LDTM", "STTM")
CONTROL = ("BRA", "EXIT", "BAR", "WARPSYNC", "BSSY", "BSYNC", "NOP", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "FENCE", "MEMBAR", "YIELD")


def unit(one: Instruction) -> str:
    """The unit of a scheduler that executes an instruction."""
    if one.multiplies:
        return "matrix"
    for name, operations in (("full", FULL), ("special", SPECIAL), ("shared", SHARED), ("global", GLOBAL), ("tensor", TENSOR)):
        if one.operation in operations:
            return name
    if one.operation in CONTROL:
        return "control"
    return "uniform" if one.operation.startswith("U") else "integer"


def occupied(one: Instruction, machine: Machine) -> float:
    """Cycles for which an instruction of a warp occupies its unit."""
    which = unit(one)
    if which == "matrix":
        return _product_cycles(one, machine)
    if which == "full":  # integer products have half the lanes
        return 32 / (machine.integer if one.operation == "IMAD" else machine.vector)
    if which == "integer":
        return 32 / machine.integer
    if which == "shared":  # 128 bytes per cycle and processor
        moved = {"LDSM": 512 if ".4" in one.name else 256 if ".2" in one.name else 128}.get(one.operation, 32 * _bytes(one))
        return moved * machine.schedulers / 128 if one.operation in ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS") else 2
    if which == "global":  # 64 bytes per cycle and processor; of an asynchronous copy of a tile, the issue alone
        return 1 if one.operation == "UTMALDG" else max(32 * _bytes(one) * machine.schedulers / 64, 4)
    if which == "special":
        return 2 if one.operation in QUICK else 8
    return 4 if which == "tensor" else 1 if which == "control" else 2


def _bytes(one: Instruction) -> int:
    return next((bits // 8 for bits in (128, 64, 16, 8) if f".{bits}" in one.name or f".U{bits}" in one.name), 4)


def _product_cycles(one: Instruction, machine: Machine) -> float:
    """Of a matrix instruction in the units of one scheduler; those of a whole processor are counted by the tile, not here."""
    if one.operation.startswith("UTC"):
        return 1
    shape = one.name.split(".")[1]
    kind = "fp8" if "E4M3" in one.name or one.operation == "QGMMA" else "int8" if ".S8" in one.name or ".U8" in one.name else "bf16"
    each = machine.products[kind] / machine.schedulers
    if "x" in shape:  # of four warps, as 64x128x16: a quarter of the rows in each scheduler
        m, n, k = (int(side) for side in shape.split("x"))
        return 2 * m * n * k / machine.schedulers / each
    m, n, k = 16, 8, int(shape[3:]) if shape.startswith("168") else int(shape[4:])
    return 2 * m * n * k / each


def latency(one: Instruction, latencies: Latencies, loaded: int) -> float:
    which = unit(one)
    if which == "global":
        return latencies.copy if one.operation == "UTMALDG" else loaded
    if which == "matrix":
        return latencies.tensor
    return {"shared": latencies.shared, "special": latencies.special, "tensor": latencies.tensor}.get(which, 6)


# --- search ------------------------------------------------------------------------------------------------------


def tile_of(launch: Launch, dtype: str, machine: Machine) -> Tile:
    """Cycles of a tile of a search kernel.

    Args:
        dtype: of the products.
    """
    parts = sass.search_of(sass.instructions(sass.disassembled(launch.cubin)))
    return tile(parts, launch, dtype, machine)


def tile(parts: sass.Search, launch: Launch, dtype: str, machine: Machine) -> Tile:
    m, n, k = (launch.values[f"BLOCK_{side}"] for side in "MNK")
    itemsize = 2 if dtype in ("bf16", "fp16") else 1
    warps = max(launch.warps // machine.schedulers, 1)
    matrix = 2 * m * n * k / machine.products[dtype] / machine.sustained
    moved = (m + n) * k * itemsize / (machine.cache / machine.clock / machine.processors)
    step = max(matrix, moved, steady(parts.step, warps, machine))
    issued = _issued(parts.step, warps, machine)
    around = (*parts.prologue, *parts.epilogue)
    near = machine.latencies.near  # weights and table lie in few lines: the first load brings them
    exposed = cycles(parts.epilogue, warps, machine, near) + machine.latencies.cache - near + filled(parts, warps, moved, machine)
    return Tile(step, max(matrix, moved, issued), exposed, _issued(around, warps, machine))


def filled(parts: sass.Search, warps: int, moved: float, machine: Machine) -> float:
    """Cycles from the beginning of a tile until its first products can begin.

    Args:
        moved: cycles in which the operands of a step arrive.
    """
    copies = [i for i, one in enumerate(parts.prologue) if one.copies]
    near = machine.latencies.near
    prologue = cycles(parts.prologue, warps, machine, near)
    if not copies:
        return prologue
    first = copies[: max(sum(one.copies for one in parts.step), 1)][-1]
    return max(prologue, cycles(parts.prologue[: first + 1], warps, machine, near) + machine.latencies.copy + moved)


def _issued(code: Sequence[Instruction], warps: float, machine: Machine) -> float:
    """Cycles for which the busiest part of a scheduler is occupied by so many warps, matrix units apart."""
    units: dict[str, float] = {"issue": len(code)}
    for one in code:
        if not one.multiplies:
            units[unit(one)] = units.get(unit(one), 0.0) + occupied(one, machine)
    return warps * max(units.values())


def resident(launch: Launch, machine: Machine) -> int:
    """Blocks that a processor runs at once."""
    allocated = math.ceil(launch.registers / 8) * 8 * 32 * launch.warps
    reserved = launch.shared + 1024  # which the system takes from each block
    return max(min(machine.blocks, 64 // launch.warps, machine.registers // allocated, machine.shared // reserved), 1)


def match_seconds(tile: Tile, steps: int, longest: int, blocks: int, machine: Machine) -> float:
    """Of the search.

    Args:
        steps: of a tile.
        longest: tiles of the program that has most.
        blocks: that run at once on a processor, each of which hides what the others expose.
    """
    alone = steps * tile.step + tile.exposed
    together = blocks * (steps * tile.limit + tile.busy)
    return longest * max(alone, together) / machine.clock


def dealt(launch: Launch, shape: Shape, at_once: int) -> int:
    """Tiles of the program that has most, as ``match_kernel`` deals them.

    Args:
        at_once: programs that run at once.
    """
    from negengine.kernels.triton import occupancy

    return occupancy.longest(occupancy.Work(*tiles_of(launch, shape), launch.values["GROUP"], at_once), launch.values["splits"])


def tiles_of(launch: Launch, shape: Shape) -> tuple[int, int]:
    """Row tiles of the images that have a reference, which is one each, and key tiles of the reference."""
    rows, columns = launch.values["BLOCK_M"], launch.values["BLOCK_N"]
    return (shape.images - 1) * math.ceil(shape.tokens / rows), math.ceil(shape.tokens / columns)


# --- rows and the bare product -----------------------------------------------------------------------------------


def rows_seconds(launch: Launch, rows: int, moved: float, machine: Machine) -> float:
    """Of norms or merge.

    Args:
        rows: that it goes through.
        moved: bytes to and from device memory.
    """
    parts = sass.rows_of(sass.instructions(sass.disassembled(launch.cubin)))
    return rows_time(parts, launch, rows, moved, machine)


def rows_time(parts: sass.Rows, launch: Launch, rows: int, moved: float, machine: Machine) -> float:
    passages = math.ceil(launch.values["D"] * launch.values["VECTOR"] / launch.values["BLOCK_D"])
    return streamed_time(parts, launch, math.ceil(rows / launch.values["ROWS"]), passages, moved, machine)


def streamed_time(parts: sass.Rows, launch: Launch, programs: int, passages: int, moved: float, machine: Machine) -> float:
    """Of a kernel that does something once for each program and goes ``passages`` times through its loops."""
    share = launch.warps / machine.schedulers  # of a block, on each scheduler: blocks of one warp are spread over all of them
    warps, blocks = math.ceil(share), resident(launch, machine)
    rounds = math.ceil(programs / (machine.processors * blocks))
    memory = moved / (machine.memory * machine.streamed)
    accesses = sum(one.wide for one in parts.once) + passages * sum(one.wide for loop in parts.loops for one in loop)
    cache = programs * accesses * launch.warps * 32 * 16 / machine.cache
    inner = sum(_issued(loop, share, machine) for loop in parts.loops)
    busy = (_issued(parts.once, share, machine) + passages * inner) * math.ceil(programs / machine.processors)
    # the first access brings a row from memory, later ones find it in the L2 cache
    far = machine.latencies.memory
    chain = cycles(parts.once, warps, machine, wide=0 if parts.loops else far)
    chain += passages * sum(cycles(loop, warps, machine, wide=0 if i else far) for i, loop in enumerate(parts.loops))
    return max(memory, cache, max(busy, rounds * chain) / machine.clock)


def product_seconds(shape: Shape, dtype: str, machine: Machine) -> float:
    """Of the bare product: main loops that never stop, epilogues that the next tile hides, the best of ``PRODUCT_TILES``."""
    rows, columns, depth = (shape.images - 1) * shape.tokens, shape.tokens, shape.channels

    def seconds(m: int, n: int) -> float:
        tiles = math.ceil(rows / m) * math.ceil(columns / n)
        one = 2 * m * n * depth / machine.products[dtype] / machine.sustained
        ends = machine.latencies.copy + machine.latencies.memory + 2 * m * n * machine.clock * machine.processors / machine.cache
        return (math.ceil(tiles / machine.processors) * one + ends) / machine.clock

    moved = 2 * (rows * depth + columns * depth + rows * columns)
    return max(min(seconds(m, n) for m, n in PRODUCT_TILES), moved / (machine.memory * machine.streamed)) + machine.launch


def predict(
    found: Sequence[Launch],
    shape: Shape,
    dtype: str,
    machine: Machine,
    schedule: Schedule = dealt,
    share: float = 0.5,
) -> Prediction:
    """Of one call in 16 bits whose launches are ``norms``, ``match`` and ``merge``.

    Args:
        schedule: tiles of the program that has most, of the search's launch, the call, and how many programs run at once.
        share: of the tokens that are merged.
    """
    kernels = {launch.name.removesuffix("_kernel"): launch for launch in found}
    if sorted(kernels) != ["match", "merge", "norms"] or len(found) != 3:
        raise ValueError(f"expected one launch each of norms, match and merge, not {[launch.name for launch in found]}")
    match = kernels["match"]
    steps = math.ceil(shape.channels / match.values["BLOCK_K"])
    at_once = min(match.programs, machine.processors * resident(match, machine))
    blocks = math.ceil(at_once / machine.processors)
    longest = schedule(match, shape, at_once)
    sources, row = (shape.images - 1) * shape.tokens, shape.channels * 2
    return Prediction(
        norms=rows_seconds(kernels["norms"], shape.tokens, shape.tokens * row, machine),
        match=match_seconds(tile_of(match, dtype, machine), steps, longest, blocks, machine),
        merge=rows_seconds(kernels["merge"], sources, ((1 + share) * sources + shape.tokens) * row, machine),
        product=product_seconds(shape, dtype, machine),
        launches=len(found),
        launching=machine.launch,
        fill=math.prod(tiles_of(match, shape)) / (longest * blocks * machine.processors),
    )


def sensitivity(
    found: Sequence[Launch], shape: Shape, dtype: str, machine: Machine, schedule: Schedule = dealt
) -> dict[str, float]:
    """How far the predicted ratio moves when one assumption is a fifth worse: assumption -> change."""
    slower = {field.name: round(1.25 * getattr(machine.latencies, field.name)) for field in fields(machine.latencies)}
    worse: dict[str, dict[str, Any]] = {
        "clock": {"clock": machine.clock * 0.8},
        "L2 cache": {"cache": machine.cache * 0.8},
        "memory": {"memory": machine.memory * 0.8},
        "main loop": {"sustained": machine.sustained * 0.8},
        "launch": {"launch": machine.launch * 1.25},
        "latencies": {"latencies": Latencies(**slower)},
    }
    usual = predict(found, shape, dtype, machine, schedule).ratio
    return {
        name: predict(found, shape, dtype, replace(machine, **change), schedule).ratio - usual for name, change in worse.items()
    }
