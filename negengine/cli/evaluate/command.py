"""The flags of ``negengine evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from negengine.cli.choice import SET_HELP
from negengine.cli.errors import one_line_errors
from negengine.cli.evaluate.options import Common, OfFolders, OfPipelines, refuse
from negengine.cli.loading import SCHEDULER_HELP, check_device

PIPELINE, FOLDERS = "Of a running pipeline", "Of folders"
FOLDERS_HELP = "Folders of images to compare; the first is the one with which the others are compared."
OUTPUT_HELP = "Folder for evaluate.json, evaluate.md, evaluate.png, and the images that are drawn."
METRIC_HELP = "NAME or NAME:EXTRACTOR; repeatable. The protocol's own if left out; --list shows them."
FEATURES_HELP = "Who sees: pixels, dreamsim, inception, clip, dinov2, an embedded classifier, or MODULE:FUNCTION."
LABELS_HELP = "Who reads classes: an embedded classifier, inception, clip with --class; or for folders a .csv or .json of labels."
GROUP_HELP = "settings, folder, name or none: which images of a folder belong together; the first that fits if left out."
VARIANT_HELP = (
    "without, METHOD, METHOD:PRESET, rewriting, asset, asset-masked, dnp, standard, random, or several joined by +; repeatable. "
    "The first is the one with which the others are compared."
)
CALL_HELP = "An argument of the pipeline's call, [VARIANT.]KEY=VALUE; repeatable."
REWRITE_HELP = "Rewritten prompts: a .txt of lines with {prompt} in them, or a .json of prompts and lists."
NEGATIVES_HELP = "Negative prompts as a variant, NAME=FILE: a .txt of lines, or a .json of prompts and lists; repeatable."
CAPTIONER_HELP = "Who captions for the variant dnp: person, classifier (embedded models), or an image-to-text model."


@one_line_errors
def evaluate(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="[FOLDER]...", help=FOLDERS_HELP)] = None,
    output: Annotated[Path, typer.Option(help=OUTPUT_HELP)] = Path("out/evaluate"),
    metric: Annotated[list[str] | None, typer.Option(help=METRIC_HELP)] = None,
    features: Annotated[str | None, typer.Option(metavar="NAME", help=FEATURES_HELP)] = None,
    labels: Annotated[str | None, typer.Option(metavar="NAME|FILE", help=LABELS_HELP)] = None,
    class_: Annotated[list[str] | None, typer.Option("--class", help="A class that clip is to tell apart; repeatable.")] = None,
    against: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Real images, for fid, kid, precision, recall.")] = None,
    asset: Annotated[Path | None, typer.Option(metavar="FILE", help="The picture to keep away from.")] = None,
    forbidden: Annotated[str | None, typer.Option(metavar="CLASS", help="The class that is to be absent.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Also evaluate.png.")] = True,
    list_: Annotated[bool, typer.Option("--list", help="Show the metrics, the extractors and the protocols, and stop.")] = False,
    base: Annotated[str | None, typer.Option(help="The folder to compare with, by its name.", rich_help_panel=FOLDERS)] = None,
    group: Annotated[str | None, typer.Option(metavar="BY", help=GROUP_HELP, rich_help_panel=FOLDERS)] = None,
    per_group: Annotated[
        int | None, typer.Option(min=1, help="Take so many images of each group.", rich_help_panel=FOLDERS)
    ] = None,
    prompts_of: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .csv or .json: image or group, prompt.", rich_help_panel=FOLDERS)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A local folder, a hub model id, or an embedded model.", rich_help_panel=PIPELINE)
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="diversity, asset, removal or pairs.", rich_help_panel=PIPELINE)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeatable.", rich_help_panel=PIPELINE)] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to draw, a line each.", rich_help_panel=PIPELINE)
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Of a group.", rich_help_panel=PIPELINE)] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Groups of a prompt and seed.", rich_help_panel=PIPELINE)] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, max=2**32 - 1, help="Repeatable; 0, 1 and 2.", rich_help_panel=PIPELINE)
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help=VARIANT_HELP, rich_help_panel=PIPELINE)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP, rich_help_panel=PIPELINE)] = None,
    avoid: Annotated[
        list[str] | None, typer.Option(help="What the variants avoid that avoid a prompt.", rich_help_panel=PIPELINE)
    ] = None,
    call: Annotated[list[str] | None, typer.Option(help=CALL_HELP, rich_help_panel=PIPELINE)] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="White where the asset is avoided.", rich_help_panel=PIPELINE)
    ] = None,
    rewrite: Annotated[Path | None, typer.Option(metavar="FILE", help=REWRITE_HELP, rich_help_panel=PIPELINE)] = None,
    negatives: Annotated[list[str] | None, typer.Option(help=NEGATIVES_HELP, rich_help_panel=PIPELINE)] = None,
    captioner: Annotated[str | None, typer.Option(help=CAPTIONER_HELP, rich_help_panel=PIPELINE)] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="NAME", help=SCHEDULER_HELP, rich_help_panel=PIPELINE)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", rich_help_panel=PIPELINE)] = None,
    groups_a_call: Annotated[
        int | None, typer.Option(min=1, help="Drawn in one batch: 1; embedded models 5.", rich_help_panel=PIPELINE)
    ] = None,
    keep: Annotated[
        bool | None, typer.Option("--keep/--no-keep", help="Write the images that are drawn.", rich_help_panel=PIPELINE)
    ] = None,
) -> None:
    """Measure diversity, fidelity and closeness to what is avoided: of folders of images, or of a model by a paper's protocol."""
    if list_:
        from negengine.cli.evaluate.listing import show

        show()
        return
    common = Common(
        output=output,
        metrics=metric or [],
        features=features,
        labels=labels,
        classes=class_ or [],
        against=against,
        base=base,
        asset=asset,
        forbidden=forbidden,
        device=device,
        plot=plot,
    )
    of_folders = OfFolders(group=group, per_group=per_group, prompts_of=prompts_of)
    of_pipelines = OfPipelines(
        model=model,
        protocol=protocol,
        prompt=prompt or [],
        prompts=prompts,
        images=images,
        repeats=repeats,
        seed=seed or [],
        variant=variant or [],
        set=set_ or [],
        avoid=avoid or [],
        call=call or [],
        mask=mask,
        rewrite=rewrite,
        negatives=negatives or [],
        captioner=captioner,
        scheduler=scheduler,
        dtype=dtype,
        groups_a_call=groups_a_call,
        keep=keep,
    )
    check_device(device)
    if folders:
        refuse(of_pipelines, "for --model and --protocol, and there are folders; give one or the other")
        from negengine.cli.evaluate.folders import of_folders as judge

        judge(folders, common, of_folders)
    else:
        refuse(of_folders, "for folders of images, and there are none")
        from negengine.cli.evaluate.running import of_pipeline

        of_pipeline(common, of_pipelines)
