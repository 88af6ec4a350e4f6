"""``apply``, ``remove`` and ``status``: putting a method on a pipeline, and taking it off again."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negengine.diffusers.families import Family, Site, find_denoiser
from negengine.diffusers.listen import MethodListener
from negengine.diffusers.report import Status
from negengine.diffusers.run import Run
from negengine.methods import NegToMe
from negengine.ops import Verdict, registry, verdicts
from negengine.ops.establish import settle

Target = TypeVar("Target")
SCHEDULER_METHODS = ("set_timesteps", "set_begin_index", "scale_model_input", "step")

_applied: weakref.WeakKeyDictionary[nn.Module, Applied] = weakref.WeakKeyDictionary()
_driven: weakref.WeakKeyDictionary[Any, Applied] = weakref.WeakKeyDictionary()  # by pipeline


def apply(target: Target, settings: NegToMe, *, scheduler: Any = None) -> Target:
    """Put NegToMe on a pipeline or a denoiser. Only this instance changes; applying again replaces the settings.

    Args:
        target: a diffusers pipeline, or its denoiser. For a denoiser, give ``settings.group_size`` and either the
            ``scheduler`` that is stepped beside it or ``timesteps=(0, 1000)``.
        settings: what to do; None fields take the defaults of the model family.
        scheduler: for a bare denoiser only; a pipeline's own is followed, also when it is replaced.

    Returns:
        ``target``.

    Raises:
        TypeError: a target of no known family, or settings of no known method.
        ValueError: settings that cannot work on this target; nothing has been changed then.
    """
    if not isinstance(settings, NegToMe):
        raise TypeError(f"settings must be a negengine.NegToMe, got {type(settings).__name__}")
    denoiser, family = find_denoiser(target)
    for kind in type(target).__mro__:
        if kind.__name__ in family.unsupported:
            raise TypeError(
                f"negengine does not support {type(target).__name__}: {family.unsupported[kind.__name__]}. "
                f"Of {family.name} it knows {', '.join(family.pipelines)}"
            )
    settings = settings.with_defaults(**family.defaults)
    pipe = None if isinstance(target, nn.Module) else target
    if pipe is None:
        _check_bare(settings, scheduler)
    elif scheduler is not None:
        raise ValueError("a pipeline's own scheduler is followed; `scheduler` is for a bare denoiser")
    elif settings.pictures and getattr(pipe, "vae", None) is None:
        raise ValueError("reference pictures are encoded by the pipeline's VAE, but this pipeline has none")
    sites = select(list(family.sites(denoiser)), settings.blocks or (), family)
    kernels = []
    if settings.backend is None:
        devices = {parameter.device for parameter in denoiser.parameters()}
        kernels = _prove_kernels(denoiser, sites, settings, devices, _dtype(denoiser))
    known = {site.path for site in _applied[denoiser].sites} if denoiser in _applied else set()
    remove(target)
    if {site.path for site in sites} - known:
        _forget_compiled(target, denoiser, family)
    _applied[denoiser] = applied = Applied(pipe, denoiser, family, settings, sites, scheduler)
    applied.run.kernels = kernels
    if pipe is not None:
        _driven[pipe] = applied
    return target


def remove(target: Target) -> Target:
    """Take the method off; nothing of it remains. Does nothing if there is none. Returns ``target``."""
    denoiser, _ = find_denoiser(target)
    for applied in (_applied.pop(denoiser, None), _driven.pop(target, None)):  # the latter: its denoiser was replaced
        if applied is not None:
            applied.detach()
    return target


def _forget_compiled(target: Any, denoiser: nn.Module, family: Family) -> None:
    """Compiled code does not look for hooks that came after it (torch._dynamo's skip_nnmodule_hook_guards)."""
    given = target if isinstance(target, nn.Module) else getattr(target, family.component)
    wrapped = given is not denoiser  # by torch.compile(module)
    if wrapped or any(module._compiled_call_impl is not None for module in denoiser.modules()):
        torch.compiler.reset()


def applied_to(target: Any) -> Applied | None:
    """What is applied to a pipeline now; None after ``remove``, or after ``apply`` to another that shares its denoiser."""
    applied = _driven.get(target)
    return applied if applied is not None and _applied.get(find_denoiser(target)[0]) is applied else None


def status(target: Any) -> Status:
    """What the method did in the last run of ``target``; ``print`` it.

    Raises:
        ValueError: nothing is applied to ``target``.
    """
    denoiser, _ = find_denoiser(target)
    if denoiser not in _applied:
        raise ValueError("no method is applied; call negengine.apply first")
    return _applied[denoiser].run.status()


def select(sites: list[Site], patterns: Sequence[str], family: Family) -> list[Site]:
    """The sites whose names are, begin with, or match one of the patterns.

    Raises:
        ValueError: a pattern that selects nothing; names what there is.
    """

    def fits(name: str, pattern: str) -> bool:
        return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)

    for pattern in patterns:
        if not any(fits(site.name, pattern) for site in sites):
            parts = sorted({".".join(site.name.split(".")[:2]) for site in sites})
            raise ValueError(
                f"no attention block of this {family.name} denoiser is named {pattern!r}; there are {', '.join(parts)}"
            )
    return [site for site in sites if any(fits(site.name, pattern) for pattern in patterns)]


