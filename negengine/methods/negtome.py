"""Settings of negative token merging (NegToMe, arXiv 2412.01339)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from negengine.methods import checks
from negengine.methods.bank import ReferenceBank
from negengine.methods.base import Method
from negengine.methods.pictures import as_shown
from negengine.ops import registry
from negengine.reference import MATCHINGS, MODES

if TYPE_CHECKING:
    from PIL import Image

Alpha = float | tuple[float, ...] | Callable[[float], float]


@dataclass(frozen=True)
class ReferenceImage:
    """A given picture that every image of the batch is pushed away from.

    Args:
        image: the picture, turned as its EXIF data says it is shown. It is resized to the size that is generated. What is
            transparent in it is not avoided.
        mask: white (> 0.5) where the picture is to be avoided, of the size that the picture is shown in; all of it if None. Of
            a picture with transparent parts it becomes what is white here and not transparent there.
        noise: noise the picture to the current timestep (fixed generator, the same noise for every picture) before the denoiser
            sees it; False leaves it clean, as the published code does by default.

    Raises:
        TypeError: ``image`` or ``mask`` is no ``PIL.Image``. ValueError: a mode that does not say which value is white (``"I"``,
            ``"F"``), or that Pillow does not convert; the mask has another size or is all black, or the picture is transparent
            wherever it would be avoided.
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
        checks.flag("noise", self.noise)
        object.__setattr__(self, "image", as_shown(self.image, "the reference picture"))
        if self.mask is not None:
            self._check_mask(self.mask)
        if self.image.has_transparency_data:
            object.__setattr__(self, "mask", self._opaque())

    def _check_mask(self, mask: Image.Image) -> None:
        from PIL import Image

        if not isinstance(mask, Image.Image):
            raise TypeError(f"the mask must be a PIL image, got {type(mask).__name__}")
        mask = as_shown(mask, "the mask")
        object.__setattr__(self, "mask", mask)
        if mask.size != self.image.size:
            raise ValueError(f"the mask is {mask.size}, its picture {self.image.size} (width, height); make them equal")
        if max(mask.convert("L").tobytes()) <= 127:
            raise ValueError(
                "the mask is black everywhere, so nothing of the picture would be avoided; leave it out or paint it white"
            )

    def _opaque(self) -> Image.Image | None:
        """The mask without what is transparent in the picture."""
        from PIL import ImageChops

        opacity = self.image.convert("RGBA").getchannel("A")
        if min(opacity.tobytes()) == 255:
            return self.mask
        left = opacity if self.mask is None else ImageChops.darker(opacity, self.mask.convert("L"))
        if max(left.tobytes()) <= 127:
            raise ValueError("the picture is transparent wherever it would be avoided; give one that shows something there")
        return left


