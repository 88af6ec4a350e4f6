"""Prompts that leave the style open with equal shares, the style that each is to avoid, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from negengine.evaluate import people
from negengine.evaluate.groups import Drawn, Group
from negengine.methods import Method
from negengine.metrics import frechet_distance, label_divergence
from negengine.models.people.attributes import GENDERS, PROFESSIONS, STYLES
from negengine.models.people.pictures import Shift, all_people, row_of, vary
from negengine.models.people.prompts import named

from .numbers import Reading, rows_of

VARIED = 8  # versions of each real picture


def other_tone(profession: str) -> str:
    """A skin tone that does not prevail in a profession: with it gender and style have equal shares in the world."""
    prevailing = people.ordinary(profession)[1]
    return next(tone for tone in ("dark", "medium") if tone != prevailing)


CHOSEN = PROFESSIONS[1::2][:9]
PROMPTS = tuple(people.sentence(profession, tone=other_tone(profession)) for profession in CHOSEN)


def forbidden(prompt: str) -> str:
    """The style that a prompt's images are to avoid: each of the three for a third of the professions."""
    return STYLES[named(prompt)[0] // 2 % len(STYLES)]


def with_style(prompt: str, style: str) -> str:
    return f"{prompt.partition(',')[0]}, in {style} style"


def avoided(prompt: str) -> str:
    """A prompt with the forbidden style named: what the images are to keep away from."""
    return with_style(prompt, forbidden(prompt))


def away(method: Callable[[tuple[str, ...]], Sequence[Method]]) -> Callable[[int, Sequence[str]], Sequence[Method]]:
    """For ``Variant.of_prompts``: methods that avoid the forbidden style of each prompt of a call."""
    return lambda seed, prompts: method(tuple(avoided(prompt) for prompt in prompts))


def removal_rows(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Share of what is forbidden; KL of what is allowed from the base's other seeds; FID to allowed real pictures; fidelity."""
    reading = Reading(drawn)
    shares = reading.by_group(lambda group, read: _share(_is_forbidden(group, read)))
    styles = {group.key: forbidden(str(group.prompt)) for group in drawn[0].groups}
    rows = rows_of("forbidden", shares)
    for style in STYLES:
        of_style = {name: {key: value for key, value in values.items() if styles[key] == style} for name, values in shares.items()}
        if style in styles.values():
            rows += rows_of(f"forbidden {style}", of_style)
    rows += rows_of("as-prompted", reading.by_group(lambda group, read: _share(_as_prompted(group, read))))
    rows += rows_of("kl", _divergences(reading))
    real = reading.features(_allowed_pictures(list(dict.fromkeys(str(group.prompt) for group in drawn[0].groups))))
    return rows + rows_of("fid", reading.by_seed(lambda read, seen, groups: float(frechet_distance(seen, real))))


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _is_forbidden(group: Group, read: Tensor) -> Tensor:
    return read[:, 3] == STYLES.index(forbidden(str(group.prompt)))


def _as_prompted(group: Group, read: Tensor) -> Tensor:
    """Whether profession and tone are those of the prompt."""
    profession, _, tone, _ = named(str(group.prompt))
    return (read[:, 0] == profession) & (read[:, 2] == tone)


def _allowed_kinds(read: Tensor, groups: Sequence[Group]) -> Tensor:
    """Gender and style of the images that show what is allowed, as one of 6 classes: styles count from the forbidden one."""
    wrong = torch.tensor([STYLES.index(forbidden(str(group.prompt))) for group in groups for _ in group.images])
    style = (read[:, 3] - wrong) % len(STYLES)
    return (read[:, 1] * (len(STYLES) - 1) + style - 1)[style > 0]


def _divergences(reading: Reading) -> dict[str, dict[str, float]]:
    """Of each seed of every variant, the base too, from the base's other seeds: a seed is always near a pool that holds itself."""
    base = reading.drawn[0]
    of_seeds = {
        seed: _allowed_kinds(reading.labels[base.name][list(of.rows)], of.part.groups) for seed, of in base.by_seed().items()
    }
    if len(of_seeds) < 2:
        raise ValueError("the KL compares with the base's other seeds: draw two seeds or more")

    def value(read: Tensor, seen: Tensor, groups: list[Group]) -> float:
        others = torch.cat([kinds for seed, kinds in of_seeds.items() if seed != groups[0].seed])
        return _divergence(_allowed_kinds(read, groups), others)

    return reading.by_seed(value)


def _divergence(kinds: Tensor, base: Tensor) -> float:
    """In bits. Without an image that is allowed nothing is known, which counts as even shares."""
    number = len(GENDERS) * (len(STYLES) - 1)
    return float(label_divergence(kinds if len(kinds) else torch.arange(number), base, number))


def _allowed_pictures(prompts: Sequence[str]) -> Tensor:
    """Real pictures of what the prompts ask for, without what is forbidden, slightly varied."""
    rows = []
    for prompt in prompts:
        profession, _, tone, _ = named(prompt)
        styles = [number for number, style in enumerate(STYLES) if style != forbidden(prompt)]
        rows += [row_of(profession, gender, tone, style) for gender in range(len(GENDERS)) for style in styles]
    return vary(all_people().images[torch.tensor(rows * VARIED)], Shift(), torch.Generator().manual_seed(0))
