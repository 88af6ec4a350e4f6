"""``negengine evaluate FOLDER ...``: images that are there already; every folder is a variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from negengine.cli.evaluate.judging import (
    WAYS,
    asked_by,
    check_given,
    check_size,
    common_settings,
    expected_of,
    few,
    is_file_of_labels,
    measured,
    opened,
    plain_of,
    reference_images,
)
from negengine.cli.evaluate.options import Common, OfFolders
from negengine.cli.evaluate.report import leave, prepare
from negengine.evaluate import plots
from negengine.evaluate.asked import check_needs, load_all
from negengine.evaluate.folders import image_files, read_folder, told_by
from negengine.evaluate.groups import Drawn, check_alike
from negengine.evaluate.measure import Beside
from negengine.evaluate.named import check_single, check_used, for_images, read_named
from negengine.evaluate.results import document
from negengine.evaluate.worlds import World, world_of

USUAL = ("distance", "vendi")


def of_folders(folders: Sequence[Path], common: Common, own: OfFolders) -> None:
    """Judge the images of folders.

    Raises:
        ValueError, OSError: folders, files or names that do not fit. ImportError, MissingWeights: what a metric needs is not here.
    """
    if common.plot:
        plots.check()
    names = _names(folders)
    base = common.base or names[0]
    if base not in names:
        raise ValueError(f"--base {base} is none of the folders; there are {', '.join(names)}")
    world = _world(folders)
    asked = asked_by(common, USUAL, world)
    check_given(common, asked)
    if own.prompts_of is not None and not any({"prompts", "texts", "expected"} & set(one.metric.needs) for one in asked):
        raise ValueError("--prompts-of: none of the metrics looks at prompts")
    extractors = load_all(asked, common.device, common.classes)  # what is not here is an error before any picture is read
    prepare(common.output)
    reference, asset = reference_images(common.against), opened("--asset", common.asset)
    drawn = [replace(read_folder(folder, own.group, own.per_group), name=name) for folder, name in zip(folders, names, strict=True)]
    check_alike(drawn)
    check_size(reference, drawn[0].images[0])
    drawn = _prompted(drawn, own.prompts_of)
    labels = _labels(drawn, common.labels)
    of_file = Beside(base=base, labels=labels, forbidden=common.forbidden).classes_of_file()
    beside = Beside(
        base=base,
        labels=labels,
        expected=expected_of(drawn, _texts, asked, extractors, (*of_file, *common.classes)),
        reference=reference,
        asset=asset,
        forbidden=common.forbidden,
    )
    there = [name for name in ("expected", "reference", "asset", "forbidden") if getattr(beside, name) is not None]
    there += ["base_labels"] if len(drawn) > 1 else []
    there += ["asset_image"] if beside.asset else []
    there += ["prompts"] if all(group.prompt for variant in drawn for group in variant.groups) else []
    fewest = min(_in_a_set(variant) for variant in drawn)
    check_needs(asked, there, len(drawn[0].groups[0].images), fewest, WAYS, len(reference or ()))
    rows = measured(drawn, asked, extractors, beside)
    ordered = sorted(drawn, key=lambda variant: variant.name != base)
    settings = {"folders": list(map(str, folders)), "base": base, **plain_of(own), **common_settings(common)}
    leave(document(rows, ordered, asked, settings, remarks=few(asked, fewest)), common.output, common.plot)


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names, or the paths where those are equal."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a folder is given twice")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _world(folders: Sequence[Path]) -> World | None:
    """Of the embedded models whose pictures these are, by what the first file of each folder tells."""
    worlds = [world_of((told_by(image_files(folder)[0]).get("run") or {}).get("model")) for folder in folders]
    return worlds[0] if all(worlds) else None


def _prompted(drawn: Sequence[Drawn], path: Path | None) -> list[Drawn]:
    """With the prompts of a file in place of those that the pictures tell."""
    if path is None:
        return list(drawn)
    told = read_named(path, "prompt")
    check_used(path, told, list(drawn), "prompt")
    found = []
    for variant in drawn:
        texts = iter(for_images(path, told, variant, "prompt"))
        groups = []
        for group in variant.groups:
            own = {next(texts) for _ in group.images}
            if len(own) > 1:
                raise ValueError(f"{path} gives the group {group.key} several prompts; the images of a group share one")
            groups.append(replace(group, prompt=own.pop()))
        found.append(replace(variant, groups=tuple(groups)))
    return found


def _texts(variant: Drawn) -> list[str]:
    """What may name a class: the prompt of each image, else the key of its group."""
    return [group.prompt or group.key for group in variant.groups for _ in group.images]


def _labels(drawn: Sequence[Drawn], path: str | None) -> dict[str, list[str]] | None:
    if path is None or not is_file_of_labels(path):
        return None
    told = read_named(Path(path), "label")
    check_used(Path(path), told, list(drawn), "label")
    check_single(Path(path), told, list(drawn), "label")
    return {variant.name: for_images(Path(path), told, variant, "label") for variant in drawn}


def _in_a_set(variant: Drawn) -> int:
    """The images of the smallest set: those of a seed."""
    return min(len(of.rows) for of in variant.by_seed().values())
