"""The oracle against the paper's equations written a second way: Python floats, one token at a time."""

import math

import pytest
import torch
from torch import Tensor

from negengine import reference

MATCHINGS = pytest.mark.parametrize("matching", ["paper", "release"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def similarity(a: list[float], b: list[float]) -> float:
    def norm(row: list[float]) -> float:
        return max(math.sqrt(sum(v * v for v in row)), 1e-12)

    return sum(p * q for p, q in zip(a, b, strict=True)) / (norm(a) * norm(b))


def by_hand(x, r, alpha, threshold, mask=None, matching="paper", keep=None):
    """Spec section 1, token by token, over lists."""
    x, r = x.tolist(), r.tolist()
    out = [list(row) for row in x]
    for p in range(len(x)):
        if matching == "paper":
            pairs = [(similarity(x[p], r[j]), j) for j in range(len(r)) if mask is None or mask[j]]
        elif mask is None or mask[p]:
            pairs = [(similarity(x[i], r[p]), i) for i in range(len(x))]
        else:
            pairs = []
        if not pairs or (keep is not None and not keep[p]):
            continue
        best, index = max(pairs, key=lambda pair: pair[0])  # the first of equals, hence the lowest index
        if best > threshold:
            out[p] = [(1 + alpha) * a - alpha * b for a, b in zip(x[p], r[index], strict=True)]
    return torch.tensor(out, dtype=torch.float64)


@MATCHINGS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("alpha,threshold", [(0.9, 0.3), (-0.4, 0.0), (1.5, -1.0), (0.9, 1.0)])
def test_one_image(matching, masked, dropped, alpha, threshold):
    x, r = randn(11, 5), randn(11, 5, seed=1)
    mask = (randn(11, seed=2) > 0) if masked else None
    keep = (randn(11, seed=3) > 0) if dropped else None
    y = reference.negtome(x, r, alpha, threshold, mask, matching, keep)
    torch.testing.assert_close(y, by_hand(x, r, alpha, threshold, mask, matching, keep), rtol=1e-12, atol=1e-12)
    assert (y != x).any() == (threshold < 1)


def test_more_reference_than_source_tokens():
    x, r = randn(4, 6), randn(19, 6, seed=1)
    torch.testing.assert_close(reference.negtome(x, r, 0.9, 0.1), by_hand(x, r, 0.9, 0.1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["first", "others", "previous"])
@pytest.mark.parametrize("prompts,images", [(1, 1), (1, 4), (3, 3), (2 * 2, 2)])  # the last: both halves of guidance
def test_groups(mode, prompts, images):
    """Every image against the images that the mode names, taken from the batch before the update."""
    x = randn(prompts * images, 7, 5)
    alphas = [0.3 + 0.1 * b for b in range(len(x))]
    mask = randn(len(x), 7, seed=4) > -0.8
    keep = randn(len(x), 7, seed=5) > -0.8
    table = reference.group_references(mode, len(x), images)
    y = reference.negtome_batch(x, table, alphas, 0.1, mask=mask, keep=keep)
    for group in range(prompts):
        for k in range(images):
            rule = {"first": [0], "others": range(images), "previous": range(k)}[mode]
            members = [group * images + i for i in rule if i != k]
            b = group * images + k
            expected = x[b]
            if members:
                r, m = torch.cat([x[i] for i in members]), torch.cat([mask[i] for i in members])
                expected = by_hand(x[b], r, alphas[b], 0.1, m, keep=keep[b])
            torch.testing.assert_close(y[b], expected, rtol=1e-12, atol=1e-12)
    assert table.dtype == torch.int32


def test_the_table_of_every_mode():
    assert reference.group_references("first", 6, 3).tolist() == [[-1], [0], [0], [-1], [3], [3]]
    assert reference.group_references("others", 4, 2).tolist() == [[1], [0], [3], [2]]
    assert reference.group_references("others", 3, 3).tolist() == [[1, 2], [0, 2], [0, 1]]
    assert reference.group_references("previous", 3, 3).tolist() == [[-1, -1], [0, -1], [0, 1]]
    for mode in reference.MODES:
        assert reference.group_references(mode, 2, 1).tolist() == [[-1], [-1]]


def test_errors():
    with pytest.raises(ValueError, match="group_size 3 does not divide a batch of 4"):
        reference.group_references("first", 4, 3)
    with pytest.raises(ValueError, match="group_size 0"):
        reference.group_references("first", 4, 0)
    with pytest.raises(ValueError, match=r"mode must be one of .*'last'"):
        reference.group_references("last", 4, 2)
    with pytest.raises(ValueError, match=r"matching must be one of .*'best'"):
        reference.match(randn(3, 2), randn(3, 2), matching="best")
    with pytest.raises(ValueError, match="got 4 and 3"):
        reference.match(randn(3, 2), randn(4, 2), matching="release")


def test_previous_reads_values_from_before_the_update():
    x = randn(3, 6, 4)
    y = reference.negtome_batch(x, reference.group_references("previous", 3, 3), 0.9, -1.0)
    assert not torch.equal(y[1], x[1])
    fresh = reference.negtome(x[2], torch.cat([x[0], x[1]]), 0.9, -1.0)
    stale = reference.negtome(x[2], torch.cat([y[0], y[1]]), 0.9, -1.0)
    assert torch.equal(y[2], fresh)
    assert not torch.equal(y[2], stale)


@MATCHINGS
def test_an_image_that_is_its_own_reference_is_unchanged(matching):
    """``(1 + alpha) x - alpha x`` is ``x`` up to rounding; without a reference it is ``x`` to the bit."""
    x = randn(1, 9, 5)
    y = reference.negtome_batch(x, torch.tensor([[0]]), 0.9, 0.0, matching=matching)
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    assert torch.equal(reference.negtome_batch(x, torch.tensor([[-1]]), 0.9, 0.0, matching=matching), x)


def test_negative_alpha_interpolates():
    x, r = randn(6, 4), randn(8, 4, seed=1)
    _, index = reference.match(x, r)
    assert torch.equal(reference.negtome(x, r, -1.0, -1.0), r[index])
    torch.testing.assert_close(reference.negtome(x, r, -0.25, -1.0), 0.75 * x + 0.25 * r[index])


@MATCHINGS
def test_of_equal_cosines_the_lowest_index_wins(matching):
    """Rows of signs: cosines are multiples of 1/16, exact in any order of summation, and many are equal."""
    x, r = randn(12, 16).sign(), randn(12, 16, seed=1).sign()
    exact = (x @ r.T) / 16 if matching == "paper" else (r @ x.T) / 16
    first = [row.index(max(row)) for row in exact.tolist()]
    assert sum(row.count(max(row)) > 1 for row in exact.tolist()) >= 3
    best, index = reference.match(x, r, matching=matching)
    assert index.tolist() == first
    assert torch.equal(best, exact.amax(1))


def test_the_threshold_itself_is_not_merged():
    """Cosines 1 and 0.5, exact in float64: only those above the threshold are merged."""
    r = torch.full((1, 4), 0.5, dtype=torch.float64)
    x = torch.stack([r[0], r[0] * torch.tensor([1, 1, 1, -1])])
    for threshold, merged in ((1.0, [False, False]), (0.75, [True, False]), (0.5, [True, False]), (0.25, [True, True])):
        y = reference.negtome(x, 2 * r, -1.0, threshold)
        assert torch.equal(y, torch.where(torch.tensor(merged)[:, None], 2 * r, x))


def test_zero_rows_have_cosine_zero():
    x, r = randn(5, 4), -randn(5, 4).abs()
    x[1], r[3] = 0, 0
    s = reference.cosine(x, r)
    assert (s[1] == 0).all()
    assert (s[:, 3] == 0).all()
    assert s.isfinite().all()
    assert reference.match(x, r)[1][1] == 0
    tiny = torch.full((1, 4), 1e-13, dtype=torch.float64)  # norm 2e-13, below eps: divided by eps instead
    torch.testing.assert_close(reference.cosine(tiny, tiny), torch.full((1, 1), 0.04, dtype=torch.float64))


@MATCHINGS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(matching, bad):
    x, r = randn(6, 4), randn(6, 4, seed=1)
    sick_x, sick_r = x.clone(), r.clone()
    sick_x[2, 1], sick_r[4, 3] = bad, bad
    best, index = reference.match(sick_x, sick_r, matching=matching)
    if matching == "paper":
        assert index[2] == -1
        assert best[2] == -torch.inf
        assert 4 not in index
    else:  # row 4 of the reference names no column, and rows 2 and 4 may not be picked
        assert index[4] == -1
        assert not {2, 4} & set(index.tolist())
    y = reference.negtome(sick_x, sick_r, 0.9, -1.0, matching=matching)
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


@MATCHINGS
def test_nothing_may_be_matched(matching):
    x, r = randn(4, 3), randn(4, 3, seed=1)
    best, index = reference.match(x, r, torch.zeros(4, dtype=torch.bool), matching)
    assert (index == -1).all()
    assert (best == -torch.inf).all()
    assert torch.equal(reference.negtome(x, r, 0.9, -1.0, torch.zeros(4, dtype=torch.bool), matching), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype(dtype):
    y = reference.negtome(randn(6, 4).to(dtype), randn(6, 4, seed=1).to(dtype), 0.9, 0.1)
    assert y.dtype == dtype
    assert y.shape == (6, 4)


def test_release_misses_the_true_partners_and_paper_finds_them():
    """The claim of the spec: on a permuted, noised copy ``release`` is right by accident only, about 2 / T."""
    g = torch.Generator().manual_seed(0)
    hits = {"paper": 0, "release": 0}
    T, runs = 600, 4
    for _ in range(runs):
        x = torch.randn(T, 64, generator=g)
        order = torch.randperm(T, generator=g)
        r = x[order] + 0.3 * torch.randn(T, 64, generator=g)
        partner = order.argsort()
        for matching in hits:
            hits[matching] += int((reference.match(x, r, matching=matching)[1] == partner).sum())
    assert hits["paper"] > 0.99 * T * runs
    assert hits["release"] < 0.012 * T * runs


def test_dropout_follows_the_published_rule():
    drawn = reference.draw_keep(3, 50, 0.3, torch.Generator().manual_seed(7))
    assert drawn.dtype == torch.bool
    assert torch.equal(drawn, torch.rand(3, 50, generator=torch.Generator().manual_seed(7)) > 0.3)
    torch.manual_seed(7)
    assert torch.equal(reference.draw_keep(3, 50, 0.3), drawn)
    assert not torch.equal(reference.draw_keep(3, 50, 0.3, torch.Generator().manual_seed(8)), drawn)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9])
def test_dropout_leaves_out_its_share(dropout):
    kept = reference.draw_keep(100, 400, dropout, torch.Generator().manual_seed(1)).double().mean()
    assert abs(kept - (1 - dropout)) < 4 * math.sqrt(dropout * (1 - dropout) / 40_000) + 1e-4
