"""``negengine negative``: what a model draws when a prompt is turned round, its caption, and the prompt without that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from negengine.cli.choice import AVOID_HELP, METHODS_OF_THE_FINAL_RUN, SET_HELP, choose, one_text
from negengine.cli.errors import one_line_errors
from negengine.cli.loading import SCHEDULER_HELP, check_device, check_dtype, load, preset
from negengine.cli.runs import Run
from negengine.cli.words import FLAGS, in_flags, put_on
from negengine.environment import machine

if TYPE_CHECKING:
    from negengine.methods import Method, NormalizedAttentionGuidance

CAPTIONER_HELP = (
    "Who captions: person (asks at the terminal), classifier (for the embedded models), or the hub id or folder of an "
    "image-to-text model (BLIP, BLIP-2, LLaVA, …)."
)

NAG_HELP = (
    "Avoid the caption by normalized attention guidance, for models without a negative branch; --set nag.KEY=VALUE sets it. "
    "FLUX: the final images have no true CFG then."
)


@one_line_errors
def negative(
    prompt: Annotated[list[str], typer.Argument(help="What to draw; several in quotes.")],
    model: Annotated[str, typer.Option(help="A local folder, a hub model id, or an embedded model (people-flux, mnist-sdxl, …).")],
    captioner: Annotated[str, typer.Option(help=CAPTIONER_HELP)] = "person",
    captioner_prompt: Annotated[str | None, typer.Option(help="Text that a captioning model is given with the picture.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for images and captions; existing images are never overwritten.")] = Path(
        "out/negative"
    ),
    count: Annotated[int, typer.Option(min=1, help="Seeds per prompt: each has a negative image and a caption of its own.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The first seed.")] = 0,
    scheduler: Annotated[str | None, typer.Option(metavar="NAME", help=SCHEDULER_HELP)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of each run; as the model has it if not given.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of both runs, above 1: guidance_scale, or true_cfg_scale on FLUX.")
    ] = None,
    negative_guidance: Annotated[float | None, typer.Option(help="Scale of the negative image, if it is another.")] = None,
    negative_prompt: Annotated[list[str] | None, typer.Option(help="Text to avoid, beside the caption.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="In pixels.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    method: Annotated[list[str] | None, typer.Option(help=METHODS_OF_THE_FINAL_RUN)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    avoid: Annotated[list[str] | None, typer.Option(help=AVOID_HELP)] = None,
    nag: Annotated[bool, typer.Option("--nag", help=NAG_HELP)] = False,
) -> None:
    """Draw what a prompt is least like, caption it, and draw the prompt with that caption as negative prompt (DNP)."""
    from negengine.captioners import CaptionCache
    from negengine.diffusers.branches import parameters
    from negengine.diffusers.dnp import diffusion_negative_prompting, files, final_call
    from negengine.diffusers.families import find_denoiser
    from negengine.methods import DiffusionNegativePrompt

    for name, scale in (("guidance", guidance), ("negative-guidance", negative_guidance)):
        if scale is not None and not (math.isfinite(scale) and scale > 1):
            raise ValueError(f"--{name} must be above 1, got {scale:g}: at 1 there is no negative branch")
    of_pipeline, of_method = one_text("negative-prompt", negative_prompt), one_text("avoid", avoid)
    check_dtype(dtype)
    check_device(device)
    seeds = range(seed, seed + count)
    taken = [f for p, text in enumerate(prompt) for s in seeds for f in files(output, p, text, s) if f.exists()]
    if taken:
        raise ValueError(f"{taken[0]} exists; choose another --output or --seed, or remove it")
    methods, avoid_with = _chosen(model, seed, method or [], set_ or [], of_method, count, nag)
    settings = DiffusionNegativePrompt(
        captioner=captioner_named(captioner, captioner_prompt, model, device), guidance=negative_guidance, avoid_with=avoid_with
    )
    console = Console()
    pipe = load(model, dtype, device, scheduler)
    if not nag and "negative_prompt" not in parameters(pipe):
        raise ValueError(
            f"{type(pipe).__name__} takes no negative prompt as text, so a picture's file could not tell how to repeat it; give "
            "--nag, or call negengine.diffusion_negative_prompting in Python"
        )
    conditioning = find_denoiser(pipe)[1].conditioning
    given = {"num_inference_steps": steps, "height": height, "width": width, conditioning.scale: guidance}
    call = preset(model, count) | {name: value for name, value in given.items() if value is not None}
    if of_pipeline is not None:
        call["negative_prompt"] = of_pipeline
    instead = "leave it out: true CFG is what avoids the caption (--nag avoids it without)"
    put_on(pipe, methods, {} if nag else {"negative_prompt": "", **call}, instead)
    cache = CaptionCache(output / "captions", model=model)
    for number, text in enumerate(prompt):
        with in_flags(methods, FLAGS | {"true_cfg_scale": "--guidance"}):
            records = diffusion_negative_prompting(
                pipe, [text] * count, settings, seed=list(seeds), cache=cache, output=output, **call
            )
        final, acting = final_call(pipe, settings, call, [record.negative_prompt for record in records])
        run = Run(model, [text] * count, 1, list(seeds), dtype, device, final, [*methods, *acting], scheduler).plain(pipe)
        for k, record in enumerate(records):
            record.save(output, number, also={"run": run, "number": k, "machine": machine()})
            console.print(
                f"{text!r}, seed {record.seed}: the negative image shows {record.caption!r}", soft_wrap=True, highlight=False
            )
    console.print(f"{2 * len(prompt) * count} images in {output}", soft_wrap=True)


def _chosen(
    model: str, seed: int, method: list[str], sets: list[str], avoid: str | None, count: int, nag: bool
) -> tuple[list[Method], NormalizedAttentionGuidance | None]:
    """The methods that are applied to the pipeline, and the settings of NAG if it is to avoid the caption."""
    from negengine.methods import NormalizedAttentionGuidance

    avoided = [] if avoid is None else [avoid]
    if not nag:
        return choose(model, seed, method or ["none"], sets, avoid=avoided, group_size=count), None
    if any(name.partition(":")[0] == "nag" for name in method):
        raise ValueError("--nag is NAG away from the caption; drop --method nag, and give a text of your own as --negative-prompt")
    of_nag = [text for text in sets if text.startswith("nag.")]
    others = choose(model, seed, method or ["none"], [text for text in sets if text not in of_nag], avoid=avoided, group_size=count)
    (settings,) = choose(model, seed, ["nag"], of_nag)
    assert isinstance(settings, NormalizedAttentionGuidance)
    return others, settings


def captioner_named(name: str, prompt: str | None, model: str, device: str) -> Any:
    """Who captions. Raises ValueError for a name that is no captioner, or one that cannot caption this model's pictures here."""
    from negengine import models
    from negengine.captioners import ImageToText, Person

    if name in ("person", "classifier") and prompt is not None:
        raise ValueError(f"--captioner-prompt is for captioning models; --captioner {name} takes none")
    if name == "person":
        try:
            return Person()
        except RuntimeError as error:
            raise ValueError(
                "--captioner person asks at a terminal, and the standard input is none; give --captioner classifier "
                "(for the embedded models), or the hub id or folder of an image-to-text model"
            ) from error
    if name == "classifier":
        if model not in models.NAMES:
            raise ValueError(f"--captioner classifier reads the pictures of the embedded models ({', '.join(models.NAMES)})")
        from negengine.evaluate.worlds import world_of

        world = world_of(model)
        assert world is not None
        return world.captioner()
    if "/" not in name and not Path(name).is_dir():
        raise ValueError(
            f"no captioner {name!r}: give person, classifier (for the embedded models), or the hub id or folder of an "
            "image-to-text model, such as Salesforce/blip-image-captioning-base"
        )
    return ImageToText.from_pretrained(name, prompt=prompt, device=device)
