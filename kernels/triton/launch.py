"""Workspace and launches of a call: norms, match, merge."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from negengine.kernels.call import Call
from negengine.kernels.triton import norms, plan, schedule, tuning
from negengine.kernels.triton.match import CANDIDATES, match_kernel
from negengine.kernels.triton.merge import merge_kernel
from negengine.kernels.triton.norms import norms_kernel
from negengine.kernels.triton.plan import Arguments, Launch
from negengine.kernels.triton.rows import FP8, INT8, INTERPRETED
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

logger = logging.getLogger("negengine")
EXTENT = 16  # bytes to which vector loads and descriptors are aligned
QUANTISED = {"auto": 0, "exact": 0, "int8": INT8.value, "fp8": FP8.value}
FP8_DTYPES = {"gfx942": torch.float8_e4m3fnuz}


@functools.cache
def architecture(device: torch.device) -> tuning.Architecture:
    if device.type != "cuda":
        return tuning.INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName if torch.version.hip else (properties.major, properties.minor)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return tuning.architecture_of(name, shared, properties.multi_processor_count)


@functools.cache
def versions(device: torch.device) -> tuning.Versions:
    return tuning.Versions(torch.cuda.get_device_name(device), str(torch.__version__), triton.__version__, tuning.fingerprint())


def traced(tensor: Tensor) -> bool:
    """Whether a call with this tensor only records what would be done with a real one."""
    return type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter


def negtome(call: Call) -> None:
    """NegToMe of ``call.x`` into ``call.y``; see ``negengine.ops.negtome_``."""
    y = call.y
    if y.numel() == 0:
        if call.stats is not None:
            call.stats[2] += 1
        return
    if _rows(y) is not y:  # the kernels write rows of neighbouring entries
        out = y.new_empty(y.shape)
        negtome(call._replace(y=out, disjoint=False))
        y.copy_(out)
        return
    _run(call)


def match(call: Call) -> tuple[Tensor, Tensor]:
    """Cosine ``[B, T]`` float32 (``-inf``: none) and index int32 (``-1``: none) of the best reference token."""
    cosine, index = (call.x.new_empty(call.x.shape[:2], dtype=dtype) for dtype in (torch.float32, torch.int32))
    if index.numel():
        _run(call, cosine, index)
    return cosine, index


def _run(call: Call, cosine: Tensor | None = None, index: Tensor | None = None) -> None:
    known = _plan(call, cosine, index) if _planned(call.x) else None
    if known is not None:
        known(Arguments.of(call, cosine, index))
        return
    for launch in laid_out(call, roles_of(call), cosine, index):
        (launch.record if traced(call.x) else launch)()


def bound(call: Call) -> Callable[[Call], None]:
    """What :func:`negtome` comes to for calls with the signature of this one."""
    simple = call.y.numel() > 0 and _rows(call.y) is call.y and _planned(call.x)
    known = _plan(call, None, None) if simple else None
    return negtome if known is None else lambda call: known(Arguments.of(call, None, None))


MOST_PLANS = 256
_plans: dict[tuple[Any, ...], plan.Plan] = {}


def _plan(call: Call, cosine: Tensor | None, index: Tensor | None) -> plan.Plan | None:
    """The plan of a call; None where the kernels read a copy, which a plan would take for workspace."""
    key = (*call.signature(), index is not None)
    if tuning.tuning_cache() is not None:  # what is captured before it is tuned has the defaults
        key = (*key, "tuned", call.x.is_cuda and torch.cuda.is_current_stream_capturing())
    if key not in _plans:
        roles = roles_of(call)
        if not roles.as_given(call):
            return None
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan.Plan(laid_out(call, roles, cosine, index), Arguments.of(call, cosine, index))
    return _plans[key]


def _planned(x: Tensor) -> bool:
    """Whether calls are launched by plans: not where they are only recorded, and not on AMD GPUs, where a variant of a kernel also
    depends on how much memory is behind each tensor."""
    return not traced(x) and (INTERPRETED.value if x.device.type == "cpu" else x.is_cuda and torch.version.hip is None)


def laid_out(call: Call, roles: Roles, cosine: Tensor | None = None, index: Tensor | None = None) -> list[Launch]:
    """The launches of a call, whose workspace lives in their pointers."""
    space = workspace(call, roles)
    norms = _norms(call, roles, space)
    candidates, match = _match(call, roles, space, norms)
    return [norms, match, _merge(call, roles, space, candidates, cosine, index)]


# --- roles and workspace -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roles:
    """Who is searched for whom, and what is overwritten while others may still read it.

    Attributes:
        x, bank, references: of the call, with adjacent channels.
        y: what is written; None in a search alone.
        release: the queries are the bank and the keys are the sources; otherwise the other way round.
        own: the bank is ``x``.
        overwritten: which of the keys, a constant of ``norms_kernel``.
        vector: elements that divide every row's address, see :func:`_vector`.
        quantised: what the search reads, a constant of the kernels.
    """

    x: Tensor
    bank: Tensor
    references: Tensor
    y: Tensor | None
    release: bool
    own: bool
    overwritten: int
    vector: int
    quantised: int

    @property
    def queries(self) -> Tensor:
        return self.bank if self.release else self.x

    @property
    def keys(self) -> Tensor:
        return self.x if self.release else self.bank

    @property
    def keys_move(self) -> bool:
        return self.overwritten >= norms.UPDATED.value

    @property
    def bank_moves(self) -> bool:
        return self.keys_move and (self.own or not self.release)

    @property
    def in_place(self) -> bool:
        return self.y is self.x

    def as_given(self, call: Call) -> bool:
        """Whether these are the tensors of the call, none of them a copy."""
        return self.x is call.x and self.bank is call.bank and self.references is call.references


def roles_of(call: Call) -> Roles:
    release, own = call.matching == "release", call.bank is call.x
    x = _rows(call.x)
    bank = x if own else _rows(call.bank)
    y = x if call.y is call.x else call.y
    if release and not own and y is x and _same_storage(bank, x):
        bank = bank.clone()  # the snapshot is of the sources
    overwritten = norms.NOTHING.value
    if y is x and _same_storage(x if release else bank, x):
        # release matching scores again with sources of the same image, which other programs overwrite
        kept = norms.NOT_READ if call.disjoint and not release else norms.UPDATED
        overwritten = kept.value if own else norms.ANYTHING.value
    vector = _vector(x, bank) if y is None else _vector(x, bank, y)
    return Roles(x, bank, call.references.contiguous(), y, release, own, overwritten, vector, QUANTISED[call.search])


@dataclass(frozen=True)
class Workspace:
    """What the kernels leave for those that follow; see their arguments."""

    weight: Tensor
    inverse: Tensor
    apart: Tensor
    flags: Tensor
    schedule: Tensor
    snapshot: Tensor
    moved: Tensor
    key_codes: Tensor
    query_codes: Tensor
    key_error: Tensor
    query_error: Tensor
    query_weight: Tensor
    rows: tuning.RowsConfig
    tiles: int  # of rows, per image
    queries: int  # images of queries that need codes of their own


def workspace(call: Call, roles: Roles) -> Workspace:
    """Memory only. Each tensor is on its own, since a traced graph would copy views of one."""
    x, keys, queries, device = roles.x, roles.keys, roles.queries, architecture(roles.x.device)
    (R, M, D), T, (B, K) = keys.shape, queries.shape[1], roles.references.shape
    weights = triton.cdiv(M, norms.PADDING.value) * norms.PADDING.value
    own_codes = 0 if roles.own or not roles.quantised else len(queries)
    rows = tuning.norms_config(D, x.itemsize, device, roles.quantised > 0)
    tiles = triton.cdiv(max(weights, T) if own_codes else weights, rows.rows)
    weight = x.new_empty(R, weights, dtype=torch.float32)
    inverse = key_error = query_error = query_weight = weight  # some pointer where nothing is read
    key_codes, query_codes = keys, queries
    if roles.quantised:
        padded = triton.cdiv(D, EXTENT) * EXTENT  # one byte per channel
        dtype = torch.int8 if roles.quantised == INT8.value else FP8_DTYPES.get(device.name, torch.float8_e4m3fn)
        inverse, key_error = torch.empty_like(weight), torch.empty_like(weight)
        query_error, query_weight = (x.new_empty(len(queries), T, dtype=torch.float32) for _ in range(2))
        key_codes = query_codes = keys.new_empty(R, M, padded, dtype=dtype)
        if own_codes:
            query_codes = queries.new_empty(own_codes, T, padded, dtype=dtype)
    return Workspace(
        weight, inverse,
        apart=x.new_empty(R, tiles, dtype=torch.int8), flags=roles.references.new_empty(R),
        schedule=roles.references.new_empty(schedule.length(B, K)),
        # the device fills it for those images alone that are both read and overwritten
        snapshot=keys.new_empty(keys.shape) if roles.keys_move else keys,
        moved=roles.references.new_empty(R) if roles.keys_move else roles.references,
        key_codes=key_codes, query_codes=query_codes, key_error=key_error, query_error=query_error, query_weight=query_weight,
        rows=rows, tiles=tiles, queries=own_codes,
    )  # fmt: skip


# --- launches ----------------------------------------------------------------------------------------------------


def _norms(call: Call, roles: Roles, space: Workspace) -> Launch:
    (B, K), (R, M, D), T = roles.references.shape, roles.bank.shape, roles.queries.shape[1]
    mask = call.mask
    pointers = (
        roles.x, roles.bank, roles.references, roles.references if mask is None else mask,
        space.weight, space.inverse, space.apart, space.schedule, space.snapshot, space.moved,
        space.key_codes, space.query_codes, space.key_error, space.query_error, space.query_weight,
    )  # fmt: skip
    sizes = (
        *_strides(roles.x, roles.vector), *_strides(roles.bank, roles.vector), *((0, 0) if mask is None else mask.stride()),
        B, K, T, M, D // roles.vector, space.weight.shape[1], space.key_codes.shape[2], R, space.tiles,
    )  # fmt: skip
    constants = {
        "RELEASE": roles.release, "MASKED": mask is not None, "OVERWRITTEN": roles.overwritten, "QUANTISED": roles.quantised,
        "OWN": roles.own, "VECTOR": roles.vector, "ROWS": space.rows.rows, "BLOCK_D": space.rows.block_d,
    }  # fmt: skip
    programs = space.tiles * (len(roles.keys) + space.queries)
    return Launch(norms_kernel, programs, pointers, sizes, constants, {"num_warps": space.rows.num_warps})


@dataclass(frozen=True)
class Candidates:
    """What ``match_kernel`` leaves for the merge."""

    score: Tensor
    index: Tensor
    splits: int


def _match(call: Call, roles: Roles, space: Workspace, before: Launch) -> tuple[Candidates, Launch]:
    """Args: before: the launch that it needs the results of, where tuning tries it."""
    x, device, quantised = roles.x, architecture(roles.x.device), roles.quantised
    (B, K), M, T = roles.references.shape, roles.keys.shape[1], roles.queries.shape[1]
    left, right, pitch = (space.query_codes, space.key_codes, EXTENT) if quantised else (roles.queries, roles.keys, roles.vector)
    depth = right.shape[2]
    shape = tuning.Shape(B, K, T, M, roles.x.shape[2], _updated(call))
    slots = CANDIDATES.value + 1 if quantised else 1

    def match_with(config: tuning.MatchConfig) -> tuple[Candidates, Launch]:
        splits = tuning.splits(shape, config, device, right.itemsize, slots)
        parts = (splits, slots) if quantised else (splits,)
        score, index = (x.new_empty(B, *parts, T, dtype=dtype) for dtype in (torch.float32, torch.int32))
        pointers = (
            _described(left, config.block_m, config), _described(right, config.block_n, config),
            space.apart, space.flags, space.schedule, space.weight, space.key_error, score, index,
        )  # fmt: skip
        sizes = (
            *_strides(left, pitch), *_strides(right, pitch),
            B, K, T, M, depth // pitch, space.weight.shape[1], splits, len(right), space.tiles,
        )  # fmt: skip
        constants = {
            "RELEASE": roles.release, "DESCRIPTORS": config.descriptors,
            "EVEN_K": config.descriptors or bool(depth % config.block_k == 0), "VECTOR": pitch,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP": config.group,
            "HALVINGS": config.halvings, "FLATTEN": config.flatten, "SPECIALIZE": config.specialize, "QUANTISED": quantised,
            "PARTIAL": quantised == FP8.value and device.partial_sums,
        }  # fmt: skip
        programs = tuning.programs(shape, config, device, right.itemsize, splits)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return Candidates(score, index, splits), Launch(match_kernel, programs, pointers, sizes, constants, options)

    def measured(config: tuning.MatchConfig) -> float:
        before()
        return milliseconds(lambda: match_with(config)[1]())

    kind = f"{call.search if quantised else str(x.dtype).removeprefix('torch.')} {call.matching}"
    return match_with(_config(shape, x, right.itemsize, kind, quantised > 0 or roles.vector > 1, measured))


def _merge(
    call: Call, roles: Roles, space: Workspace, candidates: Candidates, cosine: Tensor | None, index: Tensor | None
) -> Launch:  # fmt: skip
    x, vector = roles.x, roles.vector
    y = x if roles.y is None else roles.y
    (B, K), (R, M, D), T = roles.references.shape, roles.bank.shape, x.shape[1]
    config = tuning.merge_config(D, x.itemsize, architecture(x.device), roles.quantised > 0, vector > 1)
    row_tiles = triton.cdiv(T, config.rows)
    absent = roles.references  # some pointer, not read
    numbers = (call.mask, call.alpha, call.threshold, call.keep, call.stats, cosine, index)
    pointers = (
        x, y, roles.bank, space.snapshot, space.moved, space.schedule, roles.references, space.inverse, space.flags,
        candidates.score, candidates.index, space.query_weight, space.query_error,
        *(absent if t is None else t for t in numbers),
    )  # fmt: skip
    sizes = (
        *(n for t in (x, y, roles.bank) for n in _strides(t, vector)),
        *(n for t in (call.mask, call.keep) for n in ((0, 0) if t is None else t.stride())),
        0 if call.alpha is None else call.alpha.stride(0),
        B, K, T, M, D // vector, R, space.weight.shape[1], candidates.splits, row_tiles,
    )  # fmt: skip
    constants = {
        "RELEASE": roles.release, "MERGE": call.alpha is not None, "IN_PLACE": roles.in_place, "MASKED": call.mask is not None,
        "KEPT": call.keep is not None, "COUNTED": call.stats is not None, "KEYS_MOVE": roles.keys_move,
        "BANK_MOVES": roles.bank_moves, "CAREFUL": roles.quantised > 0 or x.dtype != torch.float16, "QUANTISED": roles.quantised,
        "VECTOR": vector, "ROWS": config.rows, "BLOCK_D": config.block_d, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    return Launch(merge_kernel, row_tiles * B, pointers, sizes, constants, {"num_warps": config.num_warps})


def _updated(call: Call) -> int | None:
    """How many images have a reference, where the host knows."""
    if call.table is None:
        return None
    K, R = call.references.shape[1], len(call.bank)
    return sum(any(0 <= entry < R for entry in call.table[row : row + K]) for row in range(0, len(call.table), K))


# --- configuration -----------------------------------------------------------------------------------------------


_tuned: dict[tuple[tuning.Versions, str], tuning.MatchConfig] = {}


def _config(
    shape: tuning.Shape, x: Tensor, itemsize: int, kind: str, aligned: bool, measured: Callable[[tuning.MatchConfig], float]
) -> tuning.MatchConfig:
    """The default configuration, or, where tuning was asked for, the fastest; measured once per device, kept on disk."""
    cache = tuning.tuning_cache()
    if traced(x):  # its arguments cannot be descriptors that the host makes, and nothing can be measured
        return tuning.match_config(shape, itemsize, architecture(x.device), aligned, descriptors=False)
    if cache is None or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return tuning.match_config(shape, itemsize, architecture(x.device), aligned)
    key = versions(x.device), tuning.call_key(shape, kind, aligned)
    if key not in _tuned:
        _tuned[key] = tuning.tune(shape, itemsize, kind, architecture(x.device), aligned, key[0], cache, measured)
    return _tuned[key]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device, with a cold cache; infinite, and said so, if it cannot be compiled or launched there."""
    try:
        return triton.testing.do_bench(call, return_mode="median")
    except (triton.runtime.errors.TritonError, triton.CompilationError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.warning("a configuration that tuning tried does not run here: %s", error)
        return math.inf


def _described(tensor: Tensor, rows: int, config: tuning.MatchConfig) -> Tensor | TensorDescriptor:
    if not config.descriptors:
        return tensor
    R, M, D = tensor.shape
    strides = [stride if n > 1 else M * D for n, stride in zip((R, M), tensor.stride(), strict=False)]  # of one: any will do
    return TensorDescriptor(tensor, [R, M, D], [*strides, 1], [1, rows, config.block_k])


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels lie side by side, else a copy."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor, vector: int) -> tuple[int, int]:
    return tensor.stride(0) // vector, tensor.stride(1) // vector


def _vector(*tensors: Tensor) -> int:
    """How many elements divide every row's address: as many as fill ``EXTENT`` bytes, or one.

    Rows that are one row repeated count as unaligned: a descriptor cannot have a stride of zero.
    """
    vector = EXTENT // tensors[0].itemsize
    for t in tensors:
        strides = [stride for n, stride in zip(t.shape[:2], t.stride(), strict=False) if n > 1]
        # in a traced graph there is no address, but there storages begin as the allocator and the compiler lay them: aligned
        start = t.storage_offset() * t.itemsize if traced(t) else t.data_ptr()
        if start % EXTENT or t.shape[2] % vector or any(stride % vector or stride == 0 for stride in strides):
            return 1
    return vector


def _same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory. In a traced graph, where tensors have none yet, they may."""
    return traced(a) or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
