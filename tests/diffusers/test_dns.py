"""The negative image against a loop written out in float64, and the chain of image, caption and final image."""

import copy
import inspect
import itertools
import json

import diffusers
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

import negengine
from negengine import png
from negengine.captioners import CaptionCache, CaptionError
from negengine.diffusers.dnp import files
from negengine.methods import DiffusionNegativePrompt

PROMPTS, SEEDS, STEPS, W = ["a cat", "two dogs"], [5, 11], 2, 4.0
CALL = {
    "sd": {"height": 32, "width": 48, "num_inference_steps": STEPS, "guidance_scale": W},
    "sdxl": {"height": 32, "width": 48, "num_inference_steps": STEPS, "guidance_scale": W},
    "flux": {"height": 32, "width": 48, "num_inference_steps": STEPS, "true_cfg_scale": W, "max_sequence_length": 11},
}


def sd(seed=0):
    """A StableDiffusionPipeline of version 1.x, stepped by DDIM."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = tiny._clip_tokenizer()
        without = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
        unet = {name: value for name, value in tiny.UNET.items() if name not in without} | {"cross_attention_dim": tiny.WIDTH}
        return tiny._quiet(  # its text encoder speaks up by itself
            StableDiffusionPipeline(
                vae=tiny._vae(),
                text_encoder=tiny._clip(CLIPTextModel, clip),
                tokenizer=clip,
                unet=UNet2DConditionModel(**unet, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), out_channels=4),
                scheduler=DDIMScheduler(**tiny.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )


def zeroed():
    """An SDXL whose unconditional branch is zeros, as the published one's is."""
    pipe = tiny.sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    return pipe


def encoded():
    pipe = tiny.sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    return pipe


BUILDERS = {"sd": sd, "sdxl, zeros": zeroed, "sdxl, empty text": encoded, "flux": tiny.flux}


