"""What families from outside the package say of a denoiser, compared with the denoiser: a wrong description must not be silent."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negengine.diffusers.families import Family, Site, Tokens, is_built_in
from negengine.diffusers.listen import Unpicklable
from negengine.diffusers.running import RunningCall


def check_names(family: Family, denoiser: nn.Module) -> None:
    """Raises ValueError: a family from outside names inputs that the denoiser does not take."""
    parameters = inspect.signature(type(denoiser).forward).parameters
    conditioning = family.conditioning
    if is_built_in(family) or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    told: dict[str, tuple[str, ...]] = {"sample": (conditioning.sample,)}
    if conditioning.lists is None:  # else the others name tensors that are made of them
        told |= {"batched": conditioning.batched, "mask": () if conditioning.mask is None else (conditioning.mask,)}
    for field, names in told.items():
        for name in names:
            if name not in parameters:
                raise ValueError(
                    f"Conditioning({field}=...) of the family {family.name} names {name!r}, but the inputs of "
                    f"{type(denoiser).__name__} are {', '.join(list(parameters)[1:])}"
                )


def as_inputs(
    family: Family, read: Callable[[Sequence[Any]], dict[str, Tensor]], encoded: Sequence[Any], needed: str | None = None
) -> dict[str, Tensor]:
    """What ``encode_prompt`` returned as the denoiser's inputs.

    Raises:
        ValueError: the ``needed`` one is not among them, or one that is said to have no row per image.
    """
    conditioning, inputs = family.conditioning, read(encoded)
    wrong = [name for name in inputs if name.partition(".")[0] not in conditioning.batched]
    if wrong or (needed is not None and needed not in inputs):
        raise ValueError(
            f"Conditioning(prompts=...) of the family {family.name} gives {', '.join(map(repr, inputs)) or 'nothing'}, but it must "
            f"give {needed or 'the text'}, and nothing that `batched` does not name ({', '.join(conditioning.batched)})"
        )
    return inputs


class ExpectedTokens(Unpicklable):
    """Refuses tokens that are not what a family from outside said. Looks at shapes alone, which are known on the host.

    Its hooks must be there before those that merge, and behind the one that joins rows.
    """

    def __init__(self, running: RunningCall, family: Family, denoiser: nn.Module) -> None:
        self._running, self._family = running, family
        self._parameters = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._text, self._filled = 0, False  # other tokens than the image's, and whether more may follow

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpectedTokens:
        """Nothing drives a copied denoiser."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self) | {"_running": copy.deepcopy(self._running, memo)})
        return twin

    def listen(self, denoiser: nn.Module, sites: Iterable[Site], modules: Iterable[nn.Module]) -> list[RemovableHandle]:
        hooks = [denoiser.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for site, module in zip(sites, modules, strict=True):
            if site.where == "input":
                hooks.append(module.register_forward_pre_hook(functools.partial(self._input, site)))
            elif site.where == "output":
                hooks.append(module.register_forward_hook(functools.partial(self._output, site)))
        return hooks

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running.active:
            text = self._family.tokens.text(dict(zip(self._parameters, args, strict=False)) | kwargs)
            self._filled = isinstance(text, list)
            self._text = max(text) if isinstance(text, list) else text

    def _input(self, site: Site, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._running.active:
            self._see(site, args[0] if args else None)

    def _output(self, site: Site, module: nn.Module, args: Any, output: Any) -> None:
        if self._running.active:
            self._see(site, output[0] if isinstance(output, tuple) else output)

    def _see(self, site: Site, x: Any) -> None:
        running, tokens = self._running, self._family.tokens
        if not running.grids:  # its latents do not tell a size
            return
        uncounted = site.image_first and tokens.text is Tokens.text  # what follows the image there
        others = self._text if site.text_first or site.image_first else 0
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[0] == running.rows.total:
            image = x.shape[1] - others
            if image in running.grids:
                return
            if (uncounted or self._filled or running.followed) and image >= running.image_tokens > 0:
                return
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        grids = " or ".join(map(str, running.grids))
        asked = "the site, `text` and `grids` of its Tokens" if self._family.component else "`tokens`, `where`, `text` and `grid`"
        raise ValueError(
            f"tokens [{running.rows.total}, {others} + {grids}, channels] (rows, text and grid) were expected at {site.name!r} of "
            f"{self._family.name}, but there is {shape}; check {asked}"
        )
