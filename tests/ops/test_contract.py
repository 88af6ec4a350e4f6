"""Every usable backend keeps the numeric contract, on data that searches have trouble with."""

import pytest
import torch
from contract import Case, cases, check_arithmetic, check_match, check_merge, laid_out, same_bits, tokens
from examples import Draw, examples

from negengine import ops
from negengine.reference import group_references

CASES = pytest.mark.parametrize("case", cases(), ids=str)
ALPHAS = (0.9, 1.5, 0.1, -0.3, -1.0, 0.0)
THRESHOLDS = (-1.0, 0.0, 0.3, 0.65, 0.95, 1.0)


@CASES
@examples
def test_match(case: Case, draw: Draw):
    B, T, M, D = draw.integer(1, 3), draw.length(), draw.length(), draw.channels()
    x = laid_out(tokens(draw.kind(), B, T, D, draw.seed(), case.dtype, case.device), draw.layout())
    shared = draw.flag()
    r = laid_out(tokens(draw.kind(), B, M, D, draw.seed(), case.dtype, case.device), draw.layout())
    mask = draw.mask(*([M] if draw.flag() else [B, M]))
    device_mask = None if mask is None else mask.to(case.device)
    cosine, index = ops.match(x, r[0] if shared else r, device_mask, **case.names)
    assert cosine.dtype == torch.float32
    assert index.dtype == torch.int32
    assert cosine.shape == index.shape == (B, T)
    for b in range(B):
        m = None if mask is None else mask.expand(B, M)[b]
        check_match(x[b].cpu(), r[0 if shared else b].cpu(), m, "paper", cosine[b].cpu(), index[b].cpu(), case.delta)


@CASES
@examples
def test_match_release(case: Case, draw: Draw):
    T, D = draw.length(), draw.channels()
    x = laid_out(tokens(draw.kind(), 2, T, D, draw.seed(), case.dtype, case.device), draw.layout())
    r = tokens(draw.kind(), 1, T, D, draw.seed(), case.dtype, case.device)[0]
    mask = draw.mask(T)
    cosine, index = ops.match(x, r, None if mask is None else mask.to(case.device), "release", **case.names)
    for b in range(2):
        check_match(x[b].cpu(), r.cpu(), mask, "release", cosine[b].cpu(), index[b].cpu(), case.delta)


@CASES
@examples
def test_negtome(case: Case, draw: Draw):
    T, D = draw.length(), draw.channels()
    matching = draw.one_of(("paper", "release"))
    M = T if matching == "release" else draw.length()
    alpha, threshold = draw.one_of(ALPHAS), draw.one_of(THRESHOLDS)
    x = laid_out(tokens(draw.kind(), 2, T, D, draw.seed(), case.dtype, case.device), draw.layout())
    r = tokens(draw.kind(), 2, M, D, draw.seed(), case.dtype, case.device)
    before = x.clone()
    y = ops.negtome(x, r, alpha, threshold, matching=matching, **case.names)
    _, index = ops.match(x, r, matching=matching, **case.names)
    assert same_bits(x, before)
    assert y.is_contiguous()
    for b in range(2):
        check_merge(x[b].cpu(), r[b].cpu(), index[b].cpu(), alpha, threshold, None, y[b].cpu(), matching)


@CASES
@examples
def test_negtome_in_place(case: Case, draw: Draw):
    """Any table of references, several images each, padded anywhere; per-image alpha, masks, dropout, own or other bank."""
    B, T, D, K = draw.integer(1, 4), draw.length(), draw.channels(), draw.integer(1, 3)
    x = laid_out(tokens(draw.kind(), B, T, D, draw.seed(), case.dtype, case.device), "skips_tokens")
    own = draw.flag()
    R, M = (B, T) if own else (draw.integer(1, 3), draw.length())
    bank = None if own else laid_out(tokens(draw.kind(), R, M, D, draw.seed(), case.dtype, case.device), draw.layout())
    table = [[draw.integer(-1, R - 1) for _ in range(K)] for _ in range(B)]
    references = torch.tensor(table, dtype=torch.int32, device=case.device)
    alpha = [draw.one_of(ALPHAS) for _ in range(B)]
    threshold = draw.one_of(THRESHOLDS)
    mask, keep = draw.mask(R, M), draw.mask(B, T)
    there = [None if t is None else t.to(case.device) for t in (mask, keep)]

    before = x.clone()
    pool = before if own else bank
    cosine, index = torch.ops.negengine.match(x, bank, references, there[0], "paper", case.search, case.backend)
    y = ops.negtome_(
        x, references, torch.tensor(alpha, dtype=torch.float64, device=case.device), threshold, bank, *there, **case.names
    )
    assert y is x
    for b, row in enumerate(table):
        slots = [max(k, 0) for k in row]
        r = torch.cat([pool[k] for k in slots]).cpu()
        present = torch.tensor(row).repeat_interleave(M) >= 0
        allowed = present if mask is None else present & torch.cat([mask[k] for k in slots])
        kept = None if keep is None else keep[b]
        check_match(before[b].cpu(), r, allowed, "paper", cosine[b].cpu(), index[b].cpu(), case.delta)
        check_merge(before[b].cpu(), r, index[b].cpu(), alpha[b], threshold, kept, y[b].cpu())