def kind(pipe):
    return {"FluxPipeline": "flux", "StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}[type(pipe).__name__]


class Watch:
    """What a pipeline decodes, the noise that its runs begin with, and how often it calls its denoiser."""

    def __init__(self, pipe):
        self.decoded, self.first, self.calls = [], [], 0
        decode = pipe.vae.decode
        pipe.vae.decode = lambda z, *args, **kwargs: (self.decoded.append(z.detach().clone()), decode(z, *args, **kwargs))[1]
        tiny.denoiser(pipe).register_forward_pre_hook(self._called)
        prepare = pipe.prepare_latents

        def prepared(*args, **kwargs):
            result = prepare(*args, **kwargs)
            self.first.append((result[0] if isinstance(result, tuple) else result).clone())
            return result

        pipe.prepare_latents = prepared

    def _called(self, module, args):
        self.calls += 1


def text_states(pipe, prompts):
    """Of the text encoders, read off without the pipeline: ``(states, pooled)``."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=tiny.CLIP_LENGTH, truncation=True, return_tensors="pt").input_ids
    first = pipe.text_encoder(ids, output_hidden_states=True)
    if kind(pipe) == "sd":
        return first[0], None
    if kind(pipe) == "flux":
        t5 = pipe.tokenizer_2(prompts, padding="max_length", max_length=11, truncation=True, return_tensors="pt").input_ids
        return pipe.text_encoder_2(t5)[0], first.pooler_output
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def noise(pipe, seeds):
    shape = (1, 4, 4, 6)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).double()


@torch.no_grad()
def literal(pipe, prompts, seeds, w, swapped=True):
    """The latents at the end of ``e = e_p + w (e_null - e_p)`` (or the usual guidance), in float64."""
    model = copy.deepcopy(tiny.denoiser(pipe)).double()
    p, null = text_states(pipe, prompts), text_states(pipe, [""] * len(prompts))
    if pipe.config.get("force_zeros_for_empty_prompt"):
        null = tuple(torch.zeros_like(part) for part in p)
    start, end = (p, null) if swapped else (null, p)
    scheduler = copy.deepcopy(pipe.scheduler)
    return LOOPS[kind(pipe)](model, scheduler, start, end, w, prompts, seeds, pipe)


def ddim_loop(model, scheduler, start, end, w, prompts, seeds, pipe):
    x = noise(pipe, seeds)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    for t in [1 + i * (1000 // STEPS) for i in reversed(range(STEPS))]:
        a, b = (model(x, t, encoder_hidden_states=states.double()).sample for states, _ in (start, end))
        e = a + w * (b - a)
        before = abar[max(t - 1000 // STEPS, 0)]
        x = before.sqrt() * (x - (1 - abar[t]).sqrt() * e) / abar[t].sqrt() + (1 - before).sqrt() * e
    return x / pipe.vae.config.scaling_factor


def euler_loop(model, scheduler, start, end, w, prompts, seeds, pipe):
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    ids = torch.tensor([[32.0, 48.0, 0.0, 0.0, 32.0, 48.0]] * len(prompts)).double()
    x = noise(pipe, seeds) * sigmas.max()
    for t, sigma, after in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        seen = x / (sigma**2 + 1).sqrt()
        a, b = (
            model(
                seen, t, encoder_hidden_states=states.double(), added_cond_kwargs={"text_embeds": pooled.double(), "time_ids": ids}
            ).sample
            for states, pooled in (start, end)
        )
        x = x + (after - sigma) * (a + w * (b - a))
    return x / pipe.vae.config.scaling_factor


def flow_loop(model, scheduler, start, end, w, prompts, seeds, pipe):
    n, (h, width) = len(prompts), (4, 6)
    x = noise(pipe, seeds).view(n, 4, h // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, 6, 16)
    places = torch.tensor([[0, r, c] for r in range(h // 2) for c in range(width // 2)]).double()
    sigmas = torch.cat([pipe.scheduler.sigmas[:-1].double(), torch.zeros(1).double()])  # of the run before
    for sigma, after in itertools.pairwise(sigmas):
        a, b = (
            model(
                hidden_states=x,
                timestep=sigma.expand(n),
                guidance=torch.full((n,), 3.5).double(),
                encoder_hidden_states=states.double(),
                pooled_projections=pooled.double(),
                txt_ids=torch.zeros(11, 3).double(),
                img_ids=places,
            ).sample
            for states, pooled in (start, end)
        )
        x = x + (after - sigma) * (a + w * (b - a))
    x = x.view(n, h // 2, width // 2, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, 4, h, width)
    return x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor


LOOPS = {"sd": ddim_loop, "sdxl": euler_loop, "flux": flow_loop}


def distance(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_negative_image_is_that_of_the_literal_loop(builder):
    pipe = BUILDERS[builder]()
    watch = Watch(pipe)
    call = {**CALL[kind(pipe)], **({"guidance_scale": 3.5} if kind(pipe) == "flux" else {})}
    images = negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **call)
    (got,) = watch.decoded
    assert [image.size for image in images] == [(48, 32)] * 2
    assert distance(got, literal(pipe, PROMPTS, SEEDS, W)) < 2e-5
    assert distance(got, literal(pipe, PROMPTS, SEEDS, W, swapped=False)) > 1e-3  # the comparison can tell
    assert distance(got, literal(pipe, PROMPTS, SEEDS, W + 0.1)) > 2e-4


@pytest.mark.parametrize("builder", ["sd", "flux"])
def test_steps_and_guidance_stand_in_for_those_of_the_call(builder):
    pipe = BUILDERS[builder]()
    call = CALL[kind(pipe)]
    expected = negengine.diffusion_negative_image(pipe, "a cat", seed=5, **call)
    scale = "true_cfg_scale" if kind(pipe) == "flux" else "guidance_scale"
    got = negengine.diffusion_negative_image(
        pipe, "a cat", seed=5, steps=STEPS, guidance=W, **{**call, "num_inference_steps": 9, scale: 1.0}
    )
    assert [image.tobytes() for image in got] == [image.tobytes() for image in expected]


def test_the_null_branch_is_what_the_call_makes_it():
    """An SDXL that is given an empty negative prompt has its encoding, not zeros, for its unconditional branch."""
    zeros, empty = Watch(pipe := zeroed()), Watch(twin := encoded())
    negengine.diffusion_negative_image(pipe, "a cat", seed=5, negative_prompt="", **CALL["sdxl"])
    negengine.diffusion_negative_image(twin, "a cat", seed=5, **CALL["sdxl"])
    negengine.diffusion_negative_image(pipe, "a cat", seed=5, **CALL["sdxl"])
    assert torch.equal(zeros.decoded[0], empty.decoded[0])
    assert not torch.equal(zeros.decoded[0], zeros.decoded[1])


def test_every_argument_of_the_text_encoders_reaches_them():
    """``prompt_2`` and ``clip_skip`` as the pipeline itself would have used them: at scale w the branches tell which is which."""
    pipe = zeroed()
    watch = Watch(pipe)
    further = {"prompt_2": "the sea", "clip_skip": 0}
    negengine.diffusion_negative_image(pipe, "a cat", seed=5, **further, **CALL["sdxl"])
    swap = pipe.encode_prompt

    def swapped(**kwargs):
        e, n, pooled, none = swap(**kwargs)
        return n, e, none, pooled

    pipe.encode_prompt = swapped
    pipe("a cat", generator=[torch.Generator().manual_seed(5)], **further, **CALL["sdxl"])
    assert torch.equal(watch.decoded[0], watch.decoded[1])


def words(image):
    """Captions that hang on the picture, so that a wrong picture has a wrong caption."""
    return f"picture {sum(image.tobytes()) % 1000}"


class Counted:
    identity = "counted"

    def __init__(self, answers=words):
        self.answers, self.seen = answers, []

    def __call__(self, image):
        self.seen.append(image)
        return self.answers(image) if callable(self.answers) else self.answers[len(self.seen) - 1]


def prompting(pipe, prompts=PROMPTS, captioner=words, seed=SEEDS, keep_own=True, **arguments):
    settings = DiffusionNegativePrompt(captioner=captioner, keep_own=keep_own)
    return negengine.diffusion_negative_prompting(pipe, prompts, settings, seed=seed, **CALL[kind(pipe)], **arguments)


@pytest.mark.parametrize("builder", ["sdxl, zeros", "flux"])
def test_the_chain_is_its_parts(builder):
    pipe = BUILDERS[builder]()
    watch = Watch(pipe)
    records = prompting(pipe)
    assert torch.equal(watch.first[0], watch.first[1])  # the same noise in both runs
    pictures = negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL[kind(pipe)])
    captions = [words(picture) for picture in pictures]
    assert [record.negative_image.tobytes() for record in records] == [picture.tobytes() for picture in pictures]
    assert [record.caption for record in records] == captions == [record.negative_prompt for record in records]
    finals = pipe(
        PROMPTS, negative_prompt=captions, generator=[torch.Generator().manual_seed(s) for s in SEEDS], **CALL[kind(pipe)]
    )
    assert [record.images[0].tobytes() for record in records] == [image.tobytes() for image in finals.images]
    assert [(record.prompt, record.seed) for record in records] == list(zip(PROMPTS, SEEDS, strict=True))


@pytest.mark.parametrize(
    "own, keep_own, expected",
    [
        ("dull", True, ["dull, sea", "dull, sea"]),
        (["dull", ""], True, ["dull, sea", "sea"]),
        ("dull", False, ["sea", "sea"]),
        (None, True, ["sea", "sea"]),
    ],
)
def test_the_users_own_negative_prompt_stands_beside_the_caption(own, keep_own, expected):
    pipe = zeroed()
    watch = Watch(pipe)
    records = prompting(pipe, captioner=lambda image: " sea\n", keep_own=keep_own, negative_prompt=own)
    assert [record.negative_prompt for record in records] == expected
    negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sdxl"])
    assert torch.equal(watch.decoded[0], watch.decoded[2])  # and not in the negative image
    pipe(PROMPTS, negative_prompt=expected, generator=[torch.Generator().manual_seed(s) for s in SEEDS], **CALL["sdxl"])
    assert torch.equal(watch.decoded[1], watch.decoded[3])


def test_several_images_of_a_prompt_have_seeds_that_count_on():
    pipe = sd()
    records = prompting(pipe, num_images_per_prompt=2)
    assert [len(record.images) for record in records] == [2, 2]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 11, 12)]
    captions = [record.caption for record in records]
    images = pipe(PROMPTS, negative_prompt=captions, num_images_per_prompt=2, generator=generators, **CALL["sd"]).images
    assert [image.tobytes() for record in records for image in record.images] == [image.tobytes() for image in images]


def test_methods_act_in_the_final_run_only_and_are_there_afterwards():
    pipe = zeroed()
    call = {**CALL["sdxl"], "height": 64, "width": 64}
    method = negengine.NegToMe(alpha=0.9, threshold=-1, timesteps=(0, 1000), blocks=("*",), min_grid=1, group_size=2)
    plain = negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **call)
    settings = DiffusionNegativePrompt(captioner=lambda image: "sea")
    bare = negengine.diffusion_negative_prompting(pipe, PROMPTS, settings, seed=SEEDS, **call)
    negengine.apply(pipe, method)
    hooks = dict(pipe.unet._forward_pre_hooks)
    with_method = negengine.diffusion_negative_prompting(pipe, PROMPTS, settings, seed=SEEDS, **call)
    for record, other, picture in zip(with_method, bare, plain, strict=True):
        assert record.negative_image.tobytes() == picture.tobytes() == other.negative_image.tobytes()
    assert with_method[0].images[0].tobytes() == bare[0].images[0].tobytes()  # the reference of the others
    assert with_method[1].images[0].tobytes() != bare[1].images[0].tobytes()
    report = negengine.status(pipe)[negengine.NegToMe]
    before = str(report)
    negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **call)
    assert str(negengine.status(pipe)[negengine.NegToMe]) == before  # not a run of the method
    assert dict(pipe.unet._forward_pre_hooks) == hooks  # compiled code would have to be compiled anew
    negengine.remove(pipe)
    for name in ("encode_prompt", "prepare_latents", "check_inputs", "maybe_free_model_hooks"):
        assert name not in vars(pipe)
    assert "step" not in vars(pipe.scheduler)


def test_methods_are_there_again_after_an_error():
    pipe = sd()
    negengine.apply(pipe, negengine.NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1, group_size=2))
    with pytest.raises(ValueError, match="divisible by 8"):
        negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sd"] | {"height": 33})
    pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **CALL["sd"])
    assert negengine.status(pipe)[negengine.NegToMe].merged_tokens


@torch.no_grad()
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_method_on_the_bare_denoiser_is_not_lost(scheduled):
    pipe = sd()
    scheduler = copy.deepcopy(pipe.scheduler) if scheduled else None
    method = negengine.NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1, group_size=2)
    negengine.apply(pipe.unet, method, scheduler=scheduler)
    watch = Watch(pipe)
    negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sd"])
    if scheduled:
        scheduler.set_timesteps(3)  # heard again
    x, states = torch.randn(2, 4, 4, 6), torch.randn(2, 16, 32)
    merged = pipe.unet(x, 3, encoder_hidden_states=states).sample
    negengine.remove(pipe.unet)
    assert not torch.equal(merged, pipe.unet(x, 3, encoder_hidden_states=states).sample)
    negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sd"])
    assert torch.equal(*watch.decoded)


# --- captions that are kept, and captioners that fail ---------------------------------------------------------------


def test_what_is_kept_is_neither_drawn_nor_captioned_again(tmp_path):
    pipe = sd()
    cache = CaptionCache(tmp_path, model="tiny")
    captioner = Counted()
    first = prompting(pipe, captioner=captioner, cache=cache)
    watch = Watch(pipe)
    again = prompting(pipe, captioner=captioner, cache=cache)
    assert len(captioner.seen) == 2
    assert watch.calls == STEPS  # the final run alone
    for a, b in zip(first, again, strict=True):
        assert (a.caption, a.negative_image.tobytes(), a.images[0].tobytes()) == (
            b.caption,
            b.negative_image.tobytes(),
            b.images[0].tobytes(),
        )
    more = prompting(pipe, ["the sea", PROMPTS[1]], captioner, [5, 11], cache=cache)  # one is new
    assert len(captioner.seen) == 3
    assert more[1].caption == first[1].caption
    assert png.read(next(tmp_path.glob("*.png")))["dnp"]["captioner"] == "counted"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": [6, 12]},
        {"prompts": ["a dog", "a tree"]},
        {"guidance": 5.0},
        {"steps": 4},
        {"height": 64},
        {"eta": 0.5},
        {"model": "another"},
        {"captioner": "another"},
        {"scheduler": True},
        {"dtype": torch.bfloat16},
        {"negative_prompt": ""},
    ],
)
def test_a_caption_is_asked_anew_when_its_picture_could_be_another(tmp_path, change):
    pipe = sd()
    captioner = Counted()
    prompting(pipe, captioner=captioner, cache=CaptionCache(tmp_path, model="tiny"))
    assert len(captioner.seen) == 2
    given = {"prompts": PROMPTS, "seed": SEEDS, "model": "tiny", **change}
    if change.get("captioner"):
        captioner.identity = given.pop("captioner")
    pipe.to(dtype=given.pop("dtype", torch.float32))
    if given.pop("scheduler", False):
        pipe.scheduler = diffusers.EulerDiscreteScheduler(**tiny.BETAS)
    settings = DiffusionNegativePrompt(captioner=captioner, guidance=given.pop("guidance", None), steps=given.pop("steps", None))
    cache = CaptionCache(tmp_path, model=given.pop("model"))
    negengine.diffusion_negative_prompting(
        pipe, given.pop("prompts"), settings, seed=given.pop("seed"), cache=cache, **CALL["sd"] | given
    )
    assert len(captioner.seen) == 4


def test_without_names_nothing_is_kept_and_nothing_drawn(tmp_path):
    pipe = sd()
    watch = Watch(pipe)
    with pytest.raises(ValueError, match="name its model"):
        prompting(pipe, cache=CaptionCache(tmp_path))
    with pytest.raises(ValueError, match="an attribute `identity`"):
        prompting(pipe, captioner=lambda image: "a", cache=CaptionCache(tmp_path, model="tiny"))
    assert not watch.calls


def broken(image):
    raise OSError("the line is down")


@pytest.mark.parametrize(
    "answers, reason, cause",
    [
        (["a house", ""], "returned an empty text", ValueError),
        (["a house", None], "returned NoneType, not a text", ValueError),
        (["a house"], "list index out of range", IndexError),
        (["a house", KeyboardInterrupt], None, None),
    ],
)
def test_a_failed_caption_keeps_prompt_seed_picture_and_what_was_captioned(tmp_path, answers, reason, cause):
    pipe = sd()
    cache = CaptionCache(tmp_path / "captions", model="tiny")
    expected = negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sd"])
    captioner = Counted(answers)
    if reason is None:  # a person who gives up is no failed caption
        captioner.answers = lambda image: (_ for _ in ()).throw(KeyboardInterrupt) if len(captioner.seen) > 1 else "a house"
        with pytest.raises(KeyboardInterrupt):
            prompting(pipe, captioner=captioner, cache=cache, output=tmp_path)
    else:
        with pytest.raises(CaptionError, match=reason) as caught:
            prompting(pipe, captioner=captioner, cache=cache, output=tmp_path)
        error = caught.value
        assert isinstance(error.__cause__, cause)
        assert (error.prompt, error.seed) == ("two dogs", 11)
        assert "'two dogs', seed 11" in str(error)
        assert str(error.path) in str(error)
        assert error.image.tobytes() == expected[1].tobytes() == Image.open(error.path).tobytes()
        assert (png.read(error.path)["prompt"], png.read(error.path)["seed"]) == ("two dogs", 11)
        with pytest.raises(CaptionError) as again:
            prompting(pipe, PROMPTS[1:], Counted([""]), SEEDS[1:], output=tmp_path)
        assert again.value.path.exists()
        assert again.value.path != error.path  # nothing is overwritten
    captioner.answers, captioner.seen = words, []
    assert prompting(pipe, captioner=captioner, cache=cache)[0].caption == "a house"
    assert len(captioner.seen) == 1


def test_a_failed_caption_without_a_folder_keeps_the_picture():
    with pytest.raises(CaptionError, match=r"the line is down; it is this error's \.image") as caught:
        prompting(sd(), captioner=broken)
    assert caught.value.path is None
    assert caught.value.image.size == (48, 32)


def test_a_folder_that_cannot_be_written_to_costs_no_picture(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CaptionError, match="the line is down, and its picture could not be written") as caught:
        prompting(sd(), captioner=broken, output=tmp_path / "file")
    assert caught.value.image.size == (48, 32)


def test_files_carry_the_settings_and_are_never_overwritten(tmp_path):
    (record,) = prompting(sd(), "a cat", seed=5, negative_prompt="dull", num_images_per_prompt=2)
    paths = record.save(tmp_path, 3)
    assert [path.name for path in paths] == ["03-a-cat-seed5-negative.png", "03-a-cat-seed5-00.png", "03-a-cat-seed5-01.png"]
    assert paths == record.files(tmp_path, 3) == files(tmp_path, 3, "a cat", 5, 2)
    for path, image in zip(paths, (record.negative_image, *record.images), strict=True):
        assert Image.open(path).tobytes() == image.tobytes()
    told = [png.read(path) for path in paths]
    assert [t["role"] for t in told] == ["negative image", "image", "image"]
    assert [t["seed"] for t in told] == [5, 5, 6]
    assert told[0]["caption"] == record.caption
    assert told[1]["negative_prompt"] == f"dull, {record.caption}"
    assert told[1]["dnp"] == {"steps": STEPS, "guidance": W, "keep_own": True, "captioner": f"{__name__}.words"}
    assert json.dumps(told[1]["call"]) == json.dumps(CALL["sd"])
    with pytest.raises(FileExistsError):
        record.save(tmp_path, 3)


# --- what cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "builder, arguments, message",
    [
        ("flux", {"true_cfg_scale": 1.0}, r"at true_cfg_scale 1 FluxPipeline draws without a negative branch.*twice as long.*NAG"),
        ("flux", {"true_cfg_scale": None}, "at true_cfg_scale 1 "),
        ("sdxl, zeros", {"guidance_scale": 0.5}, r"at guidance_scale 0\.5 .*Give guidance_scale above 1"),
        ("sd", {"guidance": 1.0}, "at guidance_scale 1 "),
        ("sd", {"guidance": -2.0}, "guidance"),
        ("sd", {"generator": torch.Generator()}, "generator is decided here: give `seed`"),
        ("sd", {"output_type": "latent"}, "output_type is decided here"),
        ("sd", {"ip_adapter_image": Image.new("RGB", (8, 8))}, "speaks to one branch"),
        ("sdxl, zeros", {"negative_original_size": (8, 8), "negative_target_size": (8, 8)}, "speaks to one branch"),
        ("sdxl, zeros", {"negative_prompt_2": "dull"}, "every text encoder reads the caption"),
        ("sdxl, zeros", {"prompt_2": ["a", "b"]}, "make a call for each prompt"),
        ("sd", {"seed": [1]}, "1 seeds for 2 prompts"),
        ("sd", {"negative_prompt": ["a"]}, "1 negative prompts for 2 prompts"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(builder, arguments, message):
    pipe = BUILDERS[builder]()
    watch = Watch(pipe)
    call = {"seed": SEEDS, **CALL[kind(pipe)], **arguments}
    with pytest.raises(ValueError, match=message):
        negengine.diffusion_negative_image(pipe, PROMPTS, **call)
    settings = DiffusionNegativePrompt(captioner=words)
    if "guidance" not in arguments:
        with pytest.raises(ValueError, match=message):
            negengine.diffusion_negative_prompting(pipe, PROMPTS, settings, **call)
    assert not watch.calls


def test_a_final_run_that_has_no_negative_branch_is_refused_too():
    pipe = sd()
    watch = Watch(pipe)
    settings = DiffusionNegativePrompt(captioner=words, guidance=7.5)
    with pytest.raises(ValueError, match="at guidance_scale 1 "):
        negengine.diffusion_negative_prompting(pipe, PROMPTS, settings, seed=0, **CALL["sd"] | {"guidance_scale": 1.0})
    assert not watch.calls


def test_a_unet_with_guidance_built_in_is_refused():
    pipe = sd()
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="has its guidance built in"):
        negengine.diffusion_negative_image(pipe, "a cat", seed=0, **CALL["sd"])


@pytest.mark.parametrize(
    "arguments", [{"prompt": []}, {"prompt": 3}, {"seed": "0"}, {"seed": -1}, {"negative_prompt": [1, 2]}, {"hight": 64}]
)
def test_arguments_of_a_wrong_kind_are_refused(arguments):
    call = {"prompt": PROMPTS, "seed": SEEDS, **CALL["sd"], **arguments}
    with pytest.raises(TypeError):
        negengine.diffusion_negative_image(sd(), call.pop("prompt"), **call)


def test_a_negative_prompt_or_several_images_have_no_place_in_a_negative_image():
    pipe = sd()
    with pytest.raises(ValueError, match="'dull' has no place here"):
        negengine.diffusion_negative_image(pipe, "a cat", seed=0, negative_prompt="dull", **CALL["sd"])
    with pytest.raises(ValueError, match="a seed has one negative image"):
        negengine.diffusion_negative_image(pipe, "a cat", seed=0, num_images_per_prompt=2, **CALL["sd"])
    with pytest.raises(TypeError, match="must be a DiffusionNegativePrompt, got NegToMe"):
        negengine.diffusion_negative_prompting(pipe, "a cat", negengine.NegToMe(), seed=0)


def test_a_blacked_out_image_is_told():
    pipe = sd()
    call = type(pipe).__call__

    class Checked(StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            found = call(self, *args, **kwargs)
            found.nsfw_content_detected = [False, True]
            return found

    Checked.__call__.__signature__ = inspect.signature(call)
    pipe.__class__ = Checked
    with pytest.raises(RuntimeError, match="blacked out the negative image of 'two dogs', seed 11"):
        negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sd"])
