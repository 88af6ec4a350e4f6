"""The judge: a small convolutional network that reads digits, trained on digits that the generators never saw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from negengine.models.digits import CLASSES, SIZE, Digits, Jitter, vary
from negengine.models.training import Recipe, Task

WIDTHS = (32, 64, 96)
FEATURES = 128
FILE = "model.safetensors"
RECIPE = Recipe(steps=800, batch=96, lr=2e-3, weight_decay=0.02, ema=0.99)
JITTER = Jitter(shift=2.0, degrees=12.0, scale=0.12, shear=0.2, elastic=0.9)

Images = Sequence[Image.Image] | Tensor


class Classifier(nn.Module):
    """Reads digits from pictures: PIL images of 32 x 32, or a float tensor ``[N, C, 32, 32]`` in [0, 1]; colour is averaged."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 1
        for width in WIDTHS:
            stages += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1, stride=2),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            channels = width
        self.stages = nn.Sequential(*stages)
        self.neck = nn.Linear(WIDTHS[-1] * (SIZE // 2 ** len(WIDTHS)) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Images) -> Tensor:
        """Penultimate features ``[N, F]``, before the last activation, on the classifier's device."""
        grey = self._grey(images)
        return self.neck(self.stages(grey * 2 - 1).flatten(1))

    def logits(self, images: Images) -> Tensor:
        """Scores ``[N, 10]`` of the ten digits."""
        return self.forward(images)

    def forward(self, images: Images) -> Tensor:
        return self.head(F.silu(self.features(images)))

    def _grey(self, images: Images) -> Tensor:
        weight = self.head.weight
        pictures = images if isinstance(images, Tensor) else _stack(images)
        if pictures.ndim != 4 or pictures.shape[2:] != (SIZE, SIZE) or not pictures.is_floating_point():
            raise ValueError(
                f"expected a float tensor [N, C, {SIZE}, {SIZE}] in [0, 1], got {pictures.dtype} {list(pictures.shape)}"
            )
        return pictures.to(weight.device, weight.dtype).mean(1, keepdim=True)


def _stack(images: Sequence[Image.Image]) -> Tensor:
    """PIL images as grey ``[N, 1, 32, 32]`` in [0, 1]."""
    rows = []
    for image in images:
        if image.size != (SIZE, SIZE):
            raise ValueError(f"expected pictures of {SIZE} x {SIZE}, got {image.size[0]} x {image.size[1]}")
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        rows.append(pixels.view(SIZE, SIZE, 3).float().mean(-1)[None] / 255)
    return torch.stack(rows) if rows else torch.empty(0, 1, SIZE, SIZE)


class ClassifierTask(Task):
    """Cross-entropy on strongly varied digits, with a little label smoothing."""

    def __init__(self, digits: Digits) -> None:
        super().__init__()
        self.classifier = Classifier()
        self.digits = digits

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.digits.labels), (batch,), generator=generator)
        images = vary(self.digits.images[rows], JITTER, generator)
        return F.cross_entropy(self.classifier(images).float(), self.digits.labels[rows], label_smoothing=0.05)
