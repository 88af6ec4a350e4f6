"""On FLUX the plug-in gives, bit for bit, what the published placement inside attention processors gives."""

import functools

import pytest
import torch
from compare import assert_same, hooked, literal
from tiny import NEGATIVES, SIZE, denoiser, draw, flux

import negengine

MODES = [("paper", "first"), ("paper", "others"), ("paper", "previous"), ("release", "first")]


@pytest.mark.parametrize("matching,reference", MODES)
def test_three_prompts_of_three_images(matching, reference):
    call = functools.partial(draw, prompts=3, n=3)
    status = assert_same("flux", call, 3, matching=matching, reference=reference)
    assert status.group_size == 3


@pytest.mark.parametrize("matching", ["paper", "release"])
def test_true_guidance_with_negative_prompts(matching):
    call = functools.partial(draw, prompts=2, n=3, true_cfg_scale=2.5, negative_prompt=NEGATIVES[:2])
    assert_same("flux", call, 3, matching=matching)


@pytest.mark.parametrize("length", [5, 16, 31])
def test_text_token_count_is_read_from_the_call(length):
    assert_same("flux", functools.partial(draw, n=2, max_sequence_length=length), 2)


def test_text_token_count_may_change_between_runs():
    pipe, fresh = flux(), flux()
    hooked(pipe, functools.partial(draw, max_sequence_length=20), timesteps=(0, 1000))
    expected, _ = hooked(fresh, draw, timesteps=(0, 1000))
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("height,width", [(48, 144), (112, 80), (80, 80)])
def test_sizes(height, width):
    assert_same("flux", functools.partial(draw, n=2, height=height, width=width), 2)


def test_text_tokens_are_left_alone():
    """Of a block's attention, only image tokens differ from the same block's without merging."""
    pipe, seen = flux(), {}

    def keep(name):
        return lambda module, args, output: seen.setdefault(name, []).append(
            [t.clone() for t in (output if isinstance(output, tuple) else output.split([11, output.shape[1] - 11], 1))]
        )

    model = denoiser(pipe)
    once = {"num_inference_steps": 1, "n": 2, "prompts": 1}
    # the first block of each kind alone, so that the inputs of the attention are those of the run without
    for path in ("transformer_blocks.0", "single_transformer_blocks.0"):
        hooks = []
        for applied in (False, True):
            if applied:
                settings = {"blocks": (path,), "timesteps": (0, 1000), "threshold": -1}
                negengine.apply(pipe, negengine.NegToMe(**settings))
            hooks = [model.get_submodule(f"{path}.attn").register_forward_hook(keep(path))]
            draw(pipe, **once)
            [hook.remove() for hook in hooks]
        negengine.remove(pipe)
        without, merged = seen[path]
        image, text = (0, 1) if path.startswith("transformer") else (1, 0)
        assert torch.equal(merged[text], without[text])
        assert torch.equal(merged[image][0], without[image][0])
        assert not torch.equal(merged[image][1], without[image][1])


@pytest.mark.parametrize("blocks", [("transformer_blocks.1",), ("single_transformer_blocks",)])
def test_blocks(blocks):
    status = assert_same("flux", draw, 2, blocks=blocks)
    assert status.active_blocks == (1 if blocks[0][-1] == "1" else 2)


def test_alpha_of_each_image():
    assert_same("flux", functools.partial(draw, n=3), 3, alpha=(0.5, 1.4, -0.3), reference="others")


def test_alpha_as_a_function_of_the_timestep():
    # multiples of a quarter at whole hundreds: the same number whether from 1000 t / 1000 or from t
    assert_same("flux", draw, 2, alpha=lambda t: 0.25 * (1 + round(t) // 100))


def test_own_embeddings_and_group_size():
    """Embeddings do not tell the groups; `group_size` does."""
    generator = torch.Generator().manual_seed(4)
    embeds, pooled = (torch.randn(*s, generator=generator) for s in ((6, 13, 32), (6, 32)))

    def call(pipe, seed=0):
        return pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=3,
            output_type="latent",
            **SIZE["flux"],
        ).images

    pipe = flux()
    expected, seed = literal(flux(), call, 3)
    got, status = hooked(pipe, functools.partial(call, seed=seed), group_size=3, timesteps=(0, 1000))
    assert status.group_size == 3
    assert torch.equal(got, expected)


def test_models_without_guidance_embedding():
    expected, seed = literal(flux(guidance_embeds=False), draw, 2)
    got, _ = hooked(flux(guidance_embeds=False), functools.partial(draw, seed=seed), timesteps=(0, 1000))
    assert torch.equal(got, expected)


def test_defaults_are_those_of_the_paper():
    """With no setting at all: alpha 0.9, threshold 0.65, timesteps 900 ... 1000, every block."""
    call = functools.partial(draw, num_inference_steps=12)
    expected, seed = literal(flux(), call, 2, alpha=0.9, threshold=0.65, timesteps=(900, 1000))
    pipe = negengine.apply(flux(), negengine.NegToMe())
    assert torch.equal(call(pipe, seed=seed), expected)
    assert negengine.status(pipe)[negengine.NegToMe].blocks == 4
    assert 0 < negengine.status(pipe)[negengine.NegToMe].active_steps < 12
