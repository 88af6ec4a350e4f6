"""What the release added to a pipeline's call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from negengine.compat.arguments import with_defaults
from negengine.compat.assets import given_picture
from negengine.diffusers import apply, remove
from negengine.diffusers.apply import applied_to
from negengine.diffusers.effect import Effect
from negengine.methods import NegToMe, ReferenceImage

logger = logging.getLogger("negengine")


class ReleaseCall:
    """The call of one of the release's pipelines, on the pipeline of diffusers that comes after this class.

    Attributes:
        _defaults: a NegtomeArgs with the default values.
        _positional: names of the call's arguments in the release's order.
        _latents_a_side: height and width, in latents, of the places to which the release resizes a mask first.
    """

    _defaults: ClassVar[Any]
    _positional: ClassVar[tuple[str, ...]]
    _latents_a_side: ClassVar[int]

    _merging: Effect[NegToMe] | None = None  # what came of the last call that merged

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's call, with NegToMe if ``use_negtome``.

        Args:
            args, kwargs: the release's arguments in its order, and further ones of diffusers by name.
            use_negtome: whether to merge in this call; as in the release, the key of that name in ``negtome_args`` says nothing.
            negtome_args: the release's settings; an unknown key raises ValueError.

        Raises:
            TypeError: an argument that neither the release nor diffusers knows, or one that is given twice.
            ValueError: what cannot work, before the first step.
        """
        call = self._named(args, kwargs)
        use_negtome, given = call.pop("use_negtome", False), call.pop("negtome_args", None)
        for_diffusers = self._for_diffusers(call)
        settings = self._translate(with_defaults(self._defaults, given), call)  # also when unused: a wrong key is an error at once
        if use_negtome and isinstance(settings, str):
            logger.warning("NegToMe merges nothing in this call, as in the release: %s", settings)
        self._put(settings if use_negtome and isinstance(settings, NegToMe) else None)
        return super().__call__(**for_diffusers)  # type: ignore[misc]

    def _translate(self, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> NegToMe | str:
        """The settings for a call; or why it merges nothing."""
        raise NotImplementedError

    def _for_diffusers(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments as the pipeline of diffusers takes them."""
        raise NotImplementedError

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        name = type(self).__name__
        if len(args) > len(self._positional):
            raise TypeError(f"{name} takes {len(self._positional)} arguments by position, got {len(args)}")
        named = dict(zip(self._positional, args, strict=False))
        twice = sorted(set(named) & set(kwargs))
        if twice:
            raise TypeError(f"{name} got {', '.join(twice)} by position and by name")
        known = set(inspect.signature(super().__call__).parameters)  # type: ignore[misc]
        if "kwargs" in known:
            known = (known - {"kwargs"}) | {"callback", "callback_steps"}  # which diffusers takes from them
        unknown = sorted(set(kwargs) - set(self._positional) - known)
        if unknown:
            raise TypeError(f"{name} got the unknown arguments {', '.join(unknown)}, which neither the release nor diffusers uses")
        return {**named, **kwargs}

    def _reference(self, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> str | ReferenceImage:
        if not arguments["use_rag_assets"]:
            return "first"
        step = self.vae_scale_factor * self._latents_a_side  # type: ignore[attr-defined]
        height, width = (int(call.get(side) or self._default_side()) // step for side in ("height", "width"))
        return given_picture(arguments, (height, width), step, self.image_processor)  # type: ignore[attr-defined]

    def _default_side(self) -> int:
        return self.default_sample_size * self.vae_scale_factor  # type: ignore[attr-defined]

    def _put(self, settings: NegToMe | None) -> None:
        """See to it that the settings are applied, or that nothing is which an earlier call applied."""
        there = applied_to(self, NegToMe)
        ours = there is not None and there is self._merging
        if settings is None:
            self._merging = None
            if ours:
                remove(self, NegToMe)
        # what is equal stays, for the sake of compiled code; but pictures are looked at anew
        elif there is None or not ours or settings.pictures or there.settings != settings:
            apply(self, settings)
            self._merging = applied_to(self, NegToMe)

    def set_attn_processor(self) -> None:
        """For scripts that call it: there is no attention processor to set, since the engine listens to the denoiser."""
