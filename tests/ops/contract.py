"""The numeric contract of a backend as data to try and checks to pass.

The oracle here is written apart from ``negengine.reference``: elementwise float64, no matrix product. A new backend is
covered as soon as it is registered; its own tests may call the checks with other data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from negengine import ops
from negengine.ops import registry

EPS = 1e-12
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DELTA = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-6}
QUANTISED = ("bf16", "int8", "fp8")
FP32 = 2e-6  # error of a cosine that was computed in fp32


@dataclass(frozen=True)
class Case:
    backend: str
    device: str
    dtype: torch.dtype
    search: str

    @property
    def quantised(self) -> bool:
        return self.search in QUANTISED

    @property
    def delta(self) -> float:
        """How far below the best cosine a choice may be."""
        if self.search == "auto":
            return DELTA[self.dtype]
        return 1e-2 if self.quantised else 1e-6

    @property
    def names(self) -> dict[str, str]:
        return {"backend": self.backend, "search": self.search}

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}-{self.search}"


def cases(searches: tuple[str, ...] = ("auto", "exact", *QUANTISED)) -> list[Case]:
    """Every usable backend with every device, dtype and search that it takes."""
    found = []
    for name, missing in ops.backends().items():
        for device in DEVICES if missing is None else ():
            for dtype in DTYPES:
                for search in searches:
                    if registry._BACKENDS[name].refuses(torch.device(device), dtype, search) is None:
                        found.append(Case(name, device, dtype, search))
    return found


# --- data --------------------------------------------------------------------------------------------------------

KINDS = ("normal", "near", "outlier", "student", "signs", "duplicates", "zeros", "nan", "inf", "tiny", "huge", "below_eps")
LAYOUTS = ("plain", "skips_tokens", "skips_images", "expanded", "images_inside")


def tokens(kind: str, B: int, T: int, D: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """``[B, T, D]`` of a kind that searches have trouble with."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, D, generator=g, dtype=torch.float64)
    rows = torch.rand(B, T, generator=g) < 0.3
    half = dtype == torch.float16
    if kind == "near":  # tokens of one picture resemble each other
        x = 0.1 * x + torch.randn(1, 1, D, generator=g, dtype=torch.float64)
    elif kind == "outlier":
        x[..., :: max(1, D // 3)] *= 20
    elif kind == "student":
        x = x / torch.rand(B, T, D, generator=g, dtype=torch.float64).clamp_min(1e-3).sqrt()
    elif kind == "signs":  # cosines are multiples of 1 / D: many exact ties between different rows
        x = x.sign()
    elif kind == "duplicates":
        x = x[:, torch.randint(0, max(1, T // 4), (T,), generator=g)]
    elif kind == "zeros":
        x[rows] = 0
    elif kind == "nan":
        x[..., 0][rows] = torch.nan
    elif kind == "inf":
        x[..., -1][rows] = torch.inf * x[..., -1][rows].sign()
    elif kind == "tiny":
        x *= 1e-3 if half else 1e-30
    elif kind == "huge":
        x *= 1e3 if half else 1e30
    elif kind == "below_eps" and not half:
        x *= 1e-13
    return x.to(device, dtype)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x [B, T, D]`` (of image 0 only for ``expanded``) in a tensor with other strides; unit inner stride."""
    B, T, D = x.shape
    if layout == "skips_tokens":
        return torch.cat([x.new_full((B, 5, D), torch.nan), x], 1)[:, 5:]
    if layout == "skips_images":
        return torch.stack([x, torch.full_like(x, torch.nan)], 1).view(2 * B, T, D)[::2]
    if layout == "expanded":
        return x[:1].expand(B, T, D)
    if layout == "images_inside":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


# --- oracle ------------------------------------------------------------------------------------------------------


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of neighbouring numbers of ``dtype`` at ``value`` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs())[1].double() - 1
    return torch.maximum(2.0**exponent, torch.tensor(info.smallest_normal, dtype=torch.float64)) * info.eps


def cosines(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """``[T, M]`` in float64; NaN where a row is not finite."""

    def unit(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.double()
        return rows / (rows * rows).sum(-1, keepdim=True).sqrt().clamp_min(EPS)

    x, r = unit(x), unit(r)
    return torch.stack([(row * r).sum(-1) for row in x]) if len(x) else x.new_zeros(0, len(r))


# --- checks, one image each --------------------------------------------------------------------------------------


def allowed_pairs(x: torch.Tensor, r: torch.Tensor, mask: torch.Tensor | None, matching: str) -> torch.Tensor:
    """Bool ``[T, M]``: which pairs the search may look at."""
    sources, targets = x.isfinite().all(-1), r.isfinite().all(-1)
    columns = targets if mask is None else targets & mask
    return (sources & targets if matching == "release" else sources)[:, None] & columns


def check_match(
    x: torch.Tensor,
    r: torch.Tensor,
    mask: torch.Tensor | None,
    matching: str,
    cosine: torch.Tensor,
    index: torch.Tensor,
    delta: float,
) -> torch.Tensor:
    """How far each chosen cosine is below the best.

    Asserts that it is within ``delta``, that equal rows go to the lowest index, and that nothing is chosen that must not be.
    """
    s, pairs, rows = cosines(x, r), allowed_pairs(x, r, mask, matching), r
    if matching == "release":  # over source tokens, one for every reference token
        s, pairs, rows = s.T, pairs.T, x
    some = pairs.any(1)
    assert (index[~some] == -1).all()
    assert (cosine[~some] == -torch.inf).all()
    s, pairs, index, cosine = s[some], pairs[some], index[some].long(), cosine[some]
    assert ((index >= 0) & (index < pairs.shape[1])).all()
    assert pairs.gather(1, index[:, None]).all(), "a token was chosen that must not be"
    chosen = s.gather(1, index[:, None])[:, 0]
    best = s.masked_fill(~pairs, -torch.inf).amax(1)
    assert (best - chosen <= delta).all(), f"{(best - chosen).max()} below the best cosine"
    assert ((cosine.double() - chosen).abs() <= FP32).all(), "the cosine is not that of the chosen pair"
    for i, j in enumerate(index.tolist()):
        equal = (rows[:j] == rows[j]).all(-1) & pairs[i, :j]
        assert not equal.any(), "of equal rows the lowest index must win"
    return best - chosen


def check_merge(
    x: torch.Tensor,
    r: torch.Tensor,
    index: torch.Tensor,
    alpha: float,
    threshold: float,
    keep: torch.Tensor | None,
    y: torch.Tensor,
    matching: str = "paper",
) -> int:
    """``y`` against the oracle given the chosen index; returns how many tokens were merged for certain."""
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    s = cosines(x, r) if matching == "paper" else cosines(x, r).T
    pairs = index.clamp_min(0).long()
    best = s.gather(1, pairs[:, None])[:, 0].masked_fill(index < 0, -torch.inf)
    if keep is not None:
        best = best.masked_fill(~keep, -torch.inf)
    merged, left = best > threshold + FP32, ~(best > threshold - FP32)
    assert same_bits(y[left], x[left]), "an unmerged row changed"
    changed = (bits(y) != bits(x)).any(-1)  # between the two, rounding decides: merged or left, nothing else
    rows = merged | (changed & ~left)
    check_arithmetic(x[rows], r[pairs[rows]], alpha, y[rows])
    return int(merged.sum())


def check_arithmetic(x: torch.Tensor, r: torch.Tensor, alpha: float, y: torch.Tensor) -> None:
    """``(1 + alpha) x - alpha r``: no entry worse than torch in the same dtype by over an ulp, and no worse on average.

    The ulp is that of the largest term: where the terms cancel, no arithmetic in ``dtype`` does better.
    """
    exact = (1 + alpha) * x.double() - alpha * r.double()
    finite = exact.isfinite()  # what is not, is in a source row that was not: it may only stay there
    assert not y[~finite].isfinite().any()
    torch_error = (((1 + alpha) * x - alpha * r).double() - exact)[finite].abs().nan_to_num(torch.inf, torch.inf)
    largest = torch.stack([exact, (1 + alpha) * x.double(), alpha * r.double()])[:, finite].abs().amax(0)
    unit = ulp(largest, x.dtype)
    error = (y.double() - exact)[finite].abs()
    assert ((error <= torch_error + unit) | (error.isinf() & torch_error.isinf())).all()
    if error.numel() >= 1000 and x.dtype != torch.float64:  # there the oracle is torch's own expression, without any error
        ours, theirs = ((e / unit).clamp_max(4).mean() for e in (error, torch_error))
        assert ours <= 1.05 * theirs + 1e-3, f"{ours:.3f} ulp wrong on average, torch {theirs:.3f}"
