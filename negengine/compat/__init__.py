"""Code written for the release published with the NegToMe paper keeps working.

    from negengine.compat import negtome, FluxNegToMePipeline, StableDiffusionXLNegToMePipeline

The names, arguments, default values and pictures are those of the release (its matching included, see ``docs/matching.md``); the
work is done by this engine. :mod:`negengine.compat.flux` and :mod:`negengine.compat.sdxl` stand for the release's two modules.
``docs/compat.md`` lists what is followed, what is an error here, and where the release is wrong and this is not.
"""

from __future__ import annotations

from negengine.compat.absent import refuse
from negengine.compat.flux import FluxNegToMePipeline
from negengine.compat.function import negtome
from negengine.compat.sdxl import StableDiffusionXLNegToMePipeline

__all__ = ["FluxNegToMePipeline", "StableDiffusionXLNegToMePipeline", "negtome"]


def __getattr__(name: str) -> object:
    if name == "NegtomeArgs":
        raise ImportError(
            "the release has two NegtomeArgs, of different fields and default values: import it from negengine.compat.flux or from "
            "negengine.compat.sdxl"
        )
    refuse(__name__, name)
