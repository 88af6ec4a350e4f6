"""Settings of negative token merging (NegToMe, arXiv 2412.01339)."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from negengine.ops import registry
from negengine.reference import MATCHINGS, MODES

if TYPE_CHECKING:
    from PIL import Image

Alpha = float | tuple[float, ...] | Callable[[float], float]


@dataclass(frozen=True)
class ReferenceImage:
    """A given picture that every image of the batch is pushed away from.

    Args:
        image: the picture. It is resized to the size that is generated.
        mask: white (> 0.5) where the picture is to be avoided, of the picture's size; all of it if None.
        noise: noise the picture to the current timestep (fixed generator) before the denoiser sees it; False leaves it
            clean, as the published code does by default.

    Raises:
        TypeError: ``image`` or ``mask`` is no ``PIL.Image``. ValueError: the mask has another size or is all black.
    """

    image: Image.Image
    mask: Image.Image | None = None
    noise: bool = True

    def __post_init__(self) -> None:
        from PIL import Image  # settings without a picture need no Pillow

        if not isinstance(self.image, Image.Image):
            raise TypeError(f"the reference picture must be a PIL image, got {type(self.image).__name__}")
        if not all(self.image.size):
            raise ValueError(f"the reference picture is empty: {self.image.size} (width, height)")
        if not isinstance(self.noise, bool):
            raise TypeError(f"noise must be True or False, got {self.noise!r}")
        if self.mask is None:
            return
        if not isinstance(self.mask, Image.Image):
            raise TypeError(f"the mask must be a PIL image, got {type(self.mask).__name__}")
        if self.mask.size != self.image.size:
            raise ValueError(f"the mask is {self.mask.size}, its picture {self.image.size} (width, height); make them equal")
        if max(self.mask.convert("L").tobytes()) <= 127:
            raise ValueError(
                "the mask is black everywhere, so nothing of the picture would be avoided; leave it out or paint it white"
            )


@dataclass(frozen=True, kw_only=True)
class NegToMe:
    """What NegToMe does, where and when. ``None`` takes the default of the model family.

    Args:
        alpha: how far a token is pushed away from its match: ``y = (1 + alpha) x - alpha r``; negative pulls towards it.
            A number, one number per image of a group, or a function of the timestep (1000 … 0) that returns a number.
        threshold: a token is merged where its best cosine exceeds this, in ``[-1, 1]``.
        timesteps: ``(low, high)``: merging is active while ``low <= timestep <= high``, of 1000.
        blocks: names of the attention blocks that merge: full names, leading parts, or globs.
        min_grid: blocks whose token grid has a side shorter than this are left alone.
        reference: ``"first"`` (image 0 of the group), ``"others"`` (all other images of the group), ``"previous"`` (those
            before this one), or one or more :class:`ReferenceImage`.
        matching: ``"paper"``, or ``"release"`` to reproduce images made with the published code.
        dropout: share of tokens left out at random, in ``[0, 1)``. seed: of the dropout and
            of the pictures' noise, below 2**32 in size.
        group_size: images per group; those of one prompt if None.
        search: precision of the search. backend: who computes it. See :func:`negengine.ops.negtome`.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    alpha: float | Sequence[float] | Callable[[float], float] | None = None
    threshold: float | None = None
    timesteps: tuple[float, float] | None = None
    blocks: Sequence[str] | None = None
    min_grid: int | None = None
    reference: str | ReferenceImage | Sequence[ReferenceImage] = "first"
    matching: str = "paper"
    dropout: float = 0.0
    seed: int = 0
    group_size: int | None = None
    search: str = "auto"
    backend: str | None = None

    def __post_init__(self) -> None:
        self._set("alpha", _alpha(self.alpha))
        if self.threshold is not None and not -1 <= _number("threshold", self.threshold) <= 1:
            raise ValueError(f"threshold is compared with a cosine and must lie in [-1, 1], got {self.threshold}")
        self._set("timesteps", _window(self.timesteps))
        self._set("blocks", _names(self.blocks))
        self._set("reference", _reference(self.reference))
        for name in ("min_grid", "group_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {MATCHINGS}, got {self.matching!r}")
        if self.matching == "release" and self.reference in ("others", "previous"):
            raise ValueError(
                f"matching='release' knows one reference image only, reference={self.reference!r} has several; "
                "use matching='paper' or reference='first'"
            )
        if self.matching == "release" and len(self.pictures) > 1:
            raise ValueError("matching='release' knows one reference picture only; use matching='paper' for several")
        if not 0 <= _number("dropout", self.dropout) < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        if abs(self.seed) >= 2**32:
            raise ValueError(f"seed must lie between -2**32 and 2**32, got {self.seed}")
        if self.search not in registry.SEARCHES:
            raise ValueError(f"search must be one of {registry.SEARCHES}, got {self.search!r}")
        if self.backend is not None:
            registry.known(self.backend)

    @property
    def pictures(self) -> tuple[ReferenceImage, ...]:
        """The given pictures; empty if the images of a group are each other's reference."""
        return self.reference if isinstance(self.reference, tuple) else ()

    def with_defaults(self, **defaults: object) -> NegToMe:
        """A copy in which every field that is None and named in ``defaults`` has that value."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)  # type: ignore[arg-type]

    def alphas(self, timestep: float, group_size: int) -> tuple[float, ...]:
        """``alpha`` of every image of a group at a timestep (of 1000)."""
        if callable(self.alpha):
            return (_number(f"alpha({timestep:g})", self.alpha(timestep)),) * group_size
        if isinstance(self.alpha, tuple):
            if len(self.alpha) != group_size:
                raise ValueError(f"alpha has {len(self.alpha)} values, one per image, but a group has {group_size} images")
            return self.alpha
        assert isinstance(self.alpha, float)
        return (self.alpha,) * group_size

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _alpha(value: object) -> Alpha | None:
    if value is None or callable(value):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError("alpha is an empty sequence; give one number per image of a group")
        return tuple(_number("alpha", a) for a in value)
    return _number("alpha", value)


def _window(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"timesteps must be (low, high), got {value!r}")
    low, high = (_number("timesteps", t) for t in value)
    if low > high:
        raise ValueError(f"the timestep window {low:g} … {high:g} is empty; give (low, high) with low <= high")
    if high < 0 or low > 1000:
        raise ValueError(f"the timestep window {low:g} … {high:g} lies outside 0 … 1000, so merging would never be active")
    return low, high


def _names(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"blocks must be a sequence of names, got {value!r}")
    if not value:
        raise ValueError("blocks is empty, so nothing would be merged; leave it out for the family's default")
    return tuple(value)


def _reference(value: object) -> str | tuple[ReferenceImage, ...]:
    if isinstance(value, str):
        if value not in MODES:
            raise ValueError(f"reference must be one of {MODES} or a ReferenceImage, got {value!r}")
        return value
    pictures = (value,) if isinstance(value, ReferenceImage) else value
    if not isinstance(pictures, Sequence) or not all(isinstance(p, ReferenceImage) for p in pictures):
        raise TypeError(f"reference must be one of {MODES}, a ReferenceImage or several, got {value!r}")
    if not pictures:
        raise ValueError("reference is an empty sequence of pictures")
    return tuple(pictures)
