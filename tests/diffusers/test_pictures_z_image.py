"""Given pictures on Z-Image: noised as the scheduler would, joined in active steps, masked."""

import functools

import pytest
import torch
from compare import hooked
from guards import guarded
from tiny import NEGATIVES, denoiser, half_mask, picture, watched
from tiny_z_image import LONG, OWN, SIZE, draw, z_image

import negengine
from negengine import NegToMe, ReferenceBank, ReferenceImage, reference

EVERYWHERE = {"timesteps": (0, 1000)}
GUIDED = {"guidance_scale": 2.0, "negative_prompt": NEGATIVES[:2]}
GRID = (5, 7)


@pytest.mark.parametrize("builder", guarded(((name,) for name in OWN), lambda name: name in ("z_image", "z_image_img2img")))
@pytest.mark.parametrize("halves, call", [(2, GUIDED), pytest.param(1, {}, marks=pytest.mark.exhaustive)], ids=["guided", "turbo"])
def test_joined_in_active_steps_only(builder, halves, call):
    """2 prompts x 3 images, 2 pictures: one row more per group and picture, with guidance per half; the output keeps its batch."""
    pipe = OWN[builder]()
    call = functools.partial(draw, n=3, num_inference_steps=4, **call)
    plain = call(pipe)
    pictures = [ReferenceImage(picture(i)) for i in range(2)]
    negengine.apply(pipe, NegToMe(timesteps=(800, 1000), threshold=-1, reference=pictures))
    with watched(denoiser(pipe)) as calls:
        got = call(pipe)
    assert [rows for _, rows in calls] == [halves * (6 + 4 * (t >= 800)) for t, _ in calls]
    assert len({rows for _, rows in calls}) == 2
    assert got.shape == plain.shape
    assert all(not torch.equal(a, b) for a, b in zip(got, plain, strict=True))  # the first images too


def test_rows_of_pictures_do_not_change_the_others():
    """At alpha = 0 nothing is merged but the pictures are there: the images are those without, but for rounding."""
    pipe = z_image()
    call = functools.partial(draw, prompt=["a cat", LONG], **GUIDED)
    plain = call(pipe)
    settings = {**EVERYWHERE, "threshold": -1, "reference": ReferenceImage(picture())}
    nothing, status = hooked(pipe, call, alpha=0.0, **settings)
    assert status.merged_tokens == status.eligible_tokens > 0
    pushed, _ = hooked(pipe, call, alpha=0.9, **settings)
    scale = (pushed - plain).abs().amax().item()
    assert scale > 1e-2
    torch.testing.assert_close(nothing, plain, rtol=0, atol=scale / 100)


@pytest.mark.parametrize("noise", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_rows_hold_the_picture_at_the_noise_of_the_step_and_the_text_of_their_group(noise):
    pipe, calls = z_image(), []
    pixels = pipe.image_processor.preprocess(picture(), SIZE["height"], SIZE["width"])
    config = pipe.vae.config
    clean = (pipe.vae.encode(pixels).latent_dist.mode().detach() - config.shift_factor) * config.scaling_factor
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    negengine.apply(pipe, NegToMe(**EVERYWHERE, seed=7, reference=ReferenceImage(picture(), noise=noise)))
    hook = denoiser(pipe).register_forward_pre_hook(lambda module, args: calls.append(args))
    draw(pipe, prompt=["a cat", LONG])
    hook.remove()
    assert len(calls) == 3
    for x, t, texts in calls:
        level = 1 - float(t[-1])
        expected = (1 - level) * clean + level * drawn if noise else clean
        torch.testing.assert_close(x[-1], expected[0, :, None], rtol=1e-4, atol=1e-4)
        assert len(x) == len(t) == len(texts) == 6
        assert torch.equal(texts[4], texts[0])
        assert torch.equal(texts[5], texts[2])
        assert len(texts[4]) < len(texts[5])


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["whole", "masked"])
def test_a_layer_gives_what_the_mathematics_says(masked):
    """Against negengine.reference, on the captured attention output: rows, groups, mask; other tokens stay."""
    pipe, seen = z_image(), []
    module = denoiser(pipe).layers[2].attention.to_out[0]
    listen = functools.partial(module.register_forward_pre_hook, lambda module, args: seen.append(args[0].clone()))
    listen()
    picked = ReferenceImage(picture(), mask=half_mask() if masked else None)
    negengine.apply(pipe, NegToMe(**EVERYWHERE, blocks=("layers.2",), threshold=0.3, alpha=0.8, reference=picked))
    listen()
    draw(pipe, num_inference_steps=1, **GUIDED)
    before, after = seen
    assert torch.equal(before[:, 35:], after[:, 35:])
    before, after = before[:, :35], after[:, :35]
    images, groups = 8, 4
    assert len(before) == images + groups
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


@pytest.mark.parametrize(
    "call",
    [{"guidance_scale": 2.0, "negative_prompt": "dull"}, pytest.param({}, marks=pytest.mark.exhaustive)],
    ids=["guided", "turbo"],
)
def test_a_bank_is_the_picture_without_its_rows(call, tmp_path):
    """Recorded under the prompt of the run, it gives what the picture in the batch gives, in either half."""
    pipe = z_image()
    settings = NegToMe(timesteps=(700, 1000), threshold=0.3, reference=ReferenceImage(picture(), mask=half_mask()))
    asked = {**SIZE, "num_inference_steps": 3, **call}
    bank = negengine.record_bank(pipe, settings, tmp_path / "asset.bank", prompt="a cat", **{"guidance_scale": 0.0, **asked})
    run = functools.partial(draw, prompts=1, **asked)
    plain = run(pipe)
    beside, status = hooked(pipe, run, timesteps=(700, 1000), threshold=0.3, reference=settings.reference)
    recorded, banked = hooked(pipe, run, timesteps=(700, 1000), threshold=0.3, reference=ReferenceBank(bank.path))
    assert banked.bank == "recorded under this prompt"
    assert banked.merged_tokens == status.merged_tokens > 0
    assert (beside - plain).abs().max() > 1e-3
    torch.testing.assert_close(recorded, beside, rtol=1e-4, atol=1e-4)
