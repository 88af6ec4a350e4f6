"""What the plug-in costs the host, call by call: ``python -m negengine.bench.host --results out``.

Real denoisers, so small that a forward is the host's work and little else, run with NegToMe while it rests, and while it merges
with one part after another left out. Every hook of a block is timed where the model calls it: between the model's own work, which
leaves less of it in the processor's caches than calls in a row do.

Variants take turns, one forward each per round. With ``--before CHECKOUT`` another state of the code takes turns with this one,
each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import negengine
from negengine import ops, reference
from negengine.bench.variants import ALPHA, THRESHOLD
from negengine.diffusers.apply import applied_to
from negengine.diffusers.effects.posterior import Posterior
from negengine.diffusers.session import Session
from negengine.interleave import Timing
from negengine.ops import cpu, guidance, registry
from negengine.ops.negtome import as_alpha, as_threshold

IMAGES, TOKENS, TEXT, WIDTH = 4, 8, 2, 8
EMPTY, RESTING, HOOK, EFFECT, OPERATOR, BACKEND = "empty", "inactive", "hook", "effect", "operator", "backend"
PARTS = (RESTING, HOOK, EFFECT, OPERATOR, BACKEND)  # each but the first with those before it
IN_A_ROW = "calls in a row"
CALLS = 200  # in a row make one measurement: a clock's own cost vanishes
NOW, BEFORE = "now", "before"
Seconds = dict[str, dict[str, float]]  # case -> variant -> of one call


# --- what is measured --------------------------------------------------------------------------------------------


def flux(blocks: int = 4) -> tuple[nn.Module, dict[str, Any]]:
    """A transformer of so many joint and as many single blocks, and the inputs of a forward."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=WIDTH,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    return model.eval(), {
        "hidden_states": torch.randn(IMAGES, TOKENS, 4),
        "encoder_hidden_states": torch.randn(IMAGES, TEXT, WIDTH),
        "pooled_projections": torch.randn(IMAGES, WIDTH),
        "timestep": torch.full((IMAGES,), 0.95),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def sdxl(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    """A UNet of one level with so many layers in each of its transformers, and the inputs of a forward."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(WIDTH,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=1,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=layers,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        cross_attention_dim=WIDTH,
    )
    return model.eval(), {
        "sample": torch.randn(IMAGES, 4, 2, TOKENS // 2),
        "timestep": torch.tensor(900),
        "encoder_hidden_states": torch.randn(IMAGES, TEXT, WIDTH),
        "added_cond_kwargs": {"text_embeds": torch.randn(IMAGES, WIDTH), "time_ids": torch.randn(IMAGES, 6)},
    }


DENOISERS = {"flux": flux, "sdxl": sdxl}


class Subject:
    """A denoiser, and NegToMe in all its blocks and every step."""

    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.denoiser, self._inputs = DENOISERS[name]()
        self.name, self.device = name, device
        self.settings = negengine.NegToMe(timesteps=(0, 1000), group_size=IMAGES, blocks=None, min_grid=1)
        negengine.apply(self.denoiser, self.settings)
        self.blocks = negengine.status(self.denoiser)[negengine.NegToMe].blocks
        negengine.remove(self.denoiser)

    def forward(self) -> None:
        self.denoiser(**self._inputs, return_dict=False)

    @contextlib.contextmanager
    def put(self, variant: str) -> Iterator[None]:
        """A ``with`` in which the next forwards are those of a variant."""
        negengine.apply(self.denoiser, self.settings)
        effect: Any = applied_to(self.denoiser, negengine.NegToMe)
        try:
            with contextlib.ExitStack() as stack:
                if variant == RESTING:
                    _session(effect, self.denoiser).running.decide_nothing()
                elif variant == HOOK:
                    stack.enter_context(mock.patch.object(effect, "tokens", nothing))
                elif variant == EFFECT:
                    stack.enter_context(mock.patch.object(ops, "negtome_", lambda x, *arguments, **named: x))
                elif variant == OPERATOR:
                    stack.enter_context(idle(self.device))
                elif variant == BACKEND:
                    stack.enter_context(unsearched(self.device))
                yield
        finally:
            negengine.remove(self.denoiser)

    def round(self) -> dict[str, float]:
        """Seconds of a hook of each variant, the median over the blocks of a forward; each after a forward that nobody times."""
        seconds = {}
        for variant in (EMPTY, *PARTS):
            with self.put(variant):
                self.forward()
                seconds[variant] = statistics.median(self._hooks_timed(variant == EMPTY))
        return seconds

    def _hooks_timed(self, empty: bool) -> list[float]:
        """Seconds of every hook of the blocks in one forward; of empty ones, what the clock takes itself."""
        found: list[int] = []

        def stopped(hook: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                begun = time.perf_counter_ns()
                result = hook(*arguments)
                found.append(time.perf_counter_ns() - begun)
                return result

            return call

        for name, module in self.denoiser.named_modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks) if name else ():
                for number, hook in hooks.items():
                    hooks[number] = stopped(nothing if empty else hook)
        with collecting_nothing():
            self.forward()
        assert len(found) == self.blocks
        return [1e-9 * each for each in found]


def nothing(*arguments: Any) -> None:
    """What stands in for a part that is left out; a mock would take time of its own."""


def _session(effect: Any, denoiser: nn.Module) -> Session:
    from negengine.diffusers.apply import _of

    return next(session for session in _of(denoiser) if effect in session.effects)


@contextlib.contextmanager
def collecting_nothing() -> Iterator[None]:
    """A ``with`` without garbage collection, which falls to whoever happens to run."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def timed(call: Callable[[], object]) -> float:
    """Seconds of one of many calls in a row."""
    with collecting_nothing():
        begun = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - begun) / CALLS


