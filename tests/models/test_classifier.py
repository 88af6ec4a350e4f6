"""The judge reads real digits, from any kind of input."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from negengine import models
from negengine.models.classifier import Classifier


def test_reads_the_digits_it_never_saw(judge: Classifier) -> None:
    images, labels = models.heldout_digits()
    assert (judge.logits(images).argmax(1) == labels).float().mean() >= 0.975


def test_pictures_and_tensors_agree(judge: Classifier) -> None:
    images = (models.heldout_digits()[0][:6] * 255).round() / 255
    pictures = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    assert torch.allclose(judge.logits(pictures), judge.logits(images), atol=1e-4)
    assert torch.allclose(judge.features(pictures), judge.features(images[:, :1]), atol=1e-4)
    assert torch.allclose(judge.logits([picture.convert("L") for picture in pictures]), judge.logits(images), atol=1e-4)


def test_logits_follow_from_features(judge: Classifier) -> None:
    images = models.heldout_digits()[0][:3]
    features = judge.features(images)
    assert features.shape == (3, 128)
    assert features.norm(dim=1).min() > 0
    assert torch.equal(judge.logits(images), judge.head(torch.nn.functional.silu(features)))
    assert judge.logits(images).shape == (3, 10)


def test_it_is_frozen_in_float32(judge: Classifier) -> None:
    assert not judge.training
    assert {(p.dtype, p.requires_grad) for p in judge.parameters()} == {(torch.float32, False)}


def test_nothing_gives_nothing(judge: Classifier) -> None:
    assert judge.logits([]).shape == (0, 10)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 28, 28), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)]
)
def test_wrong_tensors_are_told(judge: Classifier, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a float tensor \[N, C, 32, 32\]"):
        judge.logits(images)


def test_wrong_picture_size_is_told(judge: Classifier) -> None:
    with pytest.raises(ValueError, match="32 x 32, got 28 x 30"):
        judge.logits([Image.new("L", (28, 30))])
