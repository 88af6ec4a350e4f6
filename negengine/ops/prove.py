"""The proof of the Triton kernels, run in a process of its own: against the float64 oracle, then against the clock.

``negengine.ops.establish`` starts it with the folder of a ``request.json`` and judges the ``answer.json`` that it leaves there.
A kernel that poisons the device's context takes nothing but this process with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from negengine.interleave import interleave, interleave_graphs
from negengine.ops.negtome import negtome_
from negengine.ops.verdicts import Subject
from negengine.reference import cosine as similarities
from negengine.reference import group_references, is_disjoint

# how far below the best cosine a choice may be; in `exact` search always as for float32
DELTAS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
QUANTISED = ("bf16", "int8", "fp8")
FP32 = 2e-6  # error of a cosine computed in float32
GUARD = 3  # rows before and after the tokens of each image that no kernel may touch
ROUNDS = 15
SAMPLE = 96  # queries per image that are checked at the shapes that are timed
BUDGET = 20.0  # seconds for timings; shapes after the first that begin later are left out


# --- cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call in place, tried twice.

    Attributes:
        kind: of tokens, see :func:`tokens`.
        B, T, D: images, tokens per image, channels.
        mode: which images are references; ``"bank"``: two images of ``M`` tokens that are not in the batch.
        masked: whether some tokens may not be matched. dropped: whether some tokens are not merged.
        large: one of the shapes that are timed: queries are sampled, and rows are not compared with all others.
    """

    name: str
    kind: str = "near"
    B: int = 3
    T: int = 150
    D: int = 256
    mode: str = "first"
    M: int = 0
    masked: bool = False
    dropped: bool = False
    threshold: float = 0.3
    large: bool = False
    apart: bool = False  # also into new memory


# few variants of the kernels, as compiling takes most of the time: with 256 channels they are those of SDXL and FLUX.1
CASES = (
    Case("tokens that resemble each other", T=70, apart=True),
    Case("equal tokens", kind="duplicates", T=40),
    Case("tokens that are not finite", kind="nan", T=45),
    Case("channels that fill no vector", T=33, D=37),
    Case("one token", T=1),
    Case("ragged tiles", T=257),
    Case("many tiles", B=2, T=700),
    Case("tokens of zeros", kind="zeros"),
    Case("large values", kind="large"),
    Case("small values", kind="small"),
    Case("one channel above all others", kind="outlier"),
    Case("huge tokens among others", kind="huge"),
    Case("images that are sources and references", mode="others"),
    Case("equal tokens of several images", kind="duplicates", mode="others", B=4),
    Case("images one after another", kind="nan", mode="previous", B=4, T=131),
    Case("a bank of another size", mode="bank", M=77),
    Case("a masked bank", mode="bank", M=300, masked=True),
    Case("dropped tokens", dropped=True),
    Case("nothing reaches the threshold", kind="normal", threshold=0.99),
    Case("many images", B=40, T=24),
)
# where kernels are interpreted, few and small ones; numpy, which multiplies there, gives equal columns different bits
INTERPRETED = ("channels that fill no vector", "one token")


def cases_for(architecture: str, matching: str) -> list[Case]:
    """The cases of a proof. Release matching knows one reference image of as many tokens only."""
    chosen = [case for case in CASES if matching == "paper" or case.mode == "first"]
    return [case for case in chosen if architecture != "interpreter" or case.name in INTERPRETED]