def _prove_kernels(
    denoiser: nn.Module, sites: Sequence[Site], settings: NegToMe, devices: Iterable[torch.device], dtype: torch.dtype
) -> list[Verdict]:
    """On GPUs the kernels prove themselves before they are first used."""
    modules = [(site.where, denoiser.get_submodule(site.path)) for site in sites]
    channels = {getattr(module, "in_features" if where == "input" else "out_dim", 0) for where, module in modules}
    return settle(devices, dtype, settings.search, settings.matching, channels)


def _dtype(denoiser: nn.Module) -> torch.dtype:
    """What the denoiser computes in: quantised weights are of another dtype."""
    return next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _check_bare(settings: NegToMe, scheduler: Any) -> None:
    if settings.group_size is None:
        raise ValueError("a bare denoiser does not tell which images share a prompt; set NegToMe(group_size=...)")
    if settings.pictures:
        raise ValueError("reference pictures need the pipeline's VAE; apply to the pipeline")
    everywhere = settings.timesteps == (0, 1000) and not callable(settings.alpha)
    if scheduler is None and not everywhere:
        raise ValueError(
            "a bare denoiser does not tell the timestep; give apply(..., scheduler=...), or NegToMe(timesteps=(0, 1000)) "
            "with a constant alpha"
        )


