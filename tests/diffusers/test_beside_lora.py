"""LoRA as people use it: several adapters, scaled, switched, hot-swapped, fused, taken off, loaded before and after."""

import functools
import itertools

import pytest
import torch
import transformers
from compare import assert_same, hooked, literal
from guards import guarded
from peft import LoraConfig, get_peft_model_state_dict
from tiny import BUILDERS, denoiser, draw

import negengine

WINDOW = {"timesteps": (0, 1000)}
CALL = functools.partial(draw, num_inference_steps=2)


def add(pipe, name, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        denoiser(pipe).add_adapter(config, adapter_name=name)


def two(pipe):
    add(pipe, "one", 11), add(pipe, "two", 12)
    pipe.set_adapters(["one", "two"], [0.7, 0.4])


def fused(pipe):
    two(pipe)
    pipe.fuse_lora(components=[denoiser_name(pipe)], lora_scale=0.8)


def unfused(pipe):
    fused(pipe)
    pipe.unfuse_lora(components=[denoiser_name(pipe)])


def fused_and_unloaded(pipe):
    """What is left is a plain layer with other weights."""
    fused(pipe)
    pipe.unload_lora_weights()


def switched(pipe):
    two(pipe)
    pipe.set_adapters("two", 0.5)


def disabled(pipe):
    """The layers stay, but add nothing."""
    two(pipe)
    pipe.disable_lora()


def deleted(pipe):
    two(pipe)
    pipe.delete_adapters("one")


def denoiser_name(pipe):
    return "transformer" if hasattr(pipe, "transformer") else "unet"


def weights(pipe_of, seed):
    """A LoRA as it is loaded from a file."""
    other = BUILDERS[pipe_of]()
    add(other, "default", seed)
    state = get_peft_model_state_dict(denoiser(other))
    return {f"{denoiser_name(other)}.{key}": value.clone() for key, value in state.items()}


WAYS = {way.__name__: way for way in (two, fused, unfused, fused_and_unloaded, switched, disabled, deleted)}
# of each kind of change one guards every commit
EVERY = list(itertools.product(WAYS, ("flux", "sdxl")))
BEFORE = guarded(EVERY, lambda way, family: family == "flux" and way in ("two", "fused_and_unloaded"))
AFTER = guarded(EVERY, lambda way, family: family == "flux" and way in ("switched", "fused"))


@pytest.mark.parametrize("way, family", BEFORE)
def test_before(way, family):
    assert_same(family, CALL, 2, prepare=WAYS[way], **WINDOW)


@pytest.mark.parametrize("way, family", AFTER)
def test_after_a_run(way, family):
    """Each way changes the modules that are listened to, or their weights: as if it had been there first."""
    early, late = BUILDERS[family](), BUILDERS[family]()
    WAYS[way](early)
    expected, _ = hooked(early, CALL, **WINDOW)
    without, _ = hooked(late, CALL, **WINDOW)
    WAYS[way](late)
    assert torch.equal(CALL(late), expected)
    assert torch.equal(expected, without) == (way == "disabled")
    negengine.remove(late)
    plain = BUILDERS[family]()
    WAYS[way](plain)
    assert torch.equal(CALL(late), CALL(plain))


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive)])
def test_the_scale_of_a_call(family):
    """As an argument of the call, which diffusers takes out of the denoiser's inputs."""
    name = "joint_attention_kwargs" if family == "flux" else "cross_attention_kwargs"
    call = functools.partial(CALL, **{name: {"scale": 0.3}})
    assert_same(family, call, 2, prepare=functools.partial(add, name="one", seed=11), **WINDOW)


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive)])
def test_hot_swapped(family):
    """The weights of another LoRA are copied into the layers of the first; nothing is listened to anew."""
    twin, pipe = BUILDERS[family](), BUILDERS[family]()
    twin.load_lora_weights(weights(family, 12), adapter_name="style")
    expected, seed = literal(twin, CALL, 2, **WINDOW)
    pipe.load_lora_weights(weights(family, 11), adapter_name="style")
    call = functools.partial(CALL, seed=seed)
    first, _ = hooked(pipe, call, **WINDOW)
    assert not torch.equal(first, expected)
    pipe.load_lora_weights(weights(family, 12), adapter_name="style", hotswap=True)
    assert torch.equal(call(pipe), expected)
    pipe.unload_lora_weights()
    negengine.remove(pipe)
    assert torch.equal(call(pipe), call(BUILDERS[family]()))


def test_the_text_encoders_lora_changes_what_is_avoided():
    """Prompts of a method's own are encoded as the call's own are, with the same scale."""

    def avoided(scale):
        pipe = BUILDERS["sdxl"]()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            try:
                pipe.text_encoder.add_adapter(config), pipe.text_encoder_2.add_adapter(config)
            except ValueError as error:  # each transformers asks for a PEFT of its time
                if "version of PEFT" not in str(error):
                    raise
                pytest.skip(f"transformers {transformers.__version__}: {error}")
        negengine.apply(pipe, negengine.NegativePrompting(prompt="the sea", scale=2.0))
        own = {"prompt_embeds": torch.ones(1, 16, 64), "pooled_prompt_embeds": torch.ones(1, 32)}
        size = {"height": 72, "width": 56, "num_inference_steps": 1, "output_type": "latent", "guidance_scale": 1.0}
        generator = torch.Generator().manual_seed(2)
        return pipe(**own, **size, generator=generator, cross_attention_kwargs={"scale": scale}).images

    assert not torch.allclose(avoided(1.0), avoided(0.0), rtol=1e-3, atol=1e-3)
