"""Workspace and launches of a call: norms, match, merge."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from negengine.kernels.call import Call
from negengine.kernels.triton import tuning
from negengine.kernels.triton.match import CANDIDATES, match_kernel
from negengine.kernels.triton.merge import merge_kernel
from negengine.kernels.triton.norms import FP8, INT8, norms_kernel
from torch import Tensor
from torch.library import wrap_triton
from triton.tools.tensor_descriptor import TensorDescriptor

EXTENT = 16  # bytes to which vector loads and descriptors are aligned
QUANTISED = {"auto": 0, "exact": 0, "int8": INT8.value, "fp8": FP8.value}
FP8_DTYPES = {"gfx942": torch.float8_e4m3fnuz}


class Overwritten(enum.IntEnum):
    """What of the keys is overwritten while others may still read it; a constant of ``norms_kernel``."""

    NOTHING = 0
    UPDATED = 1  # images that have references
    ANYTHING = 2  # the keys share memory with the output, and nothing more is known
    NOT_READ = 3  # images that have references, of which none is one: the caller's promise


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
    return tuning.Versions(torch.cuda.get_device_name(device), str(torch.__version__), triton.__version__)


def traced(tensor: Tensor) -> bool:
    """Whether a call with this tensor only records what would be done with a real one."""
    return type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter


def _launch(kernel: triton.JITFunction, x: Tensor) -> Any:
    """The kernel, or its wrapper that a traced graph records."""
    return wrap_triton(kernel) if traced(x) else kernel


def negtome(call: Call) -> None:
    """NegToMe of ``call.x`` into ``call.y``; see ``negengine.ops.negtome_``."""
    x, y, references, mask, matching, stats = call.x, call.y, call.references, call.mask, call.matching, call.stats
    if y.numel() == 0:
        if stats is not None:
            stats[2] += 1
        return
    if _rows(y) is not y:  # the kernels write rows of neighbouring entries
        out = y.new_empty(y.shape)
        negtome(call._replace(y=out, disjoint=False))
        y.copy_(out)
        return
    found = _search(x, call.bank, references, mask, matching, call.search, y, call.disjoint)
    numbers = {"alpha": call.alpha, "threshold": call.threshold, "keep": call.keep, "stats": stats}
    _merge(found, x, y, references, mask, matching, **numbers)


def match(call: Call) -> tuple[Tensor, Tensor]:
    """Cosine ``[B, T]`` float32 (``-inf``: none) and index int32 (``-1``: none) of the best reference token."""
    x, references, mask, matching = call.x, call.references, call.mask, call.matching
    cosine, index = x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.int32)
    if index.numel():
        found = _search(x, call.bank, references, mask, matching, call.search, None)
        _merge(found, x, x, references, mask, matching, cosine=cosine, index=index)
    return cosine, index


@dataclass(frozen=True)
class _Search:
    """What the search leaves for the merge."""

    bank: Tensor
    queries: Tensor
    keys: Tensor
    snapshot: Tensor
    moved: Tensor
    keys_move: bool
    bank_moves: bool
    scale: Tensor
    inverse: Tensor
    quantised: int
    query_weight: Tensor
    query_error: Tensor
    score: Tensor
    index: Tensor
    splits: int
    vector: int


def _search(
    x: Tensor,
    bank: Tensor,
    references: Tensor,
    mask: Tensor | None,
    matching: str,
    search: str,
    y: Tensor | None,
    disjoint: bool = False,
) -> _Search:
    """Launch norms and match. ``y`` is what will be written, ``x`` itself or fresh; None if nothing will be."""
    release, own, in_place = matching == "release", bank is x, y is x
    x, bank = _rows(x), _rows(bank)
    if own:
        bank = x
    references = references.contiguous()
    if release and not own and in_place and _same_storage(bank, y):
        bank = bank.clone()  # the snapshot is of the sources
    queries, keys = (bank, x) if release else (x, bank)
    (R, M, D), (B, K), T = keys.shape, references.shape, x.shape[1]
    vector = _vector(x, bank) if y is None else _vector(x, bank, y)

    overwritten = Overwritten.NOTHING
    if in_place and _same_storage(keys, y):
        # release matching scores again with sources of the same image, which other programs overwrite
        unread = disjoint and not release
        overwritten = Overwritten.ANYTHING if not own else Overwritten.NOT_READ if unread else Overwritten.UPDATED
    moves = overwritten in (Overwritten.UPDATED, Overwritten.ANYTHING)
    # memory only; the device fills it for those images alone that are both read and overwritten
    snapshot = keys.new_empty(keys.shape) if moves else keys
    moved = references.new_empty(R) if moves else references
    order = references.new_empty(B)
    # each on its own: a traced graph would copy views of one tensor
    scale, inverse, weight, key_error = (x.new_empty(R, M, dtype=torch.float32) for _ in range(4))
    device, quantised = architecture(x.device), QUANTISED[search]
    images = 0 if own or not quantised else len(queries)
    key_codes, query_codes, query_error, query_weight = keys, queries, key_error, weight  # some pointers, not read
    if quantised:
        padded = triton.cdiv(D, EXTENT) * EXTENT  # a byte a channel
        dtype = torch.int8 if search == "int8" else FP8_DTYPES.get(device.name, torch.float8_e4m3fn)
        key_codes = query_codes = keys.new_empty(R, M, padded, dtype=dtype)
        query_error, query_weight = (x.new_empty(len(queries), T, dtype=torch.float32) for _ in range(2))
        if not own:
            query_codes = queries.new_empty(images, T, padded, dtype=dtype)
    rows = tuning.norms_config(D, x.itemsize, device, quantised > 0)
    _launch(norms_kernel, x)[triton.cdiv(max(M, T) if images else M, rows.rows), R + images](
        keys, bank, queries, references, references if mask is None else mask, scale, inverse, weight, snapshot, moved, order,
        key_codes, query_codes, key_error, query_error, query_weight,
        *_strides(keys, vector), *_strides(bank, vector), *_strides(queries, vector), *((0, 0) if mask is None else mask.stride()),
        B, K, T, M, D // vector, key_codes.shape[2], R,
        RELEASE=release, MASKED=mask is not None, OVERWRITTEN=overwritten.value, QUANTISED=quantised, OWN=own, VECTOR=vector,
        ROWS=rows.rows, BLOCK_D=rows.block_d, num_warps=rows.num_warps,
    )  # fmt: skip

    shape = tuning.Shape(B, K, T, M, D)
    left, right, depth, pitch = (query_codes, key_codes, key_codes.shape[2], EXTENT) if quantised else (queries, keys, D, vector)

    def match_with(config: tuning.MatchConfig) -> tuple[Tensor, Tensor, int]:
        splits, span = tuning.splits(shape, config, device, CANDIDATES.value + 1 if quantised else 1)
        slots = (splits, CANDIDATES.value + 1) if quantised else (splits,)
        score = x.new_empty(B, *slots, T, dtype=torch.float32)
        index = x.new_empty(B, *slots, T, dtype=torch.int32)
        units = B * triton.cdiv(T, config.block_m) * splits
        _launch(match_kernel, x)[(min(units, device.processors) if config.persistent else units,)](
            _described(left, config.block_m, config), _described(right, config.block_n, config),
            references, order, weight, key_error, score, index, *_strides(left, pitch), *_strides(right, pitch),
            B, K, T, M, depth // pitch, splits, span, units,
            RELEASE=release, DESCRIPTORS=config.descriptors, PERSISTENT=config.persistent, EVEN_K=bool(depth % config.block_k == 0),
            VECTOR=pitch, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=config.group,
            HALVINGS=config.halvings, SPECIALIZE=config.specialize, QUANTISED=quantised,
            PARTIAL=search == "fp8" and device.partial_sums,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return score, index, splits

    itemsize, aligned = (1, True) if quantised else (x.itemsize, vector > 1)
    kind = f"{search if quantised else str(x.dtype).removeprefix('torch.')} {matching}"
    score, index, splits = match_with(_config(shape, x, itemsize, kind, aligned, match_with))
    return _Search(
        bank, queries, keys, snapshot, moved, moves, moves and (own or not release), scale, inverse, quantised, query_weight,
        query_error, score, index, splits, vector,
    )  # fmt: skip


def _merge(
    search: _Search,
    x: Tensor,
    y: Tensor,
    references: Tensor,
    mask: Tensor | None,
    matching: str,
    alpha: Tensor | None = None,
    threshold: Tensor | None = None,
    keep: Tensor | None = None,
    stats: Tensor | None = None,
    cosine: Tensor | None = None,
    index: Tensor | None = None,
) -> None:
    """Launch the merge into ``y``, or, without ``alpha``, into ``cosine`` and ``index``."""
    references = references.contiguous()
    in_place, x = y is x, _rows(x)
    y = x if in_place else y
    (B, T, D), K, M = x.shape, references.shape[1], search.bank.shape[1]
    vector = search.vector
    config = tuning.merge_config(D, architecture(x.device), search.quantised > 0, vector > 1)
    absent = references  # some pointer, not read
    _launch(merge_kernel, x)[triton.cdiv(T, config.rows), B](
        x, y, search.bank, search.queries, search.keys, search.snapshot, search.moved, references, search.scale, search.inverse,
        search.score, search.index, search.query_weight, search.query_error,
        *(absent if t is None else t for t in (mask, alpha, threshold, keep, stats, cosine, index)),
        *(n for t in (x, y, search.bank, search.queries, search.keys) for n in _strides(t, vector)),
        *((0, 0) if mask is None else mask.stride()), *((0, 0) if keep is None else keep.stride()),
        0 if alpha is None else alpha.stride(0), B, K, T, M, D // vector, search.splits,
        RELEASE=matching == "release", MERGE=alpha is not None, IN_PLACE=in_place, MASKED=mask is not None,
        KEPT=keep is not None, COUNTED=stats is not None, KEYS_MOVE=search.keys_move, BANK_MOVES=search.bank_moves,
        CAREFUL=search.quantised > 0 or x.dtype != torch.float16, QUANTISED=search.quantised, VECTOR=vector,
        ROWS=config.rows, BLOCK_D=config.block_d, BLOCK_N=32,
        BLOCK_K=min(32, config.block_d), num_warps=config.num_warps,
    )  # fmt: skip


_tuned: dict[tuple[tuning.Versions, str], tuning.MatchConfig] = {}


def _config(
    shape: tuning.Shape, x: Tensor, itemsize: int, kind: str, aligned: bool, match_with: Callable[[tuning.MatchConfig], object]
) -> tuning.MatchConfig:
    """The default configuration, or, where tuning was asked for, the fastest; measured once a device, kept on disk."""
    cache = tuning.tuning_cache()
    if traced(x):  # its arguments cannot be descriptors that the host makes, and nothing can be measured
        return tuning.match_config(shape, itemsize, architecture(x.device), aligned, descriptors=False)
    if cache is None or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return tuning.match_config(shape, itemsize, architecture(x.device), aligned)
    key = versions(x.device), tuning.call_key(shape, kind, aligned)
    if key not in _tuned:
        _tuned[key] = tuning.tune(
            shape, itemsize, kind, architecture(x.device), aligned, key[0], cache, lambda c: milliseconds(lambda: match_with(c))
        )
    return _tuned[key]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device, with a cold cache; infinite if the device has not what it takes."""
    try:
        return triton.testing.do_bench(call, return_mode="median")
    except triton.runtime.errors.OutOfResources:
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
