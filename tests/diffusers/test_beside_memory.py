"""Ways to save memory, as far as a CPU can run them: offload, casting, quantised weights, tiled and sliced VAEs, other dtypes."""

import functools
import importlib.util
import itertools

import accelerate
import diffusers
import pytest
import torch
from compare import hooked
from diffusers.hooks import apply_group_offloading
from guards import guarded
from tiny import BUILDERS, denoiser, draw, flux, picture, sdxl

import negengine
from negengine import NegToMe, NormalizedAttentionGuidance, ReferenceImage

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
REST = pytest.mark.exhaustive
FAMILIES = pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=REST)])
CALL = functools.partial(draw, num_inference_steps=2)


def methods():
    """A picture is encoded by the VAE, and NAG's prompt by the text encoders, wherever these are then."""
    return NegToMe(**MERGE, reference=ReferenceImage(picture())), NormalizedAttentionGuidance(negative_prompt="the sea")


@functools.cache
def expected(family, *settings):
    return CALL(negengine.apply(BUILDERS[family](), *(settings or methods())))


# --- offload -----------------------------------------------------------------------------------------------------


def whole(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential(pipe, folder):
    """As the pipeline's method does it for each part: between the calls of a module its weights are on the device 'meta'.

    For the text encoders of this transformers accelerate fails where all is on a CPU, with and without negengine.
    """
    accelerate.cpu_offload(denoiser(pipe), torch.device("cpu"))
    accelerate.cpu_offload(pipe.vae, torch.device("cpu"))


def on_disk(pipe, folder):
    accelerate.disk_offload(denoiser(pipe), str(folder), torch.device("cpu"))


def by_leaves(pipe, folder):
    apply_group_offloading(denoiser(pipe), torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def by_blocks_on_disk(pipe, folder):
    apply_group_offloading(
        denoiser(pipe),
        torch.device("cpu"),
        torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )


OFFLOADS = {way.__name__: way for way in (whole, sequential, on_disk, by_leaves, by_blocks_on_disk)}


# on FLUX; what comes first matters most where weights are on no device
ORDERS = ("offloaded first", "applied first")
OFFLOADED = guarded(
    itertools.product(("flux", "sdxl"), OFFLOADS, ORDERS),
    lambda family, way, first: family == "flux" and (first == ORDERS[1] or way == "sequential"),
)


@pytest.mark.parametrize("family, way, first", OFFLOADED)
def test_offload(family, way, first, tmp_path, monkeypatch):
    pipe = BUILDERS[family]()
    if first == "applied first":
        negengine.apply(pipe, *methods())
    with monkeypatch.context() as patch:  # diffusers' groups look for an accelerator, of which they use nothing here
        patch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cpu"))
        OFFLOADS[way](pipe, tmp_path)
    if first == "offloaded first":
        negengine.apply(pipe, *methods())
    assert torch.equal(CALL(pipe), expected(family))
    if way in ("sequential", "on_disk"):
        assert any(parameter.device.type == "meta" for parameter in denoiser(pipe).parameters())
    negengine.remove(pipe)
    assert torch.equal(CALL(pipe), CALL(BUILDERS[family]()))


# --- the VAE -----------------------------------------------------------------------------------------------------


@FAMILIES
def test_tiling_and_slicing(family):
    """They change how images are decoded. A reference picture that is larger than a tile is encoded in tiles, too."""
    pipe = BUILDERS[family]()
    merge = NegToMe(**MERGE)
    call = functools.partial(CALL, output_type="np")
    pipe.vae.enable_slicing()
    merged = call(negengine.apply(pipe, merge))
    pipe.vae.disable_slicing()
    torch.testing.assert_close(torch.from_numpy(call(pipe)), torch.from_numpy(merged), rtol=1e-4, atol=1e-4)
    pipe.vae.enable_tiling()
    assert call(pipe).shape == merged.shape
    assert torch.equal(CALL(pipe), expected(family, merge))
    large = functools.partial(CALL, height=128, width=128)
    negengine.apply(pipe, *methods())
    untiled = large(pipe)
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 96, 12
    negengine.apply(pipe, *methods())  # a picture is encoded once
    assert torch.isfinite(large(pipe)).all()
    assert not torch.equal(large(pipe), untiled)


# --- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=REST)])
@FAMILIES
def test_to_another_dtype_after_a_run(family, dtype):
    pipe, fresh = BUILDERS[family](), BUILDERS[family]()
    negengine.apply(pipe, *methods())
    CALL(pipe)
    pipe.to(dtype)
    wanted = CALL(negengine.apply(fresh.to(dtype), *methods()))
    assert wanted.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    assert torch.equal(CALL(pipe), wanted)
    assert not torch.equal(wanted, CALL(BUILDERS[family]().to(dtype)))


# --- quantised weights -------------------------------------------------------------------------------------------


def needs(module):
    found = importlib.util.find_spec(module.split(".")[0]) is not None and importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not found, reason=f"{module} is not installed")


def with_torchao(pipe):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(denoiser(pipe), Int8WeightOnlyConfig())


def with_quanto(pipe):
    from optimum.quanto import freeze, qint8, quantize

    quantize(denoiser(pipe), weights=qint8)
    freeze(denoiser(pipe))


def with_bitsandbytes(pipe):
    """Layers of 4 bits in place of the linear ones of the attention, as diffusers puts them there."""
    import bitsandbytes

    model = denoiser(pipe)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".to_" in name:
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, quant_type="nf4", compute_dtype=torch.float32
            )
            layer.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))


