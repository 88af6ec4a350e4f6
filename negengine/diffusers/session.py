"""All that listens to one denoiser and its pipeline, for every method that is applied to them."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negengine.diffusers.caches import InnerListener, answered
from negengine.diffusers.callers import calling, within_a_call
from negengine.diffusers.described import ExpectedTokens, as_inputs
from negengine.diffusers.effect import Call, Effect, overrides
from negengine.diffusers.encoded import OTHER_PROMPTS, Encoded
from negengine.diffusers.exporting import is_exporting
from negengine.diffusers.families import Family, is_built_in
from negengine.diffusers.joint import behind
from negengine.diffusers.listen import MethodListener, Unpicklable
from negengine.diffusers.masks import MIXED, mixed
from negengine.diffusers.places import Place, at_arguments, at_input, at_output, modules_at, places
from negengine.diffusers.prompts import encoder
from negengine.diffusers.report import Status
from negengine.diffusers.rows import divide, here, join
from negengine.diffusers.running import RunningCall

logger = logging.getLogger("negengine")
SCHEDULER_METHODS = ("set_timesteps", "set_begin_index", "scale_model_input", "step")


class Session(Unpicklable):
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
        siblings: list[Session] | None = None,
    ) -> None:
        """``running``: of the session in whose place this one comes, on the same pipeline. ``siblings``: all on this denoiser."""
        bare = self.bare = pipe is None
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
        self.joiners = sorted(joiners, key=lambda effect: (not effect.branches, not effect.places_rows_first))
        self.owners = [effect for effect in self.effects if overrides(effect, "prediction")]
        # weak, so that the table of sessions keeps no model alive
        self.pipe: Callable[[], Any] = (lambda: None) if pipe is None else weakref.ref(pipe)
        self.denoiser: Callable[[], Any] = weakref.ref(denoiser)
        self._inputs = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._hooks: list[RemovableHandle | InnerListener] = []
        self._modules: list[tuple[weakref.ref[nn.Module], bool]] = []  # and whether it is answered for
        self._scheduler_listeners: list[MethodListener] = []
        self._pipe_listeners: list[MethodListener] = []
        self._encoded: Encoded | None = None  # prompts of a call whose images are not counted yet
        self._unseen: Encoded | None = None  # those that the denoiser is to be called with first
        self.siblings = [] if siblings is None else siblings
        self.siblings.append(self)
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
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.running = copy.deepcopy(self.running, memo)  # that of its hooks, too
        twin.effects, twin.awaiting, twin.editors, twin.joiners, twin.owners = [], [], [], [], []
        twin.siblings = []
        return twin

    def detach(self) -> None:
        """Take every hook and listener off."""
        for hook in self._hooks:
            hook.remove()
        for listener in self._scheduler_listeners + self._pipe_listeners:
            listener.remove()
        self._hooks, self._scheduler_listeners, self._pipe_listeners = [], [], []
        if self in self.siblings:
            self.siblings.remove(self)

    def status(self) -> Status:
        running, pipe = self.running, self.pipe()
        if running.open and not running.looping and pipe is not None and not within_a_call(pipe):
            running.end(failed=True)  # it has raised before its first step, of which nobody heard
        return running.status()

    # --- the denoiser --------------------------------------------------------------------------------------------

    def _attach(self, denoiser: nn.Module) -> None:
        modules = modules_at(denoiser, [place.site for place in self.places])
        self._modules = [(weakref.ref(module), answered(module)) for module in modules]
        self._hooks = [denoiser.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)]
        if self.joiners or self.owners:
            self._hooks.append(denoiser.register_forward_hook(self._leave))
        if not is_built_in(self.family):
            expected = ExpectedTokens(self.running, self.family, denoiser)
            self._hooks += expected.listen(denoiser, [place.site for place in self.places], modules)
        for place, module in zip(self.places, modules, strict=True):
            site = place.site
            hook: RemovableHandle | InnerListener
            if site.where == "input":
                hook = module.register_forward_pre_hook(functools.partial(at_input, self.running, self, place))
            elif site.where == "arguments":
                names = tuple(inspect.signature(module.forward).parameters)
                listener = functools.partial(at_arguments, self.running, self, place, names)
                hook = module.register_forward_pre_hook(listener, with_kwargs=True)
            else:
                listener = functools.partial(at_output, self.running, self, place)
                hook = InnerListener(module, listener) if answered(module) else module.register_forward_hook(listener)
            self._hooks.append(hook)

    def _reattach(self, denoiser: nn.Module) -> None:
        """Loading and unloading LoRA, fusing, quantising and step caches change modules: listen to those that are there now."""
        now = modules_at(denoiser, [place.site for place in self.places])
        known = zip(self._modules, now, strict=True)
        if all(ref() is module and was == answered(module) for (ref, was), module in known):
            return
        for hook in self._hooks:
            hook.remove()
        self._attach(denoiser)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_exporting():
            self._check_export()
        if not torch.compiler.is_compiling():
            pipe = self.pipe()
            if pipe is not None and not calling(pipe, self.family.component):
                if here.running is self.running:
                    here.running = None
                return None
        inputs = dict(zip(self._inputs, args, strict=False)) | kwargs
        changed = self.enter(inputs)
        if changed is inputs:
            return None
        # what was positional stays so, since other hooks may look there
        return tuple(changed.pop(name) for name in self._inputs[: len(args)]), changed

    def _check_export(self) -> None:
        """Raises RuntimeError for methods that need a pipeline's call or random numbers: a program of tensors has neither."""
        methods = [effect.settings for effect in self.effects]
        if not all(effect.unscheduled for effect in self.effects):
            raise RuntimeError(
                "an exported denoiser knows no pipeline and no timestep: apply NegToMe(group_size=..., timesteps=(0, 1000)) to "
                "the denoiser itself; export it with the method for the steps that merge, and without for the others"
            )
        if any(getattr(settings, "dropout", 0) for settings in methods):
            raise RuntimeError("an exported denoiser would leave out the same tokens in every call; export it with dropout=0")

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.running.active or here.running is not self.running:
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
        self._find_images(inputs)
        if not running.active:
            return inputs
        here.running, here.rows = running, rows  # other sessions on this denoiser rest, and leave them alone
        if not hasattr(self.scheduler, "scale_model_input") and not torch.compiler.is_compiling():
            for effect in self.effects:  # nothing else tells of the call, as flow-matching samplers do not scale its input
                if effect.active:
                    effect.refresh()
        conditioning = self.family.conditioning
        sample = inputs[conditioning.sample]
        rows.base = rows.drawn = rows.total = len(sample)
        lists, given = conditioning.lists, inputs
        if lists is not None and self._unseen is not None and not torch.compiler.is_compiling():
            self._unseen.check(inputs[lists.texts])
            self._unseen = None
        if lists is None or not any(effect.active or effect.steady for effect in (*self.editors, *self.joiners)):
            inputs = self._with_rows(inputs)
        else:
            inputs = lists.scatter(self._with_rows(lists.gather(inputs)))
        for effect in self.awaiting:
            if effect.active or effect.steady:
                effect.arrived(given, rows, sample[0].device)
        return inputs

    def _with_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        rows, conditioning = self.running.rows, self.family.conditioning
        for effect in self.editors:
            if effect.active:
                inputs = effect.inputs(inputs, rows)
        for effect in self.joiners:
            wanted = effect.joins(inputs, rows) if effect.active or effect.steady else None
            effect.start = effect.stop = rows.total
            if wanted is not None:
                inputs = join(inputs, wanted, conditioning, rows.total)
                effect.stop = rows.total = rows.total + len(wanted)
                rows.drawn = rows.total if effect.branches else rows.drawn
        if rows.total > rows.base:
            inputs = divide(inputs, conditioning, rows) if rows.divided else inputs
            self._find_images(inputs)
        return inputs

    def _find_images(self, inputs: Mapping[str, Any]) -> None:
        """Where the image tokens of this call are."""
        running, tokens = self.running, self.family.tokens
        text, sample = tokens.text(inputs), inputs[self.family.conditioning.sample]
        placed = behind(text, running.image_tokens, sample.device) if isinstance(text, list) else text
        running.first_image_token = placed
        running.followed = tokens.followed and sample.shape[1] > running.image_tokens > 0

    def leave(self, sample: Any) -> Any:
        """The denoiser's output without the joined rows, and with the prediction of the effect that owns it."""
        rows, lists, negated = self.running.rows, self.family.conditioning.lists, self.family.latents.negated
        owners = [effect for effect in self.owners if effect.active]
        if owners and lists is not None:
            sample = lists.read(sample)
        sample = rows.collect(sample) if rows.divided else sample
        if self.running.followed:  # the pipeline drops the others, which no method may take for the image's
            sample = sample[:, : self.running.image_tokens]
        base = sample[: rows.base] if rows.total > rows.base else sample
        for effect in owners:
            own = sample[effect.start : effect.stop]
            base = -effect.prediction(-base, -own) if negated else effect.prediction(base, own)
        return lists.write(base) if owners and lists is not None else base

    def tokens(self, x: Tensor, place: Place) -> Tensor:
        """What the effects make of the tokens at a place: ``x`` itself where they changed it in place, or nothing."""
        rows = here.rows
        y = rows.collect(x) if rows.divided else x
        for effect, spot in place.heard:
            if effect.active:
                changed = effect.tokens(y, spot, rows)
                y = y if changed is None else changed
        return x.copy_(rows.divide(y)) if rows.divided else y

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
        if self._encoded is not None:
            self._encoded.laid_out = True
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
        with running.refusing():
            self._check_call(pipe, denoiser)
        perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
        if perturbed:
            with running.refusing():
                self._check_perturbed(pipe.pag_applied_layers)
        running.rows.parts = 2 + pipe.do_classifier_free_guidance if perturbed else 1
        running.prompts += 1
        if mixed(self.family.conditioning, arguments, result):
            logger.warning(MIXED, type(pipe).__name__)
        if running.prompts > 1 and hasattr(pipe, "check_inputs"):
            running.encoded_more()
            running.encoded_negatives(result)
            return
        self._reattach(denoiser)
        self._follow(pipe.scheduler)
        if self.family.conditioning.counted == "latents":
            self._encoded = Encoded(type(pipe).__name__, arguments, result)
            return
        rows = len(result[0])
        per_prompt = arguments.get("num_images_per_prompt") or 1
        given = arguments.get("prompt_embeds")
        # FLUX's pipelines leave embeddings that they are given as they are: their rows stand for all images of a prompt
        self._begin(arguments, result, rows * (per_prompt if given is not None and len(given) == rows else 1), per_prompt)
        if self.family.conditioning.cfg == "calls" and arguments.get("do_classifier_free_guidance"):
            running.encoded_more()  # both branches at once

    def _check_call(self, pipe: Any, denoiser: nn.Module) -> None:
        """Raises RuntimeError, ValueError: a denoiser that is another now, or guidance of a kind that a method cannot follow."""
        present = getattr(pipe, self.family.component)
        if getattr(present, "_orig_mod", present) is not denoiser:
            raise RuntimeError(
                f"the pipeline's {self.family.component} was replaced after negengine.apply; call apply again (or remove)"
            )
        perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
        unfit = [effect.settings.title for effect in self.effects if effect.tells_branches]
        if unfit and perturbed:
            raise ValueError(
                "perturbed attention guidance has rows that are neither conditional nor unconditional, so that no method can tell "
                f"its branches apart; leave out pag_scale, or {', '.join(unfit)}"
            )

    def _check_perturbed(self, layers: Iterable[str]) -> None:
        """Raises ValueError: blocks are heard before a projection to which perturbed attention guidance brings part by part."""
        layers = list(layers)
        for place in self.places:
            name = place.site.name
            if place.site.where == "input" and any(re.search(layer, name) for layer in layers):
                raise ValueError(
                    f"perturbed attention guidance projects the parts of its batch one by one in the block {name!r}, where "
                    f"{place.heard[0][0].settings.title} cannot tell which rows it hears; leave out pag_scale, or these blocks "
                    f"(`blocks`; pag_applied_layers has {', '.join(layers)})"
                )

    def _begin(self, arguments: Mapping[str, Any], encoded: tuple[Any, ...], images: int, per_prompt: int) -> None:
        """A call has encoded its prompts, and is known to draw so many images."""
        running, embeds = self.running, encoded[0]
        encode = encoder(self.pipe, self.family, arguments, embeds, images, images // per_prompt, running.unheard)
        inputs = functools.partial(as_inputs, self.family, self.family.conditioning.prompts, encoded)
        with running.refusing():
            running.take_over([session.running for session in self.siblings if session is not self])
        branches = sum(effect.branches for effect in self.effects)
        device, dtype = embeds[0].device, embeds[0].dtype
        guided = bool(getattr(self.pipe(), "do_classifier_free_guidance", arguments.get("do_classifier_free_guidance")))
        running.begin(Call(self.pipe, images, per_prompt, guided, branches, device, dtype, inputs, encode), self.denoiser())
        running.encoded_negatives(self.family.conditioning.negative_part(encoded))

    def _counted(self, encoded: Encoded, images: int) -> None:
        """The latents tell how many images the call draws; its timesteps may be laid out."""
        self._encoded, self._unseen = None, encoded
        self._begin(encoded.arguments, encoded.result, images, encoded.per_prompt(images))
        if encoded.laid_out:
            self.running.schedule()
            self.running.move_to(self.scheduler.begin_index or 0)

    def _heard_prepare_latents(self, arguments: Mapping[str, Any], result: Any) -> None:
        pipe = self.pipe()
        latents = result[0] if isinstance(result, tuple) else result
        if self._encoded is not None:
            self._counted(self._encoded, len(latents))
        size = self.family.latents.prepared(pipe, arguments, latents)
        self.running.latents_prepared(pipe, size, self.family.tokens.grids(*size), latents.device, latents.dtype)

    def _heard_progress_bar(self, arguments: Mapping[str, Any], result: Any) -> None:
        """The loop runs within this bar, which is closed also when the loop fails."""
        self.running.loop(self.denoiser())
        if self.family.conditioning.counted == "latents" and not self.running.open:
            with self.running.refusing():
                raise ValueError(OTHER_PROMPTS.format(type(self.pipe()).__name__))
        if self.running.open and hasattr(result, "close"):
            around = sys.exc_info()[1]  # the whole call may be made in somebody's `except`
            listener = MethodListener(result, "close", lambda arguments, closed: self._loop_ended(listener, around))

    def _loop_ended(self, listener: MethodListener, around: BaseException | None) -> None:
        listener.remove()
        self.running.end(failed=sys.exc_info()[1] not in (None, around))

    def _heard_end(self, arguments: Mapping[str, Any], result: Any) -> None:
        self.running.end()
