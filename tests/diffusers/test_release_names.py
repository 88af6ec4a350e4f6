"""Names, methods and default values that scripts written for the release use."""

import dataclasses
import inspect

import pytest
import torch
from release import PUBLISHED, arguments, draw, shared
from tiny import BUILDERS, denoiser

import negengine
from negengine import compat


# --- defaults -----------------------------------------------------------------------------------------------------------
def test_flux_guidance_scale_is_7():
    pipe = shared("flux")
    given = {
        "prompt": "a cat",
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "output_type": "latent",
        "max_sequence_length": 16,
    }
    with_default = pipe(**given, generator=torch.Generator().manual_seed(0)).images
    plain = BUILDERS["flux"]()
    for scale, equal in ((7.0, True), (3.5, False)):
        other = plain(**given, guidance_scale=scale, generator=torch.Generator().manual_seed(0)).images
        assert torch.equal(with_default, other) == equal


def test_no_other_default_differs_from_those_of_diffusers():
    """Transcribed from the release's signatures; an argument that diffusers gets a new default for is noticed here."""
    numbers = {"flux": {"num_inference_steps": 28, "max_sequence_length": 512}}
    numbers["sdxl"] = {
        "num_inference_steps": 50, "guidance_scale": 5.0, "eta": 0.0, "guidance_rescale": 0.0, "crops_coords_top_left": (0, 0),
        "negative_crops_coords_top_left": (0, 0),
    }  # fmt: skip
    shared = {
        "num_images_per_prompt": 1,
        "output_type": "pil",
        "return_dict": True,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }
    for family, cls in PUBLISHED.items():
        theirs = inspect.signature(cls.__mro__[2].__call__).parameters
        own = {"seed", "use_negtome", "negtome_args", *(("timesteps", "guidance_scale") if family == "flux" else ())}
        for name in set(cls._positional) - own:
            assert theirs[name].default == {**numbers[family], **shared}.get(name), name


def test_without_a_generator_sdxl_draws_from_its_seed():
    pipe = shared("sdxl")
    draws = [draw(pipe, generator=None, **seed) for seed in ({}, {}, {"seed": 0}, {"seed": 3}, {"seed": 3})]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[3], draws[4])
    assert not torch.equal(draws[0], draws[3])
    assert torch.equal(draws[3], draw(pipe))  # which has a generator of seed 3
    assert torch.equal(draws[3], draw(pipe, seed=5))  # a generator is what counts


# --- names that scripts use ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module,last", [(compat.flux, "num_lang_tokens"), (compat.sdxl, "min_attn_dim")])
def test_settings_may_be_made_as_negtomeargs(module, last):
    names = [field.name for field in dataclasses.fields(module.NegtomeArgs)]
    assert names[:6] == ["use_negtome", *(f"merging_{name}" for name in ("alpha", "threshold", "dropout", "t_start", "t_end"))]
    assert names[names.index(last) + 1 :] == ["use_rag_assets", "noise_rag", "rag_assets"]
    family = "flux" if module is compat.flux else "sdxl"
    pipe = shared(family)
    made = module.NegtomeArgs(True, 0.8, 0.8, merging_t_end=400)
    changes = {} if family == "flux" else {"min_attn_dim": 1}
    got = draw(pipe, use_negtome=True, negtome_args=dataclasses.asdict(made) | changes)
    assert torch.equal(got, draw(pipe, use_negtome=True, negtome_args=arguments(family)))
    with pytest.raises(TypeError, match=r"must be a dict, got NegtomeArgs; give dataclasses\.asdict"):
        draw(pipe, use_negtome=True, negtome_args=made)


def test_defaults_of_negtomeargs_are_the_published_ones():
    shared = (False, 0.9)
    assert dataclasses.astuple(compat.flux.NegtomeArgs()) == (*shared, 0.65, 0.0, 1000, 900, -1, -1, 512, False, False, None)
    assert dataclasses.astuple(compat.sdxl.NegtomeArgs()) == (*shared, 0.7, 0.0, 1000, 800, ["up_blocks"], 32, False, False, None)


@pytest.mark.parametrize("module", ["negengine.compat", "negengine.compat.flux", "negengine.compat.sdxl"])
def test_names_that_are_missing_say_what_to_use(module):
    for name, hint in {
        "SpatialFluxAttnProcessor2_0": r"negengine\.apply",
        "NegToMeAttnProcessor2_0": "no attention processor is replaced",
        "retrieve_timesteps": r"diffusers\.pipelines",
    }.items():
        with pytest.raises(ImportError, match=hint):
            exec(f"from {module} import {name}")
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'neg'"):
        exec(f"import {module}; {module}.neg")


def test_where_a_missing_name_is_said_to_be_it_is():
    from negengine.compat.absent import ABSENT

    for name, hint in ABSENT.items():
        if hint.startswith("import it from "):
            exec(f"from {hint.removeprefix('import it from ')} import {name}")


def test_there_are_two_negtomeargs():
    with pytest.raises(ImportError, match=r"two NegtomeArgs.*negengine\.compat\.flux"):
        from negengine.compat import NegtomeArgs  # noqa: F401


def test_methods_of_the_release(family):
    """Those that set up what is not needed here do nothing; the other takes off what was applied."""
    pipe = shared(family)
    before = dict(denoiser(pipe).attn_processors)
    pipe.set_attn_processor()
    if family == "sdxl":
        pipe.customize_transformer_forward()
    assert dict(denoiser(pipe).attn_processors) == before
    call = {"use_negtome": True, "negtome_args": arguments(family)}
    merged = draw(pipe, **call)
    if family == "flux":
        pipe.reset_attn_processor()
        with pytest.raises(ValueError, match="no method is applied"):
            negengine.status(pipe)
    assert torch.equal(draw(pipe, **call), merged)