@dataclass(frozen=True, kw_only=True)
class NegToMe(Method):
    """What NegToMe does, where and when. ``None`` takes the default of the model family.

    Args:
        alpha: how far a token is pushed away from its match: ``y = (1 + alpha) x - alpha r``; negative pulls towards it.
            A number, one number per image of a group, or a function of the timestep (1000 … 0) that returns a number.
        threshold: a token is merged where its best cosine exceeds this, in ``[-1, 1]``.
        timesteps: ``(low, high)``: merging is active while ``low <= timestep <= high``, of 1000.
        blocks: names of the attention blocks that merge: full names, leading parts, or globs.
        min_grid: blocks whose token grid has a side shorter than this are left alone.
        reference: ``"first"`` (image 0 of the group), ``"others"`` (all other images of the group), ``"previous"`` (those
            before this one), one or more :class:`ReferenceImage`, or one or more :class:`ReferenceBank`.
        matching: ``"paper"``, or ``"release"`` to reproduce images made with the published code.
        dropout: share of tokens left out at random, in ``[0, 1)``. seed: of the dropout and
            of the pictures' noise, below 2**32 in size.
        group_size: images per group; those of one prompt if None.
        search: precision of the search. backend: who computes it. See :func:`negengine.ops.negtome`.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "negtome"
    title: ClassVar[str] = "NegToMe"

    alpha: float | Sequence[float] | Callable[[float], float] | None = None
    threshold: float | None = None
    timesteps: tuple[float, float] | None = None
    blocks: Sequence[str] | None = None
    min_grid: int | None = None
    reference: str | ReferenceImage | ReferenceBank | Sequence[ReferenceImage] | Sequence[ReferenceBank] = "first"
    matching: str = "paper"
    dropout: float = 0.0
    seed: int = 0
    group_size: int | None = None
    search: str = "auto"
    backend: str | None = None

    def __post_init__(self) -> None:
        self._set("alpha", _alpha(self.alpha))
        if self.threshold is not None and not -1 <= checks.number("threshold", self.threshold) <= 1:
            raise ValueError(f"threshold is compared with a cosine and must lie in [-1, 1], got {self.threshold}")
        if self.timesteps is not None:
            self._set("timesteps", checks.window(self.timesteps, "merging"))
        if self.blocks is not None:
            self._set("blocks", checks.blocks(self.blocks, "merged"))
        self._set("reference", _reference(self.reference))
        for name in ("min_grid", "group_size"):
            if (value := getattr(self, name)) is not None:
                checks.positive_integer(name, value)
        checks.choice("matching", self.matching, MATCHINGS)
        if self.matching == "release" and self.reference in ("others", "previous"):
            raise ValueError(
                f"matching='release' knows one reference image only, reference={self.reference!r} has several; "
                "use matching='paper' or reference='first'"
            )
        if self.matching == "release" and len(self.pictures) > 1:
            raise ValueError("matching='release' knows one reference picture only; use matching='paper' for several")
        if self.matching == "release" and len(self.banks) > 1:
            raise ValueError("matching='release' knows one reference bank only; use matching='paper' for several")
        for recorded in self.banks:
            if recorded.about.matching != self.matching:
                raise ValueError(
                    f"{recorded.path} was recorded for matching={recorded.about.matching!r}, and these settings have "
                    f"matching={self.matching!r}; make them equal, or record it again"
                )
        checks.share("dropout", self.dropout)
        checks.seed(self.seed)
        checks.choice("search", self.search, registry.SEARCHES)
        if self.backend is not None:
            registry.known(self.backend)

    @property
    def pictures(self) -> tuple[ReferenceImage, ...]:
        """The given pictures; empty if the images of a group are each other's reference."""
        return tuple(r for r in self.reference if isinstance(r, ReferenceImage)) if isinstance(self.reference, tuple) else ()

    @property
    def banks(self) -> tuple[ReferenceBank, ...]:
        """The recorded assets; empty if there are none."""
        return tuple(r for r in self.reference if isinstance(r, ReferenceBank)) if isinstance(self.reference, tuple) else ()

    def alphas(self, timestep: float, group_size: int) -> tuple[float, ...]:
        """``alpha`` of every image of a group at a timestep (of 1000)."""
        if callable(self.alpha):
            return (checks.number(f"alpha({timestep:g})", self.alpha(timestep)),) * group_size
        if isinstance(self.alpha, tuple):
            if len(self.alpha) != group_size:
                raise ValueError(f"alpha has {len(self.alpha)} values, one per image, but a group has {group_size} images")
            return self.alpha
        assert isinstance(self.alpha, float)
        return (self.alpha,) * group_size


def _alpha(value: object) -> Alpha | None:
    if value is None or callable(value):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError("alpha is an empty sequence; give one number per image of a group")
        return tuple(checks.number("alpha", a) for a in value)
    return checks.number("alpha", value)


def _reference(value: object) -> str | tuple[ReferenceImage | ReferenceBank, ...]:
    if isinstance(value, str):
        if value not in MODES:
            raise ValueError(f"reference must be one of {MODES} or a ReferenceImage (or a ReferenceBank), got {value!r}")
        return value
    given = (value,) if isinstance(value, ReferenceImage | ReferenceBank) else value
    if not isinstance(given, Sequence) or not all(isinstance(r, ReferenceImage | ReferenceBank) for r in given):
        raise TypeError(f"reference must be one of {MODES}, a ReferenceImage or several (or ReferenceBanks), got {value!r}")
    if not given:
        raise ValueError("reference is an empty sequence of pictures")
    if len({type(r) for r in given}) > 1:
        raise TypeError("reference has pictures and banks; record the pictures too, or give the pictures of the banks")
    return tuple(given)
