"""Every variant, eager and compiled, with each attention backend."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import negengine
from negengine.bench.whole.candidates import calibrated, variants
from negengine.bench.whole.rows import case, rows_of
from negengine.bench.whole.setting import WITHOUT, Setting, Variant
from negengine.bench.whole.subjects import Subject, made, subject
from negengine.bench.whole.turns import Turns, take_turns
from negengine.diffusers.families import find_denoiser


@dataclass(frozen=True)
class Measured:
    """The rows of one setting, or of a part of it.

    Attributes:
        left_out: what was left out, as case and variant, and why.
        interrupted: the user stopped it after at least one whole round; nothing follows.
    """

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    interrupted: bool = False


def groups(setting: Setting, subject: Subject, say: Callable[[str], object] = lambda text: None) -> Generator[Measured, None, None]:
    """Time every variant, eager first, then each way to compile, with each attention backend: one result for each such group.

    Raises:
        KeyboardInterrupt: stopped before a round of a group was whole.
    """
    begun = time.monotonic()
    with torch.no_grad(), calibrated(setting, subject) as (threshold, published):
        found = list(variants(setting, subject, threshold, published))
        if setting.compiled and found:
            _apply_once(subject, found[0])
        for compiled, attention in setting.groups:
            suffix = "".join(f", {word}" for word in (compiled, attention) if word not in (None, "native"))
            with prepared(subject, compiled, attention) as refusal:
                if refusal is None:
                    left = setting.seconds - (time.monotonic() - begun)
                    turns = take_turns(setting, subject, found, compiled, left, suffix, say)
                else:
                    turns = Turns(refused=dict.fromkeys((WITHOUT, *(variant.name for variant in found)), refusal))
            rows = rows_of(setting, subject, turns.timed, compiled, attention, suffix) if turns.timed else []
            left_out = {f"{case(setting, subject)}: {name}{suffix}": reason for name, reason in turns.refused.items()}
            yield Measured(rows, left_out, turns.interrupted)
            if turns.interrupted:
                return


def cases(
    settings: Sequence[Setting], subjects: Sequence[Subject] | None, say: Callable[[str], object]
) -> Generator[Measured, None, None]:
    """:func:`groups` of several settings of one model, which share their time alike.

    Args:
        subjects: one for each setting; None: of an architecture, whose pipeline is made once for all.
    """
    begun = time.monotonic()
    there = made(settings[0]) if subjects is None else None
    for number, setting in enumerate(settings):
        left = (setting.seconds - (time.monotonic() - begun)) / (len(settings) - number)
        own = subject(setting, there) if subjects is None else subjects[number]
        if len(settings) > 1:
            say(case(setting, own))
        yield from groups(replace(setting, seconds=left), own, say)


def measure(setting: Setting, subject: Subject, say: Callable[[str], object] = lambda text: None) -> Measured:
    """As :func:`groups`, all in one."""
    found = list(groups(setting, subject, say))
    left_out = {name: reason for one in found for name, reason in one.left_out.items()}
    return Measured([row for one in found for row in one.rows], left_out, any(one.interrupted for one in found))


def check_attention(names: Sequence[str]) -> None:
    """Raises ValueError: no attention backend of diffusers has this name."""
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName
    except ImportError:  # an older diffusers
        known = {"native", "xformers"}
    else:
        known = {name.value for name in AttentionBackendName}
    for name in names:
        if name not in known:
            raise ValueError(f"--attention must be of {', '.join(sorted(known))}; got {name!r}")


def _apply_once(subject: Subject, variant: Variant) -> None:
    """The first ``apply`` of a process lets torch forget what was compiled before it: it comes before anything is."""
    with contextlib.suppress(ValueError, NotImplementedError):  # its loops will tell
        negengine.apply(subject.pipe, *variant.methods)
        negengine.remove(subject.pipe)


@contextlib.contextmanager
def prepared(subject: Subject, compiled: str | None, attention: str) -> Iterator[str | None]:
    """A ``with`` in which the denoiser is compiled and has an attention backend; gives the reason where it cannot."""
    denoiser: Any = find_denoiser(subject.pipe)[0]
    refusal = _set_attention(denoiser, attention) if attention != "native" else None
    if refusal is None and compiled == "blocks":
        denoiser.compile_repeated_blocks(fullgraph=True)
    elif refusal is None and compiled is not None:
        denoiser.compile(fullgraph=True, **({"mode": compiled} if compiled == "reduce-overhead" else {}))
    try:
        yield refusal
    finally:
        if compiled is not None:
            for module in denoiser.modules():
                module._compiled_call_impl = None
            torch.compiler.reset()
        if attention != "native" and refusal is None:
            _set_attention(denoiser, "native")


def _set_attention(denoiser: Any, name: str) -> str | None:
    """Why it cannot; None if it is set."""
    try:
        if hasattr(denoiser, "set_attention_backend"):
            denoiser.set_attention_backend(name)
        elif name == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()
        elif name == "native":
            denoiser.disable_xformers_memory_efficient_attention()
        else:
            return f"diffusers gives {type(denoiser).__name__} no attention backend {name!r}"
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as refusal:
        return " ".join(str(refusal).split())
    return None
