"""The head start of the text encoders."""

from __future__ import annotations

import pytest
import torch

from negengine.models import PROMPTS, UNDER_SPECIFIED
from negengine.models.dataset import GeneratorTask, LatentDigits
from negengine.models.flux import TEXT_LENGTH, FluxTask
from negengine.models.sdxl import SdxlTask
from negengine.models.teaching import class_of


@pytest.mark.parametrize("prompt, digit", [("a handwritten seven", 7), ("the digit 3", 3), ("0", 0), ("a photo of a bold nine", 9)])
def test_class_of_a_specified_prompt(prompt: str, digit: int) -> None:
    assert class_of(prompt) == digit


@pytest.mark.parametrize("prompt", [*UNDER_SPECIFIED, "", "someone", "seventy"])
def test_an_open_prompt_names_no_class(prompt: str) -> None:
    assert class_of(prompt) == 10


@pytest.mark.parametrize("kind, arguments", [pytest.param(SdxlTask, (), marks=pytest.mark.exhaustive), (FluxTask, (TEXT_LENGTH,))])
def test_prompts_come_apart(kind: type[GeneratorTask], arguments: tuple[int, ...]) -> None:
    """What an encoder gives for the ten classes differs much more after the lesson than before; nothing else is left behind."""
    torch.manual_seed(0)
    task = kind(LatentDigits(torch.zeros(1, 10, 4, 16, 16), torch.arange(10), [()] * 10))

    def spread() -> float:
        with torch.no_grad():
            _, pooled = task.encode(list(PROMPTS), *arguments)
        return float((pooled - pooled.mean(0)).std() / pooled.std())

    before = spread()
    task.prepare(seed=0, steps=40)
    assert before < 0.4
    assert spread() > 0.8
    assert all(parameter.grad is None for parameter in task.parameters())
