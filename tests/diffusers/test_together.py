"""Beside a LoRA, an IP-Adapter and other libraries' hooks, whichever came first: the same bits as the literal placement."""

import functools
import itertools

import accelerate.hooks
import pytest
import torch
from compare import hooked, literal
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook
from guards import guarded
from peft import LoraConfig
from tiny import BUILDERS, denoiser, draw, picture, sdxl

import negengine

WINDOW = {"timesteps": (400, 1000)}


def add_lora(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        denoiser(pipe).add_adapter(config)


def drop_lora(pipe):
    denoiser(pipe).unload_lora()


class Double(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def add_hooks(pipe):
    for name, module in denoiser(pipe).named_modules():
        if name.endswith(("to_v", "to_out.0")):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(Double(), "double")


def drop_hooks(pipe):
    for name, module in denoiser(pipe).named_modules():
        if name.endswith(("to_v", "to_out.0")):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("double")


class Triple(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return 3 * output


def add_accelerate(pipe):
    accelerate.hooks.add_hook_to_module(denoiser(pipe), accelerate.hooks.ModelHook())
    for name, module in denoiser(pipe).named_modules():
        if name.endswith(("to_v", "to_out.0")):
            accelerate.hooks.add_hook_to_module(module, Triple())


def drop_accelerate(pipe):
    accelerate.hooks.remove_hook_from_module(denoiser(pipe), recurse=True)


GUESTS = {
    "lora": (add_lora, drop_lora),
    "model hook": (add_hooks, drop_hooks),
    "accelerate": (add_accelerate, drop_accelerate),
}


def expected_with(builder, add, call=draw):
    twin = BUILDERS[builder]()
    add(twin)
    plain = call(twin)
    merged, seed = literal(twin, call, 2, **WINDOW)
    assert not torch.equal(merged, plain)
    return merged, functools.partial(call, seed=seed)


@pytest.mark.parametrize("guest", GUESTS)
def test_either_order_of_arrival(family, guest):
    add, _ = GUESTS[guest]
    expected, call = expected_with(family, add)
    late, early = BUILDERS[family](), BUILDERS[family]()
    add(early)
    assert torch.equal(hooked(early, call, **WINDOW)[0], expected)
    without, _ = hooked(late, call, **WINDOW)  # also after a run
    add(late)
    assert torch.equal(call(late), expected)
    assert not torch.equal(without, expected)


@functools.cache
def drawn(family, guest=None, ours=False):
    """What a new pipeline draws with either, both or none."""
    pipe = BUILDERS[family]()
    if guest is not None:
        GUESTS[guest][0](pipe)
    return hooked(pipe, draw, **WINDOW)[0] if ours else draw(pipe)


# of a UNet one guest, which takes twice as long
LEAVING = guarded(itertools.product(GUESTS, ("flux", "sdxl")), lambda guest, family: family == "flux" or guest == "lora")


@pytest.mark.parametrize("guest_first", [True, False], ids=["guest leaves first", "guest leaves last"])
@pytest.mark.parametrize("ours_first", [True, False], ids=["guest came last", "guest came first"])
@pytest.mark.parametrize("guest, family", LEAVING)
def test_either_order_of_leaving(family, guest, ours_first, guest_first):
    add, drop = GUESTS[guest]
    pipe = BUILDERS[family]()
    plain, merged, guest_only = drawn(family), drawn(family, ours=True), drawn(family, guest)
    if not ours_first:
        add(pipe)
    hooked(pipe, draw, **WINDOW)
    if ours_first:
        add(pipe)
        draw(pipe)
    if guest_first:
        drop(pipe)
        assert torch.equal(draw(pipe), merged)
        negengine.remove(pipe)
    else:
        negengine.remove(pipe)
        assert torch.equal(draw(pipe), guest_only)
        drop(pipe)
    assert torch.equal(draw(pipe), plain)


def test_first_block_cache():
    """A step cache skips blocks; those that run are merged."""

    def cached(pipe):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.4))

    call = functools.partial(draw, num_inference_steps=6)
    expected, call = expected_with("flux", cached, call)
    pipe = BUILDERS["flux"]()
    cached(pipe)
    got, _ = hooked(pipe, call, **WINDOW)
    assert torch.equal(got, expected)
    negengine.remove(pipe)
    plain = BUILDERS["flux"]()
    cached(plain)
    assert torch.equal(call(pipe), call(plain))


def test_layerwise_casting(family):
    def cast(pipe):
        denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    expected, call = expected_with(family, cast)
    for first in (False, True):
        pipe = BUILDERS[family]()
        if first:
            negengine.apply(pipe, negengine.NegToMe(threshold=0.85, min_grid=1, **WINDOW))
        cast(pipe)
        got = call(pipe) if first else hooked(pipe, call, **WINDOW)[0]
        assert torch.equal(got, expected)


def test_fused_projections(family):
    def fuse(pipe):
        denoiser(pipe).fuse_qkv_projections()

    pipe = BUILDERS[family]()
    merged, _ = hooked(pipe, draw, **WINDOW)
    fuse(pipe)
    torch.testing.assert_close(draw(pipe), merged, rtol=1e-3, atol=1e-3)  # one product in place of three
    negengine.remove(pipe)
    assert not torch.allclose(draw(pipe), merged, rtol=1e-2, atol=1e-2)


# --- IP-Adapter --------------------------------------------------------------------------------------------------


def add_ip_adapter(pipe):
    generator = torch.Generator().manual_seed(5)

    def weight(*shape):
        return torch.randn(*shape, generator=generator)

    unet, layers = pipe.unet, {}
    width = unet.config.cross_attention_dim
    cross = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    for i, name in enumerate(n for n in unet.attn_processors if n.endswith("attn2.processor")):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{part}.weight"] = weight(hidden, width)
    assert len(cross) * 2 == len(layers)
    projection = {
        "proj.weight": weight(4 * width, 32),
        "proj.bias": weight(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}], low_cpu_mem_usage=False)
    unet.eval()


