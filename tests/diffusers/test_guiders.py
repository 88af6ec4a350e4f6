"""Modular pipelines with a NegativeGuider beside the classic ones with negengine.apply, step by step, in float64."""

import logging

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, FluxAutoBlocks, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import StableDiffusionXLInputStep
from tiny import BETAS, SIZE, picture, sdxl_controlnet
from transcription import AVOID, LIVELY, PROMPT, double, start

import negengine
from negengine import DynamicNegativeGuidance, Embeddings, NegativePrompting
from negengine.diffusers.families.flux import pack
from negengine.diffusers.guiders import NegativeGuider, with_negative_guidance

DNG = DynamicNegativeGuidance(prompt=AVOID, **LIVELY)
SCHEDULERS = [("DDPMScheduler", {"clip_sample": False}), ("EulerAncestralDiscreteScheduler", {})]
DDPM = SCHEDULERS[0]
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # modular blocks call the denoiser once per branch, pipelines once with all rows


class RightlyRepeated(StableDiffusionXLInputStep):
    """diffusers 0.40 repeats the pooled rows as prompts in turn, those of the tokens prompt by prompt."""

    def __call__(self, components, state):
        pooled = {name: state.get(name) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
        components, state = super().__call__(components, state)
        for name, rows in pooled.items():
            if rows is not None:
                state.set(name, rows.repeat_interleave(state.get("num_images_per_prompt"), 0), "denoiser_input_fields")
        return components, state


def sdxl_blocks():
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks["denoise"].sub_blocks["input"] = RightlyRepeated()
    return blocks


def modular(blocks, base):
    pipe = blocks.init_pipeline()
    pipe.update_components(**{name: part for name, part in base.components.items() if part is not None and name in pipe.components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sdxl():
    """Of one kind, to be shared: nothing that is done to it may remain."""
    return double("sdxl", DDPM[0], **DDPM[1])


@pytest.fixture
def base(sdxl):
    sdxl.scheduler = scheduler(*DDPM)
    yield sdxl
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in sdxl.unet.modules())
    assert "step" not in vars(sdxl.scheduler)


@pytest.fixture(scope="module")
def usual(sdxl):
    """What the classic path makes of DNG and a guidance scale of 3."""
    sdxl.scheduler = scheduler(*DDPM)
    return classic(sdxl, DNG, {"guidance_scale": 3.0})


def scheduler(name, config):
    return getattr(diffusers, name)(**{**BETAS, **config})


def drawn(pipe, n=2, prompts=1, seed=1, negative=True, steps=3, **call):
    arguments = {**SIZE["sdxl"], "num_inference_steps": steps, "num_images_per_prompt": n}
    if negative:
        arguments["negative_prompt"] = ["blurred", "dull"][:prompts]
    if "image" in call:
        del arguments["height"], arguments["width"]
    else:
        arguments["latents"] = noise(n * prompts)
    arguments.update(call)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(pipe, diffusers.ModularPipeline):
        return pipe(**{"prompt": PROMPT[:prompts], **arguments}, generator=generator, output="latents")
    return pipe(PROMPT[:prompts], generator=generator, output_type="latent", **arguments).images


def noise(images):
    size = SIZE["sdxl"]
    generator = torch.Generator().manual_seed(4)
    return torch.randn(images, 4, size["height"] // 8, size["width"] // 8, dtype=torch.float64, generator=generator)


def classic(base, method, guidance, **call):
    negengine.apply(base, method)
    try:
        return drawn(base, **guidance, **call), negengine.status(base)[type(method)]
    finally:
        negengine.remove(base)


def assert_same_run(ours, report, expected, status):
    torch.testing.assert_close(ours, expected, **ROUNDING)
    if hasattr(status, "p"):
        torch.testing.assert_close(torch.tensor(report.p), torch.tensor(status.p), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(torch.tensor(report.strength), torch.tensor(status.strength), rtol=1e-6, atol=1e-9)
        assert report.p[1] != report.p[0]
    assert (report.steps, report.active_steps) == (status.steps, status.active_steps)
    assert report.method == status.method


@pytest.mark.parametrize("name,config", SCHEDULERS)
def test_the_numbers_of_the_classic_path(base, name, config):
    base.scheduler = scheduler(name, config)
    expected, status = classic(base, DNG, {"guidance_scale": 3.0}, prompts=2)
    pipe = modular(with_negative_guidance(sdxl_blocks(), DNG, guidance_scale=3.0), base)
    assert_same_run(drawn(pipe, prompts=2), pipe.guider.report, expected, status)
    assert len(pipe.guider.report.p[0]) == 4


def test_every_run_begins_anew(base, usual):
    """With stock blocks, as one prompt's embeddings are repeated rightly."""
    pipe = modular(with_negative_guidance(StableDiffusionXLAutoBlocks(), DNG, guidance_scale=3.0), base)
    for _ in range(2):
        assert_same_run(drawn(pipe), pipe.guider.report, *usual)


CASES = [
    ({"prompt": ("the sea", "noise")}, {"guidance_scale": 3.0}),
    ({"negative": "cfg"}, {"guidance_scale": 3.0}),
    ({}, {"guidance_scale": 1.0}),
    ({}, {"guidance_scale": 3.0, "guidance_rescale": 0.6}),
]


@pytest.mark.parametrize("changes,guidance", CASES)
def test_settings(base, changes, guidance):
    method = DynamicNegativeGuidance(**{"prompt": AVOID, **LIVELY, **changes})
    call = {"negative": guidance["guidance_scale"] != 1, "prompts": 2, "n": 2 if isinstance(method.prompt, tuple) else 1}
    expected, status = classic(base, method, guidance, **call)
    pipe = modular(with_negative_guidance(sdxl_blocks(), method, **guidance), base)
    assert_same_run(drawn(pipe, **call), pipe.guider.report, expected, status)


def test_negative_prompting(base):
    method = NegativePrompting(prompt=AVOID, scale=1.5)
    expected, status = classic(base, method, {"guidance_scale": 3.0})
    pipe = modular(with_negative_guidance(sdxl_blocks(), method, guidance_scale=3.0), base)
    assert pipe.guider.report.steps == 0
    assert_same_run(drawn(pipe), pipe.guider.report, expected, status)


def test_the_first_formulation_of_guidance(base, usual):
    """``c + s (c - u)`` is ``u + (s + 1) (c - u)``."""
    blocks = with_negative_guidance(sdxl_blocks(), DNG, guidance_scale=2.0, use_original_formulation=True)
    torch.testing.assert_close(drawn(modular(blocks, base)), usual[0], **ROUNDING)


def test_a_strength_of_zero_changes_nothing(base):
    """Also within a window of classifier-free guidance, whose last step a guider remembers: two runs."""
    guidance = {"guidance_scale": 3.0, "start": 0.25, "stop": 0.75}
    call = {"steps": 4, "n": 1}
    stock = modular(sdxl_blocks(), base)
    stock.update_components(guider=ClassifierFreeGuidance(**guidance))
    expected = drawn(stock, **call)
    pipe = modular(with_negative_guidance(sdxl_blocks(), NegativePrompting(prompt=AVOID, scale=0.0), **guidance), base)
    for _ in range(2):
        torch.testing.assert_close(drawn(pipe, **call), expected, **ROUNDING)
        assert pipe.guider.num_conditions == 2
    forceful = modular(with_negative_guidance(sdxl_blocks(), NegativePrompting(prompt=AVOID), **guidance), base)
    assert (drawn(forceful, **call) - expected).abs().max() > 1e-3


def test_image_to_image(base):
    """It enters the timesteps in their midst."""
    call = {"image": picture(9, (56, 72)), "strength": 0.7, "steps": 6, "n": 1}
    pipe = modular(with_negative_guidance(sdxl_blocks(), DNG, guidance_scale=3.0), base)
    got = drawn(pipe, **call)
    parts = {name: part for name, part in base.components.items() if part is not None}
    other = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    expected, status = classic(other, DNG, {"guidance_scale": 3.0}, **call)
    assert_same_run(got, pipe.guider.report, expected, status)
    assert status.steps == 4


def test_a_pipeline(base, usual):
    """Its copy shares the models and its base guidance; itself it stays as it was."""
    stock = modular(sdxl_blocks(), base)
    stock.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    plain, guider, blocks = drawn(stock), stock.guider, [type(block) for block in leaves(stock.blocks)]
    made = with_negative_guidance(stock, DNG)
    assert made.unet is stock.unet
    assert made.guider.guidance_scale == 3.0
    expected, status = usual
    assert_same_run(drawn(made), made.guider.report, expected, status)
    assert stock.guider is guider
    assert [type(block) for block in leaves(stock.blocks)] == blocks
    assert torch.equal(drawn(stock), plain)
    # again: in the place of the first
    again = with_negative_guidance(made, NegativePrompting(prompt=AVOID, scale=0.0))
    torch.testing.assert_close(drawn(again), plain, **ROUNDING)
    assert [type(block) for block in leaves(again.blocks)] == [type(block) for block in leaves(made.blocks)]
    assert isinstance(made.guider.settings, DynamicNegativeGuidance)


def leaves(block):
    return [leaf for part in block.sub_blocks.values() for leaf in leaves(part)] or [block]


def test_blocks_stay_as_they_were():
    """Also those of FLUX, which instances of its blocks share."""
    for kind in (StableDiffusionXLAutoBlocks, FluxAutoBlocks):
        blocks = kind()
        before = [type(block) for block in leaves(blocks)]
        changed = with_negative_guidance(blocks, DNG)
        assert [type(block) for block in leaves(blocks)] == before
        assert [type(block) for block in leaves(kind())] == before
        assert type(changed) is kind
        assert repr(changed)
        assert changed.doc


def test_text_encoder_apart(base, usual):
    """As diffusers' guides split pipelines: what its pipeline gives goes to the other."""
    expected, _ = usual
    blocks = with_negative_guidance(sdxl_blocks(), DNG, guidance_scale=3.0)
    encoder = modular(blocks.sub_blocks.pop("text_encoder"), base)
    pipe = modular(blocks, base)
    fields = encoder(prompt=PROMPT[:1], negative_prompt=["blurred"]).get_by_kwargs("denoiser_input_fields")
    torch.testing.assert_close(drawn(pipe, negative=False, **fields), expected, **ROUNDING)
    del fields["avoided_prompt_embeds"]
    with pytest.raises(ValueError, match="lacks avoided_prompt_embeds"):
        drawn(pipe, negative=False, **fields)


def test_embeddings(base, usual):
    expected, _ = usual
    with torch.no_grad():
        prompt, _, pooled, _ = base.encode_prompt([AVOID], do_classifier_free_guidance=False)
    method = DynamicNegativeGuidance(prompt=Embeddings(prompt, pooled), **LIVELY)
    pipe = modular(with_negative_guidance(sdxl_blocks(), method, guidance_scale=3.0), base)
    torch.testing.assert_close(drawn(pipe), expected, **ROUNDING)


def test_a_control_net():
    """Every branch has the stock blocks' control; two runs, with and without the prompt to avoid."""
    base = sdxl_controlnet().to(torch.float64)
    base.scheduler = scheduler(*DDPM)
    call = {"control_image": picture(9, (56, 72)), "n": 1, "steps": 2, "controlnet_conditioning_scale": 0.5}
    stock = modular(sdxl_blocks(), base)
    stock.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    plain = drawn(stock, **call)
    nothing, something = (with_negative_guidance(stock, NegativePrompting(prompt=AVOID, scale=s)) for s in (0.0, 1.0))
    torch.testing.assert_close(drawn(nothing, **call), plain, **ROUNDING)
    assert (drawn(something, **call) - plain).abs().max() > 1e-3
    # the unconditional branch alone goes without control in guess mode
    controlled = []
    base.controlnet.register_forward_hook(lambda *_: controlled.append(0))
    torch.testing.assert_close(drawn(nothing, guess_mode=True, **call), drawn(stock, guess_mode=True, **call), **ROUNDING)
    assert len(controlled) == 2 * 2 + 2  # of two steps


@pytest.mark.parametrize("cfg", [None, 2.0])
def test_flux(cfg):
    """Its blocks have no guider; they get one."""
    method = DynamicNegativeGuidance(prompt=AVOID, surrogate="ancestral", cfg=cfg, cfg_prompt="blurred", **LIVELY)
    base = double("flux", "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    call = {
        **SIZE["flux"],
        "num_inference_steps": 3,
        "num_images_per_prompt": 2,
        "max_sequence_length": 11,
        "latents": start(base, 2),
    }
    negengine.apply(base, method)
    expected = base(PROMPT, output_type="latent", **call).images
    status = negengine.status(base)[DynamicNegativeGuidance]
    negengine.remove(base)
    pipe = modular(with_negative_guidance(FluxAutoBlocks(), method), base)
    drawn = pipe(prompt=PROMPT, output="latents", **call)
    got = pack(drawn) if drawn.ndim == 4 else drawn  # newer releases of diffusers hand them out unpacked
    assert_same_run(got, pipe.guider.report, expected, status)
    assert torch.equal(with_negative_guidance(pipe, method)(prompt=PROMPT, output="latents", **call), drawn)


@pytest.mark.exhaustive
def test_negtome_on_the_denoiser_of_a_modular_pipeline(base):
    """Which is what `apply` says of it: branches are called one by one, and merged alike."""
    settings = {"timesteps": (500, 1000), "threshold": 0.6, "min_grid": 1}
    expected, status = classic(base, negengine.NegToMe(**settings), {"guidance_scale": 3.0}, prompts=2)
    stock = modular(sdxl_blocks(), base)
    stock.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    plain = drawn(stock, prompts=2)
    with pytest.raises(TypeError, match=r"negengine\.apply\(pipe\.unet, NegToMe\(group_size=\.\.\.\), scheduler=pipe\.scheduler\)"):
        negengine.apply(stock, negengine.NegToMe(**settings))
    negengine.apply(stock.unet, negengine.NegToMe(**settings, group_size=2), scheduler=stock.scheduler)
    torch.testing.assert_close(drawn(stock, prompts=2), expected, **ROUNDING)
    told = negengine.status(stock.unet)[negengine.NegToMe]
    assert (told.merged_tokens, told.active_steps) == (status.merged_tokens, status.active_steps)
    assert (expected - plain).abs().max() > 1e-3
    negengine.remove(stock.unet)
    assert torch.equal(drawn(stock, prompts=2), plain)


# --- the guider --------------------------------------------------------------------------------------------------


def test_config(tmp_path):
    """As other guiders: saved, loaded, made anew with a change."""
    guider = NegativeGuider(DNG, guidance_scale=4.0, stop=0.8)
    guider.save_pretrained(tmp_path)
    loaded = NegativeGuider.from_pretrained(tmp_path)
    assert loaded.settings == DNG
    assert loaded.config == guider.config
    assert guider.new(guidance_scale=2.0).guidance_scale == 2.0
    assert guider.new(guidance_scale=2.0).settings == DNG
    assert "num_conditions: 2" in repr(guider)


def test_a_failed_run_leaves_nothing(base):
    pipe = modular(with_negative_guidance(sdxl_blocks(), DNG, guidance_scale=3.0, stop=0.5), base)
    expected = drawn(pipe)

    def fail(*args):
        if calls.append(0) or len(calls) > 5:
            raise ZeroDivisionError

    calls, heard = [], []
    hook = base.unet.register_forward_hook(fail)
    end = negengine.observe(heard.append)
    try:
        with pytest.raises(ZeroDivisionError):
            drawn(pipe)
    finally:
        hook.remove()
        end()
    assert [report.stage for status in heard for report in status] == ["failed"]
    assert pipe.guider.report.stage == "failed"
    assert "step" not in vars(base.scheduler)
    assert torch.equal(drawn(pipe), expected)


def test_a_run_is_logged(base, caplog):
    pipe = modular(with_negative_guidance(sdxl_blocks(), DynamicNegativeGuidance(prompt=AVOID, scale=0)), base)
    with caplog.at_level(logging.INFO, "negengine"):
        drawn(pipe, n=1, steps=2)
    assert [(r.levelname, "`scale` is 0" in r.message) for r in caplog.records if r.name == "negengine"] == [("WARNING", True)]


def test_a_scheduler_that_adds_more_noise(base, caplog):
    base.scheduler = scheduler("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"})
    pipe = modular(with_negative_guidance(sdxl_blocks(), DNG), base)
    for _ in range(2):
        drawn(pipe, n=1, steps=2)
    assert sum("fixed_small" in record.message for record in caplog.records) == 1


# --- what cannot work --------------------------------------------------------------------------------------------


def test_a_scheduler_without_a_density(base):
    """Refused before the denoiser is called, or before that where the pipeline is there."""
    base.scheduler = scheduler("DDIMScheduler", {"clip_sample": False})
    calls = []
    hook = base.unet.register_forward_hook(lambda *_: calls.append(0))
    try:
        with pytest.raises(ValueError, match=r"DDIMScheduler has no transition density.*surrogate"):
            drawn(modular(with_negative_guidance(sdxl_blocks(), DNG), base))
        with pytest.raises(ValueError, match=r"DDIMScheduler has no transition density.*surrogate"):
            with_negative_guidance(modular(sdxl_blocks(), base), DNG)
        assert not calls
    finally:
        hook.remove()
    surrogate = DynamicNegativeGuidance(prompt=AVOID, surrogate="ancestral", **LIVELY)
    expected, status = classic(base, surrogate, {"guidance_scale": 3.0})
    pipe = with_negative_guidance(modular(sdxl_blocks(), base), surrogate, guidance_scale=3.0)
    assert_same_run(drawn(pipe), pipe.guider.report, expected, status)


class Other(ModularPipelineBlocks):
    model_name = "wan"


def test_unknown_blocks(base):
    with pytest.raises(ValueError, match=r"no text encoder and no denoising loop.*'stable-diffusion-xl', 'flux'"):
        with_negative_guidance(Other(), DNG)
    wan = diffusers.WanBlocks()
    with pytest.raises(ValueError, match=r"model_name 'wan'.*negengine\.apply"):
        with_negative_guidance(wan, DNG)
    with pytest.raises(TypeError, match=r"StableDiffusionXLPipeline; other pipelines take negengine\.apply"):
        with_negative_guidance(base, DNG)


def test_settings_that_cannot_work(base):
    with pytest.raises(TypeError, match="NegToMe"):
        with_negative_guidance(sdxl_blocks(), negengine.NegToMe())
    with pytest.raises(ValueError, match="leave `cfg` out and pass guidance_scale"):
        with_negative_guidance(sdxl_blocks(), DynamicNegativeGuidance(prompt=AVOID, cfg=2.0))
    with pytest.raises(ValueError, match=r"no guidance_scale; DynamicNegativeGuidance\(cfg=\.\.\.\)"):
        with_negative_guidance(FluxAutoBlocks(), DNG, guidance_scale=2.0)
    three = modular(with_negative_guidance(sdxl_blocks(), DynamicNegativeGuidance(prompt=("a", "b", "c"))), base)
    with pytest.raises(ValueError, match="3 prompts to avoid, but this call has 1"):
        drawn(three)


def test_other_guiders(base):
    stock = modular(sdxl_blocks(), base)
    stock.update_components(guider=diffusers.AdaptiveProjectedGuidance())
    with pytest.raises(ValueError, match="guides with AdaptiveProjectedGuidance"):
        with_negative_guidance(stock, DNG)
    assert with_negative_guidance(stock, DNG, guidance_scale=2.0).guider.guidance_scale == 2.0
    # the guider without its blocks, and the blocks without their guider
    stock.update_components(guider=NegativeGuider(DNG))
    with pytest.raises(RuntimeError, match="with_negative_guidance"):
        drawn(stock)
    pipe = modular(with_negative_guidance(sdxl_blocks(), DNG), base)
    pipe.update_components(guider=ClassifierFreeGuidance())
    with pytest.raises(TypeError, match=r"NegativeGuider, but .* ClassifierFreeGuidance"):
        drawn(pipe)
