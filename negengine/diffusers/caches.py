"""Step caches of diffusers: they answer in a module's place with what it, or its block, gave in an earlier step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def cached(denoiser: nn.Module) -> bool:
    """Whether a step cache keeps something of a denoiser's rows from one call to the next."""
    return any(hook._is_stateful for module in denoiser.modules() for hook in _hooks(module).values())


def answered(module: nn.Module) -> bool:
    """Whether a hook of diffusers may answer in the module's place."""
    return any(hasattr(hook, "new_forward") for hook in _hooks(module).values())


def _hooks(module: nn.Module) -> dict[str, Any]:
    registry = vars(module).get("_diffusers_hook")  # diffusers itself offers no way to ask without making one
    return registry.hooks if registry is not None else {}


class InnerListener:
    """Hears the output of a module's own forward, beneath all that may answer in its place, until removed.

    What is done to that output in place is what a cache keeps, as if the module had given it.
    """

    def __init__(self, module: nn.Module, heard: Callable[[nn.Module, tuple[Any, ...], Tensor], None]) -> None:
        self._innermost = vars(module)["_diffusers_hook"]._fn_refs[0]
        self._place = "forward" if self._innermost.original_forward is None else "original_forward"
        self._original = getattr(self._innermost, self._place)
        self._live = True

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            output = self._original(*args, **kwargs)
            if self._live:  # its cache may have been taken off, and left this in its place
                heard(module, args, output)
            return output

        self._forward = forward
        setattr(self._innermost, self._place, forward)

    def remove(self) -> None:
        self._live = False
        if getattr(self._innermost, self._place) is self._forward:
            setattr(self._innermost, self._place, self._original)
