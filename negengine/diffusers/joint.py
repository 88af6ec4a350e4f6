"""Image tokens in sequences ``[rows, tokens, D]`` that begin with text."""

from __future__ import annotations

import torch
from torch import Tensor

ImageTokens = int | Tensor  # the first of them, the same in every row; or the place of each, int64 [rows, tokens, 1]


def behind(text: list[int], tokens: int, device: torch.device) -> ImageTokens:
    """Where the ``tokens`` of an image are in rows that begin with ``text`` tokens each; what follows them fills a row up."""
    if len(set(text)) == 1:
        return text[0]
    first = torch.tensor(text).to(device)
    return (first[:, None] + torch.arange(tokens, device=device)).unsqueeze(-1)


def images(x: Tensor, first: ImageTokens, tokens: int | None = None, channels: int | None = None) -> Tensor:
    """The image tokens: a view, or a copy where they begin at different places.

    Args:
        tokens: of an image, where others follow them. channels: the first ones that count; None: all.
    """
    if isinstance(first, Tensor):
        places = first.to(x.device)
        return x.gather(1, places.expand(-1, -1, channels or x.shape[2]))
    image = x[:, first : None if tokens is None else first + tokens]
    return image if channels is None else image[..., :channels]


def put_back(x: Tensor, first: ImageTokens, image: Tensor) -> None:
    """Write what :func:`images` gave, and was changed since, to where it came from."""
    if isinstance(first, Tensor):
        x.scatter_(1, first.to(x.device).expand_as(image), image)
