"""IP-Adapters on FLUX, with masks, and beside methods that join rows (tests of SDXL's are in test_together)."""

import functools

import literal as twin
import pytest
import torch
from compare import assert_same, hooked
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from literal import FluxProcessor
from test_together import add_ip_adapter, draw_with_ip
from tiny import BUILDERS, WIDTH, draw, flux, half_mask, picture, sd, sdxl

import negengine

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
INNER = 32  # heads x channels of the tiny FLUX


def add_flux_ip_adapter(pipe, scale=0.02):
    generator = torch.Generator().manual_seed(5)

    def weight(*shape):
        return torch.randn(*shape, generator=generator)

    layers = {}
    for i in range(pipe.transformer.config.num_layers):
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{i}.{part}.weight"], layers[f"{i}.{part}.bias"] = weight(INNER, WIDTH), weight(INNER)
    projection = {
        "proj.weight": weight(4 * WIDTH, 32),
        "proj.bias": weight(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    pipe.transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}], low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(scale)


def draw_flux_with_ip(pipe, **kwargs):
    """One image prompt for all, as FLUX's pipeline takes it."""
    embeds = [torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(6))]
    images = {"ip_adapter_image_embeds": embeds, "negative_ip_adapter_image_embeds": embeds}  # it asks for both
    return draw(pipe, prompts=1, num_inference_steps=2, **images, **kwargs)


class FluxIPProcessor(FluxProcessor):
    """The test's processor of joint blocks, with what the adapter of diffusers adds after the output projection."""

    def __init__(self, literal, name, adapter):
        super().__init__(literal, name)
        self.adapter = adapter

    def __call__(self, *args, ip_hidden_states=None, **kwargs):
        image, text = super().__call__(*args, **kwargs)
        return image, text, self.adapter(*args, ip_hidden_states=ip_hidden_states, **kwargs)[2]


def with_literal_adapters(monkeypatch):
    """Literal keeps the adapters that it finds."""
    before = twin.PROCESSORS["flux"]

    def make(literal, name):
        present = adapters.get(name)
        return before(literal, name) if present is None else FluxIPProcessor(literal, name, present)

    adapters = {}
    monkeypatch.setitem(twin.PROCESSORS, "flux", make)
    return adapters


def test_flux(monkeypatch):
    adapters = with_literal_adapters(monkeypatch)

    def prepare(pipe):
        add_flux_ip_adapter(pipe)
        for name, processor in pipe.transformer.attn_processors.items():
            if isinstance(processor, FluxIPAdapterAttnProcessor):
                adapters[name.removesuffix(".processor")] = processor

    assert_same("flux", draw_flux_with_ip, 2, prepare=prepare)


def test_flux_loaded_after_a_run_and_unloaded():
    early, late, plain = flux(), flux(), flux()
    add_flux_ip_adapter(early)
    expected, _ = hooked(early, draw_flux_with_ip, **MERGE)
    merged, _ = hooked(late, draw, **MERGE)
    add_flux_ip_adapter(late)  # replaces every attention processor
    assert torch.equal(draw_flux_with_ip(late), expected)
    late.unload_ip_adapter()
    assert torch.equal(draw(late), merged)
    negengine.remove(late)
    assert torch.equal(draw(late), draw(plain))


ADAPTED = {
    "flux": (add_flux_ip_adapter, draw_flux_with_ip),
    "sdxl": (add_ip_adapter, draw_with_ip),
    "sd": (add_ip_adapter, draw_with_ip),
}


@pytest.mark.parametrize("family", ["flux", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("sdxl", "sd"))])
def test_joined_rows_have_their_image_too(family):
    """A picture that pushes nothing changes nothing; one that pushes does."""
    add, call = ADAPTED[family]
    pipe = BUILDERS[family]()
    add(pipe)
    again = call if family == "flux" else functools.partial(call, num_inference_steps=1)
    plain = again(pipe)
    negengine.apply(pipe, negengine.NegToMe(**MERGE, alpha=0.0, reference=negengine.ReferenceImage(picture())))
    torch.testing.assert_close(again(pipe), plain, rtol=1e-3, atol=1e-3)
    negengine.apply(pipe, negengine.NegToMe(**MERGE, reference=negengine.ReferenceImage(picture())))
    assert not torch.allclose(again(pipe), plain, rtol=1e-2, atol=1e-2)


def test_nag_beside_that_of_flux():
    """The second row of each image has the image prompt of the first; what the prompt itself avoids changes nothing."""
    pipe = flux()
    add_flux_ip_adapter(pipe)
    call = functools.partial(draw_flux_with_ip, pipe)
    plain = call()
    negengine.apply(pipe, negengine.NormalizedAttentionGuidance(negative_prompt="a cat"))
    torch.testing.assert_close(call(), plain, rtol=1e-4, atol=1e-4)
    negengine.apply(pipe, negengine.NormalizedAttentionGuidance(negative_prompt="the sea"))
    assert not torch.allclose(call(), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n", [2, 1])
def test_masks(n):
    """One row of masks stands for all images; with one image alone it is as long as the batch."""
    pipe = sdxl()
    add_ip_adapter(pipe)
    mask = torch.zeros(1, 1, 72, 56)
    mask[..., :28] = 1
    embeds = [torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(6))]
    call = functools.partial(draw, pipe, prompts=1, n=n, guidance_scale=1.0, num_inference_steps=1, ip_adapter_image_embeds=embeds)
    whole = call()
    masked = functools.partial(call, cross_attention_kwargs={"ip_adapter_masks": [mask]})
    plain = masked()
    assert not torch.allclose(plain, whole, rtol=1e-2, atol=1e-2)
    pictures = [negengine.ReferenceImage(picture(i), half_mask()) for i in range(2)]
    negengine.apply(pipe, negengine.NegToMe(**MERGE, alpha=0.0, reference=pictures))
    torch.testing.assert_close(masked(), plain, rtol=1e-3, atol=1e-3)


def test_methods_come_and_go_on_stable_diffusion_with_one():
    """Its UNet then has a further input, and is of the same family all the same."""
    pipe = sd()
    add_ip_adapter(pipe)
    plain = draw_with_ip(pipe)
    negengine.apply(pipe, negengine.NegToMe(**MERGE))
    assert not torch.allclose(draw_with_ip(pipe), plain, atol=1e-2)
    assert negengine.status(pipe)[negengine.NegToMe].merged_tokens
    assert torch.equal(draw_with_ip(negengine.remove(pipe)), plain)
