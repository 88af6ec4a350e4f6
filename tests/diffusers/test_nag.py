"""Normalized attention guidance on pipelines, against the second attention written out in literal_nag.py."""

import copy
import dataclasses
import functools

import diffusers
import pytest
import torch
from literal_nag import LiteralNag, encoded
from test_apply_remove import state
from test_compile import Counting, compiled
from test_families import TOY, Toy
from test_together import GUESTS, add_ip_adapter, draw_with_ip
from tiny import BUILDERS, NEGATIVES, denoiser, draw, flux, kind, picture, sd, sdxl, watched

import negengine
from negengine import Embeddings, NegToMe, NormalizedAttentionGuidance
from negengine.diffusers import families

AVOIDED = ("trees", "a brick wall")  # one per prompt
SETTINGS = {"scale": 4.0, "tau": 2.0, "alpha": 0.6}  # much stronger than the defaults
TAU = {"flux": 2.0, "sdxl": 3.5, "sd": 3.5}  # shortens some tokens and not others
MERGE = {"threshold": -1, "timesteps": (0, 1000), "min_grid": 1}
KINDS = pytest.mark.parametrize("builder", ["flux", "sdxl", "sd"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def guide(pipe, negative_prompt=AVOIDED, **settings):
    return negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=negative_prompt, **{**SETTINGS, **settings}))


def report(pipe):
    return negengine.status(pipe)[NormalizedAttentionGuidance]


def assert_same(builder, call=draw, n=2, length=11, texts=AVOIDED, negtome=None, order=(0, 1), **settings):
    """Both ways give the same latents, but for rounding far below what guidance did to them. Returns the guided pipeline."""
    ours, theirs = builder(), builder()
    settings = {**SETTINGS, "tau": TAU[kind(ours)], **settings}
    window = {"window": settings["timesteps"]} if "timesteps" in settings else {}
    others = {name: value for name, value in settings.items() if name != "timesteps"}
    literal = LiteralNag(theirs, encoded(theirs, list(texts), n, length), n, **others, **window, negtome=negtome)
    for seed in range(20):  # until no match of NegToMe hangs on rounding
        literal.reset()
        expected = call(theirs, seed=seed)
        if literal.margin > 3e-5 or negtome is None:
            break
    else:
        raise AssertionError("every seed hangs on the rounding of a cosine")
    assert 0 < literal.clamped < literal.tokens
    methods = [NormalizedAttentionGuidance(negative_prompt=texts, **settings)]
    if negtome is not None:
        methods.append(NegToMe(**MERGE, **negtome))
    alone = call(negengine.apply(ours, methods[-1]), seed=seed) if negtome is not None else call(ours, seed=seed)
    negengine.remove(ours)
    for i in order[: len(methods)]:
        negengine.apply(ours, methods[i])
    got = call(ours, seed=seed)
    assert_close(got, expected, alone)
    return ours


def assert_close(got, expected, without):
    effect = (expected - without).abs().max()
    assert effect > 1e-2
    assert (got - expected).abs().max() < 2e-4 * effect


# --- the mathematics and its place -------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("builder", [sdxl, sd])
def test_unets(builder, guidance_scale):
    call = functools.partial(draw, guidance_scale=guidance_scale)
    pipe = assert_same(builder, call)
    assert (report(pipe).blocks, report(pipe).active_steps) == (10 if builder is sdxl else 6, 3)


@pytest.mark.parametrize("overrides", [{}, {"guidance_embeds": False}], ids=["distilled", "few-step"])
def test_flux(overrides):
    pipe = assert_same(functools.partial(flux, **overrides))
    assert (report(pipe).blocks, report(pipe).active_steps) == (4, 3)


BLOCKS = [
    (flux, ("transformer_blocks.1",), 1),
    (flux, ("transformer_blocks",), 2),
    (flux, ("single_transformer_blocks",), 2),
    (sdxl, ("up_blocks",), 6),
    (sd, ("mid_block", "down_blocks"), 2),
]


