"""Step caches of diffusers: what they hand back was merged once, and rows that they keep stay in the batch."""

import functools
import itertools

import diffusers
import pytest
import torch
from compare import assert_same
from guards import guarded
from tiny import BUILDERS, draw, picture, watched

import negengine
from negengine.diffusers.caches import InnerListener, answered, cached

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
STEPS = 12


def now(pipe):
    return lambda: 1000 if pipe._current_timestep is None else pipe._current_timestep


def broadcast(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 999),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=now(pipe),
    )


def faster(pipe):
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 999),
        spatial_attention_block_identifiers=("blocks",),
        is_guidance_distilled=True,
        attention_weight_callback=lambda module: 0.3,
        tensor_format="BCHW",
        current_timestep_callback=now(pipe),
    )


def taylor(pipe):
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=3, max_order=1, disable_cache_before_step=3, taylor_factors_dtype=torch.float32
    )


CACHES = {
    "PAB": broadcast,
    "FasterCache": faster,
    "TaylorSeer": taylor,
    "FirstBlockCache": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.4),
    "MagCache": lambda pipe: diffusers.MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, threshold=0.3),
}


def flux(cache=None):
    pipe = BUILDERS["flux"]()
    if cache:
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    return pipe


@pytest.mark.parametrize("cache", CACHES)
def test_as_merged_within_the_attention(cache):
    """What a cache keeps and predicts from is what the attention gave, merged."""
    call = functools.partial(draw, num_inference_steps=STEPS)
    assert not torch.equal(call(flux(cache)), call(flux()))

    def prepare(pipe):  # before both kinds of merging; the test's processors are within the attention all the same
        pipe.transformer.enable_cache(CACHES[cache](pipe))

    assert_same("flux", call, 2, prepare=prepare)


SOME = guarded(((cache,) for cache in CACHES), lambda cache: cache in ("PAB", "TaylorSeer"))


@pytest.mark.parametrize("cache", SOME)
def test_the_same_in_every_run_and_nothing_afterwards(cache):
    call = functools.partial(draw, num_inference_steps=STEPS)
    plain = call(flux(cache))
    pipe = negengine.apply(flux(cache), negengine.NegToMe(**MERGE))
    merged = call(pipe)
    assert torch.equal(call(pipe), merged)
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(call(negengine.remove(pipe)), plain)


@pytest.mark.parametrize("cache", SOME)
def test_switched_on_and_off_after_apply(cache):
    """Some diffusers forget to prepare caches that are switched on after a run, so the first run has it."""
    pipe = negengine.apply(flux(), negengine.NegToMe(**MERGE))
    expected = draw(negengine.apply(flux(cache), negengine.NegToMe(**MERGE)), num_inference_steps=STEPS)
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    assert torch.equal(draw(pipe, num_inference_steps=STEPS), expected)
    pipe.transformer.disable_cache()
    without = draw(negengine.apply(flux(), negengine.NegToMe(**MERGE)), num_inference_steps=STEPS)
    assert not torch.equal(without, expected)
    assert torch.equal(draw(pipe, num_inference_steps=STEPS), without)
    negengine.remove(pipe)
    assert torch.equal(draw(pipe, num_inference_steps=STEPS), draw(flux(), num_inference_steps=STEPS))


def test_taken_off_while_the_cache_stays():
    pipe = flux("PAB")
    plain = draw(pipe, num_inference_steps=STEPS)
    forward = pipe.transformer.single_transformer_blocks[0].attn._diffusers_hook._fn_refs[0].original_forward
    negengine.apply(pipe, negengine.NegToMe(**MERGE))
    draw(pipe, num_inference_steps=STEPS)
    negengine.remove(pipe)
    assert pipe.transformer.single_transformer_blocks[0].attn._diffusers_hook._fn_refs[0].original_forward == forward
    assert torch.equal(draw(pipe, num_inference_steps=STEPS), plain)


