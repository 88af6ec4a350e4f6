"""Every variant, eager and compiled, with each attention backend."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from negengine.bench.whole.candidates import calibrated, variants
from negengine.bench.whole.rows import case, rows_of
from negengine.bench.whole.setting import WITHOUT, Setting
from negengine.bench.whole.subjects import Subject
from negengine.bench.whole.turns import Timed, take_turns
from negengine.diffusers.families import find_denoiser


@dataclass(frozen=True)
class Measured:
    """The rows of one setting; what was left out, as case and variant, and why."""

    rows: list[dict[str, Any]]
    left_out: dict[str, str]


def measure(setting: Setting, subject: Subject, say: Callable[[str], object] = lambda text: None) -> Measured:
    """Time every variant, eager first, then each way to compile, with each attention backend."""
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with torch.no_grad(), calibrated(setting, subject) as (threshold, published):
        found = list(variants(setting, subject, threshold, published))
        for compiled in setting.ways:
            for attention in setting.attention:
                suffix = "".join(f", {word}" for word in (compiled, attention) if word not in (None, "native"))
                refused: dict[str, str] = {}
                timed: dict[str, Timed] = {}
                with prepared(subject, compiled, attention) as refusal:
                    if refusal is None:
                        left = setting.seconds - (time.monotonic() - begun)
                        timed = take_turns(setting, subject, found, compiled, left, refused, suffix, say)
                    else:
                        refused = dict.fromkeys((WITHOUT, *(variant.name for variant in found)), refusal)
                left_out |= {f"{case(setting, subject)}: {name}{suffix}": reason for name, reason in refused.items()}
                if timed:
                    rows += rows_of(setting, subject, timed, compiled, attention, suffix)
    return Measured(rows, left_out)


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
