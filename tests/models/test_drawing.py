"""What the models draw, as the classifier reads it: what the prompt says, every class where it leaves that open, and with NegToMe
more diverse groups and less of a picture to avoid."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import negengine
from negengine import metrics, models
from negengine.models.classifier import Classifier

GROUP = 4
SDXL = pytest.param("mnist-sdxl", marks=pytest.mark.exhaustive)
EITHER = pytest.mark.parametrize("name", ["mnist-flux", SDXL], indirect=True)
DIGITS = pytest.mark.parametrize("name", models.DIGITS, indirect=True)


def draw(pipeline: DiffusionPipeline, name: str, prompts: list[str], seed: int = 0, images: int = 1) -> list[Image.Image]:
    call = models.preset(name).call_kwargs(len(prompts))
    return pipeline(prompts, num_images_per_prompt=images, generator=torch.Generator().manual_seed(seed), **call).images


# --- without any method ------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@DIGITS
def test_open_prompt_draws_many_digits(pipeline: DiffusionPipeline, judge: Classifier, name: str) -> None:
    assert len(judge.logits(draw(pipeline, name, ["a digit"] * 40)).argmax(1).unique()) >= 6


FURTHER = [pytest.param(prompt, marks=pytest.mark.exhaustive) for prompt in ("{}", "THE NUMBER {}", "a bold digit {}")]


@EITHER
@pytest.mark.parametrize("prompt", ["the digit {}", *FURTHER])
def test_other_wordings(pipeline: DiffusionPipeline, judge: Classifier, name: str, prompt: str) -> None:
    drawn = draw(pipeline, name, [prompt.format(digit) for digit in range(10)])
    assert (judge.logits(drawn).argmax(1) == torch.arange(10)).sum() >= 8


def test_settings_of_the_preset() -> None:
    flux, sdxl = (models.preset(name).call_kwargs() for name in models.DIGITS)
    assert flux["true_cfg_scale"] > 1
    assert flux["negative_prompt"] == [""]
    assert flux["max_sequence_length"] <= 32
    assert sdxl["guidance_scale"] > 1
    assert "max_sequence_length" not in sdxl
    assert (flux["height"], flux["width"]) == (sdxl["height"], sdxl["width"]) == (32, 32)


# --- groups, without and with NegToMe ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Groups:
    """Features ``[5, 4, F]`` and logits ``[20, 10]`` of the pictures, and the digit that each was asked to show."""

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


@pytest.fixture(scope="module", params=["0 to 4", pytest.param("5 to 9", marks=pytest.mark.exhaustive)])
def groups(pipeline: DiffusionPipeline, judge: Classifier, name: str, request: pytest.FixtureRequest) -> tuple[Groups, Groups]:
    """Of five of the ten digits, on the same seeds without NegToMe and with it."""
    digits = range(5) if request.param == "0 to 4" else range(5, 10)
    found = []
    for methods in ((), (models.negtome_preset(name),)):
        if methods:
            negengine.apply(pipeline, *methods)
        images = draw(pipeline, name, [models.PROMPTS[digit] for digit in digits], seed=7, images=GROUP)
        negengine.remove(pipeline)
        labels = torch.tensor(digits).repeat_interleave(GROUP)
        found.append(Groups(judge.features(images).unflatten(0, (-1, GROUP)), judge.logits(images), labels))
    return found[0], found[1]


@EITHER
def test_draws_the_prompted_digit(groups: tuple[Groups, Groups]) -> None:
    plain, _ = groups
    assert (plain.logits.argmax(1) == plain.labels).sum() >= 18  # of 20


@EITHER
@pytest.mark.parametrize("metric", [metrics.pairwise_distance, metrics.vendi_score])
def test_groups_become_more_diverse(groups: tuple[Groups, Groups], metric) -> None:
    before, after = (sum(float(metric(group)) for group in each.features) for each in groups)
    assert after > before


@EITHER
def test_the_digits_remain_what_was_asked_for(groups: tuple[Groups, Groups]) -> None:
    before, after = (float(metrics.fidelity(each.logits, each.labels)) for each in groups)
    assert after >= before - 1 / len(groups[0].labels)  # a picture; the 2 points of docs/diversity.md need more of them


# --- a picture to avoid --------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@DIGITS
@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_is_avoided(pipeline: DiffusionPipeline, judge: Classifier, name: str, masked: bool) -> None:
    """Less like a given real digit than the same seeds without it, on the average of three digits."""
    digits, labels = models.heldout_digits()
    before = after = 0.0
    for digit in (2, 5, 8):
        pixels = digits[int((labels == digit).nonzero()[0])]
        picture = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
        mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, picture.width, picture.height // 2))
        reference = negengine.ReferenceImage(picture, mask if masked else None)
        plain = draw(pipeline, name, [models.PROMPTS[digit]], seed=digit, images=GROUP)
        negengine.apply(pipeline, dataclasses.replace(models.negtome_preset(name), reference=reference))
        avoiding = draw(pipeline, name, [models.PROMPTS[digit]], seed=digit, images=GROUP)
        negengine.remove(pipeline)
        features = judge.features([picture])
        before += float(metrics.feature_similarity(judge.features(plain), features).mean())
        after += float(metrics.feature_similarity(judge.features(avoiding), features).mean())
    assert after < before
