"""Rows of a result file, from the loops of the variants."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from negengine.bench.footprint import footprint
from negengine.bench.variants import dtype_name
from negengine.bench.whole.setting import AGAIN, WITHOUT, Setting, Variant
from negengine.bench.whole.subjects import Subject
from negengine.bench.whole.turns import Timed
from negengine.interleave import Timing

EXTRAPOLATED = (
    "time without a method scaled with the operations of the forward, what is added scaled with those of the search, each from the "
    "measured depth to the whole model; the paper's number of steps"
)


def depth_name(setting: Setting, subject: Subject) -> str:
    architecture = subject.architecture
    return "full" if architecture is None or setting.depth == architecture.full else "+".join(map(str, setting.depth))


def case(setting: Setting, subject: Subject) -> str:
    """All that the loops of its variants have in common, so that their times can be compared."""
    name = f"{setting.model} {depth_name(setting, subject)} {subject.size} x {subject.size}, {setting.images} images, "
    name += f"{dtype_name(setting.dtype)}, {setting.steps} steps"
    inside = (("text encoders", setting.text_encoders), ("VAE", setting.vae))
    return ", ".join([name, *(f"with {what}" for what, there in inside if there)])


def rows_of(
    setting: Setting, subject: Subject, timed: Mapping[str, Timed], compiled: str | None, attention: str, suffix: str
) -> list[dict[str, Any]]:
    base = timed[WITHOUT]
    against = Timing(tuple(own.whole / of_base.whole for own, of_base in zip(timed[AGAIN].loops, base.loops, strict=True)))
    noise = {"noise": abs(against.median - 1), "noise_p10": against.percentile(10) - 1, "noise_p90": against.percentile(90) - 1}
    about = {
        "case": case(setting, subject),
        "model": setting.model,
        "depth": depth_name(setting, subject),
        "size": subject.size,
        "images": setting.images,
        "dtype": dtype_name(setting.dtype),
        "steps": len(base.loops[0].steps),
        "compiled": compiled,
        "attention": attention,
        "text_encoders": setting.text_encoders or subject.architecture is None,
        "vae": setting.vae,
    }
    rows = []
    for name, one in timed.items():
        if name == AGAIN:
            continue
        variant, timing = one.variant, Timing(tuple(loop.whole for loop in one.loops))
        active = [variant.acts(t) for t in one.loops[0].timesteps]
        steps = [loop.steps for loop in one.loops]
        over = Timing(tuple(own.whole / of_base.whole for own, of_base in zip(one.loops, base.loops, strict=True)))
        own = {
            "variant": name + suffix,
            "role": variant.role,
            "method": variant.methods[0].name if variant.methods else None,
            **timing.summary(),
            "active": active,
            "step_seconds": [list(loop) for loop in steps],
            "active_step": _median(steps, active, True),
            "inactive_step": _median(steps, active, False),
            "overhead": over.median - 1,
            "overhead_p10": over.percentile(10) - 1,
            "overhead_p90": over.percentile(90) - 1,
            **noise,
            "overhead_active_step": _over_steps(steps, [loop.steps for loop in base.loops], active),
            "merged_share": one.merged_share,
            "peak_bytes": one.peak_bytes,
            "computed_bytes": _computed(subject, variant),
            "gpu": one.gpu,
            "graphs": None if compiled is None else _graphs(one, timed[AGAIN] if one is base else None),
        }
        rows.append(about | own | {"full": _full(setting, subject, one, base, active)})
    return rows


def _graphs(one: Timed, again: Timed | None) -> dict[str, int]:
    return {"graphs": one.graphs, "recompiles": one.recompiles + (again.recompiles if again is not None else 0)}


def _median(steps: Sequence[Sequence[float]], active: Sequence[bool], wanted: bool) -> float | None:
    found = [seconds for loop in steps for seconds, acts in zip(loop, active, strict=True) if acts == wanted]
    return statistics.median(found) if found else None


def _over(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds, each of which times both, so that a drift of the machine cancels."""
    return statistics.median(own / of_base for own, of_base in zip(seconds, base, strict=True)) - 1


def _over_steps(steps: Sequence[Sequence[float]], base: Sequence[Sequence[float]], active: Sequence[bool]) -> float | None:
    """Of active steps over the same steps of the base."""
    pairs = [
        (own, of_base)
        for loop, of_loop in zip(steps, base, strict=True)
        for own, of_base, acts in zip(loop, of_loop, active, strict=True)
        if acts
    ]
    return _over(*zip(*pairs, strict=True)) if pairs else None


def _computed(subject: Subject, variant: Variant) -> int | None:
    if subject.computed is None or (variant.methods and variant.methods[0].name != "negtome"):
        return None
    return subject.computed.published if variant.role == "published" else subject.computed.peak


def _full(setting: Setting, subject: Subject, one: Timed, base: Timed, active: Sequence[bool]) -> dict[str, Any] | None:
    """The whole model's loop at the paper's number of steps, where another was measured."""
    architecture, computed = subject.architecture, subject.computed
    if architecture is None or computed is None or (setting.depth == architecture.full and setting.steps == architecture.steps):
        return None
    if one.variant.methods and (not any(active) or one.variant.methods[0].name != "negtome"):
        return None
    whole = footprint(architecture, architecture.full, setting.size, setting.images, setting.dtype)
    step = statistics.median(seconds for loop in base.loops for seconds in loop.steps) * whole.flops / computed.flops
    without, added = architecture.steps * step, 0.0
    if one.variant.methods:
        pairs = [
            own - of_base
            for loop, of_loop in zip(one.loops, base.loops, strict=True)
            for own, of_base, acts in zip(loop.steps, of_loop.steps, active, strict=True)
            if acts
        ]
        added = architecture.active * statistics.median(pairs) * whole.search_flops / computed.search_flops
    return {
        "depth": "full",
        "steps": architecture.steps,
        "active": architecture.active,
        "loop": without + added,
        "without": without,
        "overhead": added / without,
        "how": EXTRAPOLATED,
    }
