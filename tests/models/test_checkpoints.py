"""The embedded checkpoints load, alone and through the package, and damage to them is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline

from negengine import models

CLASSES = {name: FluxPipeline if name.endswith("flux") else StableDiffusionXLPipeline for name in models.NAMES}
DENOISERS = {name: "transformer" if name.endswith("flux") else "unet" for name in models.NAMES}
MEGABYTE = 2**20
LARGEST = {name: 12 if name in models.DIGITS else 16 for name in models.NAMES}


def modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def draw(pipeline: DiffusionPipeline, name: str) -> torch.Tensor:
    settings = models.preset(name).call_kwargs() | {"num_inference_steps": 2, "output_type": "pt"}
    return pipeline(models.prompts_of(name)[7], generator=torch.Generator().manual_seed(0), **settings).images


def test_plain_from_pretrained_draws(name: str, pipeline: DiffusionPipeline) -> None:
    plain = CLASSES[name].from_pretrained(models.path(name))
    plain.set_progress_bar_config(disable=True)
    assert {module.dtype for module in modules(plain).values()} == {torch.float32}
    picture = draw(plain, name)
    assert picture.shape == (1, 3, models.preset(name).height, models.preset(name).width)
    assert torch.equal(picture, draw(pipeline, name))


def test_load_has_the_class_dtype_and_quiet(name: str) -> None:
    pipeline = models.load(name, dtype=torch.bfloat16)
    assert isinstance(pipeline, CLASSES[name])
    assert {module.dtype for module in modules(pipeline).values()} == {torch.bfloat16}
    assert pipeline._progress_bar_config == {"disable": True}


@pytest.mark.parametrize("model, size", [("mnist-sdxl", 32), ("people-sdxl", 64)])
def test_sdxl_draws_its_size_by_default_with_attention_at_two_grids(model: str, size: int) -> None:
    pipeline = models.load(model)
    assert pipeline("7", num_inference_steps=1).images[0].size == (size, size)
    grids = []
    hooks = [
        block.attentions[0].register_forward_hook(lambda _, inputs, __: grids.append(tuple(inputs[0].shape[2:])))
        for block in pipeline.unet.up_blocks
    ]
    pipeline("7", num_inference_steps=1)
    for hook in hooks:
        hook.remove()
    assert grids == [(8, 8), (16, 16)]


@pytest.mark.parametrize("model", [name for name in models.NAMES if name.endswith("flux")])
def test_flux_draws_its_size_by_default(model: str) -> None:
    pipeline = models.load(model)
    size = models.preset(model).height
    assert pipeline(models.prompts_of(model)[0], num_inference_steps=1).images[0].size == (size, size)


def test_save_pretrained_round_trip_is_bit_identical(name: str, pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    again = CLASSES[name].from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for part, module in modules(pipeline).items():
        other = getattr(again, part).state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key]), f"{part}.{key}"
    assert torch.equal(draw(pipeline, name), draw(again, name))


def test_size_on_disk(name: str) -> None:
    assert sum(file.stat().st_size for file in models.path(name).rglob("*") if file.is_file()) <= LARGEST[name] * MEGABYTE


def test_weights_are_16_bit(name: str) -> None:
    from safetensors import safe_open

    for file in models.path(name).rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}, file  # noqa: SIM118


@pytest.mark.parametrize("function", [models.path, models.load, models.preset, models.negtome_preset, models.prompts_of])
def test_unknown_name_lists_the_known(function) -> None:
    with pytest.raises(ValueError, match=r"'mnist-dalle'.*mnist-flux, mnist-sdxl, people-flux, people-sdxl"):
        function("mnist-dalle")


def weights_of(folder: Path, name: str) -> Path:
    return folder / name / DENOISERS[name] / "diffusion_pytorch_model.safetensors"


def test_missing_file_is_named(copies: Path, name: str) -> None:
    weights_of(copies, name).unlink()
    with pytest.raises(RuntimeError, match=rf"{DENOISERS[name]}.diffusion_pytorch_model.safetensors is missing.*make train"):
        models.load(name)


def test_truncated_file_is_named(copies: Path, name: str) -> None:
    file = weights_of(copies, name)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match=rf"{file.name} has \d+ bytes instead of \d+.*make train"):
        models.path(name)


def test_altered_file_is_named(copies: Path, name: str) -> None:
    file = weights_of(copies, name)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"{file.name} is not the file that was trained.*make train"):
        models.path(name)


@pytest.mark.parametrize(
    "content", ["{", "[]", json.dumps({"model_index.json": {"bytes": 1}}), json.dumps({"model_index.json": 3})]
)
def test_corrupt_manifest_is_named(copies: Path, content: str) -> None:
    (copies / "mnist-flux" / "manifest.json").write_text(content)
    with pytest.raises(RuntimeError, match=r"manifest.json cannot be read.*make train"):
        models.path("mnist-flux")


def test_missing_manifest_is_named(copies: Path) -> None:
    (copies / "mnist-sdxl" / "manifest.json").unlink()
    with pytest.raises(RuntimeError, match=r"manifest.json is missing.*make train"):
        models.path("mnist-sdxl")


def test_damaged_classifier_is_named(copies: Path) -> None:
    file = copies / "mnist-classifier" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"model.safetensors has 1000 bytes.*make train"):
        models.load_classifier()
