"""What a pipeline may be called with, and what may happen to the call: as merged within the attention."""

import functools
import threading

import diffusers
import pytest
import torch
from compare import assert_same
from tiny import BUILDERS, PROMPTS, SIZE, denoiser, draw, flux, kind, sdxl, watched

import negengine
from negengine import NegativePrompting, NegToMe, NormalizedAttentionGuidance

REST = pytest.mark.exhaustive
MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
CALL = functools.partial(draw, num_inference_steps=2)
FAMILIES = pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=REST)])


# --- arguments ---------------------------------------------------------------------------------------------------


def arguments_of(pipe):
    arguments = {**SIZE[kind(pipe)], "num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "latent"}
    return arguments | ({"max_sequence_length": 11} if kind(pipe) == "flux" else {})


def with_generators(pipe, seed=2):
    """One for each image."""
    generators = [torch.Generator().manual_seed(100 * seed + i) for i in range(4)]
    return pipe(PROMPTS[:2], generator=generators, **arguments_of(pipe)).images


ARGUMENTS = [
    pytest.param("sdxl", functools.partial(CALL, guidance_rescale=0.7), id="guidance_rescale"),
    pytest.param("sdxl", functools.partial(CALL, clip_skip=0), id="clip_skip", marks=REST),
    pytest.param("sdxl", functools.partial(CALL, original_size=(90, 70), crops_coords_top_left=(3, 4)), id="sizes", marks=REST),
    pytest.param("flux", functools.partial(CALL, sigmas=[1.0, 0.7, 0.2]), id="sigmas"),
    pytest.param("sdxl", functools.partial(CALL, sigmas=[14.0, 3.0, 0.4]), id="sigmas-sdxl", marks=REST),
    pytest.param("flux", functools.partial(CALL, prompt_2=["a", "another and longer one"]), id="second prompts", marks=REST),
    pytest.param("flux", with_generators, id="generators"),
    pytest.param("sdxl", with_generators, id="generators-sdxl", marks=REST),
]


@pytest.mark.parametrize("family, call", ARGUMENTS)
def test_arguments(family, call):
    assert_same(family, call, 2)


@FAMILIES
def test_prompts_of_different_length(family):
    """One is cut, one is a letter; each is grouped with its own images."""
    prompts = ["a " * 40, "b"]

    def call(pipe, seed=2):
        return pipe(prompts, generator=torch.Generator().manual_seed(seed), **arguments_of(pipe)).images

    assert_same(family, call, 2)


@FAMILIES
def test_one_image_of_each_prompt(family):
    """There is nothing that an image could differ from; a picture is all the same."""
    pipe = BUILDERS[family]()
    plain = CALL(pipe, n=1)
    assert torch.equal(CALL(negengine.apply(pipe, NegToMe(**MERGE)), n=1), plain)
    report = negengine.status(pipe)[NegToMe]
    assert report.idle_reason
    negengine.apply(pipe, NegToMe(**MERGE, group_size=2))  # the two prompts' images, one group
    assert torch.equal(CALL(pipe, n=1)[0], plain[0])
    assert not torch.allclose(CALL(pipe, n=1)[1], plain[1], atol=1e-2)


def test_what_is_avoided_is_encoded_with_the_calls_clip_skip():
    """The same text as the call's own then leaves the image as it is."""
    call = functools.partial(CALL, prompts=1, guidance_scale=1.0, clip_skip=0)
    pipe = sdxl()
    plain = call(pipe)
    for method in (NegativePrompting(prompt=PROMPTS[0], scale=2.0), NormalizedAttentionGuidance(negative_prompt=PROMPTS[0])):
        negengine.apply(negengine.remove(pipe), method)
        torch.testing.assert_close(call(pipe), plain, rtol=1e-3, atol=1e-3)


# --- schedulers of few-step models, FreeU ------------------------------------------------------------------------

FEW = {
    "LCM": lambda config: diffusers.LCMScheduler.from_config(config),
    "TCD": lambda config: diffusers.TCDScheduler.from_config(config),
    "Lightning": lambda config: diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing"),
}


@pytest.mark.parametrize("name", ["LCM", pytest.param("TCD", marks=REST), pytest.param("Lightning", marks=REST)])
def test_schedulers_of_few_step_models(name):
    """Two steps without guidance: half of the batch."""

    def prepare(pipe):
        pipe.scheduler = FEW[name](pipe.scheduler.config)

    call = functools.partial(CALL, guidance_scale=0.0, negative_prompt=None)
    status = assert_same("sdxl", call, 2, guided=False, prepare=prepare)
    assert (status.steps, status.active_steps) == (2, 2)


def test_free_u():
    assert_same("sdxl", CALL, 2, prepare=lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4))