@pytest.mark.parametrize("builder, blocks, number", BLOCKS)
def test_blocks(builder, blocks, number):
    assert report(assert_same(builder, blocks=blocks)).blocks == number


@pytest.mark.parametrize("builder, window", [(flux, (500, 1000)), (flux, (0, 900)), (sdxl, (600, 1000)), (sd, (0, 400))])
def test_window(builder, window):
    done = report(assert_same(builder, timesteps=window))
    assert 0 < done.active_steps < done.steps == 3


@pytest.mark.parametrize("builder", [flux, sdxl])
def test_three_prompts_of_three_images(builder):
    assert_same(builder, functools.partial(draw, prompts=3, n=3), n=3, texts=("trees", "a wall", "the sky"))


@pytest.mark.parametrize("builder, size", [(flux, (48, 144)), (sdxl, (40, 104)), (sd, (88, 24))])
def test_odd_sizes(builder, size):
    assert_same(builder, functools.partial(draw, height=size[0], width=size[1]))


@pytest.mark.parametrize("length", [5, 20])
def test_text_length_is_that_of_the_call(length):
    assert_same(flux, functools.partial(draw, max_sequence_length=length), length=length)


def test_one_image():
    """One row without classifier-free guidance: nothing can be mistaken for a row by its number."""
    for builder in (flux, sdxl):
        assert_same(builder, functools.partial(draw, prompts=1, n=1, guidance_scale=1.0), n=1, texts=("trees",))


def test_guidance_that_ends_mid_run():
    """A callback that turns classifier-free guidance off halves the batch: then all rows are conditional."""

    def end_guidance(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items() if name != "latents"}
        return tensors

    inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    assert_same(sdxl, functools.partial(draw, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=inputs))


@KINDS
def test_defaults_are_those_of_the_family(builder):
    scale, tau, alpha = {"flux": (5, 2.5, 0.25), "sdxl": (5, 2.5, 0.5), "sd": (5, 2.5, 0.38)}[builder]
    pipe, twin = BUILDERS[builder](), BUILDERS[builder]()
    negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt="trees"))
    got, plain = draw(pipe), draw(twin)
    LiteralNag(twin, encoded(twin, ["trees", "trees"], 2), 2, scale, tau, alpha)
    assert_close(got, draw(twin), plain)


# --- prompts -----------------------------------------------------------------------------------------------------


@KINDS
def test_one_prompt_for_all_is_that_for_each(builder):
    pipe = BUILDERS[builder]()
    one, each = draw(guide(pipe, "trees")), draw(guide(pipe, ["trees", "trees"]))
    assert torch.equal(one, each)
    assert not torch.equal(one, draw(guide(pipe, "a brick wall")))


@KINDS
def test_embeddings(builder):
    pipe = BUILDERS[builder]()
    expected = draw(guide(pipe))
    pooled = torch.randn(2, 32) if builder != "sd" else None  # of no use to NAG
    given = Embeddings(encoded(pipe, list(AVOIDED), 1), pooled)  # a pipeline may encode prompts between its runs
    assert torch.equal(draw(guide(pipe, given)), expected)


@KINDS
def test_a_second_call_with_other_prompts(builder):
    """Nothing of the first call, of more images, stays."""
    pipe, fresh = guide(BUILDERS[builder](), "trees"), guide(BUILDERS[builder](), "trees")
    draw(pipe, prompts=3, n=3, num_inference_steps=2)
    assert torch.equal(draw(pipe, prompts=1, n=2), draw(fresh, prompts=1, n=2))
    assert report(pipe) == report(fresh)


# --- nothing more than asked -------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("settings", [{"scale": 1}, {"alpha": 0}], ids=str)
def test_what_guides_nothing_costs_nothing(builder, settings):
    pipe = BUILDERS[builder]()
    plain = draw(pipe)
    guide(pipe, **settings)
    with watched(denoiser(pipe)) as calls, attended(pipe) as rows:
        assert torch.equal(draw(pipe), plain)
    assert {number for _, number in calls} == rows == {8 if builder != "flux" else 4}
    assert report(pipe).active_steps == 0
    assert "guides nothing; raise it" in str(report(pipe))