class Applied:
    """A method on a denoiser: the listeners, and the run that they drive."""

    def __init__(
        self,
        pipe: Any | None,
        denoiser: nn.Module,
        family: Family,
        settings: NegToMe,
        sites: list[Site],
        scheduler: Any | None,
    ) -> None:
        self.family, self.sites = family, sites
        self.run = Run(settings, family, len(sites), unscheduled=pipe is None and scheduler is None)
        # weak, so that the table of applied methods keeps no model alive
        self._pipe: Callable[[], Any] = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._denoiser: Callable[[], Any] = weakref.ref(denoiser)
        self._inputs = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._hooks: list[RemovableHandle] = []
        self._modules: list[weakref.ref[nn.Module]] = []
        self._scheduler: Any = None
        self._scheduler_listeners: list[MethodListener] = []
        self._pipe_listeners: list[MethodListener] = []
        self._attach(denoiser)
        self._follow(scheduler if pipe is None else pipe.scheduler)
        if pipe is not None:
            self.run.open = False
            self._pipe_listeners = [
                MethodListener(pipe, "encode_prompt", self._prompts_encoded),
                MethodListener(pipe, "prepare_latents", self._latents_prepared),
                MethodListener(pipe, "maybe_free_model_hooks", lambda arguments, result: self.run.finish()),
            ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for listener in self._scheduler_listeners + self._pipe_listeners:
            listener.remove()
        self._hooks, self._scheduler_listeners, self._pipe_listeners = [], [], []

    # --- the denoiser --------------------------------------------------------------------------------------------

    def _attach(self, denoiser: nn.Module) -> None:
        modules = [denoiser.get_submodule(site.path) for site in self.sites]
        self._modules = [weakref.ref(module) for module in modules]
        self._hooks = [denoiser.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)]
        if self.run.pictures:
            self._hooks.append(denoiser.register_forward_hook(self._leave))
        for number, (site, module) in enumerate(zip(self.sites, modules, strict=True)):
            if site.where == "input":
                hook = module.register_forward_pre_hook(functools.partial(_merge_input, self.run, number))
            else:
                hook = module.register_forward_hook(functools.partial(_merge_output, self.run, number, site.text_first))
            self._hooks.append(hook)

    def _reattach(self, denoiser: nn.Module) -> None:
        """Loading and unloading LoRA, fusing or quantising replaces modules: listen to those that are there now."""
        if all(ref() is denoiser.get_submodule(site.path) for ref, site in zip(self._modules, self.sites, strict=True)):
            return
        for hook in self._hooks:
            hook.remove()
        self._attach(denoiser)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = dict(zip(self._inputs, args, strict=False)) | kwargs
        joined = self.run.enter(inputs)
        return None if joined is None else ((), joined)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.run.leave(output[0]), *output[1:])
        output.sample = self.run.leave(output.sample)
        return output

    # --- the scheduler -------------------------------------------------------------------------------------------

    def _follow(self, scheduler: Any | None) -> None:
        if scheduler is self._scheduler:
            return
        for listener in self._scheduler_listeners:
            listener.remove()
        self._scheduler = scheduler
        self._scheduler_listeners = [
            MethodListener(scheduler, name, getattr(self, f"_heard_{name}"))
            for name in SCHEDULER_METHODS
            if hasattr(scheduler, name)
        ]

    def _heard_set_timesteps(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.run.schedule(self._scheduler)

    def _heard_set_begin_index(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.run.move_to(arguments["begin_index"])

    def _heard_scale_model_input(self, arguments: Mapping[str, Any], result: Any) -> None:
        position = position_of(arguments.get("timestep"), self._scheduler.timesteps)
        if position is not None and position != self.run.position:
            self.run.move_to(position)

    def _heard_step(self, arguments: Mapping[str, Any], result: Any) -> None:
        position = position_of(arguments.get("timestep"), self._scheduler.timesteps)
        self.run.stepped(self.run.position if position is None else position)

    # --- the pipeline --------------------------------------------------------------------------------------------

    def _prompts_encoded(self, arguments: Mapping[str, Any], result: tuple[Tensor, ...]) -> None:
        pipe, denoiser = self._pipe(), self._denoiser()
        present = getattr(pipe, self.family.component)
        if getattr(present, "_orig_mod", present) is not denoiser:
            raise RuntimeError(
                f"the pipeline's {self.family.component} was replaced after negengine.apply; call apply again (or remove)"
            )
        self._reattach(denoiser)
        self._follow(pipe.scheduler)
        embeds = result[0]
        settings = self.run.settings
        registry.choose(settings.backend, embeds.device, embeds.dtype, settings.search)  # raises before the first step
        if settings.backend is None:
            self.run.kernels = _prove_kernels(denoiser, self.sites, settings, [embeds.device], embeds.dtype)
            verdicts.pin()
        images = arguments.get("num_images_per_prompt") or 1
        self.run.begin(images, len(embeds), embeds.device)

    def _latents_prepared(self, arguments: Mapping[str, Any], result: Any) -> None:
        pipe = self._pipe()
        latents = result[0] if isinstance(result, tuple) else result
        size = latents.shape[-2:] if latents.ndim == 4 else _packed_size(pipe, arguments)
        self.run.set_size(tuple(size))
        if self.run.pictures:
            self.run.pictures.prepare_masks(self.run.grids.values(), latents.device)
            self.run.pictures.encode(pipe, tuple(size), latents.device, latents.dtype)
            self.run.move_to(self.run.position)


def _packed_size(pipe: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of packed latents, from the image size in the call that prepared them."""
    step = pipe.vae_scale_factor * 2
    return 2 * (int(arguments["height"]) // step), 2 * (int(arguments["width"]) // step)


def position_of(timestep: Any, table: Tensor) -> int | None:
    """Where in ``table`` a timestep that was taken from it lies, told by its address: no read from the device."""
    if not isinstance(timestep, Tensor) or timestep.ndim:
        return None
    if timestep.untyped_storage().data_ptr() != table.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - table.storage_offset()) // table.stride(0)


def _merge_input(run: Run, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    if run.active:
        run.merge(args[0], number)


def _merge_output(run: Run, number: int, text_first: bool, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if run.active:
        run.merge(output[:, run.text_tokens :] if text_first else output, number)