# --- what happens to a call --------------------------------------------------------------------------------------


@FAMILIES
def test_an_interrupted_run(family):
    """The steps that were made are merged; the next run is whole."""
    pipe = negengine.apply(BUILDERS[family](), NegToMe(**MERGE))
    whole = CALL(pipe)

    def stop(pipe, i, timestep, tensors):
        pipe._interrupt = True
        return {}

    draw(pipe, num_inference_steps=4, callback_on_step_end=stop)
    report = negengine.status(pipe)[NegToMe]
    assert (report.steps, report.active_steps) == (1, 1)
    assert "goes on" not in str(report)
    assert torch.equal(CALL(pipe), whole)
    assert negengine.status(pipe)[NegToMe].steps == 2


@FAMILIES
def test_guidance_that_a_callback_changes(family):
    """SDXL's pipeline halves its batch, FLUX's goes on: as in a twin."""

    def lower(pipe, i, timestep, tensors):
        pipe._guidance_scale = 1.0
        if family == "flux":
            return {}
        names = ("prompt_embeds", "add_text_embeds", "add_time_ids")
        return {name: tensors[name].chunk(2)[-1] for name in names} if i == 0 else {}

    given = {} if family == "flux" else {"callback_on_step_end_tensor_inputs": ["prompt_embeds", "add_text_embeds", "add_time_ids"]}
    call = functools.partial(draw, num_inference_steps=3, callback_on_step_end=lower, **given)
    plain = call(BUILDERS[family]())
    pipe = negengine.apply(BUILDERS[family](), NegToMe(**MERGE))
    with watched(denoiser(pipe)) as calls:
        merged = call(pipe)
    assert [rows for _, rows in calls] == ([4, 4, 4] if family == "flux" else [8, 4, 4])
    torch.testing.assert_close(merged[::2], plain[::2], rtol=1e-3, atol=1e-3)
    assert (merged[1::2] - plain[1::2]).abs().max() > 1e-2


@FAMILIES
def test_two_threads_with_a_pipeline_each(family):
    """Runs that are interleaved step by step, each with settings of its own."""
    settings = [NegToMe(**MERGE), NegToMe(**MERGE, alpha=-0.4, reference="others")]
    expected = [CALL(negengine.apply(BUILDERS[family](), one)) for one in settings]
    assert not torch.equal(*expected)
    pipes, found, turn = [negengine.apply(BUILDERS[family](), one) for one in settings], {}, threading.Barrier(2, timeout=120)

    def wait(pipe, i, timestep, tensors):
        turn.wait()
        return {}

    def work(number):
        try:
            found[number] = CALL(pipes[number], callback_on_step_end=wait)
        except BaseException as error:
            turn.abort()
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(found[number], expected[number]) for number in range(2)), found


def test_embeddings_of_different_length_without_a_text_encoder():
    """Embeddings that were made elsewhere, on a pipeline that has no text encoder any more."""
    pipe = flux()
    embeds, pooled, _ = pipe.encode_prompt(PROMPTS[:1], num_images_per_prompt=2, max_sequence_length=7)
    call = {
        **SIZE["flux"],
        "num_inference_steps": 2,
        "output_type": "latent",
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
    }
    negengine.apply(pipe, NegToMe(**MERGE, group_size=2))
    merged = pipe(generator=torch.Generator().manual_seed(2), **call).images
    pipe.text_encoder = pipe.text_encoder_2 = pipe.tokenizer = pipe.tokenizer_2 = None
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(2), **call).images, merged)
