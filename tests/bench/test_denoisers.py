"""The true denoisers' benchmark, on denoisers of the same classes that are small enough for a test."""

import pytest
import torch

from negengine.bench import denoisers


@pytest.mark.parametrize(
    "name, size, compiled",
    [("flux-dev", 256, False), ("sdxl-base", 512, False), pytest.param("flux-dev", 256, True, marks=pytest.mark.exhaustive)],
)
def test_a_forward_of_every_variant(name, size, compiled, monkeypatch):
    monkeypatch.setitem(denoisers.FLUX_DEV, "num_attention_heads", 1)
    monkeypatch.setitem(denoisers.SDXL_BASE, "block_out_channels", (32, 64, 64))
    monkeypatch.setitem(denoisers.SDXL_BASE, "attention_head_dim", [1, 1, 1])
    rows = denoisers.measure(name, "cpu", torch.float32, size, 2, (1, 1), rounds=1, compiled=compiled)
    found = {row["variant"]: row for row in rows}
    assert {"without", "published", "without (again)"} < set(found)
    ours = next(row for variant, row in found.items() if variant.endswith("auto"))
    assert 0 < ours["merged_share"] <= 1
    steps, active = denoisers.LOOPS[name]
    assert ours["loop_overhead"] == pytest.approx((ours["median"] / found["without"]["median"] - 1) * active / steps)
    assert [len(row["seconds"]) for row in rows] == [1] * len(rows)
    assert torch.get_default_dtype() == torch.float32
