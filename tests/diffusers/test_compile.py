"""A compiled denoiser: two graphs at most (merging active, inactive), nothing recompiled by other settings."""

import dataclasses
import functools

import pytest
import torch
from tiny import BUILDERS, denoiser, draw, flux, half_mask, picture

import negengine
from negengine import models

SETTINGS = {"timesteps": (500, 1000), "threshold": 0.85, "min_grid": 1}
# tracing a UNet takes ten seconds, a transformer of a block of each kind one and a half: SDXL is left to `make test-rest`
BUILDERS = {**BUILDERS, "flux": functools.partial(flux, num_layers=1, num_single_layers=1)}
FAMILIES = pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive)])


class Counting:
    """An eager backend that counts the graphs it is given.

    The hook that joins reference pictures to the inputs makes graphs of its own, of a few nodes: ``large`` leaves them out.
    """

    def __init__(self, large=False):
        self.graphs, self.least = 0, 100 if large else 1

    def __call__(self, graph, inputs):
        self.graphs += len(graph.graph.nodes) >= self.least
        return graph


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(pipe, backend, how="in place"):
    model = denoiser(pipe)
    if how == "in place":
        model.compile(backend=backend, fullgraph=True)
    else:
        wrapped = torch.compile(model, backend=backend, fullgraph=True)
        setattr(pipe, "transformer" if hasattr(pipe, "transformer") else "unet", wrapped)
    return pipe


IN_PLACE, WRAPPED = (pytest.param(how, marks=pytest.mark.exhaustive) for how in ("in place", "wrapped"))


@FAMILIES
@pytest.mark.parametrize("how", [IN_PLACE, "wrapped"])
def test_two_graphs_and_the_eager_result(family, how):
    pipe, backend = BUILDERS[family](), Counting()
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS))
    expected, status = draw(pipe), negengine.status(pipe)[negengine.NegToMe]
    assert 0 < status.active_steps < status.steps
    compiled(pipe, backend, how)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    assert negengine.status(pipe)[negengine.NegToMe].active_steps == status.active_steps
    assert negengine.status(pipe)[negengine.NegToMe].eligible_tokens == status.eligible_tokens
    assert backend.graphs <= 2


@FAMILIES
@pytest.mark.parametrize("how", ["in place", WRAPPED])
def test_applied_after_compiling(family, how):
    pipe, backend = BUILDERS[family](), Counting()
    expected = draw(negengine.apply(pipe, negengine.NegToMe(**SETTINGS)))
    negengine.remove(pipe)
    plain = draw(pipe)
    compiled(pipe, backend, how)
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-4)
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS))
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    negengine.remove(pipe)
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-4)


@FAMILIES
def test_other_values_do_not_recompile(family):
    """Another seed, prompt, alpha, threshold, window or number of steps finds its graphs made."""
    pipe, eager, backend = BUILDERS[family](), BUILDERS[family](), Counting()
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS))
    compiled(pipe, backend)
    draw(pipe)
    made = backend.graphs
    assert made == 2
    draw(pipe, seed=5)
    draw(pipe, num_inference_steps=5)
    assert backend.graphs == made
    for other in ({"alpha": 0.3}, {"threshold": 0.5}, {"timesteps": (200, 900)}, {"alpha": (0.1, 0.7)}):
        settings = negengine.NegToMe(**{**SETTINGS, **other})
        negengine.apply(pipe, settings), negengine.apply(eager, settings)
        torch.testing.assert_close(draw(pipe), draw(eager), rtol=1e-4, atol=1e-4)
        assert backend.graphs == made, other


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["mnist-flux", "mnist-sdxl"])
def test_embedded_pipelines(name):
    """In as few steps as are active and inactive."""
    preset, call = models.negtome_preset(name), models.preset(name).call_kwargs(2) | {"num_inference_steps": 4}

    def images(pipe, seed=0, prompts=models.PROMPTS[:2], **changes):
        negengine.apply(pipe, dataclasses.replace(preset, **changes))
        generator = torch.Generator().manual_seed(seed)
        drawn = pipe(list(prompts), num_images_per_prompt=2, generator=generator, output_type="pt", **call).images
        assert 0 < negengine.status(pipe)[negengine.NegToMe].active_steps < 4
        return drawn

    pipe, eager, backend = models.load(name), models.load(name), Counting()
    compiled(pipe, backend)
    for changes in ({}, {"seed": 5}, {"prompts": models.PROMPTS[3:5]}, {"alpha": 0.3}, {"alpha": (0.1, 0.5)}, {"threshold": 0.5}):
        torch.testing.assert_close(images(pipe, **changes), images(eager, **changes), rtol=1e-4, atol=1e-4)
        assert backend.graphs == 2, changes


