"""Normalized attention guidance beside other methods, adapters and hooks, in other pipelines, and compiled."""

import copy
import functools
import itertools

import pytest
import torch
from compare_nag import AVOIDED, MERGE, SETTINGS, assert_close, assert_same, guide, report
from guards import guarded
from literal_nag import LiteralNag, encoded
from test_compile import BUILDERS as SMALLER
from test_compile import Counting, compiled
from test_together import GUESTS, add_ip_adapter, draw_with_ip
from tiny import BUILDERS, denoiser, draw, flux, picture, sd, sdxl

import negengine
from negengine import NegToMe, NormalizedAttentionGuidance

KINDS = pytest.mark.parametrize("builder", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive), "sd"])
# where nothing is of the family but that it is a UNet
SOME_KINDS = pytest.mark.parametrize("builder", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive), "sd"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- FLUX: one image stream --------------------------------------------------------------------------------------


def streams(pipe):
    """Text and image tokens after every block of a run."""
    seen, model = [], denoiser(pipe)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    hooks = [block.register_forward_hook(lambda module, args, output: seen.append(output)) for block in blocks]
    draw(pipe)
    [hook.remove() for hook in hooks]
    return seen


@pytest.mark.parametrize("blocks", [None, ("transformer_blocks.0",), ("single_transformer_blocks.1",)], ids=str)
@pytest.mark.parametrize("other", ["alone", "NegToMe before", "NegToMe after"])
def test_both_rows_stay_one_image(blocks, other):
    """After every block, though their texts and the pooled embeddings of their prompts differ."""
    pipe = flux()
    if other == "NegToMe before":
        negengine.apply(pipe, NegToMe(**MERGE))
    guide(pipe, blocks=blocks)
    if other == "NegToMe after":
        negengine.apply(pipe, NegToMe(**MERGE))
    seen = streams(pipe)
    assert len(seen) == 12
    for text, image in seen:
        assert len(image) == 8
        assert torch.equal(image[:4], image[4:])
        assert not torch.allclose(text[:4], text[4:], rtol=1e-2, atol=1e-2)


# --- beside others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["NAG first", "NegToMe first"])
@pytest.mark.parametrize("builder", [flux, pytest.param(sdxl, marks=pytest.mark.exhaustive), sd])
def test_beside_negtome(builder, order):
    blocks = ("transformer_blocks", "single_transformer_blocks") if builder is flux else ("up_blocks.1.attentions.0",)
    # one step of a UNet, and few blocks: the tokens of both ways differ by less than NegToMe's closest decision
    call = draw if builder is flux else functools.partial(draw, num_inference_steps=1)
    pipe = assert_same(builder, call, negtome={"alpha": 0.4, "blocks": blocks}, order=order)
    assert negengine.status(pipe)[NegToMe].merged_tokens > 0


@KINDS
def test_pictures_of_negtome_are_not_guided(builder):
    """Rows that NegToMe joins come out of the first attention as they do without guidance, the images' guided as without them."""
    pipe, seen = BUILDERS[builder](), []
    path = "transformer_blocks.0.attn.to_out.0" if builder == "flux" else "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    module = denoiser(pipe).get_submodule(path)
    module.register_forward_hook(lambda module, args, output: seen.append(output))

    def first(*methods):
        seen.clear()
        negengine.remove(pipe)
        negengine.apply(pipe, *methods)
        draw(pipe)
        return seen[0]

    merging = NegToMe(**MERGE, alpha=0.0, reference=negengine.ReferenceImage(picture()))
    guiding = NormalizedAttentionGuidance(negative_prompt=AVOIDED, **SETTINGS)
    both, merged, guided = first(merging, guiding), first(merging), first(guiding)
    base = 4 if builder == "flux" else 8
    assert len(merged) == base + base // 2
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(both[:base], guided[:base])
    close(both[base : len(merged)], merged[base:])
    assert len(both) == len(merged) + (4 if builder == "flux" else 0)
    assert not torch.allclose(both[:base], merged[:base], rtol=1e-2, atol=1e-3)


def add_quiet_ip_adapter(pipe):
    """One that does not drown out rounding."""
    add_ip_adapter(pipe)
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith(("to_k_ip.0.weight", "to_v_ip.0.weight")):
            parameter.mul_(0.2)


