"""The negative image as a loop over the denoiser in float64, text encoders read off without the pipeline."""

from __future__ import annotations

import copy
import itertools

import tiny
import torch
from tiny_dns import STEPS, kind


def text_states(pipe, prompts):
    """Of the text encoders, read off without the pipeline: ``(states, pooled)``."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=tiny.CLIP_LENGTH, truncation=True, return_tensors="pt").input_ids
    first = pipe.text_encoder(ids, output_hidden_states=True)
    if kind(pipe) == "sd":
        return first[0], None
    if kind(pipe) == "flux":
        t5 = pipe.tokenizer_2(prompts, padding="max_length", max_length=11, truncation=True, return_tensors="pt").input_ids
        return pipe.text_encoder_2(t5)[0], first.pooler_output
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def noise(pipe, seeds):
    shape = (1, 4, 4, 6)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).double()


@torch.no_grad()
def literal(pipe, prompts, seeds, w, swapped=True):
    """The latents at the end of ``e = e_p + w (e_null - e_p)`` (or the usual guidance), in float64."""
    model = copy.deepcopy(tiny.denoiser(pipe)).double()
    p, null = text_states(pipe, prompts), text_states(pipe, [""] * len(prompts))
    if pipe.config.get("force_zeros_for_empty_prompt"):
        null = tuple(torch.zeros_like(part) for part in p)
    start, end = (p, null) if swapped else (null, p)
    scheduler = copy.deepcopy(pipe.scheduler)
    return LOOPS[kind(pipe)](model, scheduler, start, end, w, prompts, seeds, pipe)


def ddim_loop(model, scheduler, start, end, w, prompts, seeds, pipe):
    x = noise(pipe, seeds)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    for t in [1 + i * (1000 // STEPS) for i in reversed(range(STEPS))]:
        a, b = (model(x, t, encoder_hidden_states=states.double()).sample for states, _ in (start, end))
        e = a + w * (b - a)
        before = abar[max(t - 1000 // STEPS, 0)]
        x = before.sqrt() * (x - (1 - abar[t]).sqrt() * e) / abar[t].sqrt() + (1 - before).sqrt() * e
    return x / pipe.vae.config.scaling_factor


def euler_loop(model, scheduler, start, end, w, prompts, seeds, pipe):
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    ids = torch.tensor([[32.0, 48.0, 0.0, 0.0, 32.0, 48.0]] * len(prompts)).double()
    x = noise(pipe, seeds) * sigmas.max()
    for t, sigma, after in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        seen = x / (sigma**2 + 1).sqrt()
        a, b = (
            model(
                seen, t, encoder_hidden_states=states.double(), added_cond_kwargs={"text_embeds": pooled.double(), "time_ids": ids}
            ).sample
            for states, pooled in (start, end)
        )
        x = x + (after - sigma) * (a + w * (b - a))
    return x / pipe.vae.config.scaling_factor


def flow_loop(model, scheduler, start, end, w, prompts, seeds, pipe):
    n, (h, width) = len(prompts), (4, 6)
    x = noise(pipe, seeds).view(n, 4, h // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, 6, 16)
    places = torch.tensor([[0, r, c] for r in range(h // 2) for c in range(width // 2)]).double()
    sigmas = torch.cat([pipe.scheduler.sigmas[:-1].double(), torch.zeros(1).double()])  # of the run before
    for sigma, after in itertools.pairwise(sigmas):
        a, b = (
            model(
                hidden_states=x,
                timestep=sigma.expand(n),
                guidance=torch.full((n,), 3.5).double(),
                encoder_hidden_states=states.double(),
                pooled_projections=pooled.double(),
                txt_ids=torch.zeros(11, 3).double(),
                img_ids=places,
            ).sample
            for states, pooled in (start, end)
        )
        x = x + (after - sigma) * (a + w * (b - a))
    x = x.view(n, h // 2, width // 2, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, 4, h, width)
    return x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor


LOOPS = {"sd": ddim_loop, "sdxl": euler_loop, "flux": flow_loop}
