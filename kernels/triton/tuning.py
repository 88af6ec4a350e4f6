"""Launch configurations: pure functions of shape, dtype and architecture; measured ones only where somebody asked for them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negengine.kernels.files import JsonFile, cache_folder, fingerprint_of
from negengine.kernels.triton.occupancy import Work, best_splits, longest

KIB, MIB = 1024, 1024**2
WORKSPACE = 2 * MIB  # bytes of candidates, at most
CROWD = 4  # parts of the keys in a quantised search
MOST_SPLITS = 32  # that are simulated: with more, a first call would wait for the simulation
WAVES = 4  # units of work per program that runs at once, where a compiled graph must hold for every size
REDUCTION = 160  # channels whose multiplication takes as long as reducing a tile: instructions counted, on sm_90


@dataclass(frozen=True)
class Architecture:
    """What a configuration depends on, and which searches it has.

    Attributes:
        name: ``sm_90`` and the like, ``gfx942``, or ``interpreter``.
        shared: bytes of shared memory that one block may have.
        processors: multiprocessors or compute units.
        cache: bytes of the last cache that all processors share.
    """

    name: str
    shared: int
    processors: int
    cache: int = 16 * MIB

    @property
    def descriptors(self) -> bool:
        """Whether it has a tensor memory accelerator worth using."""
        return self.name in ("sm_90", "sm_100")

    @property
    def appetite(self) -> float:
        """Rows and columns of a tile, in parallel, below which the cache feeds the matrix units too slowly."""
        return 85.0 if self.descriptors else 64.0

    @property
    def partial_sums(self) -> bool:
        """Whether its matrix units add products of fp8 with 13 fraction bits, so that long sums must be made of short ones."""
        return self.name in ("sm_89", "sm_90", "sm_120", "interpreter")

    @property
    def searches(self) -> tuple[str, ...]:
        """``fp8`` where matrix units have it; ``int8`` where they have it at twice the speed of 16 bits."""
        quantised = {"sm_80": ("int8",), "sm_86": ("int8",), "sm_90": ("fp8",), "sm_100": ("fp8",), "generic": ()}
        return ("auto", "exact", *quantised.get(self.name, ("int8", "fp8")))


@dataclass(frozen=True)
class Shape:
    """A call: ``B`` images of ``T`` queries against ``K`` images of ``M`` keys, ``D`` channels.

    ``updated``: images that have references, where the host knows; else all but one are taken to have some.
    """

    B: int
    K: int
    T: int
    M: int
    D: int
    updated: int | None = None

    @property
    def images(self) -> int:
        return self.updated if self.updated is not None else max(self.B - 1, 1)


@dataclass(frozen=True)
class MatchConfig:
    """A tile of the search and how it is run.

    Attributes:
        halvings: of a tile before it is reduced, to save registers.
        group: row tiles that share their key tiles in the cache.
        persistent: as many programs as run at once, each with several units of work; otherwise one program per unit.
        descriptors: tiles are read by the tensor memory accelerator.
        flatten: the next tile is read while this one is reduced.
        specialize: some warps only load.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    halvings: int = 0
    group: int = 8
    persistent: bool = False
    descriptors: bool = False
    flatten: bool = False
    specialize: bool = False

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory for the operands in flight."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages

    def resident(self, itemsize: int, architecture: Architecture) -> int:
        """Programs that a processor runs at once, by shared memory and by registers, of which a thread takes up to 255."""
        return max(1, min(architecture.shared // (self.shared(itemsize) + KIB), 8 // self.num_warps))


@dataclass(frozen=True)
class RowsConfig:
    """Of the kernels that go through rows: norms and merge."""

    rows: int
    block_d: int
    num_warps: int
    block_n: int = 0  # of the exact search in the merge
    block_k: int = 0


# Known devices; the shared memory is what a block may opt in to.
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", 163 * KIB, 108, 40 * MIB),
        Architecture("sm_86", 99 * KIB, 84, 6 * MIB),
        Architecture("sm_89", 99 * KIB, 128, 72 * MIB),
        Architecture("sm_90", 227 * KIB, 132, 50 * MIB),
        Architecture("sm_100", 227 * KIB, 148, 126 * MIB),
        Architecture("sm_120", 99 * KIB, 170, 96 * MIB),
        Architecture("gfx942", 64 * KIB, 304, 256 * MIB),
    )
}
GENERIC = Architecture("generic", 48 * KIB, 64)
INTERPRETER = Architecture("interpreter", 48 * KIB, 1)