@contextlib.contextmanager
def idle(device: str) -> Iterator[None]:
    """The backends that a device has by itself are chosen as ever, and do nothing."""
    dtype = torch.get_default_dtype()
    usual = registry.choose(None, torch.device(device), dtype, "auto")
    assert usual.guidance is not None
    sums = torch.zeros(3, IMAGES, dtype=torch.float64, device=device)
    resting = dataclasses.replace(
        usual,
        run=nothing,
        bound=None,
        guidance=dataclasses.replace(usual.guidance, guide=nothing, evidence=lambda call: sums, nag=nothing),
    )
    with mock.patch.dict(registry._BACKENDS, {usual.name: resting}):
        registry.changed()
        yield
    registry.changed()


def unsearched(device: str) -> contextlib.AbstractContextManager[object]:
    """A backend prepares its call; on a CPU it makes none, on a GPU launching is a part of it."""
    if device == "cpu":
        return mock.patch.object(cpu, "_native", nothing)
    return contextlib.nullcontext()


# --- calls in a row ----------------------------------------------------------------------------------------------


def operators(device: str) -> dict[str, float]:
    """Seconds of each operator's call around a backend that does nothing, and of NegToMe's with the kernels of the device.

    On four images of 16 tokens; alpha and threshold are ``"tensors"`` made once, as by the plug-in, or ``"numbers"``.
    """
    x, z = torch.randn(4, 16, 8, device=device), torch.randn(4, 16, 8, device=device)
    table = reference.group_references("first", 4, 4)
    given = {"stats": torch.zeros(3, dtype=torch.int64, device=device), "disjoint": True, "table": table.flatten().tolist()}
    merge = functools.partial(ops.negtome_, x, table.to(device))
    forms = {"tensors": (as_alpha(ALPHA, x), as_threshold(THRESHOLD, x)), "numbers": (ALPHA, THRESHOLD)}
    merges = {form: functools.partial(merge, *pair, **given) for form, pair in forms.items()}
    strength, means = torch.ones(4, dtype=torch.float64, device=device), torch.ones(4, dtype=torch.float64, device=device)
    calls = {
        **{f"negtome_, {form}": call for form, call in merges.items()},
        "nag_": functools.partial(guidance.nag_, x, z, 5.0, 2.5, 0.25),
        "guide": functools.partial(guidance.guide, x, z, strength),
        "evidence": functools.partial(guidance.evidence, x, z, x, z, means),
    }
    with idle(device):
        seconds = {name: timed(call) for name, call in calls.items()}
    return seconds | {f"negtome_, {form}, with kernels": timed(call) for form, call in merges.items()}


Recorded = dict[str, Callable[[], object]]


@contextlib.contextmanager
def recorded(*doors: tuple[str, type, str]) -> Iterator[Recorded]:
    """The last call of each door by its label, while a pipeline draws; to be made again."""
    found: Recorded = {}

    def listening(label: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any) -> Any:
            found[label] = functools.partial(method, *arguments)
            return method(*arguments)

        return call

    with contextlib.ExitStack() as stack:
        for label, owner, name in doors:
            stack.enter_context(mock.patch.object(owner, name, listening(label, getattr(owner, name))))
        yield found