class attended:
    """A set that fills with the numbers of rows that cross-attentions (FLUX: attentions) look at the text with."""

    def __init__(self, pipe):
        self.rows, self.hooks = set(), []
        for name, module in denoiser(pipe).named_modules():
            if name.endswith(("attn2.to_k", "attn.to_k")):
                self.hooks.append(module.register_forward_pre_hook(lambda module, args: self.rows.add(len(args[0]))))

    def __enter__(self):
        return self.rows

    def __exit__(self, *error):
        [hook.remove() for hook in self.hooks]


@KINDS
def test_a_window_that_no_step_hits(builder):
    pipe = BUILDERS[builder]()
    plain = draw(pipe)
    guide(pipe, timesteps=(2, 3))
    assert torch.equal(draw(pipe), plain)
    assert "widen `timesteps`" in report(pipe).idle_reason


@KINDS
def test_nothing_remains(builder):
    pipe = BUILDERS[builder]()
    plain, before = draw(pipe), state(pipe)
    guide(pipe)
    assert not torch.equal(draw(pipe), plain)
    negengine.remove(pipe, NormalizedAttentionGuidance)
    assert state(pipe) == before
    assert torch.equal(draw(pipe), plain)


@KINDS
def test_steps_before_the_window_are_unchanged(builder):
    """Their latents bit for bit."""
    pipe = BUILDERS[builder]()

    def first(pipe):
        seen = []
        draw(pipe, callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["latents"].clone()) or {})
        return seen

    plain = first(pipe)
    guided = first(guide(pipe, timesteps=(0, 400 if builder == "sd" else 700)))
    assert torch.equal(guided[0], plain[0])
    assert not torch.equal(guided[-1], plain[-1])


def test_rows_of_flux():
    """A second row per image, in active steps alone."""
    pipe = guide(flux(), timesteps=(900, 1000))
    with watched(pipe.transformer) as calls:
        draw(pipe)
    assert [rows for _, rows in calls] == [8, 4, 4]


@pytest.mark.parametrize("builder", [sdxl, sd])
def test_rows_of_unets(builder):
    """One further attention of the conditional rows in cross-attention; the unconditional ones come out as before."""
    pipe, seen = builder(), {}

    def keep(name, end):
        def hook(module, args, *output):
            seen.setdefault((name, end), (output or args)[0].clone())

        return hook

    def run():
        seen.clear()
        hooks = []
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                hooks += [
                    module.to_k.register_forward_pre_hook(keep(name, "text")),
                    module.register_forward_hook(keep(name, "output")),
                ]
            if name.endswith("attn1"):
                hooks.append(module.register_forward_hook(keep(name, "output")))
        draw(pipe)
        [hook.remove() for hook in hooks]
        return dict(seen)

    plain = run()
    guide(pipe)
    guided = run()
    text = encoded(pipe, list(AVOIDED), 2)
    for (name, end), value in guided.items():
        before = plain[name, end]
        assert len(value) == (12 if end == "text" else 8), name
        if end == "text":
            assert torch.equal(value[:8], before)
            assert torch.equal(value[8:], text)
        else:
            torch.testing.assert_close(value[:4], before[:4], rtol=1e-4, atol=1e-4)
    first = ("down_blocks.1.attentions.0.transformer_blocks.0.attn2", "output")
    assert not torch.allclose(guided[first][4:], plain[first][4:], rtol=1e-2, atol=1e-2)


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
@pytest.mark.parametrize("builder", [flux, sdxl, sd])
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


@KINDS
@pytest.mark.parametrize("guest", GUESTS)
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


@KINDS
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
    pipe, eager, backend = BUILDERS[builder](), BUILDERS[builder](), Counting(large=builder == "flux")
    plain = draw(eager)
    guide(pipe, timesteps=(600, 1000)), guide(eager, timesteps=(600, 1000))
    compiled(pipe, backend, how)
    assert_close(draw(pipe), draw(eager), plain)
    assert 0 < report(pipe).active_steps < report(pipe).steps
    assert backend.graphs == 2
    for call in ({"seed": 5}, {"num_inference_steps": 4}):
        assert_close(draw(pipe, **call), draw(eager, **call), plain)
    for settings in ({"negative_prompt": "noise"}, {"timesteps": (0, 600)}):
        guide(pipe, **settings), guide(eager, **settings)
        assert_close(draw(pipe), draw(eager), plain)
    assert backend.graphs == 2
    torch._dynamo.reset()


