"""A float64 transcription of the formulas of dynamic negative guidance, and pipelines calm enough to compare with it."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny import BETAS, BUILDERS, SIZE, denoiser, kind

import negengine
from negengine import DynamicNegativeGuidance

PROMPT, AVOID = ["a cat", "two dogs"], "the sea"
LIVELY = {"scale": 2.0, "prior": 0.3, "tau": 0.05, "delta": 1e-3, "p_max": 0.8}
# a UNet of one block down and one up, for runs of many steps
SMALL = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
SMALL |= {"transformer_layers_per_block": 1, "attention_head_dim": 1, "layers_per_block": 1}


def double(builder, scheduler=None, **config):
    pipe = BUILDERS[builder]()
    if scheduler is not None:
        kept = {} if "FlowMatch" in scheduler else {**BETAS}
        pipe.scheduler = getattr(diffusers, scheduler)(**{**kept, **config})
    for name, parameter in denoiser(pipe).named_parameters():
        # calmer than the other tests want them: differences of the last bit must not grow a thousandfold per step
        if name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
            parameter.data.mul_(1 / 4)
        if name.endswith("attn2.to_k.weight"):
            parameter.data.mul_(1 / 30)
    return pipe.to(torch.float64)


def conditioning(pipe, texts, n):
    """A function of (latents, timestep) that predicts under ``texts``, one row per image."""
    with torch.no_grad():
        if kind(pipe) == "flux":
            embeds, pooled, ids = pipe.encode_prompt(texts, None, num_images_per_prompt=n, max_sequence_length=11)
        elif kind(pipe) == "sdxl":
            embeds, _, pooled, _ = pipe.encode_prompt(texts, num_images_per_prompt=n, do_classifier_free_guidance=False)
        else:
            embeds, _ = pipe.encode_prompt(texts, "cpu", n, False)
    rows = len(embeds)

    def predict(x, t):
        with torch.no_grad():
            if kind(pipe) == "flux":
                size = SIZE["flux"]
                image_ids = pipe._prepare_latent_image_ids(rows, size["height"] // 16, size["width"] // 16, "cpu", x.dtype)
                return pipe.transformer(
                    hidden_states=x,
                    timestep=t.expand(rows).to(x.dtype) / 1000,
                    guidance=torch.full([rows], 3.5),
                    pooled_projections=pooled,
                    encoder_hidden_states=embeds,
                    txt_ids=ids,
                    img_ids=image_ids,
                    return_dict=False,
                )[0]
            added = None
            if kind(pipe) == "sdxl":
                size = SIZE["sdxl"]["height"], SIZE["sdxl"]["width"]
                times = torch.tensor([[*size, 0, 0, *size]], dtype=x.dtype).repeat(rows, 1)
                added = {"text_embeds": pooled, "time_ids": times}
            return pipe.unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    return predict


def levels(scheduler):
    """(signal, noise) of the sample before every step and after the last, in float64."""
    name = type(scheduler).__name__
    if "FlowMatch" in name:
        return [(1 - s, s) for s in scheduler.sigmas.double().tolist()]
    if "Euler" in name or "Heun" in name or "KDPM2" in name:
        return [(1.0, s) for s in scheduler.sigmas.double().tolist()]
    cumulative = [scheduler.alphas_cumprod[int(t)].item() for t in scheduler.timesteps]
    end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return [(a**0.5, (1 - a) ** 0.5) for a in [*cumulative, end]]


def noise_of(prediction, x, a, b, typ):
    """The prediction as a noise prediction, in variance-exploding units."""
    if typ == "flow":
        clean = x - b * prediction
    elif typ == "v_prediction":
        c = (a * a + b * b) ** 0.5
        clean = (a / c) * (x / c) - (b / c) * prediction
    elif typ == "sample":
        clean = prediction
    else:
        return prediction
    return (x - a * clean) / b


def transcription(pipe, method, steps, scale, x, n, generator, typ, clip=None, order=1):
    """Latents and the posterior before and after every step."""
    scheduler = pipe.scheduler
    null = negatives(pipe) if scale is not None else None
    predict = {"c": conditioning(pipe, PROMPT, n), "n": conditioning(pipe, [AVOID] * 2, n)}
    if scale is not None:
        predict["u"] = conditioning(pipe, null, n)
    if kind(pipe) == "flux":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(x.shape[1]))
    else:
        scheduler.set_timesteps(steps)
        x = x * scheduler.init_noise_sigma
    table = levels(scheduler)
    p = torch.full((len(x),), method.prior, dtype=torch.float64).clamp(method.p_min, method.p_max)
    history, begun = [p], None
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        c, neg = predict["c"](seen, t), predict["n"](seen, t)
        base = c
        if scale is not None:
            u = predict["u"](seen, t)
            base = u + scale * (c - u)
            if method.negative == "cfg":
                neg = u + scale * (neg - u)
        lam = (method.scale * p / (1 - p)).view(-1, *[1] * (x.ndim - 1))
        guided = base - lam * (neg - base)
        extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        following = scheduler.step(guided, t, x, **extra, return_dict=False)[0]
        if i % order == 0:
            begun = i, x, base, neg
        if i % order == order - 1 or i + 1 == len(scheduler.timesteps):
            j, x0, base, neg = begun
            (a, b), (a_next, b_next) = table[j], table[min(j + order, len(table) - 1)]
            s, s_next = b / a if a else math.inf, b_next / a_next
            if 0 < s_next < s:
                p = update(p, x0, following, base, neg, (a, b, s), (a_next, s_next), typ, method, clip)
            history.append(p)
        x = following
    return x, torch.stack(history)


def update(p, x, following, base, neg, now, then, typ, method, clip):
    (a, b, s), (a_next, s_next) = now, then

    def mean(prediction):
        """Of the next sample, divided by its signal."""
        if typ == "flow" and not a:
            return x - b * prediction  # of pure noise nothing remains
        e = noise_of(prediction, x, a, b, typ)
        if clip is None:
            return x / a + (s_next**2 / s - s) * e  # s_down = s_next^2 / s
        clean = (x / a - s * e).clamp(-clip, clip)
        return (1 - s_next**2 / s**2) * clean + s_next**2 / s**2 * x / a

    variance = s_next**2 if s == math.inf else (s**2 - s_next**2) * s_next**2 / s**2

    def distance(prediction):
        return (following / a_next - mean(prediction)).square().flatten(1).sum(1)

    # tau and delta are in units of the sampler's own samples
    variance, gap = variance * a_next**2, (distance(neg) - distance(base)) * a_next**2
    p = p * ((-method.tau * gap + method.delta) / (2 * variance)).exp()
    return p.clamp(method.p_min, method.p_max)


def negatives(pipe):
    return ["blurred", "dull"]


def start(pipe, n):
    size = SIZE[kind(pipe)]
    generator = torch.Generator().manual_seed(4)
    if kind(pipe) == "flux":
        shape = (2 * n, size["height"] // 16 * (size["width"] // 16), 16)
    else:
        shape = (2 * n, 4, size["height"] // 8, size["width"] // 8)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def both(pipe, twin, method, steps=4, n=2, scale=3.0, typ="epsilon", clip=None, order=1):
    """Ours on ``pipe``, the transcription on ``twin``; compares latents and posteriors."""
    x = start(pipe, n)
    expected, history = transcription(twin, method, steps, scale, x, n, torch.Generator().manual_seed(1), typ, clip, order)
    call = {**SIZE[kind(pipe)], "num_inference_steps": steps, "output_type": "latent", "num_images_per_prompt": n}
    if kind(pipe) == "flux":
        call["max_sequence_length"] = 11
    elif scale is not None:
        call |= {"guidance_scale": scale, "negative_prompt": negatives(pipe)}
    else:
        call["guidance_scale"] = 1.0
    negengine.apply(pipe, method)
    got = pipe(PROMPT, latents=x, generator=torch.Generator().manual_seed(1), **call).images
    report = negengine.status(pipe)[DynamicNegativeGuidance]
    found = torch.tensor(report.p, dtype=torch.float64)
    torch.testing.assert_close(found, history, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (found[1] - found[0]).abs().max() > 1e-6  # the posterior moves
    assert report.steps == len(twin.scheduler.timesteps)
    return report