WINDOWS = [(0, 1000), (600, 1000), (300, 700)]
# of each cache a window that ends within the run, with one image and with two
PICTURES = guarded(itertools.product(CACHES, (1, 2), WINDOWS), lambda cache, n, window: window == WINDOWS[n])


@pytest.mark.parametrize("cache, n, window", PICTURES)
def test_a_picture_stays_in_the_batch(cache, n, window):
    """Its rows would otherwise meet what the cache kept of a larger batch."""
    pipe = flux(cache)
    reference = negengine.ReferenceImage(picture())
    negengine.apply(pipe, negengine.NegToMe(reference=reference, **MERGE | {"timesteps": window}))
    with watched(pipe.transformer) as calls:
        merged = draw(pipe, prompts=1, n=n, num_inference_steps=STEPS)
    assert {rows for _, rows in calls} == {n + 1}
    report = negengine.status(pipe)[negengine.NegToMe]
    assert 0 < report.active_steps <= STEPS
    assert (report.active_steps == STEPS) == (window == (0, 1000))
    assert torch.isfinite(merged).all()
    negengine.apply(pipe, negengine.NegToMe(reference=reference, **MERGE | {"timesteps": window, "alpha": 0.0}))
    unpushed = draw(pipe, prompts=1, n=n, num_inference_steps=STEPS)
    assert not torch.allclose(merged, unpushed, atol=1e-4)
    if cache not in ("FirstBlockCache", "MagCache"):  # these measure the whole batch, the picture's rows with it
        negengine.remove(pipe)
        torch.testing.assert_close(unpushed, draw(pipe, prompts=1, n=n, num_inference_steps=STEPS), rtol=1e-4, atol=1e-4)


def test_the_second_rows_of_nag_stay():
    pipe = flux("FirstBlockCache")
    negengine.apply(pipe, negengine.NormalizedAttentionGuidance(negative_prompt="the sea", timesteps=(600, 1000)))
    with watched(pipe.transformer) as calls:
        draw(pipe, prompts=1, num_inference_steps=STEPS)
    assert {rows for _, rows in calls} == {4}


def test_without_a_cache_a_picture_leaves_with_its_window():
    pipe = flux()
    negengine.apply(pipe, negengine.NegToMe(reference=negengine.ReferenceImage(picture()), **MERGE | {"timesteps": (600, 1000)}))
    with watched(pipe.transformer) as calls:
        draw(pipe, prompts=1, num_inference_steps=STEPS)
    assert {rows for _, rows in calls} == {2, 3}


def test_what_is_a_cache():
    pipe = flux()
    attention = pipe.transformer.single_transformer_blocks[0].attn
    assert not cached(pipe.transformer)
    assert not answered(attention)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert not cached(pipe.transformer)
    pipe = flux("PAB")
    attention = pipe.transformer.single_transformer_blocks[0].attn
    assert cached(pipe.transformer)
    assert answered(attention)
    assert not answered(pipe.transformer)


def test_a_listener_that_outlives_its_cache_is_silent():
    pipe = flux("PAB")
    attention = pipe.transformer.single_transformer_blocks[0].attn
    heard = []
    listener = InnerListener(attention, lambda module, args, output: heard.append(output.shape))
    pipe.transformer.disable_cache()
    attention.forward(torch.zeros(1, 3, 32), image_rotary_emb=None)
    assert len(heard) == 1
    listener.remove()
    attention.forward(torch.zeros(1, 3, 32), image_rotary_emb=None)
    assert len(heard) == 1


def test_unets_with_attention_handed_back():
    """Sites of UNets are the outputs of attention, and those are what the cache keeps."""

    def prepare(pipe):
        diffusers.apply_pyramid_attention_broadcast(
            pipe.unet,
            diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 999),
                spatial_attention_block_identifiers=("blocks",),
                current_timestep_callback=lambda: 500,
            ),
        )
        assert cached(pipe.unet)

    assert_same("sdxl", functools.partial(draw, num_inference_steps=6), 2, prepare=prepare)
