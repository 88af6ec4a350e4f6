"""NegToMe on modules of which no family is known: a family is made on the spot, from what the caller says of their tokens."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negengine.diffusers.apply import apply, remove, status, when_removed
from negengine.diffusers.families import (
    Conditioning,
    Family,
    Grid,
    Latents,
    Site,
    Tokens,
    find_denoiser,
    forget_family,
    is_registered,
    register_family,
)
from negengine.diffusers.listen import Unpicklable
from negengine.diffusers.report import NegToMeReport
from negengine.methods import NegToMe, checks

Inputs = Mapping[str, Any]
_NUMBERS = itertools.count(1)
_DEFAULTS: dict[str, Any] = {"alpha": 0.9, "threshold": 0.65, "blocks": ("*",), "min_grid": 1}


class Attached:
    """NegToMe on a module, until :meth:`remove`, ``negengine.remove(module)`` or the end of a ``with``."""

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.module, self._family = module, family

    def status(self) -> NegToMeReport:
        """What it did since it was attached. Raises ValueError: it was removed."""
        if not is_registered(self._family):
            raise ValueError(f"NegToMe was removed from this {type(self.module).__name__}; attach it again")
        return status(self.module)[NegToMe]

    def remove(self) -> None:
        """Take it off; nothing of it remains. Does nothing the second time."""
        if is_registered(self._family):
            remove(self.module)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class _Hook(Unpicklable):
    """A hook of ours on the module."""

    def __init__(self, hear: Callable[..., None]) -> None:
        self._hear = hear

    def __call__(self, *args: Any) -> None:
        self._hear(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self


class _Config(dict[str, Any]):
    num_train_timesteps = 1000


class _Steps:
    """What stands for a scheduler where the module's calls tell their timestep: it lays out one, and steps once, for each call."""

    def __init__(self) -> None:
        self.config = _Config()
        self.timesteps = torch.zeros(1)

    def set_timesteps(self, timestep: float) -> None:
        self.timesteps = torch.tensor([timestep], dtype=torch.float64)

    def step(self, sample: Tensor) -> tuple[Tensor]:
        return (sample,)


def attach(
    module: nn.Module,
    settings: NegToMe,
    *,
    tokens: str | Sequence[str],
    grid: Grid | Callable[[Inputs], Grid],
    where: str = "output",
    text: int | Callable[[Inputs], int] = 0,
    text_first: bool = True,
    timestep: str | None = None,
    noisiest: float = 1000.0,
    cleanest: float = 0.0,
) -> Attached:
    """Put NegToMe on a module that is not of diffusers, or of no family that negengine knows.

    What is heard is copied before it is merged, so that others that read the same memory do not notice.

    Args:
        module: whose calls are one step of an image each, with a row per image; its first parameter has these rows.
        settings: with ``group_size``. What is None: alpha 0.9, threshold 0.65, all blocks, ``min_grid`` 1, and
            ``timesteps`` (0, 1000), or (900, 1000) with ``timestep``.
        tokens: names or globs (``"blocks.*.attn"``) of the submodules at which tokens ``[rows, tokens, channels]`` appear; of a
            tuple that a module returns, the first entry.
        grid: height and width of the image's tokens, or a function of the module's inputs by name (those that a call leaves out
            with their defaults) that returns them.
        where: ``"output"`` of these submodules, or their ``"input"`` (the first positional one).
        text: how many other tokens there are (text, classes, registers), or a function of the module's inputs.
        text_first: whether these stand before the image's tokens, or else behind them.
        timestep: name of the module's parameter that holds it, which is read on the host in each call; None: every call merges.
        noisiest, cleanest: its values at pure noise and at the clean image: 1000 and 0; 1 and 0 for models whose time runs from 1
            to 0, 0 and 1 where it runs the other way.

    Returns:
        A handle with ``status()`` and ``remove()``, for a ``with`` as well.

    Raises:
        TypeError, ValueError: what cannot work, with what would; nothing has been changed then.
    """
    parameters = _check(module, settings, where, timestep)
    of_1000 = _of_1000(noisiest, cleanest)
    checks.choice("text_first", text_first, (True, False))
    names = _select(module, (tokens,) if isinstance(tokens, str) else tuple(tokens))
    count_text = _asking(module, "text", text, _text) if callable(text) else _fixed(_text(text))
    size = _asking(module, "grid", grid, _grid) if callable(grid) else _fixed(_grid(grid))
    sites = [Site(name, name, where, text_first=text_first, image_first=not text_first, copied=True) for name in names]
    known = weakref.ref(module)
    family = Family(
        name=f"{type(module).__name__} (attached, {next(_NUMBERS)})",
        component="",
        pipelines=("a module by itself",),
        matches=lambda candidate: candidate is known(),
        tokens=Tokens(lambda _: sites, lambda height, width: {height * width: (height, width)}, count_text),
        latents=Latents(size=size),
        conditioning=Conditioning(sample=parameters[0], batched=()),
        defaults={"negtome": {**_DEFAULTS, "timesteps": (0, 1000) if timestep is None else (900, 1000)}},
    )
    register_family(family)
    steps = None if timestep is None else _Steps()
    try:
        apply(module, settings, scheduler=steps)
    except BaseException:
        forget_family(family)
        raise
    hooks = [] if steps is None else _following(module, steps, parameters, str(timestep), of_1000)
    when_removed(module, functools.partial(_end, family, hooks))
    weakref.finalize(module, forget_family, family)
    return Attached(module, family)


