"""Captions of negative images that are kept, captioners that fail, files, and what is refused before the first step."""

import inspect
import json

import diffusers
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_dns import BUILDERS, CALL, PROMPTS, SEEDS, STEPS, Counted, W, Watch, kind, prompting, sd, words

import negengine
from negengine import png
from negengine.captioners import CaptionCache, CaptionError
from negengine.diffusers.dnp import files
from negengine.methods import DiffusionNegativePrompt

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
    assert told[1]["dnp"] == {"steps": STEPS, "guidance": W, "keep_own": True, "captioner": f"{words.__module__}.words"}
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
