"""The prompts that the embedded models understand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from negengine.models.digits import CLASSES, Digits, slant, thickness

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PROMPTS: tuple[str, ...] = tuple(f"a handwritten {word}" for word in WORDS)
"""One specified prompt a class, in the order of the classes."""

UNDER_SPECIFIED: tuple[str, ...] = (
    "a digit",
    "a handwritten digit",
    "a number",
    "a handwritten number",
    "a thin digit",
    "a bold digit",
)
"""Prompts that leave the class open."""

PLAIN: tuple[str, ...] = (
    "a handwritten {}", "a handwritten {}", "handwritten {}", "a handwritten digit {}", "the digit {}", "the number {}",
    "a digit {}", "a {}", "{}", "a photo of a {}", "an image of a {}", "a photo of the digit {}", "a drawing of a {}",
)  # fmt: skip
STYLED: tuple[str, ...] = (
    "a {style} {}",
    "a {style} digit {}",
    "a {style} handwritten {}",
    "the {style} digit {}",
    "a photo of a {style} {}",
)
OPEN: tuple[str, ...] = (
    "a digit",
    "a handwritten digit",
    "a number",
    "a handwritten number",
    "a photo of a digit",
    "digit",
    "a handwritten",
)
OPEN_STYLED: tuple[str, ...] = ("a {style} digit", "a {style} number", "a {style} handwritten digit")
STYLES = ("thin", "bold", "slanted", "upright")


def styles_of(digits: Digits) -> list[tuple[str, ...]]:
    """The words that fit each digit: the outer thirds of stroke width and slant among the digits of its class."""
    fitting: list[list[str]] = [[] for _ in digits.labels]
    for measure, (low_word, high_word) in ((thickness, ("thin", "bold")), (slant, ("upright", "slanted"))):
        values = measure(digits.images)
        for digit in range(CLASSES):
            rows = torch.nonzero(digits.labels == digit).flatten()
            low, high = torch.quantile(values[rows], torch.tensor([1 / 3, 2 / 3])).tolist()
            for row in rows.tolist():
                if values[row] <= low:
                    fitting[row].append(low_word)
                elif values[row] > high:
                    fitting[row].append(high_word)
    return [tuple(words) for words in fitting]


def write(
    labels: Tensor,
    styles: Sequence[tuple[str, ...]],
    generator: torch.Generator,
    open_share: float,
    styled_share: float = 0.35,
) -> list[str]:
    """One random true prompt for each digit; a share ``open_share`` of them leaves the class open."""

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    def chance(p: float) -> bool:
        return bool(torch.rand((), generator=generator) < p)

    prompts = []
    for label, words in zip(labels.tolist(), styles, strict=True):
        styled = bool(words) and chance(styled_share)
        style = " ".join(words) if styled and len(words) > 1 and chance(0.3) else words[draw(len(words))] if styled else ""
        if chance(open_share):
            forms, name = (OPEN_STYLED if styled else OPEN), ""
        else:
            forms, name = (STYLED if styled else PLAIN), (WORDS[label] if chance(0.6) else str(label))
        text = forms[draw(len(forms))].format(name, style=style)
        text = text.replace("a upright", "an upright")
        prompts.append(text.capitalize() if chance(0.1) else text)
    return prompts


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted."""
    templates = itertools.chain(PLAIN, STYLED, OPEN, OPEN_STYLED)
    words = {word for template in templates for word in template.split() if "{" not in word}
    return sorted(words | set(WORDS) | set(STYLES) | {str(digit) for digit in range(CLASSES)})
