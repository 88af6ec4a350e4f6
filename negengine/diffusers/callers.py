"""Whose call of a denoiser this is: pipelines may share one, and call it from each other's callbacks or from other threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


def calling(pipe: Any, component: str) -> bool:
    """Whether the code that runs is called by ``pipe``, or by no pipeline at all, and not by another one that has its denoiser.

    Of several pipelines that call one another it is the innermost one's.
    """
    for caller in _pipelines(sys._getframe(1)):
        if caller is pipe:
            return True
        if getattr(caller, component, None) is getattr(pipe, component):
            return False
    return True


def within_a_call(pipe: Any) -> bool:
    """Whether some thread is running a method of ``pipe``."""
    return any(caller is pipe for frame in sys._current_frames().values() for caller in _pipelines(frame))


def _pipelines(frame: FrameType | None) -> Iterator[Any]:
    """Those in whose methods a frame runs, from the inside out."""
    from diffusers import DiffusionPipeline

    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline):
                yield owner
        frame = frame.f_back