# For 16 bits, the better first where as many programs would be as busy. On an H100, 128 x 256, which reduces fewer rows for one
# product, takes up to 13 % less time than 256 x 128, and up to 17 % less than two blocks of 128 x 128 per processor, which hide
# each other's reductions; at sdxl-32 they differ by 8 %. The other devices are predicted.
_HALF = {
    "sm_80": (MatchConfig(128, 128, 64, 8, 4), MatchConfig(64, 128, 64, 4, 3)),
    "sm_86": (MatchConfig(128, 128, 64, 8, 3), MatchConfig(64, 64, 64, 4, 3)),
    "sm_89": (MatchConfig(128, 128, 64, 8, 3), MatchConfig(64, 64, 64, 4, 3)),
    "sm_90": (MatchConfig(128, 256, 64, 8, 4), MatchConfig(256, 128, 64, 8, 4), MatchConfig(128, 128, 64, 4, 3)),
    "sm_100": (MatchConfig(128, 256, 64, 8, 4, halvings=2), MatchConfig(128, 128, 64, 4, 4, halvings=2)),  # 256 x 128 spills
    "sm_120": (MatchConfig(128, 128, 64, 8, 3), MatchConfig(64, 64, 64, 4, 3)),
    "gfx942": (MatchConfig(128, 128, 64, 8, 2), MatchConfig(64, 64, 64, 4, 2)),
    "generic": (MatchConfig(64, 64, 32, 4, 3),),
    "interpreter": (MatchConfig(32, 32, 32, 4, 1),),
}
# rows in 8 bits, int8 or fp8: smaller tiles than for 16 bits, as two candidates a lane take registers
_QUANTISED = {
    "sm_80": (MatchConfig(128, 64, 128, 8, 3), MatchConfig(64, 64, 128, 4, 3)),
    "sm_86": (MatchConfig(128, 64, 128, 8, 3), MatchConfig(64, 64, 128, 4, 3)),
    "sm_89": (MatchConfig(128, 64, 128, 8, 3), MatchConfig(64, 64, 128, 4, 3)),
    "sm_90": (MatchConfig(128, 128, 128, 8, 4), MatchConfig(128, 128, 128, 8, 4)),  # partial sums take registers
    "sm_100": (MatchConfig(256, 128, 128, 8, 3, halvings=3), MatchConfig(128, 128, 128, 8, 4, halvings=2)),
    "sm_120": (MatchConfig(128, 64, 128, 8, 3), MatchConfig(64, 64, 128, 4, 3)),
    "gfx942": (MatchConfig(128, 128, 64, 8, 2), MatchConfig(64, 64, 64, 4, 2)),
    "generic": (MatchConfig(64, 64, 64, 4, 3), MatchConfig(64, 64, 64, 4, 3)),
    "interpreter": (MatchConfig(32, 32, 32, 4, 1), MatchConfig(32, 32, 32, 4, 1)),
}
# for callers that cannot pass descriptors: with pointers the larger tiles above spill
_POINTERS = {
    ("sm_90", 1): MatchConfig(128, 128, 128, 8, 4),
    ("sm_90", 2): MatchConfig(256, 128, 64, 8, 4),
    ("sm_100", 1): MatchConfig(128, 128, 128, 8, 4, halvings=2),
    ("sm_100", 2): MatchConfig(128, 128, 64, 8, 3, halvings=2),
}
# rows that do not start on 16 bytes cannot be copied asynchronously: they pass through registers, entry by entry
_UNALIGNED = MatchConfig(64, 64, 32, 4, 2)
# float32 is multiplied as such, on the plain units of NVIDIA: bound by registers, not by the tile
_SINGLE = {
    "gfx942": (MatchConfig(128, 128, 32, 8, 2), MatchConfig(64, 64, 32, 4, 2)),
}
_SINGLE_DEFAULT = (MatchConfig(64, 64, 16, 4, 3), MatchConfig(64, 64, 16, 4, 3))


