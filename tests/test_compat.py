"""The names, arguments and results of the release, on the release's own rule written out again."""

import diffusers
import pytest
import torch
from PIL import Image

import negengine
from negengine import compat, models


def published(x, alpha, threshold, keep=None, pairs=None):
    """The release's rule for a batch, one image at a time, as the published code applies it."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    out = []
    for n in range(len(x)):
        s = unit[n] @ unit[0].T
        if pairs is not None:
            s = s.masked_fill(~pairs[n], -torch.inf)
        best, source = s.max(dim=0)
        merged = best > threshold
        if keep is not None:
            merged = merged & keep[n]
        out.append(torch.where(merged[:, None], (1 + alpha) * x[n] - alpha * x[0][source], x[n]))
    return torch.stack(out)


def correlated(N=3, T=37, D=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(T, D, generator=generator)
    return torch.stack([first + s * torch.randn(T, D, generator=generator) for s in (0.0, 0.4, 1.0)][:N])


@pytest.mark.parametrize("alpha,threshold", [(0.5, 0.7), (0.9, 0.5), (-0.3, 0.2), (0.7, -1.0)])
def test_function_gives_the_published_bits(alpha, threshold):
    x = correlated()
    y = compat.negtome(x, alpha=alpha, threshold=threshold)
    assert torch.equal(y[1:], published(x, alpha, threshold)[1:])
    assert torch.equal(y[0], x[0])


def test_defaults_are_the_published_ones():
    x = correlated()
    assert torch.equal(compat.negtome(x), compat.negtome(x, 0.5, 0.7, 0.0, None))


def test_dropout_draws_from_the_global_generator_as_published():
    x = correlated()
    torch.manual_seed(5)
    keep = torch.rand(3, 37) > 0.4
    torch.manual_seed(5)
    y = compat.negtome(x, threshold=0.1, dropout=0.4)
    assert torch.equal(y[1:], published(x, 0.5, 0.1, keep)[1:])
    assert not torch.equal(y, compat.negtome(x, threshold=0.1))


@pytest.mark.parametrize("shape", ["pairs", "flat", "columns"])
def test_masks_of_every_published_shape(shape):
    x = correlated()
    columns = torch.rand(37, generator=torch.Generator().manual_seed(1)) > 0.5
    pairs = columns.expand(3, 37, 37)
    mask = {"pairs": pairs, "flat": pairs.reshape(-1, 37).float(), "columns": columns}[shape]
    y = compat.negtome(x, threshold=0.1, mask=mask)
    assert torch.equal(y[1:], published(x, 0.5, 0.1, pairs=pairs)[1:])
    assert torch.equal(y[:, ~columns], x[:, ~columns])


def test_a_mask_that_differs_by_row_is_kept_to():
    x = correlated()
    pairs = torch.rand(3, 37, 37, generator=torch.Generator().manual_seed(2)) > 0.8
    assert torch.equal(compat.negtome(x, threshold=0.1, mask=pairs), published(x, 0.5, 0.1, pairs=pairs))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask must have shape \[37\]"):
        compat.negtome(correlated(), mask=torch.ones(5, 37))


# --- pipelines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux():
    pipe = compat.FluxNegToMePipeline.from_pretrained(models.path("mnist-flux"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sdxl():
    pipe = compat.StableDiffusionXLNegToMePipeline.from_pretrained(models.path("mnist-sdxl"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **kwargs):
    size = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
    if isinstance(pipe, compat.FluxPipeline):
        size["max_sequence_length"] = 16
    generator = torch.Generator().manual_seed(0)
    return pipe(["a handwritten 3", "a digit"], num_images_per_prompt=2, generator=generator, **size, **kwargs).images


FLUX_ARGS = {
    "use_negtome": False,  # as in the release's README; the call's own argument decides
    "merging_alpha": 0.8,
    "merging_threshold": 0.1,
    "merging_dropout": 0.1,
    "merging_t_start": 1000,
    "merging_t_end": 500,
    "num_joint_blocks": 1,
    "num_single_blocks": -1,
    "num_lang_tokens": 512,
    "use_rag_assets": False,
    "rag_assets": None,
    "noise_rag": False,
}


def test_flux_arguments_are_translated(flux):
    plain = draw(flux)
    merged = draw(flux, use_negtome=True, negtome_args=FLUX_ARGS)
    assert negengine.status(flux)[negengine.NegToMe].blocks == 1 + len(flux.transformer.single_transformer_blocks)
    assert not torch.equal(merged, plain)
    assert torch.equal(draw(flux), plain)
    settings = negengine.NegToMe(
        alpha=0.8,
        threshold=0.1,
        dropout=0.1,
        timesteps=(500, 1000),
        blocks=("transformer_blocks.0", "single_transformer_blocks"),
        matching="release",
    )
    negengine.apply(flux, settings)
    try:
        assert torch.equal(draw(flux), merged)
    finally:
        negengine.remove(flux)


def test_sdxl_arguments_are_translated(sdxl):
    plain = draw(sdxl)
    arguments = {"merging_threshold": 0.1, "merging_t_end": 500, "blocks": ["up_blocks.1"], "min_attn_dim": 8}
    merged = draw(sdxl, use_negtome=True, negtome_args=arguments)
    assert negengine.status(sdxl)[negengine.NegToMe].merged_tokens > 0
    assert not torch.equal(merged, plain)
    assert torch.equal(draw(sdxl), plain)


def test_rag_assets_push_every_image(flux):
    picture, mask = Image.new("RGB", (50, 40), "white"), Image.new("L", (20, 20), 255)
    arguments = {"use_rag_assets": True, "rag_assets": [(picture, mask)], "merging_threshold": -1, "merging_t_end": 500}
    merged = draw(flux, use_negtome=True, negtome_args=arguments)
    plain = draw(flux)
    assert merged.shape == plain.shape
    assert (merged != plain).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_unknown_keys_raise(name, request):
    pipe = request.getfixturevalue(name)
    with pytest.raises(ValueError, match="unknown negtome_args merging_alfa; known are"):
        draw(pipe, use_negtome=True, negtome_args={"merging_alfa": 1})


def test_several_rag_assets_are_refused(flux):
    pair = (Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255))
    with pytest.raises(ValueError, match=r"one \(image, mask\) pair, got 2"):
        draw(flux, use_negtome=True, negtome_args={"use_rag_assets": True, "rag_assets": [pair, pair]})


def test_what_others_did_to_the_pipeline_is_noticed(flux):
    """The same call merges again after ``remove``, and after a sibling took the denoiser over."""
    merged = draw(flux, use_negtome=True, negtome_args=FLUX_ARGS)
    negengine.remove(flux)
    assert torch.equal(draw(flux, use_negtome=True, negtome_args=FLUX_ARGS), merged)
    sibling = diffusers.FluxPipeline(**flux.components)
    negengine.apply(sibling, negengine.NegToMe())
    assert torch.equal(draw(flux, use_negtome=True, negtome_args=FLUX_ARGS), merged)


def test_more_blocks_than_the_model_has(flux):
    everywhere = draw(flux, use_negtome=True, negtome_args=FLUX_ARGS | {"num_joint_blocks": -1, "num_single_blocks": -1})
    assert torch.equal(
        draw(flux, use_negtome=True, negtome_args=FLUX_ARGS | {"num_joint_blocks": 19, "num_single_blocks": 38}), everywhere
    )
    with pytest.raises(ValueError, match="leave no block"):
        draw(flux, use_negtome=True, negtome_args={"num_joint_blocks": 0, "num_single_blocks": 0})


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2.0])
def test_dropout_is_a_share(dropout):
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\)"):
        compat.negtome(torch.randn(2, 5, 4), dropout=dropout)


@pytest.mark.parametrize("bad", [{"alpha": float("nan")}, {"threshold": 3.0}])
def test_settings_are_checked_with_a_mask_of_pairs_too(bad):
    with pytest.raises(ValueError, match=r"alpha|threshold"):
        compat.negtome(torch.randn(2, 5, 4), mask=torch.ones(2, 5, 5), **bad)