@pytest.mark.exhaustive
@pytest.mark.parametrize("builder", ["flux", "sd"])
def test_through_autograd_tracing(builder):
    """`aot_eager` functionalises: what is written in place must survive it, beside NegToMe too."""
    torch._dynamo.reset()
    pipe = BUILDERS[builder]()
    call = functools.partial(draw, num_inference_steps=2)
    plain = call(pipe)
    expected = call(negengine.apply(guide(pipe), NegToMe(**MERGE)))
    compiled(pipe, "aot_eager")
    assert_close(call(pipe), expected, plain)
    torch._dynamo.reset()


# --- bad input ---------------------------------------------------------------------------------------------------


@KINDS
def test_a_bare_denoiser(builder):
    with pytest.raises(
        ValueError, match="NAG encodes its negative prompt as the pipeline encodes its prompts; apply it to the pipe"
    ):
        guide(denoiser(BUILDERS[builder]()))


class ToyPipeline:
    def __init__(self):
        self.transformer = Toy()


def test_a_family_that_does_not_tell_how_prompts_are_encoded():
    with families.registered(TOY), pytest.raises(ValueError, match="Toy does not tell how its pipelines encode prompts"):
        guide(ToyPipeline())


def test_a_family_without_defaults():
    told = dataclasses.replace(TOY.conditioning, prompts=lambda encoded: {"encoder_hidden_states": encoded[0]})
    family = dataclasses.replace(TOY, conditioning=told)
    with families.registered(family), pytest.raises(ValueError, match="Toy has no defaults for NAG; give scale, alpha"):
        negengine.apply(ToyPipeline(), NormalizedAttentionGuidance(negative_prompt="trees", tau=2))


@KINDS
def test_unknown_blocks(builder):
    with pytest.raises(ValueError, match=r"no attention block of this .* denoiser is named 'middle'; there are"):
        guide(BUILDERS[builder](), blocks=("middle",))


def refused(pipe, message, **kwargs):
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=message):
        draw(pipe, **kwargs)
    assert not calls


def test_true_guidance_of_flux():
    """An error that says what to do; with a scale of 1 there is nothing to refuse."""
    pipe, true = flux(), {"true_cfg_scale": 2.5, "negative_prompt": NEGATIVES[:2]}
    plain = draw(pipe, **true)
    refused(guide(pipe), "leave out the call's true_cfg_scale and negative_prompt, and give NormalizedAttentionGuidance", **true)
    draw(pipe)
    assert torch.equal(draw(guide(pipe, scale=1), **true), plain)


@KINDS
def test_a_wrong_number_of_prompts(builder):
    pipe = guide(BUILDERS[builder](), ["trees", "walls", "skies"])
    refused(pipe, "3 prompts to avoid, but this call has 2; give one, or one for each")


def test_rows_that_are_neither_halves_nor_one_per_image():
    parts = sdxl(in_channels=8).components
    del parts["image_encoder"], parts["feature_extractor"]
    pipe = diffusers.StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    guide(pipe, "trees")
    with pytest.raises(ValueError, match="called with 6 rows for 2 images; NAG knows one row per image, or two"):
        draw(pipe, prompts=1, image=picture(3, (56, 72)), negative_prompt=NEGATIVES[:1], image_guidance_scale=1.5)


def test_the_report_says_what_was_done():
    pipe = guide(sd())
    assert str(report(pipe)) == "NAG on Stable Diffusion 1.x and 2.x: applied, not run yet"
    draw(pipe)
    assert str(report(pipe)) == "NAG on Stable Diffusion 1.x and 2.x: guided 6 blocks in 3 of 3 steps"
    assert kind(pipe) == "sd"
