"""What is measured, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from negengine.methods import KINDS, Method

WITHOUT, PUBLISHED, AGAIN = "without", "published", "without (again)"
METHODS = tuple(name for name in KINDS if name != "dnp")  # DNP is two runs and a caption, not a method within one
COMPILED = ("blocks", "whole", "reduce-overhead")


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: name of an architecture; of others the pipeline is given.
        depth: of the architecture. size: pixels of a side.
        methods: by name; NegToMe also as the published algorithm.
        eager: as it is, not compiled. compiled: ways to compile, of :data:`COMPILED`.
        attention: backends of diffusers' attention, by the name in ``set_attention_backend``; ``"native"`` is PyTorch's.
        searches: of NegToMe: all that each backend has, instead of those that it chooses by itself.
        rounds: at most. seconds: no round begins after so many.
    """

    model: str
    depth: tuple[int, int] = (0, 0)
    size: int = 1024
    images: int = 4
    steps: int = 4
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    methods: tuple[str, ...] = ("negtome",)
    eager: bool = True
    compiled: tuple[str, ...] = ()
    attention: tuple[str, ...] = ("native",)
    searches: bool = False
    text_encoders: bool = False
    vae: bool = False
    rounds: int = 5
    seconds: float = 420.0

    def __post_init__(self) -> None:
        """Raises ValueError: no such way to compile, or neither eager nor compiled."""
        for name in self.compiled:
            if name not in COMPILED:
                raise ValueError(f"compiled must be of {', '.join(COMPILED)}, got {name!r}")
        if not self.ways:
            raise ValueError(f"nothing would be measured: neither eager nor compiled; name one of {', '.join(COMPILED)}")

    @property
    def ways(self) -> tuple[str | None, ...]:
        """What is measured in turn: None is eager."""
        return ((None,) if self.eager else ()) + self.compiled

    @property
    def groups(self) -> list[tuple[str | None, str]]:
        """Ways to compile and attention backends, in the order in which they are measured."""
        return [(compiled, attention) for compiled in self.ways for attention in self.attention]


@dataclass(frozen=True)
class Variant:
    """Methods on the pipeline, and what its call needs for them.

    Attributes:
        role: ``"without"``, ``"ours"`` or ``"published"``.
        window: between which timesteps it acts; None: always.
    """

    name: str
    role: str
    methods: tuple[Method, ...] = ()
    window: tuple[float, float] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def acts(self, timestep: float) -> bool:
        """Whether it does at this timestep."""
        return bool(self.methods) and (self.window is None or self.window[0] <= timestep <= self.window[1])
