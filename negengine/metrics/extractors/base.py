"""What an extractor is, and the simplest one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

Images = Sequence[Image.Image]
Classes = Sequence[str]
BATCH = 32


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that sees.

    Attributes:
        name: by which it was asked for.
        features: images -> ``[N, F]``.
        logits: images -> ``[N, classes]``; None if it reads no classes.
        classes: their names.
        texts: texts -> ``[N, F]`` in the space of ``features``; None if it reads no texts.
    """

    name: str
    features: Callable[[Images], Tensor]
    logits: Callable[[Images], Tensor] | None = None
    classes: tuple[str, ...] = ()
    texts: Callable[[Sequence[str]], Tensor] | None = None


def batched(function: Callable[[Images], Tensor], size: int = BATCH) -> Callable[[Images], Tensor]:
    """``function`` of many images, in batches, on the CPU in float32.

    The result raises TypeError or ValueError where ``function`` does not return a tensor ``[N, F]``.
    """

    def whole(images: Images) -> Tensor:
        parts = []
        for start in range(0, len(images), size):
            part = list(images[start : start + size])
            with torch.no_grad():
                found = function(part)
            if not isinstance(found, Tensor):
                raise TypeError(f"a feature extractor must return a tensor [N, F], got {type(found).__name__}")
            if found.ndim != 2 or len(found) != len(part):
                raise ValueError(f"a feature extractor returned {list(found.shape)} for {len(part)} images; [N, F] is needed")
            parts.append(found.detach().float().cpu())
        return torch.cat(parts)

    return whole


def as_tensor(images: Images) -> Tensor:
    """RGB images of one size as float32 ``[N, 3, H, W]`` in [0, 1]. Raises ValueError for unequal sizes."""
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"images of one size are needed, got {', '.join(f'{w} x {h}' for w, h in sorted(sizes))}")
    rows = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in images]
    width, height = images[0].size
    return torch.stack(rows).view(-1, height, width, 3).permute(0, 3, 1, 2).float() / 255


def pixels(device: str, classes: Classes) -> Extractor:
    """The pixels themselves, in [-1, 1]: no network, and no idea of what is shown."""
    return Extractor("pixels", batched(lambda images: as_tensor(images).flatten(1) * 2 - 1))
