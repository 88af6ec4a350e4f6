"""What a script can import from the release's modules and not from here: each name with what to use in its place."""

from __future__ import annotations

from typing import NoReturn

PROCESSOR = (
    "no attention processor is replaced: the engine listens to the denoiser; take the pipeline of negengine.compat, or "
    "negengine.apply(pipe, negengine.NegToMe(...)) on any pipeline"
)
ABSENT = {
    "SpatialFluxAttnProcessor2_0": PROCESSOR,
    "NegToMeAttnProcessor2_0": PROCESSOR,
    "retrieve_latents": "import it from diffusers.pipelines.flux.pipeline_flux_img2img",
    "retrieve_timesteps": "import it from diffusers.pipelines.flux.pipeline_flux",
    "calculate_shift": "import it from diffusers.pipelines.flux.pipeline_flux",
    "rescale_noise_cfg": "import it from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
}


def refuse(module: str, name: str) -> NoReturn:
    """Raises ImportError for what the release has, since ``import`` drops the text of an AttributeError, which all else raises."""
    if name in ABSENT:
        raise ImportError(f"{module} has no {name}: {ABSENT[name]} (docs/compat.md)")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
