"""NegToMe on FLUX.3's transformer, whose pipelines are modular: attached to its joint blocks, as docs/families.md says."""

import diffusers
import pytest
import torch
from literal import merged
from literal_flux2 import heads, product

import negengine
from negengine import NegToMe

MODEL = getattr(diffusers, "Flux3Transformer2DModel", None)
pytestmark = pytest.mark.skipif(MODEL is None, reason=f"diffusers {diffusers.__version__} has no Flux3Transformer2DModel")

GRID, TEXT = (5, 7), 11
THRESHOLD = 0.8
PLACES = "single_transformer_blocks.*.attn.to_out.0"


def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODEL(
            in_channels=16,
            cond_in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    for name, parameter in model.named_parameters():  # random attention is nearly uniform, and all its tokens nearly equal
        if "attn.norm_" in name:
            parameter.data.mul_(3)
    return model.eval().requires_grad_(False)


def inputs(time, beside=False):
    """Two prompts of two images, called as the modular pipelines call it."""
    generator = torch.Generator().manual_seed(1)
    place = torch.cartesian_prod(*map(torch.arange, (1, *GRID, 1)))
    word = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, TEXT)))
    given = {
        "hidden_states": torch.randn(4, GRID[0] * GRID[1], 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT, 32, generator=generator).repeat_interleave(2, 0),
        "timestep": torch.full((4,), time),
        "img_ids": place,
        "txt_ids": word,
        "return_dict": False,
    }
    if beside:
        image = torch.randn(4, 6, 16, generator=generator)
        given |= {"image_cond_hidden_states": image, "image_cond_ids": place[:6] + torch.tensor([10, 0, 0, 0])}
    return given


def attached(model, **settings):
    method = NegToMe(group_size=2, threshold=THRESHOLD, **settings)
    text = lambda inputs: inputs["encoder_hidden_states"].shape[1]  # noqa: E731
    places = {"tokens": PLACES, "where": "input", "text": text, "grid": GRID}
    return negengine.attach(model, method, **places, timestep="timestep", noisiest=1.0)


class Processor:
    """The attention of a joint block, with the image's tokens of its output merged."""

    def __init__(self):
        self.margin, self.merged = 1.0, 0

    def __call__(self, attn, x, attention_mask=None, image_rotary_emb=None):
        q, k, v = heads(attn.to_q(x), attn, attn.norm_q), heads(attn.to_k(x), attn, attn.norm_k), heads(attn.to_v(x), attn)
        text, image = product(q, k, v, image_rotary_emb).tensor_split([-GRID[0] * GRID[1]], 1)
        results = [merged(group, (0.9,) * 2, THRESHOLD, "paper", "first") for group in image.split(2)]
        self.margin = min([self.margin, *(margin for _, margin in results)])
        new = torch.cat([result for result, _ in results])
        self.merged += int((new != image).any(-1).sum())
        return attn.to_out[1](attn.to_out[0](torch.cat([text, new], 1)))


def by_hand():
    model, processor = transformer(), Processor()
    for block in model.single_transformer_blocks:
        block.attn.set_processor(processor)
    return model, processor


def test_as_the_rule_by_hand():
    """At the noisiest timesteps, in the joint blocks, before the projection of the attention's output."""
    model, (twin, processor) = transformer(), by_hand()
    with attached(model) as handle:
        for time in (1.0, 0.95):
            expected = twin(**inputs(time))[0]
            assert torch.equal(model(**inputs(time))[0], expected)
            assert not torch.equal(transformer()(**inputs(time))[0], expected)
        assert torch.equal(model(**inputs(0.5))[0], transformer()(**inputs(0.5))[0])
        report = handle.status()
    assert processor.margin > 3e-7  # no decision hangs on the rounding of a cosine
    assert (report.blocks, report.steps, report.active_steps) == (3, 3, 2)
    assert 0 < report.merged_tokens == processor.merged < report.eligible_tokens


def test_in_the_loop_of_its_modular_pipeline():
    """Which calls the transformer twice in a step, with texts of two lengths."""

    def drawn(model):
        from diffusers.modular_pipelines.flux3.denoise import Flux3DenoiseStep

        pipe = Flux3DenoiseStep().init_pipeline()
        pipe.set_progress_bar_config(disable=True)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1.0, 0.95])
        pipe.update_components(transformer=model, scheduler=scheduler)
        given = inputs(1.0)
        text, ids = given["encoder_hidden_states"], given["txt_ids"]
        fields = {"prompt_embeds": text, "txt_ids": ids, "img_ids": given["img_ids"]}
        fields |= {"negative_prompt_embeds": text[:, :5], "negative_txt_ids": ids[:5]}
        call = {"timesteps": scheduler.timesteps, "num_inference_steps": 2, "denoiser_input_fields": fields, "output": "latents"}
        return pipe(latents=given["hidden_states"], **call)

    model, (twin, processor) = transformer(), by_hand()
    with attached(model) as handle:
        got = drawn(model)
        assert (handle.status().steps, handle.status().active_steps) == (4, 4)
    assert torch.equal(got, drawn(twin))
    assert processor.margin > 3e-7
    assert not torch.equal(got, drawn(model))


def test_images_beside_the_drawn_one_are_refused():
    model = transformer()
    with attached(model), pytest.raises(ValueError, match=r"tokens \[4, 11 \+ 35, channels\].*there is \[4, 52, 32\]"):
        model(**inputs(1.0, beside=True))
    model(**inputs(1.0, beside=True))


def test_its_modular_pipeline_is_refused():
    pipe = diffusers.Flux3ModularPipeline()
    pipe.transformer = transformer()
    with pytest.raises(TypeError, match=r"does not know Flux3ModularPipeline \(its denoiser is a Flux3Transformer2DModel\)"):
        negengine.apply(pipe, NegToMe())
