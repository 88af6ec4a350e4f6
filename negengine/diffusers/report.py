"""What a run did: a setting that changed nothing must be visible."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from negengine.methods.base import Method

Stage = Literal["new", "running", "over", "failed", "late"]


@dataclass(frozen=True)
class Report:
    """Of one method, for the last run of a pipeline (or since :func:`negengine.apply` for a bare denoiser).

    Attributes:
        method: its name.
        family: model family.
        steps, active_steps: denoising steps, and those in which it was active. Samplers of second order (Heun) make two of a
            step that ``num_inference_steps`` counts.
        nothing: why its settings change nothing; None if they do.
        stage: of the run: ``"new"``, before the first; ``"running"``, so that the numbers grow; ``"over"``; ``"failed"``, if an
            error ended or refused it; or ``"late"``: the method was applied in the middle of a run, which is not its own.
    """

    method: str
    family: str
    steps: int
    active_steps: int
    nothing: str | None = dataclasses.field(default=None, kw_only=True)
    stage: Stage = dataclasses.field(default="over", kw_only=True)

    @property
    def idle_reason(self) -> str | None:
        """Why the last run changed nothing; None if it changed something, failed, is not over, or there was none."""
        if self.stage == "late":
            return "it was applied in the middle of a run, and begins with the next"
        if self.stage != "over" or not self.steps:
            return None
        return self.idle() if self.nothing is None else self.nothing

    def idle(self) -> str | None:
        """Why a run that is over changed nothing, if not for its settings alone."""
        return None if self.active_steps else "no step of the run lies in its window"

    def of_image(self, number: int) -> dict[str, Any]:
        """The numbers as JSON can hold them; of those that every image has, those of one image of the call."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["method"], fields["family"], fields["stage"]
        return {name: [row[number] for row in value] if isinstance(value, tuple) else value for name, value in fields.items()}

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, under keys that stay: the attributes, and ``idle_reason``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["nothing"]  # a part of the reason
        return json.loads(json.dumps(fields | {"idle_reason": self.idle_reason}))

    def told(self) -> str:
        """What it did, as a clause."""
        return f"active in {self.active_steps} of {self.steps} steps"

    def applied(self) -> str:
        """What there is before its first run, as a clause."""
        return "applied"

    def __str__(self) -> str:
        name = f"{self.method} on {self.family}"
        if self.stage == "late":
            return f"{name}: {self.applied()} in the middle of a run; it begins with the next"
        if self.stage == "new":
            return f"{name}: {self.applied()}, not run yet"
        if self.stage == "failed":
            return f"{name}: {self.told()}; then the run failed" if self.steps else f"{name}: the run failed before its first step"
        if self.stage == "running":
            return f"{name}: {self.told()}; the run goes on"
        done = f"{name}: {self.told()}"
        return done if self.idle_reason is None else f"{done}; it changed nothing: {self.idle_reason}"


@dataclass(frozen=True)
class NegToMeReport(Report):
    """Of NegToMe.

    Attributes:
        blocks: attention blocks that are listened to.
        active_blocks: of those, blocks that had something to merge.
        eligible_tokens: tokens that had a reference, summed over blocks and steps.
        merged_tokens: of those, tokens whose match exceeded the threshold.
        group_size: images per group; 0 before the first run.
        kernels: verdict on the Triton kernels for this run's device, and its age; None where they do not come into question.
        bank: whether the prompt under which a reference bank was recorded is that of the run; None without one.
    """

    blocks: int
    active_blocks: int
    eligible_tokens: int
    merged_tokens: int
    group_size: int
    kernels: str | None = None
    bank: str | None = None

    @property
    def merged_share(self) -> float:
        """Merged of eligible tokens, 0 … 1."""
        return self.merged_tokens / self.eligible_tokens if self.eligible_tokens else 0.0

    def idle(self) -> str | None:
        if self.merged_tokens:
            return None
        if not self.active_steps:
            return "no timestep of the run lies in the window; widen `timesteps`"
        if not self.eligible_tokens:
            if self.group_size == 1:
                return "every group has one image; raise num_images_per_prompt, or set `group_size` or a ReferenceImage"
            return "no selected block has a token grid of `min_grid`; lower it or select other `blocks`"
        return "no token's cosine exceeded `threshold`; lower it"

    def told(self) -> str:
        done = (
            f"active in {self.active_blocks} of {self.blocks} blocks and "
            f"{self.active_steps} of {self.steps} steps, merged {self.merged_share:.1%} of the tokens"
        )
        done = done if self.bank is None else f"{done}; references {self.bank}"
        return done if self.kernels is None else f"{done}; Triton kernels: {self.kernels}"

    def applied(self) -> str:
        return f"applied to {self.blocks} blocks"