def draw_with_ip(pipe, **kwargs):
    embeds = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(6))
    return draw(pipe, ip_adapter_image_embeds=[embeds], **kwargs)


def test_ip_adapter_in_either_order():
    expected, call = expected_with("sdxl", add_ip_adapter, draw_with_ip)
    late, early = sdxl(), sdxl()
    add_ip_adapter(early)
    assert torch.equal(hooked(early, call, **WINDOW)[0], expected)
    hooked(late, draw, **WINDOW)
    add_ip_adapter(late)  # replaces every attention processor
    assert torch.equal(call(late), expected)


@pytest.mark.parametrize("adapter_first", [True, False])
def test_ip_adapter_leaves_in_either_order(adapter_first):
    pipe, other = sdxl(), sdxl()
    plain = draw(pipe)
    merged, _ = hooked(other, draw, **WINDOW)
    negengine.apply(pipe, negengine.NegToMe(threshold=0.85, min_grid=1, **WINDOW))
    add_ip_adapter(pipe)
    draw_with_ip(pipe)
    if adapter_first:
        pipe.unload_ip_adapter()
        assert torch.equal(draw(pipe), merged)
        negengine.remove(pipe)
    else:
        negengine.remove(pipe)
        add_ip_adapter(alone := sdxl())
        assert torch.equal(draw_with_ip(pipe), draw_with_ip(alone))
        pipe.unload_ip_adapter()
    assert torch.equal(draw(pipe), plain)


def test_a_picture_beside_an_ip_adapter():
    """The joined rows get image embeddings too."""
    pipe = sdxl()
    add_ip_adapter(pipe)
    plain = draw_with_ip(pipe)
    reference = negengine.ReferenceImage(picture())
    got, status = hooked(pipe, draw_with_ip, **WINDOW, reference=reference, threshold=-1)
    assert got.shape == plain.shape
    assert status.merged_tokens == status.eligible_tokens > 0