def tokens(kind: str, B: int, T: int, D: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """``[B, T, D]`` float32 of a kind that searches have trouble with."""
    x = torch.randn(B, T, D, generator=generator)
    some = torch.rand(B, T, generator=generator) < 0.3
    if kind == "near":
        x = 0.3 * x + torch.randn(1, T, D, generator=generator)
    elif kind == "duplicates":
        x = x[:1, torch.randint(0, max(T // 4, 1), (B, T), generator=generator)[0]].expand(B, T, D)
    elif kind == "nan":
        x[..., 0][some] = torch.nan
        x[:, -1:, -1] = torch.inf
    elif kind == "zeros":
        x[some] = 0
    elif kind == "large":
        x = 1e3 * x
    elif kind == "small":
        x = 1e-3 * x
    elif kind == "outlier":
        x[..., D // 3] *= 20
    elif kind == "huge":  # float16 holds no such numbers
        x[:, ::3] *= 60.0 if dtype == torch.float16 else 1e20
    return x


@dataclass(frozen=True)
class Inputs:
    """What a case calls with, on the CPU."""

    x: Tensor
    bank: Tensor | None
    table: Tensor
    mask: Tensor | None
    keep: Tensor | None
    alpha: Tensor


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:4], "big"))
    x, bank = tokens(case.kind, case.B, case.T, case.D, generator, dtype).to(dtype), None
    R, M = case.B, case.T
    if case.mode == "bank":
        R, M = 2, case.M
        bank = tokens(case.kind, R, M, case.D, generator, dtype).to(dtype)
        table = torch.arange(R, dtype=torch.int32).expand(case.B, R).contiguous()
    else:
        table = group_references(case.mode, case.B, case.B)
    mask = torch.rand(R, M, generator=generator) < 0.5 if case.masked else None
    keep = torch.rand(case.B, case.T, generator=generator) < 0.7 if case.dropped else None
    return Inputs(x, bank, table, mask, keep, torch.linspace(0.5, 1.0, case.B, dtype=torch.float64))


def guarded(values: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A buffer on a device, and in it ``values [B, T, D]`` between rows of NaN."""
    B, T, D = values.shape
    buffer = torch.full((B, T + 2 * GUARD, D), torch.nan, dtype=values.dtype, device=device)
    buffer[:, GUARD : GUARD + T] = values.to(device)
    return buffer, buffer[:, GUARD : GUARD + T]


def fault(case: Case, backend: str, device: torch.device, dtype: torch.dtype, search: str, matching: str) -> str | None:
    """What a backend does wrong in a case; None if nothing."""
    given = inputs(case, dtype)
    table, alpha = given.table.to(device), given.alpha.to(device)
    mask, keep = (None if t is None else t.to(device) for t in (given.mask, given.keep))
    threshold = torch.tensor([case.threshold], dtype=torch.float64, device=device)
    settings: dict[str, Any] = {"matching": matching, "search": search, "backend": backend}
    outputs, counts = [], []
    for _ in range(2):
        buffer, x = guarded(given.x, device)
        bank_buffer, bank = (None, None) if given.bank is None else guarded(given.bank, device)
        counters = torch.full((5,), -7, dtype=torch.int64, device=device)
        counters[1:4] = 0
        disjoint = bank is None and is_disjoint(given.table)
        cosine, index = torch.ops.negengine.match(x, bank, table, mask, **settings)
        negtome_(x, table, alpha, threshold, bank, mask, keep, counters[1:4], disjoint=disjoint, **settings)
        outputs.append([t.cpu() for t in (cosine, index, x)])
        if case.apart:
            x = guarded(given.x, device)[1]
            again = torch.ops.negengine.negtome(x, bank, table, alpha, threshold, keep, mask, *settings.values())
            if not same_bits(again.cpu(), outputs[-1][2]):
                return "into new memory, the result is another one"
        counts.append(counters.tolist())
        for rows in (buffer, bank_buffer):
            if rows is not None and not bool(torch.cat([rows[:, :GUARD], rows[:, -GUARD:]], 1).isnan().all()):
                return "memory beside the tokens was written"
        if bank is not None and given.bank is not None and not same_bits(bank.cpu(), given.bank):
            return "the bank was written"
        if counts[-1][0] != -7 or counts[-1][4] != -7:
            return "memory beside the counts was written"
    if counts[0] != counts[1] or not all(same_bits(a, b) for a, b in zip(*outputs, strict=True)):
        return "two calls with the same input gave different results"
    cosine, index, y = outputs[0]
    delta = FP32 / 2 if search == "exact" else 1e-2 if search in QUANTISED else DELTAS[dtype]
    return against_oracle(case, given, matching, cosine, index, y, counts[0][1:4], delta)


def against_oracle(
    case: Case, given: Inputs, matching: str, cosine: Tensor, index: Tensor, y: Tensor, counts: Sequence[int], delta: float
) -> str | None:
    """What of a result differs from the float64 oracle by more than the numeric contract allows."""
    bank, surely, perhaps = given.x if given.bank is None else given.bank, 0, 0
    for b, row in enumerate(given.table.tolist()):
        images = [image for image in row if image >= 0]
        if not images:
            if bool((index[b] != -1).any()) or not same_bits(y[b], given.x[b]):
                return f"image {b} has no reference and changed"
            continue
        r = torch.cat([bank[image] for image in images])
        allowed = torch.ones(len(r), dtype=torch.bool) if given.mask is None else torch.cat([given.mask[i] for i in images])
        queries = torch.arange(case.T)
        if case.large:
            queries = queries[torch.randperm(case.T, generator=torch.Generator().manual_seed(b))[:SAMPLE]]
        found, chosen = cosine[b][queries].double(), index[b][queries].long()
        text = match_fault(given.x[b], r, allowed, matching, queries, found, chosen, delta, case.large)
        if text is not None:
            return f"image {b}: {text}"
        kept = torch.ones(case.T, dtype=torch.bool) if given.keep is None else given.keep[b]
        above, reach = ((index[b] >= 0) & (cosine[b].double() > case.threshold + slack) & kept for slack in (FP32, -FP32))
        surely, perhaps = surely + int(above.sum()), perhaps + int(reach.sum())
        x, alpha = given.x[b][queries], float(given.alpha[b])
        text = merge_fault(x, r, chosen, alpha, above[queries], reach[queries], y[b][queries])
        if text is not None:
            return f"image {b}: {text}"
    eligible = sum(any(image >= 0 for image in row) for row in given.table.tolist()) * case.T
    if not surely <= counts[0] <= perhaps or list(counts[1:]) != [eligible, 1]:
        return f"counted {list(counts)}, expected {surely} to {perhaps} merged tokens, {eligible} with a reference, and one call"
    return None


def match_fault(
    x: Tensor,
    r: Tensor,
    allowed: Tensor,
    matching: str,
    queries: Tensor,
    cosine: Tensor,
    index: Tensor,
    delta: float,
    large: bool,
) -> str | None:
    finite_x, finite_r = x.isfinite().all(-1), r.isfinite().all(-1)
    if matching == "paper":  # a query is a source token, a candidate a reference token
        asking, rows, asks, may = x[queries], r, finite_x[queries], finite_r & allowed
    else:  # a query is a reference token, a candidate a source token, whose index then picks a reference token
        asking, rows, asks, may = r[queries], x, (finite_r & allowed)[queries], finite_x & finite_r
    some = asks & may.any()
    if bool((index[~some] != -1).any()) or bool((cosine[~some] != -torch.inf).any()):
        return "a token was matched that must not be"
    if not bool(some.any()):
        return None
    index, s = index[some], similarities(asking[some].double(), rows.double())
    if bool(((index < 0) | (index >= len(rows))).any()) or not bool(may[index].all()):
        return "a token was chosen that must not be"
    chosen = s.gather(1, index[:, None])[:, 0]
    behind = float((s.masked_fill(~may, -torch.inf).amax(1) - chosen).max())
    if not behind <= delta:
        return f"a chosen token's cosine is {behind:.1e} below the best, {delta:.0e} is allowed"
    if bool(((cosine[some] - chosen).abs() > FP32).any()):
        return "a cosine is not that of the chosen token"
    if not large:
        group = rows.nan_to_num(0, 0, 0).unique(dim=0, return_inverse=True)[1]
        first = torch.full((len(rows),), len(rows)).scatter_reduce(0, group[may], may.nonzero()[:, 0], "amin")
        if not torch.equal(first[group[index]], index):
            return "of equal tokens the first was not chosen"
    return None


def merge_fault(x: Tensor, r: Tensor, index: Tensor, alpha: float, surely: Tensor, perhaps: Tensor, y: Tensor) -> str | None:
    """Merged tokens may be as far from the oracle as torch's own arithmetic in that dtype, and a last place further."""
    if not same_bits(y[~perhaps], x[~perhaps]):
        return "a token changed that must not"
    rows = surely | (perhaps & (bits(y) != bits(x)).any(-1))
    x, r, y = x[rows], r[index[rows]], y[rows].double()
    terms = torch.stack([(1 + alpha) * x.double(), alpha * r.double()])
    exact = terms[0] - terms[1]
    finite = exact.isfinite()  # what is not, was not in the source: it stays so
    if bool(y[~finite].isfinite().any()):
        return "a number that was not finite became one"
    theirs = (((1 + alpha) * x - alpha * r).double() - exact).abs()
    place = torch.finfo(x.dtype).eps * torch.maximum(terms.abs().amax(0), exact.abs())
    worst = float(((y - exact).abs() - theirs - place)[finite].nan_to_num(torch.inf).max()) if bool(finite.any()) else 0.0
    return None if worst <= 0 else f"a merged token is {worst:.1e} further from the oracle than torch's arithmetic"


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


# --- witness -----------------------------------------------------------------------------------------------------

TOKENS, CHANNELS = 40, 256  # of the witness


def witness_rows(nonce: str, matching: str) -> tuple[list[list[int]], list[int], list[int]]:
    """Rows of ones and minus ones, and for every source token, which of them it is twice and which it is matched with."""
    dice = random.Random(nonce)
    rows = [[dice.choice((-1, 1)) for _ in range(CHANNELS)] for _ in range(TOKENS)]
    order = dice.sample(range(TOKENS), TOKENS)
    return rows, order, order if matching == "paper" else [order.index(token) for token in range(TOKENS)]


def _digest(values: Sequence[float]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(values)}f", *values)).hexdigest()


def witness(nonce: str, matching: str) -> str:
    """The digest that a right call must leave, known without running any: every number in it is exact in every dtype.

    Each source token is twice a reference token, whose cosine is one; so ``y = 1.5 * 2 r - 0.5 r'``. Release matching takes the
    source token that fits best for the place of the reference token, so that ``r'`` is another one there.
    """
    rows, twice, matched = witness_rows(nonce, matching)
    y = [3 * a - 0.5 * b for i, j in zip(twice, matched, strict=True) for a, b in zip(rows[i], rows[j], strict=True)]
    return _digest(y)


def computed_witness(nonce: str, backend: str, device: torch.device, dtype: torch.dtype, search: str, matching: str) -> str:
    rows, twice, _ = witness_rows(nonce, matching)
    r = torch.tensor(rows, dtype=dtype, device=device)
    x = torch.stack([r, 2 * r[torch.tensor(twice, device=device)]])
    table = group_references("first", 2, 2).to(device)
    stats = torch.zeros(3, dtype=torch.int64, device=device)
    how: dict[str, Any] = {"matching": matching, "search": search, "backend": backend}
    y = negtome_(x, table, 0.5, 0.9, stats=stats, disjoint=True, **how)[1].float().flatten().tolist()
    return _digest(y)


# --- speed -------------------------------------------------------------------------------------------------------


def rounds(shape: Sequence[int], device: torch.device, dtype: torch.dtype, search: str, matching: str) -> dict[str, Any]:
    """Milliseconds of ``ROUNDS`` rounds of the kernels and of the fallback in turn, at ``(B, T, M, D)``; image 0 is the reference.

    The fallback has no quantised search: there it searches exactly, as it would for a caller who leaves the search to it.
    """
    B, T, M, D = shape
    generator = torch.Generator().manual_seed(0)
    original = tokens("near", B, T, D, generator, dtype).to(device, dtype)
    bank = None if M == T else tokens("near", 1, M, D, generator, dtype).to(device, dtype)
    references = group_references("first", B, B) if bank is None else torch.zeros(B, 1, dtype=torch.int32)
    table, entries = references.to(device), references.flatten().tolist()
    alpha, threshold = (torch.full((n,), value, dtype=torch.float64, device=device) for n, value in ((B, 0.9), (1, 0.65)))
    x = {name: original.clone() for name in ("kernels", "fallback")}

    def call(name: str, backend: str, search: str) -> Callable[[], object]:
        settings: dict[str, Any] = {"matching": matching, "search": search, "backend": backend}
        settings |= {"disjoint": bank is None, "table": entries}  # as the plug-in passes them
        return lambda: negtome_(x[name], table, alpha, threshold, bank, **settings)

    variants = {
        "kernels": call("kernels", "triton", search),
        "fallback": call("fallback", "torch", "auto" if search in QUANTISED else search),
    }
    prepare: Mapping[str, Callable[[], object]] = {name: lambda name=name: x[name].copy_(original) for name in x}  # type: ignore[misc]
    timing = (interleave_graphs if device.type == "cuda" else interleave)(variants, ROUNDS, prepare=prepare)
    return {"shape": list(shape), **{name: [1e3 * s for s in timing[name].seconds] for name in variants}}


def large_case(shape: Sequence[int]) -> Case:
    B, T, M, D = shape
    own = M == T
    return Case(f"shape {B} x {T} x {M} x {D}", B=B, T=T, D=D, mode="first" if own else "bank", M=0 if own else M, large=True)


# --- the process -------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """The kernels computed something wrong, or do not run on this device."""


def find_device(request: Mapping[str, Any]) -> torch.device:
    """The device that the parent means, whatever order this process sees the devices in."""
    if request["device"] == "cpu":
        return torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        if str(getattr(torch.cuda.get_device_properties(index), "uuid", "")) == request["uuid"]:
            torch.cuda.set_device(index)
            torch.empty(1, device="cuda")  # takes the context: fails here, before the kernels, if the device is not to be had
            return torch.device("cuda", index)
    raise RuntimeError(f"the device {request['uuid']} is not visible to a new process")


def blames_kernels(error: BaseException) -> bool:
    """Whether an error says something about the kernels on this device, rather than about the moment."""
    moment = ("out of memory", "CUBLAS_STATUS", "capturing")  # a full card is told in several ways; the kernels use no cuBLAS
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in moment):
        return False
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error) or "Triton Error" in str(error):
        return True
    return type(error).__module__.startswith("triton.")  # does not compile, or needs more than the device has


def prove(request: Mapping[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Try everything that was requested; ``say`` sends a part of the answer."""
    device, dtype = find_device(request), getattr(torch, request["dtype"])
    how = {"search": request["search"], "matching": request["matching"]}
    say({"nonce": request["nonce"], "key": dataclasses.asdict(Subject(device, dtype, **how).key)})
    known = {case.name: case for case in CASES}
    cases = [known[name] for name in request["cases"]]
    cases += [large_case(shape) for shape in request["shapes"]]
    say({"running": "the kernels"})  # who dies from here on, dies of them
    try:
        seen = computed_witness(request["nonce"], "triton", device, dtype, **how)
        if seen != witness(request["nonce"], request["matching"]):
            raise Wrong("tokens of whole numbers: the result is known to every bit, and is another one")
        say({"witness": seen})
        for case in cases:
            text = fault(case, "triton", device, dtype, **how)
            if text is not None:
                raise Wrong(f"{case.name}: {text}")
            say({"case": case.name})
        begun = time.monotonic()
        for number, shape in enumerate(request["shapes"]):
            if number and time.monotonic() - begun > BUDGET:
                break
            say({"speed": rounds(shape, device, dtype, **how)})
    except Wrong as error:
        say({"wrong": str(error)})
    except Exception as error:
        say({"wrong" if blames_kernels(error) else "unknown": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
    say({"done": True})


def main(folder: Path) -> None:
    """Answer ``request.json`` in ``answer.json``, a line for each part, so that a process that dies has told how far it came."""
    request = json.loads((folder / "request.json").read_text())
    with open(folder / "answer.json", "a") as file:

        def say(part: dict[str, Any]) -> None:
            file.write(json.dumps(part) + "\n")
            file.flush()

        try:
            prove(request, say)
        except Exception as error:
            say({"unknown": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", "done": True})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