def known_configs(itemsize: int, architecture: Architecture, aligned: bool, descriptors: bool = True) -> tuple[MatchConfig, ...]:
    """The tiles that a call may use, the better first where they keep the device as busy.

    Args:
        itemsize: bytes of an element; 1 if quantised.
        aligned: whether every row starts on 16 bytes.
        descriptors: whether the caller can pass any.
    """
    if architecture == INTERPRETER:
        return _HALF["interpreter"]
    if itemsize == 4:
        return _SINGLE.get(architecture.name, _SINGLE_DEFAULT)
    if not aligned:
        return (_UNALIGNED,)
    if architecture.descriptors and not descriptors:
        return (_POINTERS[architecture.name, itemsize],)
    known = _QUANTISED if itemsize == 1 else _HALF
    found = known.get(architecture.name, known["generic"])
    if architecture.descriptors:
        # partial sums and two candidates per lane leave no registers to read ahead with
        return tuple(dataclasses.replace(c, descriptors=True, persistent=True, flatten=itemsize > 1) for c in found)
    return found


def work(shape: Shape, config: MatchConfig, architecture: Architecture, itemsize: int) -> Work:
    """The call in tiles of a configuration."""
    row_tiles, key_tiles = -(-shape.T // config.block_m), -(-shape.M // config.block_n)
    return Work(
        shape.images * row_tiles,
        shape.K * key_tiles,
        config.group,
        architecture.processors * config.resident(itemsize, architecture),
    )


def match_config(shape: Shape, itemsize: int, architecture: Architecture, aligned: bool, descriptors: bool = True) -> MatchConfig:
    """The configuration of the search that should be done first.

    Args:
        descriptors: whether the caller can pass any.
    """
    if not concrete(shape):  # a compiled graph for every size: comparisons would tie it to one
        return known_configs(itemsize, architecture, aligned, descriptors)[0]
    return _cheapest(shape, itemsize, architecture, aligned, descriptors)


@functools.lru_cache(maxsize=4096)  # 60 microseconds each, which every call would take again
def _cheapest(shape: Shape, itemsize: int, architecture: Architecture, aligned: bool, descriptors: bool) -> MatchConfig:
    """By the time of the longest program, in channels of a tile: a prediction, which chose best or within 2 % on an H100.

    Channels are multiplied, slower where the tile is small for the cache's bandwidth; to them comes what the tile's reduction
    costs, unless a second program on the same processor multiplies meanwhile.
    """

    def cost(config: MatchConfig) -> float:
        programs, area = config.resident(itemsize, architecture), config.block_m * config.block_n
        rounds = longest(work(shape, config, architecture, itemsize), splits(shape, config, architecture, itemsize))
        hungry = max(1.0, architecture.appetite * (1 / config.block_m + 1 / config.block_n))
        return rounds * area * (programs * shape.D * hungry + (REDUCTION if programs == 1 else 0))

    return min(known_configs(itemsize, architecture, aligned, descriptors), key=cost)


def concrete(shape: Shape) -> bool:
    """Whether the sizes are numbers and not a compiler's symbols."""
    return all(type(n) is int for n in (shape.B, shape.K, shape.T, shape.M, shape.D))


def splits(shape: Shape, config: MatchConfig, architecture: Architecture, itemsize: int, slots: int = 1) -> int:
    """Into how many parts the keys of a row tile are divided, at most as many as one image has key tiles.

    ``slots`` scores and indices leave a part. Where that is more than one, which candidates crowd each other out depends on the
    parts, so there are ``CROWD`` of them whatever the device and the memory: the same input gives the same bits.
    """
    key_tiles = -(-shape.M // config.block_n)
    if slots > 1:
        return min(CROWD, key_tiles)
    if concrete(shape):
        return _simulated(shape, config, architecture, itemsize)
    wanted = -(-WAVES * architecture.processors // (shape.images * -(-shape.T // config.block_m)))
    return max(1, min(wanted, _most_splits(shape, key_tiles)))


def _most_splits(shape: Shape, key_tiles: int) -> int:
    return max(1, min(WORKSPACE // (8 * shape.B * shape.T), key_tiles, MOST_SPLITS))


@functools.lru_cache(maxsize=4096)
def _simulated(shape: Shape, config: MatchConfig, architecture: Architecture, itemsize: int) -> int:
    tiles, most = work(shape, config, architecture, itemsize), _most_splits(shape, -(-shape.M // config.block_n))
    active = tiles.programs * config.block_m * shape.D * itemsize  # bytes of rows, if every program had a row tile of its own
    return best_splits(tiles, min(most, -(-active // (architecture.cache * 6 // 10))), most)


def programs(shape: Shape, config: MatchConfig, architecture: Architecture, itemsize: int, parts: int) -> int:
    """Of the search's grid: at most one per unit of work, if persistent at most as many as run at once."""
    units = shape.B * -(-shape.T // config.block_m) * parts
    return min(units, architecture.processors * config.resident(itemsize, architecture)) if config.persistent else units


def norms_config(D: int, itemsize: int, architecture: Architecture, quantised: bool = False) -> RowsConfig:
    """Few rows in long pieces, since each piece costs a reduction across lanes; as measured on an H100."""
    if architecture == INTERPRETER:
        return RowsConfig(32, _block_d(D, 256), num_warps=4)
    if quantised:
        return RowsConfig(8, _block_d(D, 128), 4)
    return RowsConfig(2, 2048 // itemsize, 2) if D > 1024 else RowsConfig(4, _block_d(D, 256), 4)


def merge_config(D: int, itemsize: int, architecture: Architecture, quantised: bool = False, aligned: bool = True) -> RowsConfig:
    """Few rows in pieces that are read twice, the second time from the cache; as measured on an H100.

    Whole rows in registers, read once, took 99 instead of 69 us at flux-1024: so few programs then fit a processor that they
    wait for memory.
    """
    if architecture == INTERPRETER:
        return RowsConfig(32, _block_d(D, 256), num_warps=4, block_n=32, block_k=32)
    exact = {"block_n": 16, "block_k": 16}
    if quantised or not aligned:  # unaligned entries have an address each: 1028 bytes spilled at 256
        return RowsConfig(8, _block_d(D, 128 if aligned else 32), num_warps=4, **exact)
    return (
        RowsConfig(1, 2048 // itemsize, num_warps=1, **exact) if D > 1280 else RowsConfig(4, _block_d(D, 256), num_warps=2, **exact)
    )


def _block_d(D: int, most: int) -> int:
    return min(most, max(16, 1 << (int(D) - 1).bit_length()))


# --- tuning ------------------------------------------------------------------------------------------------------


def candidates(itemsize: int, architecture: Architecture, aligned: bool) -> list[MatchConfig]:
    """What tuning tries: the known tiles with fewer stages, other orders of the work, and warps that only load."""
    found = []
    for base in known_configs(itemsize, architecture, aligned):
        for stages, group in itertools.product((base.num_stages, base.num_stages - 1), (8, 4, 16)):
            config = dataclasses.replace(base, num_stages=max(stages, 1), group=group)
            found.append(config)
            if config.descriptors:
                found.append(dataclasses.replace(config, flatten=False))
                if architecture.name == "sm_100" and config.block_m == 128:  # at 256 rows it spills
                    found.append(dataclasses.replace(config, specialize=True, flatten=False))
    return list(dict.fromkeys(found))


@functools.cache
def fingerprint() -> str:
    """Of the kernels and their launches: what was measured of others says nothing of these."""
    return fingerprint_of(sorted(Path(__file__).parent.glob("*.py")))


@dataclass(frozen=True)
class Versions:
    """What a measurement is valid for."""

    device: str
    torch: str
    triton: str
    kernels: str

    @property
    def key(self) -> str:
        return f"{self.device} torch {self.torch} triton {self.triton} kernels {self.kernels}"


class Cache:
    """Tuned configurations in one JSON file. Several processes may read and write it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = JsonFile(path)

    def get(self, versions: Versions, call: str) -> MatchConfig | None:
        """The configuration stored for a call, None if there is none or it is not one that this version knows."""
        calls = self._file.read().get(versions.key)
        entry = calls.get(call) if isinstance(calls, dict) else None
        known = {
            field.name: type(field.default) if field.default is not dataclasses.MISSING else int
            for field in dataclasses.fields(MatchConfig)
        }
        if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != known:
            return None
        return MatchConfig(**entry)

    def put(self, versions: Versions, call: str, config: MatchConfig) -> None:
        def add(entries: dict[str, Any]) -> None:
            if not isinstance(entries.get(versions.key), dict):
                entries[versions.key] = {}
            entries[versions.key][call] = dataclasses.asdict(config)

        self._file.change(add)


def call_key(shape: Shape, kind: str, aligned: bool) -> str:
    """Tuned for powers of two of the sizes: near shapes share a configuration.

    Args:
        kind: what is multiplied, and which way: dtypes, searches and matchings do not share any.
    """
    B, T, M = ((n - 1).bit_length() if n else 0 for n in (shape.B, shape.T, shape.M))
    return f"B{1 << B} K{shape.K} T{1 << T} M{1 << M} D{shape.D} {kind} aligned{int(aligned)}"


def tune(
    shape: Shape,
    itemsize: int,
    kind: str,
    architecture: Architecture,
    aligned: bool,
    versions: Versions,
    cache: Cache,
    milliseconds: Callable[[MatchConfig], float],
) -> MatchConfig:
    """The stored configuration for a call, or else the fastest candidate by ``milliseconds``, which is then stored.

    Args:
        kind: as for :func:`call_key`.
        milliseconds: infinite for a configuration that this device does not take.
    """
    call = call_key(shape, kind, aligned)
    config = cache.get(versions, call)
    if config is None:
        times = {candidate: milliseconds(candidate) for candidate in candidates(itemsize, architecture, aligned)}
        config = min(times, key=times.__getitem__)
        if math.isfinite(times[config]):
            cache.put(versions, call, config)
    return config


def tuning_cache() -> Cache | None:
    """Where tuned configurations are kept; None unless ``NEGENGINE_TUNE`` is set to ``1`` or to a file's path."""
    setting = os.environ.get("NEGENGINE_TUNE", "")
    if setting in ("", "0"):
        return None
    return Cache(cache_folder() / "triton.json" if setting == "1" else Path(setting))


@functools.cache
def architecture_of(capability: tuple[int, int] | str, shared: int, processors: int) -> Architecture:
    """The architecture of a device: its compute capability or gfx name decides the configuration, its sizes the splits."""
    if isinstance(capability, str):
        name = capability.split(":")[0]
    else:
        major, minor = capability
        name = {12: "sm_120", 10: "sm_100"}.get(major, f"sm_{major}{minor}")  # within these, all minors are alike
        if name == "sm_87":
            name = "sm_80" if shared >= ARCHITECTURES["sm_80"].shared else "sm_86"
    known = ARCHITECTURES.get(name)
    if known is None or known.shared > shared:
        return dataclasses.replace(GENERIC, shared=shared, processors=processors)
    return Architecture(name, shared, processors, known.cache)
