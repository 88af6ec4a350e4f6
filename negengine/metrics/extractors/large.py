"""The networks that papers measure with. Their packages and weights are asked for when they are loaded."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from negengine.metrics.extractors.base import Classes, Extractor, Images, as_tensor, batched
from negengine.metrics.libraries import need, weights

CLIP_MODEL, CLIP_WEIGHTS = "ViT-B-32", "openai"  # that of the published CLIPScores
DINOV2 = "facebook/dinov2-base"
ONLINE = "run it once with network, or copy the cache folder"


def dreamsim(device: str, classes: Classes) -> Extractor:
    """DreamSim's ensemble (Fu et al., NeurIPS 2023): distances that agree with people's. The paper of NegToMe uses it."""
    package = need("dreamsim", "dreamsim", "the feature extractor dreamsim")
    folder = Path(os.environ.get("DREAMSIM_CACHE", Path(torch.hub.get_dir()) / "dreamsim"))
    folder.mkdir(parents=True, exist_ok=True)
    with weights("DreamSim", f"{ONLINE} {folder} (DREAMSIM_CACHE names another)"), contextlib.redirect_stdout(sys.stderr):
        model, prepare = package.dreamsim(pretrained=True, device=device, cache_dir=str(folder))
    return Extractor("dreamsim", batched(lambda images: model.embed(torch.cat([prepare(image) for image in images]).to(device))))


def inception(device: str, classes: Classes) -> Extractor:
    """Inception v3 as FID, KID and the inception score use it, by torch-fidelity: 2048 features, 1008 classes."""
    package = need("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "the feature extractor inception")
    with weights("Inception v3", f"{ONLINE} {Path(torch.hub.get_dir()) / 'checkpoints'} with {_name(package.URL_INCEPTION_V3)}"):
        network = package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)

    def seen(number: int) -> Callable[[Images], Tensor]:
        def one(images: Images) -> Tensor:
            return network((as_tensor(images) * 255).round().byte().to(device))[number]

        return batched(one)

    return Extractor("inception", seen(0), seen(1), tuple(f"class {number}" for number in range(1008)))


def clip(device: str, classes: Classes) -> Extractor:
    """CLIP by open_clip: features, texts in the same space, and with ``classes`` a zero-shot reader of them."""
    package = need("open_clip", "open_clip_torch", "the feature extractor clip")
    with weights(f"CLIP {CLIP_MODEL}", f"{ONLINE} of the Hugging Face hub (HF_HOME, with timm/vit_base_patch32_clip_224.openai)"):
        model, _, prepare = package.create_model_and_transforms(
            CLIP_MODEL,
            pretrained=CLIP_WEIGHTS,
            device=device,
            force_quick_gelu=True,  # these weights were trained with it
        )
    tokens = package.get_tokenizer(CLIP_MODEL)
    model.eval()

    def texts(given: Any) -> Tensor:
        with torch.no_grad():
            return model.encode_text(tokens(list(given)).to(device), normalize=True).float().cpu()

    features = batched(
        lambda images: model.encode_image(torch.stack([prepare(image) for image in images]).to(device), normalize=True)
    )
    if not classes:
        return Extractor("clip", features, texts=texts)
    named = texts(classes)
    return Extractor("clip", features, lambda images: 100 * features(images) @ named.T, tuple(classes), texts)


def dinov2(device: str, classes: Classes) -> Extractor:
    """DINOv2 (base) by transformers: features of looks without texts."""
    package = need("transformers", "transformers", "the feature extractor dinov2")
    with weights("DINOv2", f"{ONLINE} of the Hugging Face hub (HF_HOME, with {DINOV2})"):
        prepare = package.AutoImageProcessor.from_pretrained(DINOV2)
        model = package.AutoModel.from_pretrained(DINOV2).to(device).eval()
    return Extractor(
        "dinov2", batched(lambda images: model(**prepare(images=list(images), return_tensors="pt").to(device)).pooler_output)
    )


def _name(url: str) -> str:
    return url.rpartition("/")[2]
