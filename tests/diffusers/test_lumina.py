"""Lumina-Image 2.0, whose images begin behind texts of different lengths, and whose negative prompts have no system prompt."""

import functools

import pytest
import torch
from compare import assert_same
from guards import guarded
from test_methods_joint import calm
from tiny import NEGATIVES, denoiser, half_mask, picture
from tiny_more import BUILDERS, CALL, draw

import negengine
from negengine import CADS, Embeddings, NegativePrompting, NegToMe, NormalizedAttentionGuidance, ReferenceImage, reference
from negengine.diffusers.joint import behind, images, put_back

GRID = (5, 7)
IMAGE = GRID[0] * GRID[1]
UNLIKE = ["a cat", "a longer text"]  # their tokens differ in number
lumina = functools.partial(draw, prompt=UNLIKE)


def heard(pipe, method):
    """What the last block's output projection would get without a method, what it gets, and the text tokens of every row."""
    seen, lengths = [], []
    model = denoiser(pipe)
    place = model.get_submodule("layers.2.attn.to_out.0")
    listen = functools.partial(place.register_forward_pre_hook, lambda module, args: seen.append(args[0].clone()))
    listen()
    negengine.apply(pipe, method)
    listen()
    model.rope_embedder.register_forward_hook(lambda module, args, output: lengths.extend(output[4]))
    lumina(pipe, num_inference_steps=1)
    before, after = seen
    return before, after, lengths


def rest(x, lengths):
    """Text, and what fills a row up."""
    return torch.cat([torch.cat([row[:n], row[n + IMAGE :]]) for row, n in zip(x, lengths, strict=True)])


SETTINGS = {"timesteps": (0, 1000), "threshold": 0.3, "alpha": 0.8, "blocks": ("layers.2",)}


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["whole", "masked"])
def test_a_block_gives_what_the_mathematics_says(masked):
    """Image tokens alone are changed, and matched with image tokens alone, in rows that begin them at different places."""
    given = ReferenceImage(picture(), mask=half_mask() if masked else None)
    before, after, lengths = heard(BUILDERS["lumina"](), NegToMe(**SETTINGS, reference=given))
    assert len(before) == len(lengths) == 4 + 2
    assert len(set(lengths)) == 2
    assert before.shape[1] == max(lengths) + IMAGE
    allowed = None
    if masked:
        pixels = torch.zeros(1, 1, 40, 50)
        pixels[..., :25] = 1
        allowed = torch.nn.functional.interpolate(pixels, GRID, mode="nearest-exact").flatten() > 0.5
        assert 0 < allowed.sum() < IMAGE
    own = [row[n : n + IMAGE] for row, n in zip(before, lengths, strict=True)]
    changed = 0
    for row, n in enumerate(lengths):
        got = after[row, n : n + IMAGE]
        expected = own[row] if row >= 4 else reference.negtome(own[row], own[4 + row // 2], 0.8, 0.3, allowed, "paper")
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        changed += (expected != own[row]).any(-1).sum().item()
    assert changed > 0
    assert torch.equal(rest(after, lengths), rest(before, lengths))


def test_nag_leaves_text_and_filling_alone():
    """Its second rows have texts of another length than the first, and are the same image."""
    method = NormalizedAttentionGuidance(negative_prompt="sea", scale=4.0, blocks=("layers.2",))
    before, after, lengths = heard(BUILDERS["lumina"](), method)
    assert len(before) == 8
    assert len(set(lengths)) == 3
    assert torch.equal(rest(after, lengths), rest(before, lengths))
    image = torch.stack([row[n : n + IMAGE] for row, n in zip(after, lengths, strict=True)])
    assert torch.equal(image[:4], image[4:])
    assert not torch.equal(after, before)


def test_places_in_rows():
    x = torch.arange(1, 2 * 5 * 3 + 1.0).view(2, 5, 3)
    same, apart = behind([2, 2], 3, x.device), behind([2, 0], 3, x.device)
    assert same == 2
    assert torch.equal(images(x, same), x[:, 2:])
    assert images(x, same).data_ptr() == x[:, 2:].data_ptr()  # in place
    image = images(x, apart)
    assert torch.equal(image, torch.stack([x[0, 2:], x[1, :3]]))
    put_back(x, apart, torch.zeros_like(image))
    assert torch.equal(x.any(-1), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool())


CASES = [
    ("one prompt", {"prompts": 1}),
    ("prompts of other lengths", {"prompt": UNLIKE}),
    ("guidance that ends early", {"guidance_scale": 2.5, "negative_prompt": NEGATIVES[:2], "cfg_trunc_ratio": 0.5}),
]


@pytest.mark.parametrize("name, call", guarded(CASES, lambda name, call: name.startswith("prompts")))
def test_bits_are_those_of_the_published_rule(name, call):
    assert_same("lumina", functools.partial(draw, n=3, **call), 3, reference="others")


# --- prompts to avoid --------------------------------------------------------------------------------------------


def test_prompts_to_avoid_are_encoded_as_the_pipeline_encodes_its_negative_prompts():
    """Guidance of a method's own is the pipeline's, which has no system prompt before its negative prompt."""
    pipe, twin = calm("lumina"), calm("lumina")
    negengine.apply(pipe, NegativePrompting(prompt="sea", scale=0.0, cfg=2.5, cfg_prompt="blurred"))
    expected = lumina(twin, guidance_scale=2.5, negative_prompt=["blurred"] * 2, cfg_normalization=False)
    torch.testing.assert_close(lumina(pipe), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", guarded([(12,), (60,)], lambda length: length == 60))
def test_embeddings_may_have_any_length(length):
    """They have no mask: all their tokens are seen."""
    pipe = calm("lumina")
    away = "a" * (length - 2)  # between two tokens that are no letters
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(["sea"], negative_prompt=[away], max_sequence_length=length)[2:]
    assert mask.all()
    call = functools.partial(lumina, max_sequence_length=max(length, 60))
    got = call(negengine.apply(pipe, NegativePrompting(prompt=Embeddings(embeds), scale=2.0)))
    expected = call(negengine.apply(pipe, NegativePrompting(prompt=away, scale=2.0)))
    assert (got - call(negengine.remove(pipe))).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_prompts_that_are_given_encoded_and_short():
    """What is avoided may be longer than they are."""
    pipe = calm("lumina")
    own = {**CALL["lumina"], "device": pipe._execution_device}
    options = {name: own[name] for name in ("max_sequence_length", "system_prompt", "device")}
    with torch.no_grad():
        embeds, mask, *_ = pipe.encode_prompt(["a cat", "the sea"], False, **options)
    longest = int(mask.sum(1).max())
    given = {"prompt": None, "prompt_embeds": embeds[:, :longest], "prompt_attention_mask": mask[:, :longest]}
    away = "a text to avoid that is longer"
    assert longest < len(away)
    negengine.apply(pipe, NegativePrompting(prompt=away, scale=2.0))
    torch.testing.assert_close(draw(pipe, **given), draw(pipe, prompt=["a cat", "the sea"]), rtol=1e-6, atol=1e-6)


def test_cads_in_both_calls_is_refused():
    pipe = negengine.apply(BUILDERS["lumina"](), CADS(unconditional=True))
    with pytest.raises(ValueError, match=r"calls the denoiser twice.*pass guidance_scale=1 ") as refusal:
        draw(pipe, guidance_scale=2.5)
    assert "unconditional" not in str(refusal.value)
