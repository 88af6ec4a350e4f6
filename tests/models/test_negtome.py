"""NegToMe on the embedded models, at their presets: groups become more diverse, pictures are avoided."""

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
pytestmark = pytest.mark.parametrize("name", ["mnist-flux", SDXL], indirect=True)


@pytest.fixture(scope="module")
def groups(pipeline: DiffusionPipeline, judge: Classifier, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Features ``[10, 4, F]`` and logits ``[40, 10]`` without and with NegToMe, on the same seeds."""
    found = {}
    for case in ("without", "with"):
        if case == "with":
            negengine.apply(pipeline, models.negtome_preset(name))
        images = draw(pipeline, name, list(models.PROMPTS), seed=7)
        negengine.remove(pipeline)
        found[case] = judge.features(images).unflatten(0, (-1, GROUP)), judge.logits(images)
    return found


def draw(pipeline: DiffusionPipeline, name: str, prompts: list[str], seed: int) -> list[Image.Image]:
    call = models.preset(name).call_kwargs(len(prompts))
    return pipeline(prompts, num_images_per_prompt=GROUP, generator=torch.Generator().manual_seed(seed), **call).images


@pytest.mark.parametrize("metric", [metrics.pairwise_distance, metrics.vendi_score])
def test_groups_become_more_diverse(groups: dict[str, tuple[torch.Tensor, torch.Tensor]], metric) -> None:
    before, after = (sum(float(metric(group)) for group in groups[case][0]) for case in ("without", "with"))
    assert after > before


def test_the_digits_remain_what_was_asked_for(groups: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    labels = torch.arange(10).repeat_interleave(GROUP)
    before, after = (float(metrics.fidelity(groups[case][1], labels)) for case in ("without", "with"))
    assert after >= before - 2 / len(labels)  # two pictures; the 2 points of docs/diversity.md need more of them


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_a_picture_is_avoided(pipeline: DiffusionPipeline, judge: Classifier, name: str, masked: bool) -> None:
    """Less like a given real digit than the same seeds without it."""
    digits, labels = models.heldout_digits()
    similarity = dict.fromkeys(("without", "with"), 0.0)
    for digit in (2, 5, 8):
        pixels = digits[int((labels == digit).nonzero()[0])]
        picture = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
        mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, picture.width, picture.height // 2))
        reference = negengine.ReferenceImage(picture, mask if masked else None)
        for case in similarity:
            if case == "with":
                negengine.apply(pipeline, dataclasses.replace(models.negtome_preset(name), reference=reference))
            images = draw(pipeline, name, [models.PROMPTS[digit]], seed=digit)
            negengine.remove(pipeline)
            features = judge.features([picture])
            similarity[case] += float(metrics.feature_similarity(judge.features(images), features).mean())
    assert similarity["with"] < similarity["without"]
