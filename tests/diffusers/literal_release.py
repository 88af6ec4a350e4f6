"""The whole of the published pipelines, written out again for tests: their window, their masks, their way with a given picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from literal import Literal
from tiny import denoiser, kind


def merged(group, alpha, threshold, may_match):
    """The rule for a batch: of every column of the similarities the best row, taken as the index of a token of image 0."""
    unit = F.normalize(group, dim=-1)
    out = []
    for k, x in enumerate(group):
        s = (unit[k] @ unit[0].T).masked_fill(~may_match, -torch.inf)
        best, index = s.max(dim=0)
        out.append(torch.where((best > threshold)[:, None], (1 + alpha) * x - alpha * group[0][index], x) if k else x)
    return torch.stack(out)


class Release(Literal):
    """Puts the test's processors on a pipeline of diffusers, whose next calls then give the published pictures.

    Args:
        low, high: the window, compared with the scheduler's timestep as the denoiser is told it.
        asset: clean latents ``[1, C, h, w]`` that take the place of image 0 in every step. mask: [1, 1, H, W] of greys.
        rule_in: the dtype in which the rule is computed, other than that of the tokens.
    """

    def __init__(self, pipe, n, low, high, alpha, threshold, blocks=None, min_grid=1, asset=None, mask=None, rule_in=None):
        super().__init__(pipe, n, alpha, threshold, matching="release", blocks=blocks, min_grid=min_grid)
        self.pipe, self.low, self.high, self.asset, self.mask, self.rule_in = pipe, low, high, asset, mask, rule_in
        self.position, self.active = 0, []
        denoiser(pipe).register_forward_pre_hook(self._place, with_kwargs=True)

    def _note(self, module, args, kwargs):
        super()._note(module, args, kwargs)
        flux = self.family == "flux"
        sample = kwargs["hidden_states"] if flux else args[0]
        t = self.pipe.scheduler.timesteps[self.position]
        self.timestep = (t.to(sample.dtype) if flux else t).item()
        self.position = (self.position + 1) % len(self.pipe.scheduler.timesteps)
        self.active.append(self.low <= self.timestep <= self.high)

    def _place(self, module, args, kwargs):
        if self.asset is None:
            return None
        if self.family == "flux":
            A, C, h, w = self.asset.shape
            packed = self.asset.view(A, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(A, h * w // 4, 4 * C)
            return args, kwargs | {"hidden_states": torch.cat([packed, kwargs["hidden_states"][1:]])}
        sample = args[0].clone()
        scheduler = self.pipe.scheduler
        scale = 1 / (scheduler.sigmas[scheduler.step_index or 0] ** 2 + 1) ** 0.5  # of Euler's scale_model_input
        sample[:: self.n] = self.asset * scale
        return (sample, *args[1:]), kwargs

    def _may_match(self, tokens):
        if self.mask is None:
            return torch.ones(tokens, dtype=torch.bool)
        h, w = (self.asset.shape[-2] // 2, self.asset.shape[-1] // 2) if self.family == "flux" else self.asset.shape[-2:]
        seen = F.interpolate(self.mask, (h, w), mode="nearest-exact")
        while h * w > tokens:
            h, w = -(-h // 2), -(-w // 2)
        return F.interpolate(seen, (h, w), mode="nearest-exact").flatten() != 0

    def __call__(self, x, name):
        if not (self.active[-1] and self.selects(name)):
            return x
        self.calls += 1
        halves = x.to(self.rule_in or x.dtype).split(self.n)
        may_match = self._may_match(x.shape[1])
        return torch.cat([merged(half, self.alpha, self.threshold, may_match) for half in halves]).to(x.dtype)


def encoded(pipe, picture):
    """A picture of the generated size as the published code gives it to the denoiser, with the mode of the VAE's distribution."""
    config = pipe.vae.config
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.image_processor.preprocess(picture).to(pipe.vae.dtype)).latent_dist.mode()
    shift = config.shift_factor if kind(pipe) == "flux" else 0
    return (latents - shift) * config.scaling_factor
