"""Given pictures as references: encoded once, noised per step, joined to the denoiser's batch while merging is active."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from negengine.diffusers.families import Family, Grid
from negengine.methods import ReferenceImage


class Pictures:
    """The reference pictures of one applied method."""

    def __init__(self, pictures: tuple[ReferenceImage, ...], seed: int, family: Family) -> None:
        self.pictures, self.seed, self.family = pictures, seed, family
        self.latents: Tensor | None = None  # clean, [A, C, h, w]
        self.noise: Tensor | None = None
        self.size: Grid | None = None
        self.rows: Tensor | None = None  # of the current step, as the denoiser takes them
        self._masks: dict[tuple[Grid, torch.device], Tensor | None] = {}

    def encode(self, pipe: Any, size: Grid, device: torch.device, dtype: torch.dtype) -> None:
        """VAE-encode the pictures for latents of ``size``; does nothing if that was done already.

        Raises:
            ValueError: the denoiser takes more channels than latents have (inpainting), so that a picture alone
                cannot join its batch.
        """
        if self.latents is not None and (self.size, self.latents.device, self.latents.dtype) == (size, device, dtype):
            return
        vae = pipe.vae
        height, width = size[0] * pipe.vae_scale_factor, size[1] * pipe.vae_scale_factor
        batch = torch.cat([pipe.image_processor.preprocess(p.image.convert("RGB"), height, width) for p in self.pictures])
        stored = vae.dtype
        if vae.config.get("force_upcast") and stored == torch.float16:
            vae.to(torch.float32)  # SDXL's VAE overflows in float16
        with torch.no_grad():
            encoded = vae.encode(batch.to(device, vae.dtype))
        clean = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents  # AutoencoderTiny
        if vae.dtype != stored:
            vae.to(stored)
        self.latents = _normalise(clean.float(), vae.config).to(device, dtype)
        # drawn on the CPU, so that every device gets the same pictures
        generator = torch.Generator().manual_seed(self.seed)
        self.noise = torch.randn(clean.shape, generator=generator).to(device, dtype)
        self.size = size

    def at_step(self, levels: tuple[float, float, float]) -> None:
        """Set ``rows`` to the pictures at one step, given ``(signal, noise, scale of a clean sample)``."""
        assert self.latents is not None
        assert self.noise is not None
        signal, noise, clean = levels
        noisy = signal * self.latents + noise * self.noise
        chosen = [n if p.noise else c for p, n, c in zip(self.pictures, noisy, clean * self.latents, strict=True)]
        self.rows = self.family.pack(torch.stack(chosen))

    def join(self, inputs: Mapping[str, Any], groups: Tensor) -> dict[str, Any]:
        """The denoiser's inputs with ``len(groups) * A`` rows more: every picture under every group's conditioning.

        Args:
            inputs: inputs by name. groups: int64, the first row of each group.
        """
        assert self.rows is not None
        sample = inputs[self.family.sample]
        if sample.shape[1:] != self.rows.shape[1:]:
            raise ValueError(
                f"reference pictures become rows of shape {list(self.rows.shape[1:])}, but this denoiser takes "
                f"{list(sample.shape[1:])}; inpainting and control denoisers with extra channels are not supported"
            )
        owner = groups.repeat_interleave(len(self.rows))
        joined = dict(inputs)
        joined[self.family.sample] = torch.cat([sample, self.rows.to(sample).repeat(len(groups), *[1] * (sample.ndim - 1))])
        for name in self.family.batched:
            if name in joined:
                joined[name] = _with_rows(joined[name], len(sample), owner)
        return joined

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
        if all(p.mask is None for p in self.pictures):
            return None
        key = (grid, device)
        if key not in self._masks:  # a denoiser spread over several devices
            self.prepare_masks([grid], device)
        masks = self._masks[key]
        assert masks is not None
        return torch.cat([masks.new_ones(images, masks.shape[1]), masks.repeat(groups, 1)])


def _normalise(latents: Tensor, config: Any) -> Tensor:
    """VAE latents as the denoiser was trained on them."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        view = (1, -1, 1, 1)
        mean, std = latents.new_tensor(mean).view(view), latents.new_tensor(std).view(view)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def _token_mask(picture: ReferenceImage, grid: Grid) -> Tensor:
    if picture.mask is None:
        return torch.ones(grid[0] * grid[1], dtype=torch.bool)
    grey = picture.mask.convert("L")
    pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, 1, grey.height, grey.width)
    return torch.nn.functional.interpolate(pixels.float() / 255, grid, mode="nearest-exact").flatten() > 0.5


def _with_rows(value: Any, rows: int, owner: Tensor) -> Any:
    """``value`` with the rows ``owner`` appended to every tensor in it that has one row per image."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[owner]]) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {k: _with_rows(v, rows, owner) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_with_rows(v, rows, owner) for v in value])
    return value


def noise_levels(scheduler: Any) -> Callable[[int], tuple[float, float, float]]:
    """What a scheduler makes of signal and noise at each position of its timesteps, found by asking it.

    Every sampler is linear in both, so two numbers and the scale of a clean sample say all. Asked on a copy on the CPU:
    the scheduler's own counters stay as they are, and nothing waits for the device.
    """
    probe = copy.deepcopy(scheduler)
    for name, value in vars(probe).items():
        if isinstance(value, Tensor):
            setattr(probe, name, value.cpu())

    def rewind() -> None:
        for name in ("_step_index", "_begin_index"):
            if hasattr(probe, name):
                setattr(probe, name, None)

    def scaled(sample: Tensor, t: Tensor) -> Tensor:
        if not hasattr(probe, "scale_model_input"):
            return sample
        rewind()
        return probe.scale_model_input(sample, t)

    def levels(position: int) -> tuple[float, float, float]:
        t = probe.timesteps[position]
        signal, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        rewind()
        if hasattr(probe, "scale_noise"):
            mixed = probe.scale_noise(signal, t.view(1), noise)
        else:
            mixed = probe.add_noise(signal, noise, t.view(1))
        a, b = scaled(mixed, t).flatten().tolist()
        return a, b, scaled(torch.ones(1, 1), t).item()

    return levels
