"""All that listens to one denoiser and its pipeline, for every method that is applied to them."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negengine.diffusers.effect import Call, Effect, overrides
from negengine.diffusers.families import Family, Site
from negengine.diffusers.listen import MethodListener
from negengine.diffusers.prompts import encoder
from negengine.diffusers.report import Status
from negengine.diffusers.rows import join
from negengine.diffusers.running import RunningCall

SCHEDULER_METHODS = ("set_timesteps", "set_begin_index", "scale_model_input", "step")


@dataclass
class Place:
    """A module that is listened to: ``heard`` holds the effects that do, each with its own spot, see :meth:`Effect.spot`."""

    site: Site
    heard: list[tuple[Effect[Any], Any]] = field(default_factory=list)


class Session:
    """The effects on one denoiser, and the hooks and listeners that drive them, from ``apply`` to ``remove``.

    What is known of the call that is running, and what the effects are told as it goes on, is in ``running``. The host's
    side is driven by the pipeline's and the scheduler's own calls, between the denoiser's forwards. The forward only reads:
    ``running``, and the effects.
    """

    def __init__(
        self,
        pipe: Any | None,
        denoiser: nn.Module,
        family: Family,
        effects: Sequence[Effect[Any]],
        scheduler: Any,
        running: RunningCall | None = None,
    ) -> None:
        """``running``: of the session in whose place this one comes, on the same pipeline."""
        bare = pipe is None
        self.family, self.effects = family, list(effects)
        self.scheduler: Any = None  # that is listened to
        self.running = running or RunningCall(
            self.effects, bare, unscheduled=bare and scheduler is None, announced=hasattr(pipe, "check_inputs")
        )
        self.running.change(self.effects)
        self.places = places(self.effects)
        self.awaiting = [effect for effect in self.effects if overrides(effect, "arrived")]
        self.editors = [effect for effect in self.effects if overrides(effect, "inputs")]
        joiners = [effect for effect in self.effects if effect.joining]
        self.joiners = sorted(joiners, key=lambda effect: not effect.places_rows_first)
        self.owners = [effect for effect in self.effects if overrides(effect, "prediction")]
        # weak, so that the table of sessions keeps no model alive
        self.pipe: Callable[[], Any] = (lambda: None) if pipe is None else weakref.ref(pipe)
        self.denoiser: Callable[[], Any] = weakref.ref(denoiser)
        self._inputs = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._hooks: list[RemovableHandle] = []
        self._modules: list[weakref.ref[nn.Module]] = []
        self._scheduler_listeners: list[MethodListener] = []
        self._pipe_listeners: list[MethodListener] = []
        self._attach(denoiser)
        self._follow(scheduler if pipe is None else pipe.scheduler)
        self._listen_to(pipe)
        if bare:
            self.running.decide() if scheduler is None else self.running.join()

    def _listen_to(self, pipe: Any | None) -> None:
        if pipe is not None:
            self._pipe_listeners = [
                MethodListener(pipe, name, heard)
                for name, heard in (
                    ("check_inputs", self._heard_check_inputs),
                    ("encode_prompt", self._heard_encode_prompt),
                    ("prepare_latents", self._heard_prepare_latents),
                    ("progress_bar", self._heard_progress_bar),
                    ("maybe_free_model_hooks", self._heard_end),
                )
                if hasattr(pipe, name)
            ]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Nothing is heard and no effect acts; afterwards all is as it was. The hooks stay, and compiled code with them."""
        running, scheduler = self.running, self.scheduler
        was_open = running.open
        for listener in self._scheduler_listeners + self._pipe_listeners:
            listener.remove()
        self._scheduler_listeners, self._pipe_listeners = [], []
        running.open = False
        running.decide_nothing()
        try:
            yield
        finally:
            running.open, self.scheduler = was_open, None
            self._follow(scheduler)
            self._listen_to(self.pipe())
            running.decide()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Nothing drives a copied denoiser: its hooks stay silent."""
        twin = copy.copy(self)
        twin.running = RunningCall([])
        twin.effects, twin.awaiting, twin.editors, twin.joiners, twin.owners = [], [], [], [], []
        return twin

    def detach(self) -> None:
        """Take every hook and listener off."""
        for hook in self._hooks:
            hook.remove()
        for listener in self._scheduler_listeners + self._pipe_listeners:
            listener.remove()
        self._hooks, self._scheduler_listeners, self._pipe_listeners = [], [], []

    @property
    def heard_places(self) -> set[tuple[str, str]]:
        """Every module that has a hook, and at which of its ends."""
        whole = {("", "input")} | ({("", "output")} if self.joiners or self.owners else set())
        return whole | {(place.site.path, place.site.where) for place in self.places}

    def status(self) -> Status:
        return self.running.status()

    # --- the denoiser --------------------------------------------------------------------------------------------

    def _attach(self, denoiser: nn.Module) -> None:
        modules = [denoiser.get_submodule(place.site.path) for place in self.places]
        self._modules = [weakref.ref(module) for module in modules]
        self._hooks = [denoiser.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)]
        if self.joiners or self.owners:
            self._hooks.append(denoiser.register_forward_hook(self._leave))
        for place, module in zip(self.places, modules, strict=True):
            site = place.site
            if site.where == "input":
                hook = module.register_forward_pre_hook(functools.partial(_site_input, self, place))
            elif site.where == "arguments":
                names = tuple(inspect.signature(module.forward).parameters)
                listener = functools.partial(_site_arguments, self, place, names)
                hook = module.register_forward_pre_hook(listener, with_kwargs=True)
            else:
                hook = module.register_forward_hook(functools.partial(_site_output, self, place, site.text_first))
            self._hooks.append(hook)

    def _reattach(self, denoiser: nn.Module) -> None:
        """Loading and unloading LoRA, fusing or quantising replaces modules: listen to those that are there now."""
        now = [denoiser.get_submodule(place.site.path) for place in self.places]
        if all(ref() is module for ref, module in zip(self._modules, now, strict=True)):
            return
        for hook in self._hooks:
            hook.remove()
        self._attach(denoiser)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = dict(zip(self._inputs, args, strict=False)) | kwargs
        changed = self.enter(inputs)
        return None if changed is inputs else ((), changed)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.running.active:
            return None
        if isinstance(output, Tensor):
            return self.leave(output)
        if isinstance(output, tuple):
            return (self.leave(output[0]), *output[1:])
        output.sample = self.leave(output.sample)
        return output

    def enter(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The denoiser is called with these inputs: the same, or others with conditioning edited and rows joined."""
        running, rows = self.running, self.running.rows
        size = self.family.latents.size(inputs)
        if size is not None and size != running.size:
            running.resize(size, self.family.tokens.grids(*size))
        running.text_tokens = self.family.tokens.text(inputs)
        if not running.active:
            return inputs
        conditioning = self.family.conditioning
        sample = inputs[conditioning.sample]
        rows.base = rows.total = len(sample)
        for effect in self.awaiting:
            if effect.active:
                effect.arrived(rows, sample.device)
        for effect in self.editors:
            if effect.active:
                inputs = effect.inputs(inputs, rows)
        joins = []
        for effect in self.joiners:
            wanted = effect.joins(inputs, rows) if effect.active else None
            effect.start = effect.stop = rows.total
            if wanted is not None:
                rows.total += len(wanted)
                effect.stop = rows.total
                joins.append(wanted)
        return join(inputs, joins, conditioning) if joins else inputs

    def leave(self, sample: Tensor) -> Tensor:
        """The denoiser's output without the joined rows, and with the prediction of the effect that owns it."""
        rows = self.running.rows
        base = sample[: rows.base] if rows.total > rows.base else sample
        for effect in self.owners:
            if effect.active:
                base = effect.prediction(base, sample[effect.start : effect.stop])
        return base

    def tokens(self, x: Tensor, place: Place) -> Tensor:
        """What the effects make of the tokens at a place: ``x`` itself where they changed it in place, or nothing."""
        for effect, spot in place.heard:
            if effect.active:
                changed = effect.tokens(x, spot, self.running.rows)
                x = x if changed is None else changed
        return x

    # --- the scheduler -------------------------------------------------------------------------------------------

    def _follow(self, scheduler: Any | None) -> None:
        if scheduler is self.scheduler:
            return
        for listener in self._scheduler_listeners:
            listener.remove()
        self.scheduler = self.running.clock.scheduler = scheduler
        self._scheduler_listeners = [
            MethodListener(scheduler, name, getattr(self, f"_heard_{name}"))
            for name in SCHEDULER_METHODS
            if hasattr(scheduler, name)
        ]

    def _heard_set_timesteps(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.running.schedule()

    def _heard_set_begin_index(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.running.move_to(arguments["begin_index"])

    def _heard_scale_model_input(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.running.refresh(arguments.get("timestep"))

    def _heard_step(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.running.step(arguments, result[0] if isinstance(result, tuple) else result.prev_sample)

    # --- the pipeline --------------------------------------------------------------------------------------------

    def _heard_check_inputs(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.running.announce()

    def _heard_encode_prompt(self, arguments: Mapping[str, Any], result: tuple[Any, ...]) -> None:
        running = self.running
        if running.silent or not running.encoding:
            return
        pipe, denoiser = self.pipe(), self.denoiser()
        present = getattr(pipe, self.family.component)
        if getattr(present, "_orig_mod", present) is not denoiser:
            raise RuntimeError(
                f"the pipeline's {self.family.component} was replaced after negengine.apply; call apply again (or remove)"
            )
        if self.joiners and getattr(pipe, "do_perturbed_attention_guidance", False):
            raise ValueError(
                "perturbed attention guidance parts the denoiser's batch into equal pieces, so that no method can join rows to it; "
                f"leave out pag_scale, or {', '.join(effect.settings.title for effect in self.joiners)}"
            )
        running.prompts += 1
        if running.prompts > 1 and hasattr(pipe, "check_inputs"):
            running.encoded_more()
            return
        self._reattach(denoiser)
        self._follow(pipe.scheduler)
        embeds = result[0]
        per_prompt = arguments.get("num_images_per_prompt") or 1
        inputs = functools.partial(self.family.conditioning.prompts, result)
        given = arguments.get("prompt_embeds")
        # FLUX's pipelines leave embeddings that they are given as they are: their rows stand for all images of a prompt
        images = len(embeds) * (per_prompt if given is not None and len(given) == len(embeds) else 1)
        encode = encoder(pipe, self.family, arguments, embeds, images, running.unheard)
        running.begin(Call(pipe, images, per_prompt, embeds.device, embeds.dtype, inputs, encode), denoiser)

    def _heard_prepare_latents(self, arguments: Mapping[str, Any], result: Any) -> None:
        pipe = self.pipe()
        latents = result[0] if isinstance(result, tuple) else result
        size = self.family.latents.prepared(pipe, arguments, latents)
        self.running.latents_prepared(pipe, size, self.family.tokens.grids(*size), latents.device, latents.dtype)

    def _heard_progress_bar(self, arguments: Mapping[str, Any], result: Any) -> None:
        """The loop runs within this bar, which is closed also when the loop fails."""
        if self.running.open and hasattr(result, "close"):
            listener = MethodListener(result, "close", lambda arguments, closed: self._loop_ended(listener))

    def _loop_ended(self, listener: MethodListener) -> None:
        listener.remove()
        self.running.end()

    def _heard_end(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.running.end()


def places(effects: Sequence[Effect[Any]]) -> list[Place]:
    """Every module that some effect wants to hear, each once."""
    found: dict[tuple[str, str], Place] = {}
    for effect in sorted(effects, key=lambda effect: effect.listens_last):
        for number, site in enumerate(effect.sites()):
            found.setdefault((site.path, site.where), Place(site)).heard.append((effect, effect.spot(number)))
    return list(found.values())


def _site_input(session: Session, place: Place, module: nn.Module, args: tuple[Any, ...]) -> Any:
    if session.running.active:
        x = session.tokens(args[0], place)
        return None if x is args[0] else (x, *args[1:])
    return None


def _site_output(
    session: Session, place: Place, text_first: bool, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    if session.running.active:
        session.tokens(output[:, session.running.text_tokens :] if text_first else output, place)


def _site_arguments(
    session: Session, place: Place, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not session.running.active:
        return None
    arguments = dict(zip(names, args, strict=False)) | kwargs
    for effect, spot in place.heard:
        if effect.active:
            arguments = effect.arguments(arguments, spot, session.running.rows)
    return (), arguments