@dataclass(frozen=True)
class DngReport(Report):
    """Of dynamic negative guidance.

    Attributes:
        p: estimate of how far each image belongs to what is avoided, ``[updates + 1][images]``: before the first step and after
            each.
        strength: the guidance scale ``scale * p / (1 - p)`` that it commands, likewise; the last one was not used any more.
        clamped: updates that left ``[p_min, p_max]`` and were clamped, over steps and images.
        unusable: updates that were not a number and left the estimate as it was.
    """

    p: tuple[tuple[float, ...], ...]
    strength: tuple[tuple[float, ...], ...]
    clamped: int
    unusable: int

    def idle(self) -> str | None:
        if len(self.p) > 1 and all(value == 0 for row in self.strength for value in row):
            return "`scale` is 0"
        return super().idle()

    def told(self) -> str:
        if not self.p or not self.p[0]:
            return super().told()
        first, last = self.p[0][0], self.p[-1]
        peak = max(value for row in self.strength[:-1] or self.strength for value in row)
        done = f"{super().told()}, posterior {first:.2g} -> {min(last):.2g} to {max(last):.2g}, strongest guidance {peak:.3g}"
        if self.clamped:
            done += f"; {self.clamped} updates were clamped"
        if self.unusable:
            done += f"; {self.unusable} updates were not a number"
        return done


@dataclass(frozen=True)
class NagReport(Report):
    """Of normalized attention guidance.

    Attributes:
        blocks: attention blocks that are guided.
        guides: whether its scale and alpha guide at all.
    """

    blocks: int
    guides: bool

    def idle(self) -> str | None:
        if self.active_steps:
            return None
        if not self.guides:
            return "a scale of 1 or an alpha of 0 guides nothing; raise it"
        return "no timestep of the run lies in the window; widen `timesteps`"

    def told(self) -> str:
        return f"guided {self.blocks} blocks in {self.active_steps} of {self.steps} steps"


@dataclass(frozen=True)
class IntervalReport(Report):
    """Of the guidance interval.

    Attributes:
        active_steps: steps that the pipeline would have guided and the interval leaves without guidance.
        guided_steps: steps that the pipeline guided.
    """

    guided_steps: int

    def idle(self) -> str | None:
        if self.active_steps:
            return None
        if not self.guided_steps:
            return "the pipeline guides no step of this run by itself (its guidance ended before, or a callback switched it off)"
        return "every step that the pipeline guides lies in the interval; narrow it"

    def told(self) -> str:
        return f"guided {self.guided_steps} of {self.steps} steps"


class Status:
    """The reports of all methods on a denoiser, in the order in which they were applied.

    ``status[negengine.NegToMe]`` is the report of one, and so is ``status["negtome"]``, by its short name; iterating gives all;
    ``print`` says them. Where there is one alone, its attributes can be asked for here: ``status(pipe).active_steps``.
    """

    def __init__(self, reports: Mapping[type[Method], Report]) -> None:
        self._reports = dict(reports)

    def __getitem__(self, kind: type[Method] | str) -> Any:
        """Raises KeyError for a method that is not applied."""
        for applied, report in self._reports.items():
            if kind in (applied, applied.name):
                return report
        there = ", ".join(f"{applied.__name__} ({applied.name!r})" for applied in self._reports)
        raise KeyError(
            f"no method {kind.__name__ if isinstance(kind, type) else repr(kind)} is applied; "
            f"there are reports of {there or 'no method'}, each under its class and its short name"
        )

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError where there is more than one report to ask, or it does not know."""
        if name.startswith("_"):
            raise AttributeError(name)
        if len(self) != 1:
            there = " and ".join(kind.__name__ for kind in self._reports)
            raise AttributeError(f"there are reports of {there}: ask one of them, such as status[negengine.NegToMe].{name}")
        return getattr(next(iter(self)), name)

    def __contains__(self, kind: object) -> bool:
        return any(kind in (applied, applied.name) for applied in self._reports)

    def __iter__(self) -> Iterator[Report]:
        return iter(self._reports.values())

    def __len__(self) -> int:
        return len(self._reports)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Short name of each method -> its report as JSON can hold it."""
        return {kind.name: report.as_dict() for kind, report in self._reports.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Status) and self._reports == other._reports

    def __hash__(self) -> int:
        return hash(tuple(self._reports.items()))

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__
