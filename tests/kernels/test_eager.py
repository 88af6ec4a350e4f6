"""What the contract does not see of the PyTorch kernels: memory, and independence of torch's global settings."""

import pytest
import torch
from negengine.kernels.call import Call
from negengine.kernels.eager import match as kernel
from negengine.kernels.eager import merge, product
from torch.utils._python_dispatch import TorchDispatchMode

from negengine import ops

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


class LargestProduct(TorchDispatchMode):
    """Bytes of the largest matrix product, how many there were, and the sides of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.count, self.sides = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.bytes, self.count = max(self.bytes, out.numel() * out.itemsize), self.count + 1
            self.sides.update(out.shape)
        return out


@pytest.mark.parametrize("matching", ["paper", "release"])
def test_no_more_than_64_mb_of_similarities(matching):
    x, r = torch.randn(1, 4500, 3), torch.randn(4500, 3)  # the whole matrix would have 77 MB
    with LargestProduct() as seen:
        kernel.match(Call(x, r[None], torch.zeros(1, 1, dtype=torch.int32), None, matching, "exact"), torch.float32)
    assert 32 * 2**20 < seen.bytes <= 64 * 2**20
    assert seen.count == 2
    assert all(side % kernel.TILE[torch.float32] == 0 for side in seen.sides)


@pytest.mark.parametrize("matching", ["paper", "release"])
@pytest.mark.parametrize("rows", [1, 64, 100, 130])
def test_chunks_do_not_change_the_result(matching, rows, monkeypatch):
    x, r = torch.randn(2, 200, 24), torch.randn(200, 24)
    whole = ops.match(x, r, matching=matching, backend="torch")
    monkeypatch.setattr(kernel, "SIMILARITY_BYTES", rows * 4 * 256)
    with LargestProduct() as seen:
        references = torch.zeros(2, 1, dtype=torch.int32)
        parts = kernel.match(Call(x, r[None], references, None, matching, "exact"), torch.float32)
    assert seen.bytes <= rows * 4 * 256
    assert seen.count >= 4
    assert torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=0 if rows >= 64 else 1e-6)  # of whole tiles: to the bit


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_search(autocast):
    x, r = torch.randn(2, 40, 32), torch.randn(50, 32)
    expected = ops.match(x, r, backend="torch"), ops.negtome(x, r, threshold=0.1, backend="torch")
    with torch.autocast("cpu", dtype=autocast):
        cosine, index = ops.match(x, r, backend="torch")
        y = ops.negtome(x, r, threshold=0.1, backend="torch")
    assert torch.equal(cosine, expected[0][0])
    assert torch.equal(index, expected[0][1])
    assert torch.equal(y, expected[1])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_does_not_reach_the_search(precision):
    x, r = torch.randn(1, 512, 640), torch.randn(512, 640)
    expected = ops.match(x, r, backend="torch")[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with kernel.as_written(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.equal(ops.match(x, r, backend="torch")[0], expected)
        assert torch.get_float32_matmul_precision() == precision  # and it is the user's again
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-120, -60, -30, 0, 60, 127])
def test_rows_of_any_magnitude_become_unit_rows(dtype, exponent):
    rows = torch.tensor([[1.0, -1.5, 1.25, 0.5, 1.75]], dtype=dtype) * 2.0**exponent
    unit, finite = kernel.unit_rows(rows, dtype, eps=0.0)
    torch.testing.assert_close(unit.norm(), torch.ones((), dtype=dtype))
    assert finite.all()


def test_rows_below_eps_are_divided_by_eps():
    unit, _ = kernel.unit_rows(torch.tensor([[3e-13, 4e-13], [0, 0], [3e-30, 0]]), torch.float32)
    torch.testing.assert_close(unit, torch.tensor([[0.3, 0.4], [0, 0], [3e-18, 0]]), rtol=1e-6, atol=1e-24)


def test_rows_that_are_not_finite_become_zeros():
    unit, finite = kernel.unit_rows(torch.tensor([[1, torch.nan], [torch.inf, 1], [3, 4]]), torch.float32)
    assert finite.tolist() == [False, False, True]
    torch.testing.assert_close(unit, torch.tensor([[0, 0], [0, 0], [0.6, 0.8]]))


def test_overlapping_calls_put_the_users_precision_back():
    """Of two threads the first to begin need not be the first to end."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        first, second = (product.as_written(torch.device("cpu")) for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert matmul.fp32_precision == "ieee"  # the second still computes
        second.__exit__(None, None, None)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("layout", ["plain", "behind_text", "images_inside", "expanded", "uneven", "one_token"])
def test_rows_of_any_bank_are_gathered_without_a_copy(layout):
    """Whatever lies between images and tokens."""
    memory = torch.randn(4000)
    bank = {
        "plain": lambda: memory[: 3 * 7 * 5].view(3, 7, 5),
        "behind_text": lambda: memory[: 3 * 11 * 5].view(3, 11, 5)[:, 4:],
        "images_inside": lambda: memory[: 7 * 3 * 5].view(7, 3, 5).transpose(0, 1),
        "expanded": lambda: memory[: 7 * 5].view(1, 7, 5).expand(3, 7, 5),
        "uneven": lambda: memory.as_strided((3, 7, 5), (77, 10, 1), 2),
        "one_token": lambda: memory[:15].view(3, 1, 5),
    }[layout]()
    rows, token, image = merge._flat(bank)
    assert rows.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    for r in range(len(bank)):
        for t in range(bank.shape[1]):
            assert torch.equal(rows[r * image + t * token], bank[r, t])
