"""The plug-in: methods on unmodified diffusers pipelines, applied and removed in one line."""

from negengine.diffusers.apply import apply, remove, status
from negengine.diffusers.families import Family, Site, register_family
from negengine.diffusers.report import Status

__all__ = ["Family", "Site", "Status", "apply", "register_family", "remove", "status"]
