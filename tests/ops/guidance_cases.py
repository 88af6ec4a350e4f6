"""The contract of guidance: which backends and dtypes are tried, on what, and how far they may be from float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from contract import DEVICES, DTYPES, ulp
from examples import Draw

from negengine import ops
from negengine.ops import registry
from negengine.reference import guidance as reference

KINDS = ("normal", "large", "tiny", "zeros", "outlier", "equal")
SHAPES = ((1,), (7,), (16,), (3, 5, 7), (4, 8, 8), (2048,), (2065,), (4, 33, 31))
LAYOUTS = ("plain", "rows of a batch", "every other row", "channels last", "strided", "expanded")
MEANS = [reference.means_of(0.9, 0.95), reference.means_of(0.005, 0.02), (0.0, 0.0, 0.0, 1.0), reference.means_of(0.99, 1 - 1e-6)]


@dataclass(frozen=True)
class Case:
    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


def cases() -> list[Case]:
    found = []
    for name, missing in ops.backends().items():
        offered = registry._BACKENDS[name].guidance
        for device in DEVICES if missing is None and offered is not None else ():
            found += [Case(name, device, dtype) for dtype in DTYPES if offered.refuses(torch.device(device), dtype) is None]
    return found


CASES = pytest.mark.parametrize("case", cases(), ids=str)


# --- data and oracle ---------------------------------------------------------------------------------------------


def values(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "large":
        x *= 1e3
    elif kind == "tiny":
        x *= 1e-3 if dtype == torch.float16 else 1e-20
    elif kind == "zeros":
        x[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.5] = 0
    elif kind == "outlier":
        x[..., :: max(1, shape[-1] // 3)] *= 300
    return x.to(device, dtype)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x`` (of its first row only for ``expanded``) with other strides."""
    nan = torch.full_like(x, torch.nan)
    if layout == "rows of a batch":
        return torch.cat([nan, x, nan])[len(x) : 2 * len(x)]
    if layout == "every other row":
        return torch.stack([nan, x], 1).flatten(0, 1)[1::2]
    if layout == "channels last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, nan], -1)[..., 0]
    return x[:1].expand_as(x) if layout == "expanded" else x


def check(y: torch.Tensor, exact: torch.Tensor, same: torch.Tensor, largest: torch.Tensor | None = None) -> None:
    """``|y - exact|`` is at most that of torch in the same dtype and one step of the result, and no larger on average.

    Args:
        largest: the largest of the terms of which the result is made, where sums of many may be rounded in another order: torch may
            then be right by luck where this is four steps of the arithmetic's dtype off, of the size of that term.
    """
    y, exact, same, dtype = y.cpu(), exact.cpu(), same.cpu(), y.dtype
    rounded = exact.to(dtype)
    assert y[rounded.abs() < torch.finfo(dtype).max].isfinite().all(), "overflow of what is no overflow"
    step = ulp(exact, dtype)
    if largest is not None:
        step = step + 4 * ulp(largest.cpu(), torch.promote_types(dtype, torch.float32))
    theirs = (same.double() - exact).abs().nan_to_num(torch.inf, torch.inf)
    ours = (y.double() - exact).abs()
    wrong = ~((ours <= theirs + step) | (y == rounded))
    assert not wrong.any(), f"{(ours - theirs)[wrong].max()} more than torch, where a step is {step[wrong].max()}"
    finite = rounded.isfinite()
    if finite.sum() >= 1000:
        on_average, torch_s = ((e[finite] / step[finite]).clamp_max(4).mean() for e in (ours, theirs))
        most = max(1.05 * torch_s.item() + 1e-3, 0.25)  # a quarter of a step is what a single rounding leaves
        assert on_average <= most, f"{on_average:.3f} steps wrong on average, torch {torch_s:.3f}"


def double(*tensors):
    return [t.double().cpu() if isinstance(t, torch.Tensor) else t for t in tensors]


@dataclass(frozen=True)
class Inputs:
    conditional: torch.Tensor
    negative: torch.Tensor
    strength: torch.Tensor
    unconditional: torch.Tensor | None
    guidance: torch.Tensor | None
    guide_negative: bool

    @property
    def cfg(self):
        return self.unconditional, self.guidance, self.guide_negative


def inputs(case: Case, draw: Draw, shape: tuple[int, ...]) -> Inputs:
    def one() -> torch.Tensor:
        return laid_out(values(draw.one_of(KINDS), shape, draw.seed(), case.dtype, case.device), draw.one_of(LAYOUTS))

    conditional, negative, unconditional = one(), one(), one()
    if draw.one_of(KINDS) == "equal":
        negative = conditional
    numbers = {"device": case.device, "dtype": draw.one_of((torch.float32, torch.float64))}
    strength = torch.tensor([draw.one_of((0.0, 0.3, 1.0, 17.7, 1e4)) for _ in range(shape[0])], **numbers)
    guidance = torch.tensor([draw.one_of((7.5, 1.0, 0.0, 1e3))], **numbers)
    if draw.flag():
        return Inputs(conditional, negative, strength, None, None, draw.flag())
    return Inputs(conditional, negative, strength, unconditional, guidance, draw.flag())


def means_on(case: Case, number: int = 0) -> torch.Tensor:
    return torch.tensor(MEANS[number], dtype=torch.float64, device=case.device)
