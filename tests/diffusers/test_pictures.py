"""Given pictures: encoded once, noised as the scheduler would, joined in active steps only, matched under their mask."""

import functools
import itertools

import diffusers
import pytest
import torch
from compare import hooked
from guards import guarded
from tiny import BUILDERS, SIZE, denoiser, draw, half_mask, kind, picture, sdxl, watched

import negengine
from negengine import reference

ReferenceImage = negengine.ReferenceImage
EVERYWHERE = {"timesteps": (0, 1000)}
PIPELINES = ["flux", "flux_img2img", "flux_controlnet", "sdxl", "sdxl_img2img", "sdxl_controlnet"]


def test_encoded_once_per_size(family, monkeypatch):
    pipe = BUILDERS[family]()
    encoded, encode = [], pipe.vae.encode

    def counting(batch, *args, **kwargs):
        encoded.append(tuple(batch.shape))
        return encode(batch, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "encode", counting)
    hooked(pipe, draw, reference=[ReferenceImage(picture(0)), ReferenceImage(picture(1))])
    size = SIZE[family]
    assert encoded == [(2, 3, size["height"], size["width"])]
    draw(pipe, n=3)
    assert len(encoded) == 1
    draw(pipe, height=64, width=64)
    assert encoded[1:] == [(2, 3, 64, 64)]


# a picture on every pipeline, two where nothing else is conditioned
PICTURES = guarded(itertools.product(PIPELINES, (1, 2)), lambda builder, n: n == (2 if builder in ("flux", "sdxl") else 1))


@pytest.mark.parametrize("builder, pictures", PICTURES)
def test_joined_in_active_steps_only(builder, pictures):
    """2 prompts x 3 images: one row more per group and picture, with guidance per half; the output keeps its batch."""
    pipe = BUILDERS[builder]()
    call = functools.partial(draw, prompts=2, n=3, num_inference_steps=5)
    plain = call(pipe)
    references = [ReferenceImage(picture(i)) for i in range(pictures)]
    negengine.apply(pipe, negengine.NegToMe(timesteps=(450, 1000), threshold=-1, min_grid=1, reference=references))
    with watched(denoiser(pipe)) as calls:
        got = call(pipe)
    halves = 2 if kind(pipe) == "sdxl" else 1
    assert [rows for _, rows in calls] == [halves * (6 + 2 * pictures * (t >= 450)) for t, _ in calls]
    assert len({rows for _, rows in calls}) == 2
    assert got.shape == plain.shape
    assert all(not torch.equal(a, b) for a, b in zip(got, plain, strict=True))  # the first images too


def test_true_guidance():
    pipe = BUILDERS["flux"]()
    negengine.apply(pipe, negengine.NegToMe(**EVERYWHERE, reference=ReferenceImage(picture())))
    with watched(pipe.transformer) as calls:
        got = draw(pipe, n=3, true_cfg_scale=2.0, negative_prompt=["dull", "grey"])
    assert [rows for _, rows in calls] == [8] * 6
    assert len(got) == 6


@pytest.mark.parametrize("builder", PIPELINES)
def test_rows_of_pictures_do_not_change_the_others(builder):
    """At alpha = 0 nothing is merged but the pictures are there: the images are those without.

    Not to the bit: a product over more rows may be blocked differently. Such noise stays a hundred times below what
    merging in earnest does.
    """
    pipe = BUILDERS[builder]()
    plain = draw(pipe)
    settings = {**EVERYWHERE, "threshold": -1, "reference": ReferenceImage(picture())}
    nothing, status = hooked(pipe, draw, alpha=0.0, **settings)
    assert status.merged_tokens == status.eligible_tokens > 0
    pushed, _ = hooked(pipe, draw, alpha=0.9, **settings)
    scale = (pushed - plain).abs().amax().item()
    assert scale > 1e-2
    torch.testing.assert_close(nothing, plain, rtol=0, atol=scale / 100)