def _end(family: Family, hooks: Sequence[RemovableHandle]) -> None:
    """The method is taken off the module."""
    for hook in hooks:
        hook.remove()
    forget_family(family)


def _check(module: nn.Module, settings: NegToMe, where: str, timestep: str | None) -> list[str]:
    """The names of the module's parameters."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"attach takes a torch.nn.Module, got {type(module).__name__}; for a pipeline use negengine.apply")
    if not isinstance(settings, NegToMe):
        raise TypeError(f"attach takes NegToMe, got {settings!r}; other methods need a family (docs/families.md)")
    checks.choice("where", where, ("output", "input"))
    if _is_known(module):
        raise ValueError(
            f"negengine knows this {type(module).__name__}, or is attached to it; use negengine.apply, or negengine.remove first"
        )
    if timestep is None and (settings.timesteps not in (None, (0, 1000)) or callable(settings.alpha)):
        raise ValueError("a window of timesteps needs `timestep`, the name of the module's parameter that holds it")
    found = inspect.signature(type(module).forward).parameters
    parameters = [name for name, p in found.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    if not parameters:
        raise TypeError(f"the forward of {type(module).__name__} names no parameter; attach to the module that it calls")
    if timestep is not None and timestep not in found:
        raise ValueError(f"{type(module).__name__} has no parameter {timestep!r}; there are {', '.join(parameters)}")
    return parameters


def _is_known(module: nn.Module) -> bool:
    try:
        find_denoiser(module)
    except TypeError:
        return False
    return True


def _of_1000(noisiest: float, cleanest: float) -> Callable[[float], float]:
    noisy, clean = checks.number("noisiest", noisiest), checks.number("cleanest", cleanest)
    if noisy == clean:
        raise ValueError(
            f"noisiest and cleanest are the timestep's values at pure noise and at the clean image, and cannot both be {noisy:g}; "
            "for a time that runs from 0, which is noise, to 1 give noisiest=0, cleanest=1"
        )
    return lambda value: (value - clean) * 1000 / (noisy - clean)


def _complete(module: nn.Module, asked: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """A function of a call's inputs that sees also those that the call leaves to their defaults."""
    found = inspect.signature(type(module).forward).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in found if parameter.default is not parameter.empty}
    return lambda inputs: asked({**defaults, **inputs})


def _asking(module: nn.Module, name: str, asked: Callable[[Inputs], Any], read: Callable[[Any], Any]) -> Callable[[Inputs], Any]:
    """An argument that is a function of a call's inputs, with an error of its own where it fails."""
    complete, kind = _complete(module, asked), type(module).__name__  # a family keeps no module alive

    def ask(inputs: Inputs) -> Any:
        if torch.compiler.is_compiling():  # sizes may be symbols there
            return complete(inputs)
        try:
            return read(complete(inputs))
        except Exception as error:
            raise ValueError(
                f"`{name}` of negengine.attach, a function of the inputs of {kind} by name ({', '.join(inputs)}), "
                f"failed: {type(error).__name__}: {error}"
            ) from error

    return ask


def _fixed(value: Any) -> Callable[[Inputs], Any]:
    return lambda inputs: value


def _text(value: Any) -> int:
    return checks.count("text", value)


def _grid(value: Any) -> Grid:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"grid must be (height, width) of the image's tokens, or a function that returns it, got {value!r}")
    height, width = (checks.positive_integer("grid", side) for side in value)
    return height, width


def _select(module: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """In the module's own order; of a module that stands in several places, its first name.

    Raises:
        ValueError: a pattern that fits nothing, or some but not all places of a module: it is heard wherever it is called.
    """
    places = [(name, place) for name, place in module.named_modules(remove_duplicate=False) if name]
    names = [name for name, _ in places]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"no submodule of this {type(module).__name__} is named {pattern!r}; there are {', '.join(names[:12])}"
            )
    if not patterns:
        raise ValueError("tokens is empty, so nothing would be merged; give names of submodules")
    of_module: dict[nn.Module, list[str]] = {}
    for name, place in places:
        of_module.setdefault(place, []).append(name)
    found = []
    for alike in of_module.values():
        meant = [name for name in alike if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if meant and len(meant) < len(alike):
            raise ValueError(
                f"{', '.join(map(repr, alike))} are one module, which is heard wherever it is called, but `tokens` names it at "
                f"{', '.join(map(repr, meant))} alone; give `tokens` that name all of them"
            )
        found += meant[:1]
    return found


def _by_name(parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(parameters, args, strict=False)) | kwargs


def _following(
    module: nn.Module, steps: _Steps, parameters: Sequence[str], name: str, of_1000: Callable[[float], float]
) -> list[RemovableHandle]:
    """Tell the clock of every call."""
    given = _complete(module, lambda inputs: inputs.get(name))

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = given(_by_name(parameters, args, kwargs))
        if value is None:
            raise ValueError(f"{type(module).__name__} was called without {name!r}, which tells NegToMe where it is; pass it")
        told = value.flatten().tolist() if isinstance(value, Tensor) else [float(value)]
        if len(set(told)) > 1:
            raise ValueError(
                f"{type(module).__name__} was called at several timesteps ({name!r} runs from {min(told):g} to {max(told):g}), but "
                "NegToMe acts on all rows of a call or on none; call it with rows of one timestep, or attach without `timestep`"
            )
        steps.set_timesteps(of_1000(told[0]))

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        steps.step(output)

    before = module.register_forward_pre_hook(_Hook(enter), with_kwargs=True, prepend=True)
    return [before, module.register_forward_hook(_Hook(leave))]
