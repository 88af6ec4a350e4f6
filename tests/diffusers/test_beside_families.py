"""The features that people use beside methods, on every family beyond FLUX.1 and SDXL."""

import copy
import functools
import threading

import accelerate
import diffusers
import pytest
import tiny
import tiny_more
import tiny_z_image
import torch
from compare import assert_same
from guards import guarded
from peft import LoraConfig
from tiny import denoiser, kind, picture

import negengine
from negengine import NegToMe, ReferenceImage

MERGE = NegToMe(timesteps=(0, 1000), threshold=-1, min_grid=1)
BUILDERS = tiny_more.BUILDERS | tiny_z_image.OWN
FAMILIES = ["sd", "z_image", *tiny_more.FAMILIES]


CACHING = ["qwen", "chroma", "flux2"]  # whose denoisers have `enable_cache`


def every(*guards, of=FAMILIES):
    """A test of every family; those that are not among ``guards`` wait for `make test-rest`."""
    return pytest.mark.parametrize("family", guarded(((family,) for family in of), lambda family: family in guards))


def draw(pipe, prompts=2, n=2, seed=2, **given):
    if kind(pipe) == "z_image":
        return tiny_z_image.draw(pipe, prompts, n, seed, **given)
    if kind(pipe) == "sd":
        return tiny.draw(pipe, prompts, n, seed, **given)
    return tiny_more.draw(pipe, prompts, n, seed, **given)


CALL = functools.partial(draw, num_inference_steps=2)


def with_lora(pipe, name="one", seed=11):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        denoiser(pipe).add_adapter(config, adapter_name=name)


@every("qwen", "z_image")
def test_lora(family):
    """As merged within the attention of a twin that has it; and in either order."""
    plain = CALL(BUILDERS[family]())
    assert_same(family, CALL, 2, prepare=with_lora)
    early, late = BUILDERS[family](), negengine.apply(BUILDERS[family](), MERGE)
    with_lora(early)
    with_lora(late)
    merged = CALL(negengine.apply(early, MERGE))
    assert torch.equal(CALL(late), merged)
    denoiser(late).delete_adapters("one")
    without = CALL(late)
    assert torch.equal(without[::2], plain[::2])
    assert not torch.equal(without, merged)
    assert torch.equal(CALL(negengine.remove(late)), plain)


@every("flux2", of=CACHING)
def test_step_caches(family):
    """The attention is handed back in every third step: as merged within it."""

    def prepare(pipe):
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("blocks", "layers"),
            current_timestep_callback=lambda: 500,
        )
        denoiser(pipe).enable_cache(config)

    cached = BUILDERS[family]()
    prepare(cached)
    call = functools.partial(draw, num_inference_steps=4)
    assert not torch.equal(call(cached), call(BUILDERS[family]()))
    assert_same(family, call, 2, prepare=prepare)


@pytest.mark.parametrize("way", ["model", "sequential"])
@every("chroma", "flux2")
def test_offload(family, way):
    """A picture is encoded by the VAE, wherever this is then."""
    method = NegToMe(timesteps=(0, 1000), threshold=-1, min_grid=1, reference=ReferenceImage(picture()))
    expected = CALL(negengine.apply(BUILDERS[family](), method))
    pipe = negengine.apply(BUILDERS[family](), method)
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        accelerate.cpu_offload(denoiser(pipe), torch.device("cpu"))
        accelerate.cpu_offload(pipe.vae, torch.device("cpu"))
    assert torch.equal(CALL(pipe), expected)
    assert torch.equal(CALL(negengine.remove(pipe)), CALL(BUILDERS[family]()))


@every(*FAMILIES)
def test_copies(family):
    """As servers make one for each request: the copy has no method, and none of the original's."""
    base = BUILDERS[family]()
    plain = CALL(base)
    merged = CALL(negengine.apply(base, MERGE))
    twin = copy.copy(base)
    twin.scheduler = copy.deepcopy(base.scheduler)
    assert torch.equal(CALL(twin), plain)
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(twin)
    assert torch.equal(CALL(base), merged)
    assert not torch.equal(merged, plain)


@every("qwen", "z_image")
def test_threads(family):
    """Runs that are interleaved step by step, each with settings of its own."""
    settings = [MERGE, NegToMe(timesteps=(0, 1000), threshold=-1, min_grid=1, alpha=-0.4, reference="others")]
    pipes = [negengine.apply(BUILDERS[family](), one) for one in settings]
    expected, found, turn = [CALL(pipe) for pipe in pipes], {}, threading.Barrier(2, timeout=120)
    assert not torch.equal(*expected)

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
