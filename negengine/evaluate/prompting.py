"""Prompts from files: rewritten ones, and negative ones."""

from __future__ import annotations

import random
from pathlib import Path

from negengine.evaluate.draw import Negative, Rewrite
from negengine.evaluate.files import read_json, read_lines

HERE = "{prompt}"  # stands for the prompt in a line of a file
# what people paste into negative prompts, whatever the prompt is
STANDARD = ("blurry, low quality, deformed, bad anatomy, extra limbs, watermark, text",)
# has nothing to do with any prompt
RANDOM = (
    "the early bird catches the worm", "all that glitters is not gold", "still waters run deep", "look before you leap",
    "a watched pot never boils", "honesty is the best policy", "rome was not built in a day", "every cloud has a silver lining",
)  # fmt: skip


def rewriting(path: Path) -> Rewrite:
    """Image k of a group gets the k-th rewritten prompt, and the first again after the last.

    Args:
        path: ``.txt``: a line each, in which ``{prompt}`` stands for the prompt; ``.json``: prompt -> list of prompts.

    Raises:
        ValueError: another ending, no line, a line without ``{prompt}``, or an object of another form. OSError: it cannot be read.
    """
    if path.suffix.lower() == ".json":
        lists = _lists(path)

        def by_prompt(prompt: str, images: int) -> list[str]:
            if prompt not in lists:
                raise ValueError(f"{path} has no rewritten prompts for {prompt!r}")
            return [lists[prompt][k % len(lists[prompt])] for k in range(images)]

        return by_prompt
    lines = _lines(path)
    wrong = next((line for line in lines if HERE not in line), None)
    if wrong is not None:
        raise ValueError(f"{path}: every line must say where the prompt stands, by {HERE}; got {wrong!r}")
    return lambda prompt, images: [lines[k % len(lines)].replace(HERE, prompt) for k in range(images)]


def negatives(path: Path) -> Negative:
    """Every image gets one of the file's texts by its seed.

    Args:
        path: ``.txt``: a line each, for any prompt; ``.json``: prompt -> list of texts.

    Raises: as :func:`rewriting`.
    """
    if path.suffix.lower() == ".json":
        lists = _lists(path)

        def by_prompt(prompt: str, seed: int) -> str:
            if prompt not in lists:
                raise ValueError(f"{path} has no negative prompts for {prompt!r}")
            return random.Random(seed).choice(lists[prompt])

        return by_prompt
    return chosen_by_seed(tuple(_lines(path)))


def chosen_by_seed(texts: tuple[str, ...]) -> Negative:
    """One of some texts, by the seed of the image."""
    return lambda prompt, seed: random.Random(seed).choice(texts)


def _lines(path: Path) -> list[str]:
    if path.suffix.lower() != ".txt":
        raise ValueError(f"{path} must be a .txt file with a text in each line, or a .json file of prompts and lists of texts")
    return read_lines(path)


def _lists(path: Path) -> dict[str, list[str]]:
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} must hold an object of prompts and lists of texts")
    for prompt, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}: {prompt!r} must have a list of texts")
    return found
