"""Diffusion-negative sampling (DNS, arXiv 2411.05473): the image that fits a prompt least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from negengine.diffusers.apply import suspended
from negengine.diffusers.branches import TEXTS, exchanged, guidance_scale, parameters
from negengine.diffusers.families import find_denoiser
from negengine.methods import checks

# arguments of a pipeline's call that are decided here -> what to do instead
DECIDED = {
    "generator": "give `seed`",
    "output_type": "images are PIL images",
    "return_dict": "drop it",
    "prompt": "give it first",
    "prompt_embeds": "give the prompt as text; a caption is text too",
    "negative_prompt_embeds": "give negative_prompt as text; a caption is text too",
    "negative_prompt_2": "every text encoder reads the caption; give negative_prompt",
    "negative_prompt_3": "every text encoder reads the caption; give negative_prompt",
}
PICTURES = ("image", "mask_image", "control_image")


def diffusion_negative_image(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    seed: int | Sequence[int],
    steps: int | None = None,
    guidance: float | None = None,
    **call: Any,
) -> list[Image.Image]:
    """Draw what a prompt is least like: classifier-free guidance with the roles of its two branches exchanged.

    ``e = e_p + w (e_null - e_p)``, with ``e_p`` the prediction for the prompt, ``e_null`` the unconditional one exactly as
    the pipeline has it, and ``w`` the guidance scale. It starts from the noise of the image with the same seed.

    Methods that were applied to the pipeline do not act on this image, and are as they were when it is drawn.

    Args:
        pipe: a pipeline with a negative branch: one that guides by classifier-free guidance, FLUX and Qwen-Image by true CFG.
        prompt: a text, or several.
        seed: of the noise; for several prompts one for all or one each. Every image has a generator of its own
            (:func:`generators`), so it does not depend on the others of the call.
        steps: denoising steps, in place of the call's ``num_inference_steps``.
        guidance: ``w``, in place of the call's ``guidance_scale`` (FLUX, Qwen-Image: ``true_cfg_scale``).
        call: further arguments of the pipeline's call, such as ``height``.

    Returns:
        One image per prompt.

    Raises:
        TypeError: a pipeline of no known family, or arguments of a wrong kind.
        ValueError: no negative branch (a scale of at most 1), or arguments that cannot work; nothing has been drawn.
        RuntimeError: the pipeline's safety checker blacked an image out.
    """
    prompts = texts(prompt)
    seeds = seeds_of(seed, len(prompts))
    check_call(pipe, call, len(prompts))
    if call.get("num_images_per_prompt", 1) != 1:
        raise ValueError("a seed has one negative image; give the prompt several times, each with a seed of its own")
    own = negatives_of(call.pop("negative_prompt", None), len(prompts))
    if any(own):
        raise ValueError(f"negative_prompt {next(filter(None, own))!r} has no place here: its branch is the prompt's; drop it")
    call |= first_run(pipe, steps, guidance)
    guidance_scale(pipe, call)
    with suspended(pipe):
        found = pipe(**exchanged(pipe, prompts, call, empty="" in own), generator=generators(pipe, seeds))
    for text, number, black in zip(prompts, seeds, getattr(found, "nsfw_content_detected", None) or (), strict=False):
        if black:
            raise RuntimeError(f"the safety checker blacked out the negative image of {text!r}, seed {number}; take another seed")
    return found.images


def generators(pipe: Any, seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for every image, on the device on which the pipeline runs."""
    device = pipe._execution_device
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def first_run(pipe: Any, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """What the run of the negative image has in place of the call's own, as arguments of the pipeline's call."""
    changed: dict[str, Any] = {}
    if steps is not None:
        checks.positive_integer("steps", steps)
        changed["num_inference_steps"] = steps
    if guidance is not None:
        changed[find_denoiser(pipe)[1].conditioning.scale] = checks.positive("guidance", guidance)
    return changed


def texts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"give a prompt, a text, or several; got {prompt!r}")
    return prompts


def seeds_of(seed: int | Sequence[int], prompts: int) -> list[int]:
    seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 for number in seeds):
        raise TypeError(f"a seed is an integer from 0 on, got {seed!r}")
    if len(seeds) != prompts:
        raise ValueError(f"{len(seeds)} seeds for {prompts} prompts; give one, or one for each")
    return seeds


def negatives_of(negative: str | Sequence[str] | None, prompts: int) -> list[str | None]:
    """The user's own negative prompt for each prompt; None where there is none."""
    found: list[str | None] = [negative] * prompts if negative is None or isinstance(negative, str) else list(negative)
    if not all(text is None or isinstance(text, str) for text in found):
        raise TypeError(f"negative_prompt must be a text, or one for each prompt; got {negative!r}")
    if len(found) != prompts:
        raise ValueError(f"{len(found)} negative prompts for {prompts} prompts; give one, or one for each")
    return found


def check_call(pipe: Any, call: Mapping[str, Any], prompts: int) -> None:
    """Raises TypeError for an argument that the pipeline does not know, ValueError for one that cannot be given here."""
    unknown = call.keys() - parameters(pipe).keys()
    if unknown:  # some pipelines drop them without a word
        raise TypeError(f"{type(pipe).__name__} takes no {', '.join(sorted(unknown))}")
    one_sided = find_denoiser(pipe)[1].conditioning.one_sided
    given = {name for name, value in call.items() if value is not None}
    for name in given & set(DECIDED):
        raise ValueError(f"{name} is decided here: {DECIDED[name]}")
    for name in given & set(one_sided):
        if call[name] is not False:
            raise ValueError(f"{name} speaks to one branch of the guidance alone, and the negative image exchanges them; drop it")
    for name in given & {*PICTURES, *TEXTS}:
        if isinstance(call[name], list | tuple) and prompts > 1:
            raise ValueError(f"several of {name} in a call of {prompts} prompts; make a call for each prompt")
