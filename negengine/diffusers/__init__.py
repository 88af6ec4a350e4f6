"""The plug-in: methods on unmodified diffusers pipelines, applied and removed in one line."""

from negengine.diffusers.apply import apply, remove, status
from negengine.diffusers.families import Conditioning, Family, Latents, Site, Tokens, register_family
from negengine.diffusers.report import DngReport, NagReport, NegToMeReport, Report, Status

__all__ = [
    "Conditioning",
    "DngReport",
    "Family",
    "Latents",
    "NagReport",
    "NegToMeReport",
    "Report",
    "Site",
    "Status",
    "Tokens",
    "apply",
    "register_family",
    "remove",
    "status",
]