@CASES
@pytest.mark.parametrize("mode", ["first", "others", "previous"])
def test_references_of_a_group_are_read_before_the_update(case, mode):
    before = tokens("near", 8, 21, 33, 3, case.dtype, case.device)  # 2 prompts x 2 images, both halves of guidance
    table = group_references(mode, 8, 2).to(case.device)
    y = ops.negtome_(before.clone(), table, 0.9, 0.0, **case.names)
    copy = ops.negtome_(before.clone(), table, 0.9, 0.0, bank=before.clone(), **case.names)
    assert same_bits(y, copy)
    assert not same_bits(y, before)


@CASES
def test_arithmetic_over_many_entries(case):
    """Large enough for the comparison of average errors: an alpha that was rounded shows there."""
    x = tokens("near", 1, 200, 64, 5, case.dtype, case.device)
    r = tokens("near", 1, 64, 64, 6, case.dtype, case.device)
    for alpha in (0.9, 0.37, -0.3):
        y = ops.negtome(x, r, alpha, -1.0, **case.names)
        index = ops.match(x, r, **case.names)[1].long()
        check_arithmetic(x[0].cpu(), r[0][index[0]].cpu(), alpha, y[0].cpu())


def test_torch_gives_the_published_bits():
    """In float32 the expression of the release, evaluated by torch, is reproduced to the bit."""
    x, r = tokens("near", 1, 200, 64, 5, torch.float32), tokens("near", 1, 64, 64, 6, torch.float32)[0]
    index = ops.match(x, r, backend="torch")[1][0].long()
    for alpha in (0.9, -0.3, 0.18, 1.93, -0.91):
        y = ops.negtome(x, r, alpha, -1.0, backend="torch")
        assert same_bits(y[0], (1 + alpha) * x[0] - alpha * r[index])


@CASES
def test_the_threshold_itself_is_not_merged(case):
    """Cosines that are exact in every dtype: only those above the threshold are merged."""
    half = [0.5, 0.5, 0.5, 0.5]
    x = torch.tensor([[half, [0.5, 0.5, 0.5, -0.5], [0.5, 0.5, -0.5, -0.5]]], dtype=case.dtype, device=case.device)
    r = torch.tensor([half], dtype=case.dtype, device=case.device)
    for threshold, merged in ((1.0, 0), (0.75, 1), (0.5, 1), (0.25, 2), (0.0, 2), (-0.25, 3)):
        stats = torch.zeros(3, dtype=torch.int64, device=case.device)
        ops.negtome_(
            x.clone(), torch.zeros(1, 1, dtype=torch.int32, device=case.device), 0.9, threshold, r[None], stats=stats, **case.names
        )
        assert stats[0] == merged


@CASES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(case, bad):
    x = tokens("near", 2, 40, 16, 1, case.dtype, case.device)
    clean = ops.negtome(x, x[0], 0.9, 0.0, **case.names)
    sick = x.clone()
    sick[1, 7, 3] = bad
    y = ops.negtome(sick, x[0], 0.9, 0.0, **case.names)
    others = torch.arange(40) != 7
    assert same_bits(y[:, others], clean[:, others])
    assert same_bits(y[1, 7], sick[1, 7])
    r = torch.cat([torch.full_like(x[0, :3], bad), x[0]])
    assert same_bits(ops.negtome(x, r, 0.9, 0.0, **case.names), clean)


@CASES
def test_zero_rows_have_cosine_zero(case):
    x = tokens("near", 1, 5, 8, 1, case.dtype, case.device)
    x[0, 2] = 0
    cosine, index = ops.match(x, x[0], **case.names)
    assert cosine[0, 2] == 0
    assert index[0, 2] == 0
    cosine, index = ops.match(x, x[0, 2:3], **case.names)
    assert (cosine == 0).all()
    assert (index == 0).all()


@CASES
@pytest.mark.parametrize("kind", ["normal", "outlier", "student"])
def test_ordinary_data(case, kind):
    """A search in low precision, too, finds the very best for nearly every token."""
    x, r = tokens(kind, 1, 300, 128, 1, case.dtype, case.device), tokens(kind, 1, 400, 128, 2, case.dtype, case.device)[0]
    cosine, index = ops.match(x, r, **case.names)
    short = check_match(x[0].cpu(), r.cpu(), None, "paper", cosine[0].cpu(), index[0].cpu(), case.delta)
    if case.quantised:
        assert (short <= 1e-6).double().mean() >= 0.9999


@CASES
def test_largest_finite_values(case):
    x = torch.full((1, 3, 8), torch.finfo(case.dtype).max if case.dtype != torch.float64 else 1e150, dtype=case.dtype)
    cosine, _ = ops.match(x.to(case.device), x[0].to(case.device), **case.names)
    assert (cosine - 1).abs().max() < 1e-6