@pytest.mark.parametrize("arrival", ["before", "after"])
def test_ip_adapter(arrival):
    """Its part is in both attentions, that to the negative text too. Loading it replaces every attention processor."""
    twin, pipe = sdxl(), sdxl()
    add_quiet_ip_adapter(twin)
    without = draw_with_ip(twin)
    LiteralNag(twin, encoded(twin, list(AVOIDED), 2), 2, **SETTINGS)
    if arrival == "before":
        add_quiet_ip_adapter(pipe)
    guide(pipe)
    if arrival == "after":
        draw(pipe)
        add_quiet_ip_adapter(pipe)
    assert_close(draw_with_ip(pipe), draw_with_ip(twin), without)


# on a UNet one guest each
ALSO = (("lora", "sdxl"), ("accelerate", "sd"))
ARRIVALS = guarded(
    itertools.product(GUESTS, ("flux", "sdxl", "sd")), lambda guest, builder: (guest, builder) in ALSO or builder == "flux"
)


@pytest.mark.parametrize("guest, builder", ARRIVALS)
def test_either_order_of_arrival(builder, guest):
    """Of a LoRA, or of hooks of diffusers or accelerate, which replace a module's forward."""
    add, drop = GUESTS[guest]
    early, late = BUILDERS[builder](), BUILDERS[builder]()
    guided = draw(guide(late))
    add(early)
    without = draw(early)
    expected = draw(guide(early))
    assert (expected - without).abs().max() > 1e-2
    add(late)
    assert torch.equal(draw(late), expected)
    assert not torch.equal(expected, guided)
    drop(late)
    assert torch.equal(draw(late), guided)


@SOME_KINDS
def test_fused_projections(builder):
    pipe = BUILDERS[builder]()
    plain, guided = draw(pipe), draw(guide(pipe))
    denoiser(pipe).fuse_qkv_projections()
    assert_close(draw(pipe), guided, plain)


@pytest.mark.parametrize("builder", ["flux_img2img", "flux_controlnet", "sdxl_img2img", "sdxl_controlnet"])
def test_other_pipelines(builder):
    pipe = BUILDERS[builder]()
    assert_same(BUILDERS[builder]) if builder == "sdxl_img2img" else None
    plain = draw(pipe)
    assert not torch.equal(draw(guide(pipe)), plain)
    assert report(pipe).active_steps == report(pipe).steps > 0
    assert torch.equal(draw(negengine.remove(pipe)), plain)


def test_copies_are_not_guided():
    pipe = sd()
    plain = draw(pipe)
    guide(pipe)
    pipe.unet = copy.deepcopy(pipe.unet)
    negengine.remove(pipe)
    assert torch.equal(draw(pipe), plain)


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ["flux", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("sd", "sdxl"))])
@pytest.mark.parametrize("how", ["in place", pytest.param("wrapped", marks=pytest.mark.exhaustive)])
def test_two_graphs_and_the_eager_result(builder, how):
    """Active and inactive; another prompt, seed, window or number of steps finds its graphs made.

    On FLUX the joining of rows makes graphs of its own, of a few nodes.
    """
    torch._dynamo.reset()
    pipe, eager, backend = SMALLER[builder](), SMALLER[builder](), Counting(large=builder == "flux")
    plain = draw(eager)
    guide(pipe, timesteps=(600, 1000)), guide(eager, timesteps=(600, 1000))
    compiled(pipe, backend, how)
    assert_close(draw(pipe), draw(eager), plain)
    assert 0 < report(pipe).active_steps < report(pipe).steps
    made = backend.graphs
    assert made == 2
    for call in ({"seed": 5}, {"num_inference_steps": 4}):
        assert_close(draw(pipe, **call), draw(eager, **call), plain)
    for settings in ({"negative_prompt": "noise"}, {"timesteps": (0, 600)}):
        guide(pipe, **settings), guide(eager, **settings)
        assert_close(draw(pipe), draw(eager), plain)
    assert backend.graphs == made
    torch._dynamo.reset()


@pytest.mark.exhaustive
@pytest.mark.parametrize("builder", ["flux", "sd"])
def test_through_autograd_tracing(builder):
    """`aot_eager` functionalises: what is written in place must survive it, beside NegToMe too."""
    torch._dynamo.reset()
    pipe = SMALLER[builder]()
    call = functools.partial(draw, num_inference_steps=2)
    plain = call(pipe)
    expected = call(negengine.apply(guide(pipe), NegToMe(**MERGE)))
    compiled(pipe, "aot_eager")
    assert_close(call(pipe), expected, plain)
    torch._dynamo.reset()
