"""The two branches of a pipeline's classifier-free guidance, encoded by the pipeline itself, and their exchange."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from negengine.diffusers.families import Family, find_denoiser

NEGATIVE = "negative_"
TEXTS = ("prompt_2", "prompt_3")  # for further text encoders
SCALES_LORA = ("cross_attention_kwargs", "joint_attention_kwargs")


def guidance_scale(pipe: Any, call: Mapping[str, Any], image_alone: bool = False) -> float:
    """The scale with which ``pipe(**call)`` guides.

    Args:
        image_alone: it is for the negative image only, since NAG avoids the caption.

    Raises:
        ValueError: it would draw without a negative branch; says what would work, and what that costs.
    """
    denoiser, family = find_denoiser(pipe)
    name, unguided, of = family.conditioning.scale, family.conditioning.unguided, type(pipe).__name__
    instead = "Normalized attention guidance (NAG) away from a prompt of your own needs no such branch"
    if name not in parameters(pipe):
        raise ValueError(f"{of} has no negative branch: it takes no {name}. {instead}")
    if family.conditioning.distilled(pipe):
        raise ValueError(f"this {type(denoiser).__name__} has its guidance built in, so there is no negative branch. {instead}")
    scale = argument(pipe, name, call)
    if scale > unguided:
        return float(scale)
    without = f"at {name} {scale:g} {of} draws without a negative branch"
    if image_alone:
        raise ValueError(
            f"{without}, which the negative image needs: give DiffusionNegativePrompt(guidance=...) above {unguided:g}, which is "
            "the scale of that run alone"
        )
    raise ValueError(
        f"{without}, which the negative image and the negative prompt both need. Give {name} above {unguided:g}: the denoiser then "
        "works twice in each step, so a run takes about twice as long. Or have the caption avoided by NAG, which needs none: "
        "DiffusionNegativePrompt(guidance=..., avoid_with=NormalizedAttentionGuidance())"
    )


def argument(pipe: Any, name: str, call: Mapping[str, Any]) -> Any:
    """An argument of ``pipe(**call)``, the pipeline's default where ``call`` does not give it."""
    value = call.get(name)
    return parameters(pipe)[name].default if value is None else value


def exchanged(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any], empty: bool) -> dict[str, Any]:
    """``call`` as it draws ``prompts`` with the roles of prompt and unconditional branch exchanged: embeddings in place of texts.

    Both branches are what the pipeline itself encodes, so that an SDXL that has zeros for its unconditional branch keeps them.

    Args:
        empty: the unconditional branch is that of an empty negative prompt, not of none.
    """
    family = find_denoiser(pipe)[1]
    encoded = _encoded(pipe, family, prompts, call, empty)
    embeds = {other_side(name): value for name, value in encoded.items()}
    return {name: value for name, value in call.items() if name not in TEXTS} | embeds


def away_from(pipe: Any, texts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
    """Texts as the negative prompts of ``pipe(**call)``: encoded, where a pipeline takes none as text (FLUX.2 klein)."""
    if "negative_prompt" in parameters(pipe):
        return {"negative_prompt": list(texts)}
    embeds = find_denoiser(pipe)[1].conditioning.embeds
    given = {"prompt": list(texts), "num_images_per_prompt": 1}
    encoded = _named(zip(embeds, _encode(pipe, given, call), strict=False))
    return {NEGATIVE + name: value for name, value in encoded.items()}


def other_side(name: str) -> str:
    return name.removeprefix(NEGATIVE) if name.startswith(NEGATIVE) else NEGATIVE + name


def _encoded(pipe: Any, family: Family, prompts: Sequence[str], call: Mapping[str, Any], empty: bool) -> dict[str, Tensor]:
    names, nothing = family.conditioning.embeds, [""] * len(prompts)
    if not names:
        raise TypeError(f"{family.name} does not tell how its pipelines take prompts that are encoded (Conditioning.embeds)")
    if any(name is not None and name.startswith(NEGATIVE) for name in names):
        given = {"prompt": list(prompts), "negative_prompt": nothing if empty else None, "do_classifier_free_guidance": True}
        return _named(zip(names, _encode(pipe, given, call), strict=True))
    texts = dict.fromkeys(TEXTS)
    found = _named(zip(names, _encode(pipe, {"prompt": list(prompts)}, call), strict=False))  # what follows holds positions
    none = _named(zip(names, _encode(pipe, {"prompt": nothing} | texts, call), strict=False))
    return found | {NEGATIVE + name: value for name, value in none.items()}


def _named(encoded: Iterable[tuple[str | None, Any]]) -> dict[str, Any]:
    """What an argument of the pipeline's call takes."""
    return {name: value for name, value in encoded if name is not None}


def _encode(pipe: Any, given: Mapping[str, Any], call: Mapping[str, Any]) -> Sequence[Tensor]:
    """``encode_prompt`` as the pipeline's call would ask it, for one image per prompt."""
    lora = next((call[name].get("scale") for name in SCALES_LORA if call.get(name)), None)
    asked = {
        **dict.fromkeys(TEXTS),
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "lora_scale": lora,
        **call,
        **given,
    }
    known = inspect.signature(pipe.encode_prompt).parameters
    with torch.no_grad():
        return pipe.encode_prompt(**{name: value for name, value in asked.items() if name in known})


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes by name."""
    return inspect.signature(type(pipe).__call__).parameters
