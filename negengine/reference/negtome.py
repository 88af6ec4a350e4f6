"""NegToMe in plain PyTorch: the definition that every backend is tested against.

Written to be read beside the paper (Singh et al., "Negative Token Merging", arXiv 2412.01339, section 3 and
algorithm 1). It forms the whole similarity matrix and loops over images; nothing here is fast. Run it on float64
tensors for the oracle, on any other float dtype for "what torch itself would give".

Notation: ``x`` are source tokens ``[T, D]``, ``r`` reference tokens ``[M, D]``, both of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-12
MATCHINGS = ("paper", "release")
MODES = ("first", "others", "previous")


def cosine(x: Tensor, r: Tensor) -> Tensor:
    """``S[i, j] = <x_i, r_j> / (max(|x_i|, eps) max(|r_j|, eps))``, shape ``[T, M]``."""
    unit_x = x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)
    unit_r = r / r.norm(dim=-1, keepdim=True).clamp_min(EPS)
    return unit_x @ unit_r.T


def match(x: Tensor, r: Tensor, mask: Tensor | None = None, matching: str = "paper") -> tuple[Tensor, Tensor]:
    """Best cosine and its index for every token of ``x``.

    ``paper``: row ``i`` gets ``max_j S[i, j]`` and the reference index ``j`` that reaches it.
    ``release``: row ``p`` gets ``max_i S[i, p]`` and the *source* index ``i`` that reaches it, as the code published
    with the paper does before using that index to pick a reference token; it needs ``T == M``.

    Args:
        x: source tokens ``[T, D]``, any float dtype.
        r: reference tokens ``[M, D]``, same dtype.
        mask: bool ``[M]``, true where a reference token may be matched; all of them if None.
        matching: ``"paper"`` or ``"release"``.

    Returns:
        cosine ``[T]`` (``-inf`` where nothing can be matched) and index ``[T]`` int64 (``-1`` there). Of equal
        cosines the lowest index wins. A row of ``x`` that is not finite matches nothing; a row of ``r`` that is
        not finite is never chosen.
    """
    finite_x, finite_r = x.isfinite().all(-1), r.isfinite().all(-1)
    allowed = finite_r if mask is None else finite_r & mask
    s = cosine(x, r)
    if matching == "paper":
        s = s.masked_fill(~(finite_x[:, None] & allowed[None, :]), -torch.inf)
        best, index = s.max(dim=1)
    elif matching == "release":
        if len(x) != len(r):
            raise ValueError(f"release matching needs as many reference as source tokens, got {len(r)} and {len(x)}")
        chosen = finite_x & finite_r  # i indexes the source in the search and the reference in the merge
        s = s.masked_fill(~(chosen[:, None] & allowed[None, :]), -torch.inf)
        best, index = s.max(dim=0)
    else:
        raise ValueError(f"matching must be one of {MATCHINGS}, got {matching!r}")
    return best, index.masked_fill(best == -torch.inf, -1)


def merge(x: Tensor, r: Tensor, index: Tensor, alpha: float, gate: Tensor) -> Tensor:
    """``y_i = (1 + alpha) x_i - alpha r_index(i)`` where ``gate`` is true, ``x_i`` elsewhere."""
    pushed = (1 + alpha) * x - alpha * r[index.clamp_min(0)]
    return torch.where(gate[:, None], pushed, x)


def negtome(
    x: Tensor,
    r: Tensor,
    alpha: float,
    threshold: float,
    mask: Tensor | None = None,
    matching: str = "paper",
    keep: Tensor | None = None,
) -> Tensor:
    """NegToMe of one image against one set of reference tokens (algorithm 1 of the paper).

    Args:
        x: source tokens ``[T, D]``.
        r: reference tokens ``[M, D]``.
        alpha: extrapolation coefficient; positive pushes away from the reference, negative pulls towards it.
        threshold: a token is merged where its best cosine exceeds this.
        mask: bool ``[M]``, see :func:`match`.
        matching: ``"paper"`` or ``"release"``.
        keep: bool ``[T]``; false drops a token from merging (token dropout, see :func:`draw_keep`).

    Returns:
        A new tensor ``[T, D]`` in the dtype of ``x``.
    """
    best, index = match(x, r, mask, matching)
    gate = (index >= 0) & (best > threshold)
    return merge(x, r, index, alpha, gate if keep is None else gate & keep)


def negtome_batch(
    x: Tensor,
    references: Tensor,
    alpha: float | Sequence[float],
    threshold: float,
    bank: Tensor | None = None,
    mask: Tensor | None = None,
    matching: str = "paper",
    keep: Tensor | None = None,
) -> Tensor:
    """NegToMe of a batch, each image against its own set of reference images.

    Args:
        x: ``[B, T, D]``.
        references: int ``[B, K]``; row ``b`` lists the images of the bank that image ``b`` is pushed away from,
            padded with ``-1``. See :func:`group_references`.
        alpha: one number, or one per image.
        threshold: as in :func:`negtome`.
        bank: reference images ``[R, M, D]``; ``x`` itself, as it was before the update, if None.
        mask: bool ``[R, M]``.
        matching: ``"release"`` needs at most one reference image per source image.
        keep: bool ``[B, T]``.
    """
    bank = x if bank is None else bank
    alphas = [float(alpha)] * len(x) if isinstance(alpha, (int, float)) else [float(a) for a in alpha]
    y = x.clone()
    for b, row in enumerate(references.tolist()):
        images = [r for r in row if r >= 0]
        if images:
            tokens = torch.cat([bank[r] for r in images])
            allowed = None if mask is None else torch.cat([mask[r] for r in images])
            kept = None if keep is None else keep[b]
            y[b] = negtome(x[b], tokens, alphas[b], threshold, allowed, matching, kept)
    return y


def group_rows(mode: str, rows: int, group_size: int) -> list[list[int]]:
    """Which images of a batch are whose reference: of each image those that it is pushed away from, padded with ``-1``.

    The batch holds ``rows // group_size`` groups of consecutive images; with classifier-free guidance each half
    consists of groups of its own, so the same rule covers it.

    Args:
        mode: ``"first"``: image 0 of the group, which has none itself; ``"others"``: all other images of the group;
            ``"previous"``: the images of the group before this one.
        rows: images in the batch.
        group_size: images per prompt; must divide ``rows``.

    Returns:
        ``rows`` lists of ``K``: 1 for ``first``, else ``max(group_size - 1, 1)``.
    """
    if mode not in MODES:
        raise ValueError(f"reference mode must be one of {MODES}, got {mode!r}")
    if group_size < 1 or rows % group_size:
        raise ValueError(f"group_size {group_size} does not divide a batch of {rows} images")
    width = 1 if mode == "first" else max(group_size - 1, 1)
    table = []
    for row in range(rows):
        k = row % group_size
        members = {"first": range(min(k, 1)), "others": [i for i in range(group_size) if i != k], "previous": range(k)}[mode]
        named = [row - k + member for member in members]
        table.append(named + [-1] * (width - len(named)))
    return table


def group_references(mode: str, rows: int, group_size: int) -> Tensor:
    """:func:`group_rows` as operators take them: int32 ``[rows, K]`` on the CPU."""
    width = 1 if mode == "first" else max(group_size - 1, 1)
    return torch.tensor(group_rows(mode, rows, group_size), dtype=torch.int32).view(rows, width)


def is_disjoint(references: Tensor | Sequence[Sequence[int]]) -> bool:
    """Whether no image of a batch both has a reference and is one, by a table as of :func:`group_references` or its rows."""
    rows = references.tolist() if isinstance(references, Tensor) else references
    read = {image for row in rows for image in row}
    return not any(b in read and max(row) >= 0 for b, row in enumerate(rows))


def draw_keep(
    rows: int, tokens: int, dropout: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Token dropout: bool ``[rows, tokens]``, false with probability ``dropout``, drawn as the published code does."""
    return torch.rand(rows, tokens, dtype=torch.float32, device=device, generator=generator) > dropout