@FAMILIES
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["whole", "masked"])
def test_pictures(family, masked):
    pipe, backend = BUILDERS[family](), Counting(large=True)
    reference = negengine.ReferenceImage(picture(), mask=half_mask() if masked else None)
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS, reference=reference))
    expected = draw(pipe)
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS, reference=reference))
    compiled(pipe, backend)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    draw(pipe, seed=5)
    assert backend.graphs <= 2


@pytest.mark.exhaustive
@FAMILIES
def test_dropout(family):
    pipe, backend = BUILDERS[family](), Counting()
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS, dropout=0.3))
    expected = draw(pipe)
    compiled(pipe, backend)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    assert backend.graphs <= 2


@pytest.mark.exhaustive
def test_through_autograd_tracing():
    """`aot_eager` functionalises: the in-place operator must survive it."""
    pipe = BUILDERS["flux"]()
    call = functools.partial(draw, num_inference_steps=2)
    expected = call(negengine.apply(pipe, negengine.NegToMe(**SETTINGS)))
    compiled(pipe, "aot_eager")
    torch.testing.assert_close(call(pipe), expected, rtol=1e-4, atol=1e-4)


AVOID = "the sea"
METHODS = {
    "dng": negengine.DynamicNegativeGuidance(prompt=AVOID, tau=0.01, surrogate="ancestral"),
    "negative prompting": negengine.NegativePrompting(prompt=AVOID),
    "sld": negengine.SafeLatentDiffusion.preset("dng", prompt=AVOID, scale=5.0, warmup=1),
    "cads": negengine.CADS(tau1=0.2, tau2=1.0),
    "seed variance": negengine.SeedVariance(timesteps=(500, 1000)),
}


OTHERS = [
    pytest.param(name, family, marks=() if (name, family) == ("dng", "flux") else pytest.mark.exhaustive)
    for name in METHODS
    for family in ("flux", "sdxl")
]


@pytest.mark.parametrize("name,family", OTHERS)
def test_other_methods(name, family):
    """Their doors are inside the graph: one graph, or two where a window opens; other seeds and step counts find them made."""
    pipe, eager, backend = BUILDERS[family](), BUILDERS[family](), Counting(large=True)
    for each in (pipe, eager):
        negengine.apply(each, METHODS[name])
    compiled(pipe, backend)
    for call in ({}, {"seed": 5}, {"num_inference_steps": 5}):
        torch.testing.assert_close(draw(pipe, **call), draw(eager, **call), rtol=1e-3, atol=1e-3)
    assert backend.graphs <= 2
    assert [report.active_steps for report in negengine.status(pipe)] == [r.active_steps for r in negengine.status(eager)]


def test_three_methods_together():
    pipe, eager, backend = BUILDERS["flux"](), BUILDERS["flux"](), Counting(large=True)
    for each in (pipe, eager):
        negengine.apply(each, negengine.NegToMe(**SETTINGS), METHODS["dng"], METHODS["seed variance"])
    compiled(pipe, backend)
    for seed in (2, 5):
        torch.testing.assert_close(draw(pipe, seed=seed), draw(eager, seed=seed), rtol=1e-3, atol=1e-3)
    assert backend.graphs <= 2
    p = negengine.status(pipe)[negengine.DynamicNegativeGuidance].p
    assert p[0] != p[1]
