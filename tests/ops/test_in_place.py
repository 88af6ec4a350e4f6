"""``negtome_``: aliasing, statistics, dropout, and numbers that live in tensors."""

import pytest
import torch
from contract import cases, same_bits, tokens

from negengine import ops
from negengine.reference import group_references, is_disjoint

CASES = pytest.mark.parametrize("case", cases(("auto",)), ids=str)


def batch(case, B=4, T=21, D=33):
    return tokens("near", B, T, D, 3, case.dtype, case.device)


@CASES
@pytest.mark.parametrize("mode", ["first", "others", "previous"])
def test_a_bank_that_shares_memory_with_x(case, mode):
    x = batch(case)
    table = group_references(mode, 4, 4).to(case.device)
    expected = ops.negtome_(x.clone(), table, 0.9, 0.0, bank=x.clone()[:, 4:], **case.names)
    storage = x.clone()
    assert same_bits(ops.negtome_(storage, table, 0.9, 0.0, bank=storage[:, 4:], **case.names), expected)


@CASES
def test_only_the_view_is_written(case):
    joint = batch(case)
    before = joint.clone()
    view = joint[:, 5:]
    assert ops.negtome_(view, group_references("first", 4, 2).to(case.device), 0.9, 0.0, **case.names) is view
    assert same_bits(joint[:, :5], before[:, :5])
    assert same_bits(joint[[0, 2]], before[[0, 2]])  # images without a reference
    expected = ops.negtome(before[[1, 3], 5:], before[[0, 2], 5:], 0.9, 0.0, **case.names)
    assert same_bits(joint[[1, 3], 5:], expected)


@CASES
def test_stats_count_and_accumulate(case):
    x = tokens("normal", 4, 21, 33, 3, case.dtype, case.device)
    references = torch.tensor([[-1, -1], [0, -1], [-1, -1], [1, 0]], dtype=torch.int32, device=case.device)
    y, stats = x.clone(), torch.zeros(3, dtype=torch.int64, device=case.device)
    ops.negtome_(y, references, 0.9, 0.35, stats=stats, **case.names)
    merged = int((y != x).any(-1).sum())
    assert 0 < merged < 2 * 21
    assert stats.tolist() == [merged, 2 * 21, 1]
    ops.negtome_(x.clone(), references, 0.9, 0.35, stats=stats, **case.names)
    assert stats.tolist() == [2 * merged, 4 * 21, 2]
    keep = torch.zeros(4, 21, dtype=torch.bool, device=case.device)
    ops.negtome_(x.clone(), references, 0.9, -1.0, keep=keep, stats=stats, **case.names)
    assert stats.tolist() == [2 * merged, 6 * 21, 3]  # a token that is dropped had a reference, and is not merged


@CASES
def test_dropped_tokens_stay_and_the_others_do_not_notice(case):
    x = batch(case)
    table = group_references("others", 4, 4).to(case.device)
    keep = ops.keep_tokens(4, 21, 0.4, torch.tensor([1], device=case.device), 0)
    y, whole = (ops.negtome_(x.clone(), table, 0.9, 0.0, keep=k, **case.names) for k in (keep, None))
    assert same_bits(y, torch.where(keep[..., None], whole, x))
    assert not same_bits(y, whole)


@CASES
def test_alpha_and_threshold_as_tensors(case):
    x = batch(case)
    table = group_references("first", 4, 4).to(case.device)
    for alpha, threshold in ((0.9, 0.65), (-0.3, 0.1)):
        expected = ops.negtome_(x.clone(), table, alpha, threshold, **case.names)
        for shape in ((), (1,), (4,)):
            a = torch.full(shape, alpha, dtype=torch.float64, device=case.device)
            t = torch.full((1,) if shape else (), threshold, dtype=torch.float64, device=case.device)
            assert same_bits(ops.negtome_(x.clone(), table, a, t, **case.names), expected)


@CASES
def test_empty_batches_and_images(case):
    r = batch(case)[0]
    assert ops.negtome(r.new_empty(0, 7, 33), r, **case.names).shape == (0, 7, 33)
    assert ops.negtome(r.new_empty(2, 0, 33), r, **case.names).shape == (2, 0, 33)
    assert ops.match(r.new_empty(2, 0, 33), r, **case.names)[1].shape == (2, 0)


@CASES
def test_a_table_said_to_be_disjoint(case):
    """The promise changes no bit where it is kept, and is refused where the host sees that it is not."""
    x = batch(case)
    first = group_references("first", 4, 2).to(case.device)
    expected = ops.negtome_(x.clone(), first, 0.9, 0.0, **case.names)
    assert same_bits(ops.negtome_(x.clone(), first, 0.9, 0.0, disjoint=True, **case.names), expected)
    others = group_references("others", 4, 2)
    if case.device == "cpu":
        with pytest.raises(ValueError, match="both has a reference and is one"):
            ops.negtome_(x, others, 0.9, 0.0, disjoint=True, **case.names)


@CASES
@pytest.mark.parametrize("mode", ["first", "others"])
def test_entries_that_the_caller_knows_change_no_bit(case, mode):
    x, references = batch(case), group_references(mode, 4, 2)
    table = references.to(case.device)
    expected = ops.negtome_(x.clone(), table, 0.9, 0.0, **case.names)
    assert same_bits(ops.negtome_(x.clone(), table, 0.9, 0.0, table=references.flatten().tolist(), **case.names), expected)


@pytest.mark.parametrize(
    "mode,size,expected",
    [("first", 4, True), ("first", 1, True), ("previous", 2, True), ("previous", 3, False), ("others", 2, False)],
)
def test_which_groups_are_disjoint(mode, size, expected):
    table = group_references(mode, 2 * size, size)
    assert is_disjoint(table) is is_disjoint(table.tolist()) is expected
