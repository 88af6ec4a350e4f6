"""What the settings of every method have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of one method: a frozen dataclass that refuses, when it is made, what cannot work.

    A subclass names itself and checks its fields in ``__post_init__``. It knows no pipeline and no operator's backend.

    Attributes:
        name: short, as on a command line: ``"negtome"``.
        title: as in a sentence or a table: ``"NegToMe"``.
        owns_prediction: whether the method decides the denoiser's final prediction; of those that do, a denoiser takes one.
        presets: settings by name, for :meth:`preset`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    owns_prediction: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    @classmethod
    def preset(cls, name: str, **changes: object) -> Self:
        """The settings of a preset, with ``changes`` in place of some of them or beside them.

        Raises:
            ValueError: there is no such preset. And what the class raises for a setting that cannot work.
        """
        if name not in cls.presets:
            known = f"there are {', '.join(map(repr, cls.presets))}" if cls.presets else "it has none"
            raise ValueError(f"unknown preset {name!r} of {cls.title}; {known}")
        return cls(**{**cls.presets[name], **changes})

    def with_defaults(self, **defaults: object) -> Self:
        """A copy in which every field that is None and named in ``defaults`` has that value."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def _set(self, name: str, value: object) -> None:
        """Stores a field's checked form, while the settings are made."""
        object.__setattr__(self, name, value)


def check_owners(kinds: Iterable[type[Method]]) -> None:
    """Raises ValueError where several methods would decide one denoiser's prediction."""
    owners = [kind.title for kind in kinds if kind.owns_prediction]
    if len(owners) > 1:
        raise ValueError(f"{' and '.join(owners)} would both decide the prediction; take one of them alone")
