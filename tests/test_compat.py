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
        merged = best > (threshold[n] if isinstance(threshold, torch.Tensor) and threshold.ndim == 2 else threshold)
        if keep is not None:
            merged = merged & keep[n]
        a = alpha[n] if isinstance(alpha, torch.Tensor) and alpha.ndim == 3 else alpha
        out.append(torch.where(merged[:, None], (1 + a) * x[n] - a * x[0][source], x[n]))
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


@pytest.mark.parametrize("shape", ["pairs", "flat", "one for all", "columns"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_masks_of_every_shape(shape, dtype):
    x = correlated()
    columns = torch.rand(37, generator=torch.Generator().manual_seed(1)) > 0.5
    pairs = columns.expand(3, 37, 37)
    mask = {"pairs": pairs, "flat": pairs.reshape(-1, 37), "one for all": pairs[0], "columns": columns}[shape].to(dtype)
    y = compat.negtome(x, threshold=0.1, mask=mask * 3 if dtype != torch.bool else mask)
    assert torch.equal(y[1:], published(x, 0.5, 0.1, pairs=pairs)[1:])
    assert torch.equal(y[:, ~columns], x[:, ~columns])


@pytest.mark.parametrize("images", [1, 3])
def test_a_mask_that_differs_by_row_is_kept_to(images):
    x = correlated()
    pairs = torch.rand(images, 37, 37, generator=torch.Generator().manual_seed(2)) > 0.8
    given = pairs if images > 1 else pairs[0]
    expected = published(x, 0.5, 0.1, pairs=pairs.expand(3, 37, 37))
    assert torch.equal(compat.negtome(x, threshold=0.1, mask=given), expected)
    assert torch.equal(compat.negtome(x, threshold=0.1, mask=given.reshape(-1, 37)), expected)


@pytest.mark.parametrize("shape", [(5, 37), (36,), (2, 37, 37), (3, 37), (37, 37, 37)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask must have shape \[37\], \[37, 37\], \[111, 37\] or \[3, 37, 37\], got"):
        compat.negtome(correlated(), mask=torch.ones(shape))


def test_arguments_by_their_published_names():
    x = correlated()
    expected = published(x, 0.3, 0.2)
    y = compat.negtome(hidden_states_orig=x, alpha=0.3, threshold=0.2, dropout=0.0, mask=None)
    assert torch.equal(y[1:], expected[1:])


@pytest.mark.parametrize("threshold", [1.5, float("inf"), -1.5, float("-inf"), torch.tensor(0.8), torch.tensor([[[0.8]]])])
@pytest.mark.parametrize("masked", [False, True])
def test_thresholds_beyond_every_cosine_and_of_one_number(threshold, masked):
    """Everything is merged, or nothing."""
    x = correlated()
    pairs = torch.rand(3, 37, 37, generator=torch.Generator().manual_seed(2)) > 0.5 if masked else None
    y = compat.negtome(x, threshold=threshold, mask=pairs)
    limit = float(threshold)
    assert torch.equal(y[1:], published(x, 0.5, limit, pairs=pairs)[1:])
    assert torch.equal(y, x) == (limit > 1)
    assert bool((y[1:] != x[1:]).any(-1).all()) == (limit < -1)


def test_a_threshold_for_each_token():
    x = correlated()
    threshold = torch.rand(3, 37, generator=torch.Generator().manual_seed(4))
    y = compat.negtome(x, threshold=threshold)
    assert torch.allclose(y[0], x[0])
    assert torch.equal(y[1:], published(x, 0.5, threshold)[1:])


def test_alphas_as_tensors():
    x = correlated()
    generator = torch.Generator().manual_seed(4)
    for shape in [(), (1,), (1, 1, 1), (3, 1, 1), (1, 37, 1), (3, 37, 1), (24,), (3, 37, 24)]:
        alpha = torch.rand(shape, generator=generator)
        y = compat.negtome(x, alpha=alpha, threshold=0.1)
        assert torch.equal(y[1:], published(x, alpha.expand(x.shape), 0.1)[1:]), shape


@pytest.mark.parametrize("wanted", ["x", "alpha"])
def test_gradients(wanted):
    """The release is differentiable, and some train through it."""
    x, alpha = correlated(), torch.tensor(0.4)
    gradients = []
    for rule in (compat.negtome, lambda x, alpha, threshold: published(x, alpha, threshold)):
        inputs = {"x": x.clone(), "alpha": alpha.clone()}
        inputs[wanted].requires_grad_()
        y = rule(inputs["x"], inputs["alpha"], 0.1)
        y[1:].square().sum().backward()
        gradients.append(inputs[wanted].grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0
    with torch.no_grad():
        y = compat.negtome(x.requires_grad_(), alpha, 0.1)
    assert not y.requires_grad


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
    if isinstance(pipe, diffusers.FluxPipeline):
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


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan"), torch.ones(2)])
def test_dropout_is_a_share(dropout):
    with pytest.raises(ValueError, match=r"dropout must (lie in \[0, 1\]|be a number|be one number)"):
        compat.negtome(torch.randn(2, 5, 4), dropout=dropout)


def test_dropout_of_all_tokens_merges_nothing_and_draws():
    x = correlated()
    torch.manual_seed(5)
    torch.rand(3, 37)
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(compat.negtome(x, threshold=-1.0, dropout=1.0), x)
    assert torch.rand(()) == after


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5, 5)])
@pytest.mark.parametrize(
    "bad,error,message",
    [
        ({"alpha": float("nan")}, ValueError, "alpha must be a finite number, got nan"),
        ({"alpha": float("inf")}, ValueError, "alpha must be a finite number, got inf"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a number, got nan"),
        ({"threshold": None}, TypeError, "threshold must be a number, got None"),
    ],
)
def test_settings_are_checked(bad, error, message, mask):
    with pytest.raises(error, match=message):
        compat.negtome(torch.randn(2, 5, 4), mask=mask, **bad)


def test_tokens_have_three_dimensions():
    with pytest.raises(ValueError, match=r"hidden_states_orig must have shape \[N, T, D\], got \[5, 4\]"):
        compat.negtome(torch.randn(5, 4))
