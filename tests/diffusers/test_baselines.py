"""The baselines on pipelines beside literal loops in float64: SLD, guidance interval, CADS, seed variance."""

import itertools
import math

import pytest
import torch
from guards import guarded
from tiny import BUILDERS, SIZE, denoiser, draw, flux, kind, sdxl, watched
from transcription import AVOID, PROMPT, conditioning, double, negatives, start

import negengine
from negengine import CADS, GuidanceInterval, SafeLatentDiffusion, SeedVariance


def loop(pipe, steps, predict, x, generator):
    """``predict(x, t, step index, sigma)`` -> what the scheduler is given."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        abar = scheduler.alphas_cumprod[int(t)].item()
        x = scheduler.step(predict(x, t, i, math.sqrt(1 / abar - 1)), t, x, generator=generator, return_dict=False)[0]
    return x


def compared(builder, method, predict, n=2, steps=4, scale=3.0):
    """Ours on a pipeline, the literal loop on its twin."""
    pipe, twin = (double(builder, "DDIMScheduler", clip_sample=False) for _ in range(2))
    x = start(pipe, n)
    branches = {"c": conditioning(twin, PROMPT, n), "u": conditioning(twin, negatives(twin), n)}
    branches["n"] = conditioning(twin, [AVOID] * 2, n)
    expected = loop(twin, steps, lambda *call: predict(branches, *call), x, torch.Generator().manual_seed(1))
    call = {**SIZE[kind(pipe)], "num_inference_steps": steps, "output_type": "latent", "num_images_per_prompt": n}
    call |= {"guidance_scale": scale, "negative_prompt": negatives(pipe)}
    negengine.apply(pipe, method)
    got = pipe(PROMPT, latents=x, generator=torch.Generator().manual_seed(1), **call).images
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    plain = double(builder, "DDIMScheduler", clip_sample=False)
    assert (plain(PROMPT, latents=x, **call).images - got).abs().max() > 1e-3
    return negengine.status(pipe)[type(method)]


@pytest.mark.parametrize("builder, warmup", guarded(itertools.product(("sd", "sdxl"), (0, 2)), lambda *case: case != ("sdxl", 0)))
def test_sld(builder, warmup):
    settings = {"scale": 30.0, "threshold": 0.05, "momentum_scale": 0.4, "momentum": 0.6}
    nu = []

    def predict(branches, x, t, i, sigma):
        c, u, s = (branches[name](x, t) for name in "cun")
        share = torch.where(c - s >= 0.05, 0.0, ((c - s).abs() * 30).clamp(max=1))
        g = (s - u) * share + 0.4 * (nu[-1] if nu else 0)
        nu.append(0.6 * (nu[-1] if nu else 0) + 0.4 * g)
        return u + 3.0 * (c - u - (g if i >= warmup else 0))

    compared(builder, SafeLatentDiffusion(prompt=AVOID, warmup=warmup, **settings), predict)


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_sld_as_in_the_code_of_dng(scale):
    nu = []

    def predict(branches, x, t, i, sigma):
        c, u, s = (branches[name](x, t) for name in "cun")
        e = u + scale * (c - u)
        share = torch.where(e - s >= 0.04, 0.0, ((e - s).abs() * 100).clamp(max=1))
        g = share * (s - e) + 0.2 * (nu[-1] if nu else 0)
        nu.append(0.1 * (nu[-1] if nu else 0) + 0.9 * g)
        return e - 2.0 * g

    compared("sd", SafeLatentDiffusion.preset("dng", prompt=AVOID, outer=2.0), predict, scale=scale)


def test_a_second_run_begins_without_momentum(family):
    pipe = negengine.apply(BUILDERS[family](), SafeLatentDiffusion.preset("dng", prompt=AVOID))
    assert torch.equal(draw(pipe), draw(pipe))


def test_guidance_interval():
    inside = []

    def predict(branches, x, t, i, sigma):
        c, u = branches["c"](x, t), branches["u"](x, t)
        inside.append(0.5 < sigma <= 5)
        return u + 3.0 * (c - u) if inside[-1] else c

    report = compared("sd", GuidanceInterval(low=0.5, high=5.0), predict, steps=6)
    assert 0 < report.active_steps == 6 - sum(inside) < 6


# --- the embedding -----------------------------------------------------------------------------------------------


def embeddings(pipe, settings, steps=5, **kwargs):
    """What the denoiser is given in every step: (timestep of 1000, its text inputs)."""
    seen = []

    def note(module, args, kwargs):
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        pooled = kwargs.get("pooled_projections")
        pooled = kwargs["added_cond_kwargs"]["text_embeds"] if pooled is None else pooled
        scale = 1000 if "hidden_states" in kwargs else 1
        seen.append((float(timestep.flatten()[0]) * scale, kwargs["encoder_hidden_states"].clone(), pooled.clone()))

    if settings is not None:
        negengine.apply(pipe, settings)
    hook = denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    draw(pipe, num_inference_steps=steps, **kwargs)
    hook.remove()
    return seen


@pytest.mark.parametrize(
    "family, psi", guarded(itertools.product(("flux", "sdxl"), (1.0, 0.4)), lambda *case: case != ("sdxl", 0.4))
)
def test_cads(family, psi):
    """The conditional rows are what the formula makes of the clean ones and some standard normal noise; the others stay."""
    clean = embeddings(BUILDERS[family](), None)
    settings = CADS(tau1=0.3, tau2=0.9, scale=0.5, psi=psi, seed=3)
    noised = embeddings(BUILDERS[family](), settings)
    kept = 4 if family == "sdxl" else 0
    changed = 0
    for (t, *before), (same, *after) in zip(clean, noised, strict=True):
        assert t == same
        gamma = min(max((0.9 - t / 1000) / 0.6, 0), 1)
        for c, y in zip(before, after, strict=True):
            assert torch.equal(c[:kept], y[:kept])
            c, y = c[kept:].flatten(1).double(), y[kept:].flatten(1).double()
            if gamma == 1:
                assert torch.equal(c, y)
                continue
            changed += 1
            assert not torch.equal(y[0], y[1])  # images of one prompt get noise of their own
            if psi == 1:
                torch.testing.assert_close(y.mean(1), c.mean(1), rtol=0, atol=1e-4)
                torch.testing.assert_close(y.std(1), c.std(1), rtol=1e-4, atol=1e-4)
                # what is left of the clean embedding
                if c.shape[1] > 100:
                    spread = gamma * c.var(1) + 0.25 * (1 - gamma)
                    share = math.sqrt(gamma) * c.std(1) / spread.sqrt()
                    found = torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(c, y, strict=True)])
                    assert (found - share).abs().max() < 0.25
    assert changed
    again = embeddings(BUILDERS[family](), settings)
    other = embeddings(BUILDERS[family](), CADS(tau1=0.3, tau2=0.9, scale=0.5, psi=psi, seed=4))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(noised, again, strict=True))
    assert not torch.equal(noised[0][1], other[0][1])


def test_cads_on_the_unconditional_half_too():
    both = embeddings(sdxl(), CADS(tau1=0.1, tau2=0.9, unconditional=True, pooled=False))
    clean = embeddings(sdxl(), None)
    assert not torch.equal(both[0][1][:4], clean[0][1][:4])
    assert torch.equal(both[0][2], clean[0][2])


def test_seed_variance(family):
    clean = embeddings(BUILDERS[family](), None)
    settings = SeedVariance(share=0.5, strength=0.7, relative=False, timesteps=(500, 1000), seed=1)
    noised = embeddings(BUILDERS[family](), settings)
    kept, differences = 4 if family == "sdxl" else 0, []
    for (t, before, pooled), (_, after, pooled_after) in zip(clean, noised, strict=True):
        assert torch.equal(pooled, pooled_after)
        assert torch.equal(before[:kept], after[:kept])
        difference = (after - before)[kept:]
        if t < 500:
            assert not difference.any()
            continue
        differences.append(difference)
        assert difference.abs().max() <= 0.7 + 1e-5
        assert 0.4 < (difference != 0).float().mean() < 0.6
    assert 0 < len(differences) < len(clean)
    torch.testing.assert_close(differences[0], differences[-1], atol=1e-5, rtol=0)  # the same in every step
    assert not torch.equal(differences[0][0], differences[0][1])


def test_true_cfg_cannot_be_told_apart():
    pipe = negengine.apply(flux(), SeedVariance())
    with watched(pipe.transformer) as calls, pytest.raises(ValueError, match=r"calls the denoiser twice.*true_cfg_scale=1"):
        draw(pipe, true_cfg_scale=2.0, negative_prompt=["dull", "grey"])
    negengine.apply(negengine.remove(pipe), CADS())
    with pytest.raises(ValueError, match=r"true_cfg_scale=1, or CADS\(unconditional=True\)"):
        draw(pipe, true_cfg_scale=2.0, negative_prompt=["dull", "grey"])
    assert not calls
    negengine.remove(pipe)
    draw(negengine.apply(pipe, CADS(unconditional=True)), true_cfg_scale=2.0, negative_prompt=["dull", "grey"])


@pytest.mark.parametrize(
    "method,call,message",
    [
        (SafeLatentDiffusion(), {"guidance_scale": 1.0}, "SLD changes classifier-free guidance, which is off here"),
        (SafeLatentDiffusion(), {"guidance_rescale": 0.5}, "pass guidance_rescale=0"),
        (GuidanceInterval(low=0, high=1), {"guidance_scale": 1.0}, "no classifier-free guidance in this call"),
    ],
    ids=["sld off", "sld rescaled", "interval off"],
)
def test_calls_that_cannot_work(method, call, message):
    pipe = negengine.apply(sdxl(), method)
    with watched(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        draw(pipe, **call)
    assert not calls


@pytest.mark.parametrize("method", [SafeLatentDiffusion(), GuidanceInterval(low=0, high=1)], ids=["sld", "interval"])
def test_flux_has_no_guidance_in_one_batch(method):
    with pytest.raises(ValueError, match=r"which FLUX\.1 has not"):
        negengine.apply(flux(), method)


@pytest.mark.parametrize("method", [CADS(), SeedVariance(), GuidanceInterval(low=0, high=1), SafeLatentDiffusion()])
def test_bare_denoisers(method):
    with pytest.raises(ValueError, match="to the pipeline"):
        negengine.apply(sdxl().unet, method)