class Guided:
    """A pipeline with NAG, or with DNG, of which the calls within the plug-in are repeated after its first step."""

    def __init__(self, device: str) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        torch.manual_seed(0)
        with torch.device(device):
            transformer, inputs = flux(1)
        absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"))
        self.device = device
        self.pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)
        self.pipe.set_progress_bar_config(disable=True)
        self._prompts = {
            "prompt_embeds": inputs["encoder_hidden_states"],
            "pooled_prompt_embeds": inputs["pooled_projections"],
        }
        embeddings = negengine.Embeddings(*(-value for value in self._prompts.values()))
        nag = negengine.NormalizedAttentionGuidance(negative_prompt=embeddings)
        dng = negengine.DynamicNegativeGuidance(prompt=embeddings, surrogate="ancestral")
        self._methods = (
            (nag, (("NAG, a block", Session, "tokens"),)),
            (dng, (("DNG, the prediction", Session, "leave"), ("DNG, the update", Posterior, "stepped"))),
        )

    def round(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        with idle(self.device):
            for settings, doors in self._methods:
                negengine.apply(self.pipe, settings)
                with recorded(*doors) as found:

                    def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                        if step == 0:
                            seconds.update({label: timed(call) for label, call in dict(found).items()})
                        return {}

                    self._draw(ended)
                negengine.remove(self.pipe)
        return seconds

    def _draw(self, ended: Callable[..., dict[str, Any]]) -> None:
        # images of 4 x 2 tokens
        self.pipe(**self._prompts, height=64, width=32, num_inference_steps=2, output_type="latent", callback_on_step_end=ended)


def hooks(subject: Subject) -> dict[str, float]:
    """Seconds of a call of the hook itself, by the module's own list, while the method rests and while it is asked for nothing."""
    seconds = {}
    for variant, label in ((RESTING, "hook, inactive"), (HOOK, "hook, active, nothing to do")):
        with subject.put(variant):
            subject.forward()
            module = subject.denoiser.get_submodule("transformer_blocks.0.attn.to_out.0")
            (hook,) = module._forward_pre_hooks.values()
            x = torch.randn(IMAGES, TOKENS, WIDTH, device=subject.device)
            seconds[label] = timed(functools.partial(hook, module, (x,)))
    return seconds


class Bench:
    """All that is measured, made once."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.subjects = [Subject(name, device) for name in DENOISERS]
        self.guided = Guided(device)

    @property
    def blocks(self) -> dict[str, int]:
        """Merging blocks of each case; in a row there is one call at a time."""
        return {subject.name: subject.blocks for subject in self.subjects} | {IN_A_ROW: 1}

    @torch.no_grad()
    def round(self) -> Seconds:
        seconds = {subject.name: subject.round() for subject in self.subjects}
        return seconds | {IN_A_ROW: hooks(self.subjects[0]) | operators(self.device) | self.guided.round()}


# --- taking turns ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(checkout: Path, device: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """A process with the code of a checkout; each call gives its next line: first the blocks, then a round at a time."""
    begin = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r})['serve']({device!r})"
    command = [sys.executable, "-c", begin]
    with subprocess.Popen(command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        questions, answers = child.stdin, child.stdout
        assert questions is not None
        assert answers is not None

        def ask() -> dict[str, Any]:
            questions.write("\n")
            questions.flush()
            line = answers.readline()
            if not line:
                raise RuntimeError(f"measuring the code of {checkout} failed; what it said is above")
            return json.loads(line)

        try:
            yield ask
        finally:
            questions.close()


def serve(device: str) -> None:
    """A line of JSON for each line that comes in."""
    bench = Bench(device)
    for number, _ in enumerate(sys.stdin):
        print(json.dumps(bench.round() if number else {"code": negengine.__file__, "blocks": bench.blocks}), flush=True)


def measure(device: str, rounds: int = 100, before: Path | None = None) -> list[dict[str, Any]]:
    """Rows of every case and variant, and of each state of the code.

    Seconds of a call are those over the rounds: ``median``, ``p10``, ``p90`` and ``least``. Of a block's hook the clock's own are
    within, which the variant ``empty`` tells.

    Args:
        before: a checkout of another state of the code, whose native kernels are built.
    """
    if before is None:
        bench = Bench(device)
        bench.round()  # imports, first allocations, the specialising interpreter
        return rows({NOW: [bench.round() for _ in range(rounds)]}, bench.blocks)
    found: dict[str, list[Seconds]] = {BEFORE: [], NOW: []}
    with process(before, device) as old, process(Path(negengine.__file__).parents[1], device) as new:
        codes = {BEFORE: old, NOW: new}
        answers = {code: ask() for code, ask in codes.items()}
        if not Path(answers[BEFORE]["code"]).is_relative_to(before.resolve()):
            raise RuntimeError(f"the code before should be that of {before}, but {answers[BEFORE]['code']} was imported")
        for number in range(rounds + 1):
            for code, ask in codes.items():
                seconds = ask()
                if number:
                    found[code].append(seconds)
    return rows(found, answers[NOW]["blocks"])


def rows(found: dict[str, list[Seconds]], blocks: dict[str, int]) -> list[dict[str, Any]]:
    made = []
    for case, number in blocks.items():
        for code, rounds in found.items():
            for variant in rounds[0][case]:
                timing = Timing(tuple(seconds[case][variant] for seconds in rounds))
                name = variant if code == NOW else f"{variant}, {code}"
                about = {"case": case, "variant": name, "part": variant, "code": code, "blocks": number}
                made.append(about | timing.summary() | {"least": min(timing.seconds)})
    return made


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, in microseconds of a call."""
    return "\n".join(
        f"{row['case']:15} {row['code']:7} {row['part']:32} {1e6 * row['median']:8.2f} us, least {1e6 * row['least']:8.2f}"
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    from negengine.bench.results import Results

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of host.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--before", type=Path, help="a checkout of another state of the code, to take turns with this one")
    given = parser.parse_args(arguments)
    found = measure(given.device, given.rounds, given.before)
    Results(given.results / "host.json", "host").add(found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
