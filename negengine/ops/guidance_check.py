"""Whether the Triton kernels of guidance may be chosen by themselves: each process tries them once on each GPU and dtype.

The kernels of NegToMe prove themselves in a process of their own, for correctness and speed, and keep the verdict
(``negengine.ops.establish``). These are three short kernels without matrix units, whose variants differ in little: a few calls
against float64, some milliseconds beside the time that compiling them takes, are all that is asked of them, and nothing is kept.
``NEGENGINE_VERIFY`` decides as it does there: ``trust`` asks nothing, ``off`` leaves the choice to PyTorch.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from negengine.ops import verdicts
from negengine.reference import guidance as reference

logger = logging.getLogger("negengine")
SIZES = (4096, 2051)  # elements: rows on 16 bytes, and not
NUMBERS = (5.0, 2.5, 0.25)
CLIP = 1.0
_known: dict[tuple[torch.device, torch.dtype], str | None] = {}


def defers(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels should not be chosen by themselves; None if they should.

    Raises:
        ValueError: ``NEGENGINE_VERIFY`` has an unknown value.
    """
    if device.type != "cuda":
        return "on CPUs it is Triton's interpreter, which is for tests"
    mode = verdicts.verify_mode()
    if mode == "trust":
        return None
    if mode == "off":
        return f"{verdicts.VARIABLE}=off"
    if (device, dtype) not in _known:
        if torch.cuda.is_current_stream_capturing():
            return "they have not been tried on this device yet, and cannot be while a graph is captured"
        reason = _known[device, dtype] = wrong(device, dtype)
        if reason is not None:
            logger.warning("negengine: the Triton kernels of guidance are not used on %s in %s: %s", device, dtype, reason)
    return _known[device, dtype]


@torch.no_grad()
def wrong(device: torch.device, dtype: torch.dtype, backend: str = "triton") -> str | None:
    """What a backend gets wrong of the three operators; None if nothing."""
    for size in SIZES:
        generator = torch.Generator().manual_seed(size)
        c, n, u, x, y = (torch.randn(2, size, generator=generator).to(dtype) for _ in range(5))
        numbers = torch.tensor([0.7, 3.0]), torch.tensor([7.5]), torch.tensor(reference.means_of(0.3, 0.4), dtype=torch.float64)
        try:
            found = _results([t.to(device) for t in (c, n, u, x, y)], [t.to(device) for t in numbers], backend)
        except Exception as error:  # whatever a compiler or a driver may raise
            return f"they do not run: {type(error).__name__}: {error}"
        for (name, result), expected, allowed in zip(found.items(), *_expected([c, n, u, x, y], numbers), strict=True):
            off = (result.cpu().double() - expected).abs()
            if not (off <= allowed).all():
                return f"{name} of {size} elements is {off.nan_to_num(torch.inf).max():.2g} off"
    return None


def _results(tensors: list[Tensor], numbers: list[Tensor], backend: str) -> dict[str, Tensor]:
    (c, n, u, x, y), (strength, g, means), ops = tensors, numbers, torch.ops.negengine
    return {
        "guide": ops.guide(c, n, strength, u, g, True, 1, backend),
        "evidence": ops.evidence(x, y, c, n, means, u, g, False, CLIP, backend),
        "nag": ops.nag(c[:, None], n[:, None], *NUMBERS, backend)[:, 0],
    }


def _expected(tensors: list[Tensor], numbers: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The results in float64, and how far from them rounding may lead."""
    (c, n, u, x, y), (strength, g, means) = [t.double() for t in tensors], numbers
    step, single = torch.finfo(tensors[0].dtype).eps, torch.finfo(torch.float32).eps
    squares = reference.squares(x, y, c, n, means, u, g, False, CLIP)
    guided, held = reference.guide(c, n, strength, u, g, True), reference.nag(c, n, *NUMBERS)
    allowed = [step * guided.abs() + 1e3 * single, 100 * single * squares.abs().sum(-1), step * held.abs() + 1e2 * single]
    return [guided, squares.sum(-1), held], allowed
