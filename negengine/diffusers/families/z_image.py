"""Z-Image: one stream of image and text, batches that are lists, the conditional half first, predictions with the opposite sign."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from negengine.diffusers.families.family import Conditioning, Family, Grid, Latents, Lists, Site, Tokens, is_a
from negengine.diffusers.families.flux import grids

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"


def sites(transformer: Any) -> Iterator[Site]:
    """Before the output projection: image tokens, what they are filled up with to a multiple of 32, then the text.

    The noise refiner, two layers before the text is there, is left out: control nets run these very modules for themselves.
    """
    for i in range(len(transformer.layers)):
        yield Site(f"layers.{i}", f"layers.{i}.attention.to_out.0", "input", image_first=True)


def size(inputs: Mapping[str, Any]) -> Grid:
    """Of latents ``[C, frames, h, w]``, a list with an entry per row."""
    shapes = {x.shape if isinstance(x, Tensor) else None for x in inputs["x"]}
    if None in shapes:
        raise ValueError("this call joins the tokens of other images to those of the image, which negengine does not support")
    if len(shapes) > 1:
        raise ValueError("the images of this call differ in size, so that their tokens cannot be matched; give each size a call")
    _, _, height, width = shapes.pop()  # type: ignore[misc]
    return height, width


def pack(latents: Tensor) -> Tensor:
    """One frame."""
    return latents.unsqueeze(2)


def filled_up(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Texts ``[L, D]`` in one tensor, and which of its tokens are theirs."""
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return {TEXT: pad_sequence(list(texts), batch_first=True), MASK: mask}


def gather(inputs: Mapping[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in inputs.items() if name not in ("x", "cap_feats")}
    return {"x": torch.stack(list(inputs["x"])), **filled_up(inputs["cap_feats"]), **others}


def scatter(inputs: Mapping[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in inputs.items() if name not in ("x", TEXT, MASK)}
    lengths = inputs[MASK].sum(1).tolist()
    texts = [text[:length] for text, length in zip(inputs[TEXT], lengths, strict=True)]
    return {"x": list(inputs["x"]), "cap_feats": texts, **others}


def read(predictions: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(predictions)).squeeze(2)


def write(predictions: Tensor) -> list[Tensor]:
    return list(predictions.unsqueeze(2))


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    """As long as they are in a batch with those of the other branch."""
    texts, others = encoded
    together = filled_up([*texts, *others])
    return {name: value[: len(texts)] for name, value in together.items()}


CONTROLLED = ("ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline")

Z_IMAGE = Family(
    name="Z-Image",
    component="transformer",
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "ZImageControlNetPipeline"),
    matches=lambda module: is_a(module, "ZImageTransformer2DModel"),
    tokens=Tokens(sites=sites, grids=grids),
    latents=Latents(size=size, pack=pack, negated=True),
    conditioning=Conditioning(
        sample="x",
        batched=(TEXT, MASK, "t", "controlnet_block_samples"),
        prompts=prompts,
        longest=None,
        mask=MASK,
        conditional_first=True,
        unguided=0.0,
        renormalises="cfg_normalization",
        truncates="cfg_truncation",
        embeds=("prompt_embeds", "negative_prompt_embeds"),
        counted="latents",
        lists=Lists("cap_feats", gather, scatter, read, write),
    ),
    # no paper gives settings for this model: those of FLUX.1
    defaults={
        "negtome": {
            "alpha": 0.9,
            "threshold": 0.65,
            "timesteps": (900, 1000),
            "blocks": ("layers",),
            "min_grid": 1,
        },
        "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.25},
    },
    unsupported={"ZImageOmniPipeline": "it joins the tokens of other images to those of the image"},
    unlike=dict.fromkeys(CONTROLLED, "its control net adds to the tokens of each text, in the rows that it knows"),
)
