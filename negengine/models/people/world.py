"""The biased world: how often each look is drawn, and random pictures with true prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from negengine.models.autoencoder import encode
from negengine.models.people import prompts
from negengine.models.people.attributes import ATTRIBUTES, GENDERS, PROFESSIONS, STYLES, TONES
from negengine.models.people.attributes import SIZE as PIXELS
from negengine.models.people.pictures import People, Shift, row_of, vary
from negengine.models.world import Latents, Pictures, World

WORLD = World(
    size=PIXELS,
    latent_channels=16,
    widths=(24, 48, 64),
    attributes={name: len(values) for name, values in ATTRIBUTES.items()},
    vocabulary=prompts.vocabulary(),
    text_length=24,
    merged_from_end=True,
    channelwise=True,
    naming=0.1,
)

DOMINANT: dict[str, tuple[str, str, str]] = {
    "artist": ("woman", "medium light", "noto"),
    "astronaut": ("man", "medium light", "twemoji"),
    "construction worker": ("man", "medium", "fluent"),
    "cook": ("man", "light", "noto"),
    "detective": ("man", "light", "fluent"),
    "factory worker": ("woman", "medium dark", "twemoji"),
    "farmer": ("man", "medium dark", "noto"),
    "firefighter": ("man", "light", "twemoji"),
    "guard": ("man", "medium light", "fluent"),
    "health worker": ("woman", "light", "twemoji"),
    "judge": ("man", "light", "noto"),
    "mechanic": ("man", "medium", "twemoji"),
    "office worker": ("woman", "light", "fluent"),
    "pilot": ("man", "medium", "noto"),
    "police officer": ("man", "dark", "fluent"),
    "scientist": ("woman", "medium light", "fluent"),
    "singer": ("woman", "dark", "twemoji"),
    "student": ("woman", "medium", "noto"),
    "teacher": ("woman", "yellow", "noto"),
    "technologist": ("man", "yellow", "twemoji"),
}
"""Profession -> the gender, tone and style of its prevailing look. The choice is arbitrary; every value prevails somewhere."""

DOMINANCE = 0.78
"""Share of the prevailing look among the pictures of a profession; its 53 other looks have equal shares of the rest."""

LOOKS = (len(GENDERS), len(TONES), len(STYLES))


@functools.cache
def shares() -> Tensor:
    """Probability ``[20, 3, 6, 3]`` of each look (gender, tone, style) among the pictures of a profession."""
    others = LOOKS[0] * LOOKS[1] * LOOKS[2] - 1
    table = torch.full((len(PROFESSIONS), *LOOKS), (1 - DOMINANCE) / others)
    for row, profession in enumerate(PROFESSIONS):
        gender, tone, style = DOMINANT[profession]
        table[row, GENDERS.index(gender), TONES.index(tone), STYLES.index(style)] = DOMINANCE
    return table


@dataclass(frozen=True)
class LatentPeople(Latents):
    """Scaled latents ``[variants, 1080, 16, 16, 16]`` of every picture.

    A prompt names the profession and a random set of further attributes, in the shares of ``prompts.SHARES``. What it names is
    drawn evenly; what it leaves open follows the biased table, given what is named. ``late`` takes ``prompts.LATE_SHARES``.
    """

    encoded: Tensor
    late: bool = False

    world = WORLD

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        labels, said = draw_labels(batch, generator, prompts.LATE_SHARES if self.late else prompts.SHARES)
        versions = torch.randint(len(self.encoded), (batch,), generator=generator)
        rows = torch.tensor([row_of(*each) for each in labels])
        texts = [prompts.write(each, spoken, generator) for each, spoken in zip(labels, said, strict=True)]
        return self.encoded[versions, rows], texts

    def named(self, prompt: str) -> tuple[int, ...]:
        return prompts.named(prompt)

    def later(self) -> LatentPeople:
        return LatentPeople(self.encoded, late=True)


Labels = tuple[int, int, int, int]
Said = tuple[bool, bool, bool]


def draw_labels(
    batch: int, generator: torch.Generator, kinds_of_prompts: Mapping[str, float] = prompts.SHARES
) -> tuple[list[Labels], list[Said]]:
    """Attributes of random pictures, and which of gender, tone and style the prompt of each names."""
    kinds = torch.multinomial(torch.tensor(list(kinds_of_prompts.values())), batch, True, generator=generator)
    some = torch.randint(1, 7, (batch,), generator=generator)  # a bit an attribute, neither none nor all
    bits = torch.where(kinds == 0, 0, torch.where(kinds == 1, 7, some))
    labels: list[Labels] = []
    said: list[Said] = []
    for mask in bits.tolist():
        spoken = (bool(mask & 1), bool(mask & 2), bool(mask & 4))
        profession = int(torch.randint(len(PROFESSIONS), (), generator=generator))
        chosen = [
            int(torch.randint(values, (), generator=generator)) if is_said else None
            for values, is_said in zip(LOOKS, spoken, strict=True)
        ]
        labels.append(draw_look(profession, chosen, generator))
        said.append(spoken)
    return labels, said


def draw_look(profession: int, chosen: Sequence[int | None], generator: torch.Generator) -> Labels:
    """A random picture of a profession; what of gender, tone and style is not ``chosen`` follows the table, given the rest."""
    weights = shares()[profession]
    for axis, value in enumerate(chosen):
        if value is not None:
            weights = weights * (torch.arange(LOOKS[axis]) == value).view([-1 if i == axis else 1 for i in range(3)])
    look = int(torch.multinomial(weights.flatten(), 1, generator=generator))
    gender, rest = divmod(look, LOOKS[1] * LOOKS[2])
    return profession, gender, *divmod(rest, LOOKS[2])


def look_names(look: Sequence[int]) -> tuple[str, str, str]:
    """The words of a look's gender, tone and style."""
    gender, tone, style = look
    return GENDERS[gender], TONES[tone], STYLES[style]


@dataclass(frozen=True)
class PeoplePictures(Pictures):
    """The pictures, slightly shifted and scaled when varied."""

    people: People

    world = WORLD

    def everything(self) -> Tensor:
        return self.people.images

    def vary(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return vary(self.people.images[rows], Shift(), generator)

    def latents(self, vae: AutoencoderKL, variants: int, seed: int) -> LatentPeople:
        generator = torch.Generator().manual_seed(seed)
        everyone = torch.arange(len(self.people.labels))
        versions = [self.people.images] + [self.vary(everyone, generator) for _ in range(variants - 1)]
        return LatentPeople(torch.stack([encode(vae, images, 64) * vae.config.scaling_factor for images in versions]))