# --- what the pictures' rows hold --------------------------------------------------------------------------------


def clean_latents(pipe, image):
    size = SIZE[kind(pipe)]
    pixels = pipe.image_processor.preprocess(image, size["height"], size["width"])
    latents = pipe.vae.encode(pixels).latent_dist.mode().detach()
    return (latents - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor


def formula(scheduler, t):
    """(signal, noise, clean) as the scheduler's own papers write them, at timestep ``t``."""
    train = scheduler.config.num_train_timesteps
    if "FlowMatch" in type(scheduler).__name__:
        return 1 - t / train, t / train, 1.0
    cumulative = scheduler.alphas_cumprod.double()
    if "Euler" in type(scheduler).__name__:
        low = min(int(t), train - 2)
        table = ((1 - cumulative) / cumulative).sqrt()
        sigma = (table[low] + (t - low) * (table[low + 1] - table[low])).item()
        scale = (sigma**2 + 1) ** -0.5
        return scale, sigma * scale, scale
    abar = cumulative[int(t)].item()
    return abar**0.5, (1 - abar) ** 0.5, 1.0


LEVELS = [
    ("flux", "FlowMatchEulerDiscreteScheduler", {}),
    ("flux", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("sdxl", "EulerDiscreteScheduler", {}),
    ("sdxl", "EulerAncestralDiscreteScheduler", {}),
    ("sdxl", "DDIMScheduler", {}),
    ("sdxl", "DPMSolverMultistepScheduler", {}),
    ("sdxl", "UniPCMultistepScheduler", {}),
    ("sdxl_img2img", "DDIMScheduler", {}),
    ("flux_img2img", "FlowMatchEulerDiscreteScheduler", {}),
]
WITHOUT_NOISE = (LEVELS[0], LEVELS[2], LEVELS[4])  # of each way to write levels one


@pytest.mark.parametrize(
    "builder, scheduler, config, noise",
    guarded(
        ((*level, noise) for level in LEVELS for noise in (True, False)),
        lambda *case: case[-1] or case[:-1] in WITHOUT_NOISE,
    ),
)
def test_levels_are_those_of_the_scheduler(builder, scheduler, config, noise):
    pipe = BUILDERS[builder]()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **config)
    clean = clean_latents(pipe, picture())
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    reference = ReferenceImage(picture(), noise=noise)
    negengine.apply(pipe, negengine.NegToMe(**EVERYWHERE, min_grid=1, seed=7, reference=reference))
    rows = []

    def note(module, args, kwargs):
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        timestep = args[1] if len(args) > 1 else kwargs["timestep"].flatten()[0]
        rows.append((float(timestep) * (1000 if kind(pipe) == "flux" else 1), sample[-1].clone()))

    hook = denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    draw(pipe, num_inference_steps=4)
    hook.remove()
    assert len(rows) >= 2
    for t, row in rows:
        signal, deviation, alone = formula(pipe.scheduler, t)
        expected = signal * clean + deviation * drawn if noise else alone * clean
        if kind(pipe) == "flux":
            expected = pipe._pack_latents(expected, 1, *expected.shape[1:])
        torch.testing.assert_close(row, expected[0].float(), rtol=1e-4, atol=1e-4)


# --- what a block makes of them ----------------------------------------------------------------------------------

BLOCKS = {
    "flux joint": ("flux", "transformer_blocks.0", "transformer_blocks.0.attn.to_out.0", (5, 7)),
    "flux single": ("flux", "single_transformer_blocks.1", "single_transformer_blocks.1.attn", (5, 7)),
    "sdxl coarse": ("sdxl", "mid_block.attentions.0.transformer_blocks.0.attn1", None, (5, 4)),
    "sdxl fine": ("sdxl", "up_blocks.1.attentions.1.transformer_blocks.0.attn2", None, (9, 7)),
}


def before_and_after(place, settings, n=2):
    """Image tokens at one place with one merging block, ``[rows, tokens, channels]`` before and after merging."""
    builder, block, path, _ = BLOCKS[place]
    pipe, seen = BUILDERS[builder](), []
    module = denoiser(pipe).get_submodule(path or block)

    def note(module, args, output=None):
        x = args[0] if output is None else output
        seen.append(x[:, 11:].clone() if "single" in block else x.clone())

    def listen():
        return module.register_forward_pre_hook(note) if "to_out" in (path or "") else module.register_forward_hook(note)

    hooks = [listen()]
    negengine.apply(pipe, negengine.NegToMe(**{**EVERYWHERE, "min_grid": 1, "blocks": (block,), **settings}))
    hooks.append(listen())
    draw(pipe, n=n, num_inference_steps=1)
    [hook.remove() for hook in hooks]
    return seen


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("matching,pictures", [("paper", 1), ("paper", 2), ("release", 1)])
@pytest.mark.parametrize("place", BLOCKS)
def test_a_block_gives_what_the_mathematics_says(place, matching, pictures, masked):
    """Against negengine.reference, on the captured attention output: rows, groups, masks, several pictures."""
    builder, _, _, grid = BLOCKS[place]
    masks = [half_mask() if masked else None] + [None] * (pictures - 1)
    references = [ReferenceImage(picture(i), mask=mask) for i, mask in enumerate(masks)]
    settings = {"reference": references, "matching": matching, "threshold": 0.3, "alpha": 0.8}
    before, after = before_and_after(place, settings)
    halves = 2 if builder == "sdxl" else 1
    images, groups = 4 * halves, 2 * halves
    assert len(before) == images + groups * pictures
    allowed = None
    if masked:
        pixels = torch.zeros(1, 1, 40, 50)
        pixels[..., :25] = 1
        token_mask = torch.nn.functional.interpolate(pixels, grid, mode="nearest-exact").flatten() > 0.5
        assert 0 < token_mask.sum() < len(token_mask)
        allowed = torch.cat([token_mask] + [torch.ones_like(token_mask)] * (pictures - 1))
    changed = 0
    for row in range(images):
        first = images + (row // 2) * pictures
        r = torch.cat(list(before[first : first + pictures]))
        expected = reference.negtome(before[row], r, 0.8, 0.3, allowed, matching)
        torch.testing.assert_close(after[row], expected, rtol=1e-6, atol=1e-6)
        changed += (expected != before[row]).any(-1).sum().item()
    assert changed > 0
    assert torch.equal(after[images:], before[images:])


@pytest.mark.parametrize("place", BLOCKS)
@pytest.mark.parametrize("alpha", [0.5, -0.5])
def test_alpha_pushes_away_and_pulls_towards(place, alpha):
    before, after = before_and_after(place, {"reference": ReferenceImage(picture()), "alpha": alpha, "threshold": 0.0})
    images = len(before) * 2 // 3  # groups of 2 images and 1 picture
    for row in range(images):
        r = before[images + row // 2]
        cosine, index = reference.match(before[row], r)
        merged = cosine > 0
        now = torch.nn.functional.cosine_similarity(after[row], r[index], dim=-1)
        assert merged.any()
        assert ((now < cosine) if alpha > 0 else (now > cosine))[merged & (cosine < 0.9999)].all()


def test_one_image_of_one_prompt():
    """A picture needs no second image."""
    pipe = sdxl()
    plain = draw(pipe, prompts=1, n=1)
    got, status = hooked(pipe, functools.partial(draw, prompts=1, n=1), reference=ReferenceImage(picture()), threshold=-1)
    assert status.merged_tokens > 0
    assert not torch.equal(got, plain)


def test_the_seed_fixes_the_noise(family):
    call = functools.partial(hooked, call=draw, reference=ReferenceImage(picture()), **EVERYWHERE)
    one, same, other = (call(BUILDERS[family](), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