def with_gguf(pipe):
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    model, kind = denoiser(pipe), GGMLQuantizationType.Q8_0
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".to_" in name and module.in_features % 32 == 0:
            layer = GGUFLinear(module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.float32)
            weights = torch.from_numpy(quants.quantize(module.weight.detach().numpy(), kind))
            layer.weight = GGUFParameter(weights, quant_type=kind)
            layer.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


QUANTISED = [
    pytest.param(with_torchao, marks=needs("torchao")),
    pytest.param(with_quanto, marks=needs("optimum.quanto")),
    pytest.param(with_bitsandbytes, marks=needs("bitsandbytes")),
    pytest.param(with_gguf, marks=needs("gguf")),
]


@pytest.mark.parametrize("first", ["quantised first", "applied first"])
@pytest.mark.parametrize("quantise", QUANTISED)
@FAMILIES
def test_quantised(family, quantise, first):
    """The first image of each prompt is what the quantised pipeline draws without; the others are pushed. Either order."""
    pipe, other = BUILDERS[family](), BUILDERS[family]()
    with torch.no_grad():
        if first == "quantised first":
            quantise(pipe)
            plain = CALL(pipe)
            negengine.apply(pipe, NegToMe(**MERGE))
        else:
            CALL(negengine.apply(pipe, NegToMe(**MERGE)))
            quantise(pipe), quantise(other)
            plain = CALL(other)
    assert not torch.equal(plain, CALL(BUILDERS[family]()))
    merged = CALL(pipe)
    torch.testing.assert_close(merged[::2], plain[::2], rtol=1e-3, atol=1e-3)
    assert (merged[1::2] - plain[1::2]).flatten(1).abs().amax(1).min() > 1e-2
    if first == "applied first":  # in all blocks, whose layers may have been replaced
        assert torch.equal(merged, CALL(negengine.apply(other, NegToMe(**MERGE))))
    assert torch.equal(CALL(negengine.remove(pipe)), plain)


# --- kept on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [flux, pytest.param(sdxl, marks=REST)])
def test_saved_after_a_run(build, tmp_path):
    """Nothing of the methods is in what is saved, and the pipeline goes on."""
    pipe = build()
    plain = CALL(pipe)
    merged, _ = hooked(pipe, CALL, **MERGE)
    pipe.save_pretrained(tmp_path)
    loaded = getattr(diffusers, type(pipe).__name__).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(CALL(loaded), plain)
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(loaded)
    assert torch.equal(CALL(pipe), merged)
