"""Given pictures on the transformers beyond FLUX: noised as the scheduler would, joined in active steps, masked."""

import functools

import pytest
import torch
from compare import hooked
from guards import guarded
from tiny import denoiser, half_mask, kind, of_1000, picture, watched
from tiny_more import BUILDERS, CALL, FAMILIES, SIZE, draw, every

import negengine
from negengine import NegToMe, ReferenceImage, reference

PIPELINES = [name for name in BUILDERS if name.partition("_")[0] in FAMILIES]
EVERYWHERE = {"timesteps": (0, 1000)}
GRID = (5, 7)
# the last block with a tensor of image tokens alone, as users name it, and its attention
LAST = {
    "sd3": ("transformer_blocks.2.attn", "transformer_blocks.2.attn"),
    "qwen": ("transformer_blocks.2", "transformer_blocks.2.attn"),
    "chroma": ("transformer_blocks.1", "transformer_blocks.1.attn"),
    "flux2": ("transformer_blocks.1", "transformer_blocks.1.attn"),
    "lumina": ("noise_refiner.1", "noise_refiner.1.attn"),  # the image alone; test_lumina.py has those with text
}


def halves(family):
    """Of the batch, as `draw` calls the pipeline."""
    return 2 if CALL[family].get("guidance_scale", 1) > 1 else 1


@pytest.mark.parametrize("builder", guarded(((name,) for name in PIPELINES), lambda name: name == "qwen"))
def test_joined_in_active_steps_only(builder):
    """2 prompts x 3 images, 2 pictures: one row more per group and picture, with guidance per half; the output keeps its batch."""
    pipe = BUILDERS[builder]()
    call = functools.partial(draw, prompts=2, n=3, num_inference_steps=4)
    plain = call(pipe)
    pictures = [ReferenceImage(picture(i)) for i in range(2)]
    negengine.apply(pipe, NegToMe(timesteps=(650, 1000), threshold=-1, reference=pictures))
    with watched(denoiser(pipe)) as calls:
        got = call(pipe)
    assert [rows for _, rows in calls] == [halves(kind(pipe)) * (6 + 4 * (t >= 650)) for t, _ in calls]
    assert len({rows for _, rows in calls}) == 2
    assert got.shape == plain.shape
    assert all(not torch.equal(a, b) for a, b in zip(got, plain, strict=True))  # the first images too


@every()
def test_rows_of_pictures_do_not_change_the_others(family):
    """At alpha = 0 nothing is merged but the pictures are there: the images are those without, but for rounding."""
    pipe = BUILDERS[family]()
    plain = draw(pipe)
    settings = {**EVERYWHERE, "threshold": -1, "reference": ReferenceImage(picture())}
    nothing, status = hooked(pipe, draw, alpha=0.0, **settings)
    assert status.merged_tokens == status.eligible_tokens > 0
    pushed, _ = hooked(pipe, draw, alpha=0.9, **settings)
    scale = (pushed - plain).abs().amax().item()
    assert scale > 1e-2
    torch.testing.assert_close(nothing, plain, rtol=0, atol=scale / 100)


def clean_latents(pipe, image):
    """As the pipelines that begin with an image encode it."""
    size = SIZE[kind(pipe)]
    pixels = pipe.image_processor.preprocess(image, size["height"], size["width"])
    if kind(pipe) == "qwen":
        latents = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode().detach()[:, :, 0]
        mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
        return (latents - mean) / std
    if kind(pipe) == "flux2":
        return pipe._encode_vae_image(pixels, None).detach()
    return (pipe.vae.encode(pixels).latent_dist.mode().detach() - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("noise", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@every(*FAMILIES)
def test_rows_hold_the_picture_at_the_noise_of_the_step(family, noise):
    pipe, rows = BUILDERS[family](), []
    clean = clean_latents(pipe, picture())
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    negengine.apply(pipe, NegToMe(**EVERYWHERE, seed=7, reference=ReferenceImage(picture(), noise=noise)))

    def note(module, args, kwargs):
        rows.append((of_1000(module, kwargs["timestep"]) / 1000, kwargs["hidden_states"][-1].clone()))

    hook = denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    draw(pipe)
    hook.remove()
    assert len(rows) == 3
    for t, row in rows:
        expected = (1 - t) * clean + t * drawn if noise else clean
        if kind(pipe) == "flux2":
            expected = pipe._pack_latents(expected)
        elif kind(pipe) not in ("sd3", "lumina"):
            expected = pipe._pack_latents(expected, 1, *expected.shape[1:])
        torch.testing.assert_close(row, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["whole", "masked"])
@every(*FAMILIES)
def test_a_block_gives_what_the_mathematics_says(family, masked):
    """Against negengine.reference, on the captured attention output: rows, groups, mask."""
    pipe, seen = BUILDERS[family](), []
    block, path = LAST[family]
    module = denoiser(pipe).get_submodule(f"{path}.to_out.0")
    listen = functools.partial(module.register_forward_pre_hook, lambda module, args: seen.append(args[0].clone()))
    listen()
    negengine.apply(
        pipe,
        NegToMe(
            **EVERYWHERE,
            blocks=(block,),
            threshold=0.3,
            alpha=0.8,
            reference=ReferenceImage(picture(), mask=half_mask() if masked else None),
        ),
    )
    listen()
    draw(pipe, num_inference_steps=1)
    before, after = seen
    images, groups = 4 * halves(family), 2 * halves(family)
    assert before.shape[:2] == (images + groups, GRID[0] * GRID[1])
    allowed = None
    if masked:
        pixels = torch.zeros(1, 1, 40, 50)
        pixels[..., :25] = 1
        allowed = torch.nn.functional.interpolate(pixels, GRID, mode="nearest-exact").flatten() > 0.5
        assert 0 < allowed.sum() < len(allowed)
    changed = 0
    for row in range(images):
        expected = reference.negtome(before[row], before[images + row // 2], 0.8, 0.3, allowed, "paper")
        torch.testing.assert_close(after[row], expected, rtol=1e-6, atol=1e-6)
        changed += (expected != before[row]).any(-1).sum().item()
    assert changed > 0
    assert torch.equal(after[images:], before[images:])


def test_the_rows_of_another_guidance_are_told_apart():
    """Skipped layers: a further call in a step, with one row per image."""
    pipe = negengine.apply(BUILDERS["sd3"](), NegToMe(**EVERYWHERE, reference=ReferenceImage(picture())))
    with watched(denoiser(pipe)) as calls:
        draw(pipe, skip_guidance_layers=[1], skip_layer_guidance_start=0.3, skip_layer_guidance_stop=0.5)
    assert [rows for _, rows in calls] == [12, 12, 6, 12]
