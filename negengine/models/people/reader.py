"""The judge: a small convolutional network that reads profession, gender, tone and style, trained apart from the generators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from negengine.models.people.attributes import ATTRIBUTES, SIZE
from negengine.models.people.pictures import People, Shift, vary
from negengine.models.training import Recipe, Task

WIDTHS = (32, 64, 96, 128)
FEATURES = 128
RECIPE = Recipe(steps=1500, batch=64, lr=2e-3, weight_decay=0.02, ema=0.99)
SHIFT = Shift(pixels=4.0, scale=0.1, degrees=5.0, flip=0.5)
NOISE, SHADE = 0.06, 0.06

Images = Sequence[Image.Image] | Tensor


class PeopleClassifier(nn.Module):
    """Reads the attributes of people: PIL images of 64 x 64, or a float tensor ``[N, 3, 64, 64]`` in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            stages += [nn.Conv2d(channels, width, 3, padding=1, stride=2), nn.GroupNorm(8, width), nn.SiLU()]
            stages += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.stages = nn.Sequential(*stages)
        self.neck = nn.Linear(WIDTHS[-1] * (SIZE // 2 ** len(WIDTHS)) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, sum(map(len, ATTRIBUTES.values())))

    def features(self, images: Images) -> Tensor:
        """Penultimate features ``[N, F]``, before the last activation, on the classifier's device."""
        pictures = self._pictures(images)
        return self.neck(self.stages(pictures * 2 - 1).flatten(1))

    def forward(self, images: Images) -> tuple[Tensor, ...]:
        """Scores ``[N, K]`` of the K values of each attribute, in the order of ``ATTRIBUTES``."""
        return self.head(F.silu(self.features(images))).split([len(values) for values in ATTRIBUTES.values()], -1)

    def logits(self, images: Images, attribute: str = "profession") -> Tensor:
        """Scores ``[N, K]`` of one attribute's values. Raises ValueError for an unknown attribute."""
        if attribute not in ATTRIBUTES:
            raise ValueError(f"there is no attribute {attribute!r}; there are {', '.join(ATTRIBUTES)}")
        return self.forward(images)[list(ATTRIBUTES).index(attribute)]

    def read(self, images: Images) -> Tensor:
        """The likeliest value of each attribute, indices ``[N, 4]``: profession, gender, tone, style."""
        return torch.stack([scores.argmax(-1) for scores in self.forward(images)], 1)

    def _pictures(self, images: Images) -> Tensor:
        weight = self.head.weight
        pictures = images if isinstance(images, Tensor) else _stack(images)
        if pictures.ndim != 4 or pictures.shape[1:] != (3, SIZE, SIZE) or not pictures.is_floating_point():
            raise ValueError(
                f"expected a float tensor [N, 3, {SIZE}, {SIZE}] in [0, 1], got {pictures.dtype} {list(pictures.shape)}"
            )
        return pictures.to(weight.device, weight.dtype)


def _stack(images: Sequence[Image.Image]) -> Tensor:
    """PIL images as ``[N, 3, 64, 64]`` in [0, 1]."""
    for image in images:
        if image.size != (SIZE, SIZE):
            raise ValueError(f"expected pictures of {SIZE} x {SIZE}, got {image.size[0]} x {image.size[1]}")
    pixels = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255 for image in images]
    return torch.stack(pixels) if pixels else torch.empty(0, 3, SIZE, SIZE)


class ReaderTask(Task):
    """Cross-entropy of every attribute on strongly varied pictures, some blurred, shaded and noisy as a generator's may be."""

    def __init__(self, people: People) -> None:
        super().__init__()
        self.classifier = PeopleClassifier()
        self.people = people

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.people.labels), (batch,), generator=generator)
        scores = self.classifier(spoil(vary(self.people.images[rows], SHIFT, generator), generator))
        truths = self.people.labels[rows].unbind(1)
        losses = [F.cross_entropy(s.float(), t, label_smoothing=0.05) for s, t in zip(scores, truths, strict=True)]
        return torch.stack(losses).sum()


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures blurred; all with another brightness for each colour and with noise."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5)
    shade = 1 + (torch.rand(n, 3, 1, 1, generator=generator) * 2 - 1) * SHADE
    noise = torch.randn(images.shape, generator=generator) * NOISE * torch.rand(n, 1, 1, 1, generator=generator)
    return (torch.lerp(images, blurred, share) * shade + noise).clamp(0, 1)
