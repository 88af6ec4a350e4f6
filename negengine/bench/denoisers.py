"""One forward of the true denoisers of FLUX.1-dev and SDXL: ``python -m negengine.bench.denoisers flux-dev --results out``.

Public configurations, random weights: time does not depend on the weights. Merging is active in the forward, in every block that
the family merges by default. One model serves all variants, since two of FLUX.1 do not fit one GPU. They take turns; compiled, each
has all its rounds in a row, as another variant compiles anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import negengine
from negengine.bench.end_to_end import AGAIN, PUBLISHED, WITHOUT
from negengine.bench.published import published_backend
from negengine.bench.results import Results
from negengine.bench.stacks import CONTEXT, CONTEXT_CHANNELS, FLUX_TEXT, alike
from negengine.bench.variants import usable
from negengine.diffusers import families
from negengine.ops import registry

LOOPS = {"flux-dev": (25, 7), "sdxl-base": (50, 13)}  # steps of a picture, and how many of them merge, as in the NegToMe paper

FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
SDXL_BASE = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": CONTEXT_CHANNELS,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def flux_dev(size: int, images: int, depth: tuple[int, ...]) -> tuple[nn.Module, Callable[[], Tensor]]:
    from diffusers import FluxTransformer2DModel

    layers = dict(zip(("num_layers", "num_single_layers"), depth, strict=False))
    model = FluxTransformer2DModel(**FLUX_DEV | layers).eval()
    side = size // 16
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inputs = {
        "hidden_states": alike(1, images, side * side, 64),
        "encoder_hidden_states": torch.randn(images, FLUX_TEXT, 4096),
        "pooled_projections": torch.randn(images, 768),
        "timestep": torch.full((images,), 0.95),
        "guidance": torch.full((images,), 3.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(torch.get_default_dtype()),
        "txt_ids": torch.zeros(FLUX_TEXT, 3),
    }
    return model, lambda: model(**inputs, return_dict=False)[0]


def sdxl_base(size: int, images: int, depth: tuple[int, ...]) -> tuple[nn.Module, Callable[[], Tensor]]:
    """With the unconditional half in the batch."""
    from diffusers import UNet2DConditionModel

    layers = {"transformer_layers_per_block": [1, *depth]} if depth else {}
    model = UNet2DConditionModel(**SDXL_BASE | layers).eval()
    inputs = {
        "sample": alike(2, images, 4, size // 8, size // 8),
        "timestep": torch.tensor(900),
        "encoder_hidden_states": torch.randn(2 * images, CONTEXT, CONTEXT_CHANNELS),
        "added_cond_kwargs": {"text_embeds": torch.randn(2 * images, 1280), "time_ids": torch.randn(2 * images, 6)},
    }
    return model, lambda: model(**inputs, return_dict=False)[0]


BUILD = {"flux-dev": flux_dev, "sdxl-base": sdxl_base}


@torch.inference_mode()
def measure(
    name: str,
    device: str,
    dtype: torch.dtype,
    size: int,
    images: int,
    depth: tuple[int, ...],
    rounds: int,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row for each variant; seconds of a forward.

    Args:
        compiled: its repeated blocks, each as one graph.
    """
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model, forward = BUILD[name](size, images, depth)
    finally:
        torch.set_default_dtype(usual)
    settings: Any = families.with_family_defaults(negengine.NegToMe(timesteps=(0, 1000), group_size=images), model)
    found = [own for own in usable(device, dtype) if own[1] == "auto"]
    choices: dict[str, negengine.NegToMe | None] = {WITHOUT: None}
    for backend, search in found[: None if device == "cuda" else 1]:
        choices[f"{backend} {search}"] = dataclasses.replace(settings, backend=backend, search=search)
    seconds: dict[str, list[float]] = {}
    shares: dict[str, float] = {}
    memory: dict[str, int] = {}
    with registry.registered(published_backend(images, settings.alpha, float(settings.threshold or 0))) as published:
        choices[PUBLISHED] = dataclasses.replace(settings, backend=published.name)
        choices[AGAIN] = None
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
        # the first two forwards of a variant compile and are not counted
        turns = [(case, 2 + rounds) for case in choices] if compiled else [(case, 1) for _ in range(2 + rounds) for case in choices]
        done = dict.fromkeys(choices, 0)
        for case, forwards in turns:
            choice = choices[case]
            if choice is not None:
                negengine.apply(model, choice)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(forwards):
                spent = _timed(forward, device)
                done[case] += 1
                if done[case] > 2:
                    seconds.setdefault(case, []).append(spent)
            if device == "cuda":
                memory[case] = torch.cuda.max_memory_allocated()
            if choice is not None:
                if case != PUBLISHED:
                    shares[case] = negengine.status(model)[negengine.NegToMe].merged_share
                negengine.remove(model)
    steps, active = LOOPS[name]
    base = statistics.median(seconds[WITHOUT])
    about = {"model": name, "size": size, "images": images, "depth": "x".join(map(str, depth)) or "full", "compiled": compiled}
    rows = []
    for case, times in seconds.items():
        overhead = statistics.median(times) / base - 1
        about_case = {"variant": case, "median": statistics.median(times), "seconds": times, "overhead": overhead}
        loop = {"loop_overhead": overhead * active / steps, "steps": steps, "active": active}
        rows.append(about | about_case | loop | {"merged_share": shares.get(case), "peak_bytes": memory.get(case)})
    return rows


def _timed(forward: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    forward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=BUILD)
    parser.add_argument("--results", type=Path, required=True, help="folder; its denoisers.json is added to")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument(
        "--depth", help="fewer blocks: FLUX.1's joint+single, like 1+2; SDXL's transformer layers at its two lower levels"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="the repeated blocks, each as one graph")
    given = parser.parse_args(arguments)
    depth = tuple(map(int, given.depth.split("+"))) if given.depth else ()
    how = (given.size, given.images, depth, given.rounds, given.compiled)
    rows = measure(given.model, given.device, torch.bfloat16, *how)
    Results(given.results / "denoisers.json", "denoisers", proceed=True).add(rows)
    for row in rows:
        what = f"{row['model']}{', compiled' * row['compiled']}, {row['size']} x {row['images']}: {row['variant']:18}"
        print(
            f"{what} {row['median'] * 1e3:9.2f} ms  {row['overhead']:+.2%} of the forward, {row['loop_overhead']:+.2%} of a loop, "
            f"merged {row['merged_share']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
