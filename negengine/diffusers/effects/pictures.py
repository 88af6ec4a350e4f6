"""Given pictures as references: encoded once, noised per step, joined to the denoiser's batch while merging is active."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from negengine.diffusers.families import Family, Grid
from negengine.diffusers.rows import Join, Owners
from negengine.methods import ReferenceImage


class Pictures:
    """The reference pictures of one applied method."""

    def __init__(self, pictures: tuple[ReferenceImage, ...], seed: int, family: Family) -> None:
        self.pictures, self.seed, self.family = pictures, seed, family
        self.latents: Tensor | None = None  # clean, [A, C, h, w]
        self.noise: Tensor | None = None  # the same for every picture, [C, h, w]
        self.size: Grid | None = None
        self.rows: Tensor | None = None  # of the current step, as the denoiser takes them
        self._masks: dict[tuple[Grid, torch.device], Tensor | None] = {}

    def encode(self, pipe: Any, size: Grid, device: torch.device, dtype: torch.dtype) -> None:
        """VAE-encode the pictures for latents of ``size``; does nothing if that was done already."""
        if self.latents is not None and (self.size, self.latents.device, self.latents.dtype) == (size, device, dtype):
            return
        clean = self.family.latents.encode(pipe, [picture.image for picture in self.pictures], size, device)
        self.latents = clean.to(device, dtype)
        # drawn on the CPU, so that every device gets the same pictures; once for all, so that none depends on the others
        generator = torch.Generator().manual_seed(self.seed)
        self.noise = torch.randn(clean.shape[1:], generator=generator).to(device, dtype)
        self.size = size

    def check_channels(self, denoiser: Any) -> None:
        """Raises ValueError: the denoiser takes more than latents (inpainting), so that a picture alone cannot join its batch."""
        assert self.latents is not None
        rows = self.family.latents.pack(self.latents)
        channels, taken = rows.shape[-1 if rows.ndim == 3 else 1], getattr(denoiser.config, "in_channels", None)
        if taken is not None and taken > channels:
            raise ValueError(
                f"this denoiser takes {taken} channels, but a reference picture has {channels}: inpainting and control denoisers "
                "with extra channels are not supported; groups (reference='first' and others) are"
            )

    @property
    def masked(self) -> bool:
        return any(p.mask is not None for p in self.pictures)

    def at_step(self, levels: tuple[float, float, float]) -> None:
        """Set ``rows`` to the pictures at one step, given ``(signal, noise, scale of a clean sample)``."""
        assert self.latents is not None
        assert self.noise is not None
        signal, noise, clean = levels
        noisy = signal * self.latents + noise * self.noise
        chosen = [n if p.noise else c for p, n, c in zip(self.pictures, noisy, clean * self.latents, strict=True)]
        self.rows = self.family.latents.pack(torch.stack(chosen))

    def join(self, sample: Tensor, owners: Owners) -> Join:
        """Rows more: every picture under every group's conditioning.

        Args:
            sample: what the denoiser is called with. owners: of every group its first row, once for each picture.
        """
        assert self.rows is not None
        tokens, followed = self.rows.shape[1], self.family.tokens.followed
        place = sample[:, :tokens] if followed else sample
        if place.shape[1:] != self.rows.shape[1:]:
            raise ValueError(
                f"reference pictures become rows of shape {list(self.rows.shape[1:])}, but this denoiser takes "
                f"{list(place.shape[1:])}"
            )
        rows = self.rows.to(sample).repeat(len(owners) // len(self.rows), *[1] * (sample.ndim - 1))
        if followed:
            rows = torch.cat([rows, owners.of(sample)[:, tokens:]], 1)
        return Join(owners, {self.family.conditioning.sample: rows})

    def prepare_masks(self, grids: Any, device: torch.device) -> None:
        """Resize the masks to every token grid, on the host, before the denoiser runs.

        Raises:
            ValueError: a mask's white parts are too small to be seen even on the finest grid.
        """
        finest = max(grids, key=lambda grid: grid[0] * grid[1])
        for number, picture in enumerate(self.pictures):
            if not _token_mask(picture, finest).any():
                raise ValueError(
                    f"the white parts of mask {number} fall between the {finest[0]} x {finest[1]} tokens of this image; "
                    "make them larger, or the image"
                )
        for grid in grids:
            if (grid, device) not in self._masks:
                self._masks[grid, device] = torch.stack([_token_mask(p, grid) for p in self.pictures]).to(device)

    def mask(self, grid: Grid, images: int, groups: int, device: torch.device) -> Tensor | None:
        """Which tokens of the joined batch may be matched: bool ``[images + groups * A, tokens]``; None if all.

        The masks are resized to the token grid by nearest-exact.
        """
        if not self.masked:
            return None
        key = (grid, device)
        if key not in self._masks:  # a denoiser spread over several devices
            self.prepare_masks([grid], device)
        masks = self._masks[key]
        assert masks is not None
        return torch.cat([masks.new_ones(images, masks.shape[1]), masks.repeat(groups, 1)])


def _token_mask(picture: ReferenceImage, grid: Grid) -> Tensor:
    if picture.mask is None:
        return torch.ones(grid[0] * grid[1], dtype=torch.bool)
    grey = picture.mask.convert("L")
    pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, 1, grey.height, grey.width)
    return torch.nn.functional.interpolate(pixels.float() / 255, grid, mode="nearest-exact").flatten() > 0.5
