"""Who judges, and what is given beside the images: the same for folders and for a running pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from negengine.cli.evaluate.options import Common, OfFolders, OfPipelines
from negengine.evaluate.asked import FROM_FILE, Asked, asked_for
from negengine.evaluate.folders import image_files, open_image
from negengine.evaluate.groups import Drawn
from negengine.evaluate.measure import Beside, Row, class_in, measure
from negengine.evaluate.worlds import Removable, World
from negengine.metrics.extractors import Extractor

WAYS = {
    "reference": "give --against FOLDER with real images",
    "asset": "give --asset FILE",
    "asset_image": "give --asset FILE",
    "forbidden": "give --forbidden CLASS",
    "prompts": "give --prompts-of FILE, or PNG files of negengine",
    "expected": "give prompts that name one class each, and --class NAME for one that no label of a file is",
    "base_labels": "give two variants or more",
}  # what a metric may need -> what to give


def is_file_of_labels(labels: str | None) -> bool:
    return labels is not None and Path(labels).suffix.lower() in (".csv", ".json")


def asked_by(common: Common, usual: Sequence[str], world: World | None, removable: Removable | None = None) -> list[Asked]:
    """The metrics of ``--metric`` or the usual ones, seen by ``--features`` and ``--labels``, else by the model's own reader.

    Args:
        removable: its reader reads classes, in place of the model's.
    """
    reader = world.reader if world else None
    labels = FROM_FILE if is_file_of_labels(common.labels) else common.labels or (removable.reader if removable else reader)
    return asked_for(common.metrics or usual, common.features or reader, labels)


def opened(flag: str, path: Path | None) -> Image.Image | None:
    """The picture of a flag. Raises ValueError, with the flag, if it cannot be read."""
    try:
        return None if path is None else open_image(path)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def reference_images(folder: Path | None) -> list[Image.Image] | None:
    """The images of ``--against``. Raises ValueError, with the flag, for those that cannot be read or are of unequal size."""
    if folder is None:
        return None
    try:
        found = {file: open_image(file) for file in image_files(folder)}
    except ValueError as error:
        raise ValueError(f"--against: {error}") from error
    by_size = {image.size: file for file, image in found.items()}
    if len(by_size) > 1:
        (one, first), (other, second) = list(by_size.items())[:2]
        raise ValueError(f"--against: {first} has {_size(one)} pixels and {second} {_size(other)}; resize them first")
    return list(found.values())


def check_size(reference: Sequence[Image.Image] | None, image: Image.Image) -> None:
    """Raises ValueError where the images of ``--against`` are not as large as those that are judged."""
    if reference and reference[0].size != image.size:
        raise ValueError(
            f"--against: its images have {_size(reference[0].size)} pixels, and those that are judged {_size(image.size)}; "
            "resize them first"
        )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def check_given(common: Common, asked: Sequence[Asked], exempt: Collection[str] = ()) -> None:
    """Raises ValueError for a flag that no metric uses.

    Args:
        exempt: flags that a protocol uses.
    """
    needs = {need for one in asked for need in one.metric.needs}
    readers = {one.extractor for one in asked if one.reads}
    used = {
        "--against": (common.against, "reference" in needs),
        "--asset": (common.asset, bool(needs & {"asset", "asset_image"})),
        "--forbidden": (common.forbidden, "forbidden" in needs),
        "--class": (common.classes or None, "clip" in readers or (FROM_FILE in readers and "expected" in needs)),
        "--labels": (common.labels, (FROM_FILE if is_file_of_labels(common.labels) else common.labels) in readers),
        "--features": (common.features, common.features in {one.extractor for one in asked if not one.reads}),
    }
    for flag, (value, serves) in used.items():
        if value is not None and not serves and flag not in exempt:
            raise ValueError(f"{flag}: none of the metrics uses it; they are {', '.join(one.key for one in asked)}")


def expected_of(
    drawn: Sequence[Drawn],
    prompts: Callable[[Drawn], Sequence[str]],
    asked: Sequence[Asked],
    extractors: Mapping[str, Extractor],
    of_file: Sequence[str] = (),
) -> dict[str, dict[str, list[str]]] | None:
    """Reader -> variant -> the class that each image's prompt names; None if a prompt names none of a reader's, or several.

    Args:
        of_file: the classes of a file of labels.
    """
    readers = dict.fromkeys(str(one.extractor) for one in asked if "expected" in one.metric.needs)
    found: dict[str, dict[str, list[str]]] = {reader: {} for reader in readers}
    for reader in readers:
        classes = of_file if reader == FROM_FILE else extractors[reader].classes
        for variant in drawn:
            named = [class_in(prompt, classes) for prompt in prompts(variant)]
            if None in named:
                return None
            found[reader][variant.name] = [str(name) for name in named]
    return found or None


def measured(drawn: Sequence[Drawn], asked: Sequence[Asked], extractors: Mapping[str, Extractor], beside: Beside) -> list[Row]:
    """The rows, with a bar on the terminal."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(asked) * len(drawn))
        return measure(drawn, asked, extractors, beside, lambda: progress.advance(task))


def few(asked: Sequence[Asked], images: int) -> list[str]:
    """A remark on each FID, which is not the same for another number of images."""
    return [
        f"{one.key} is of {images} images a set: FID is biased upwards for few images, so compare it at equal numbers only."
        for one in asked
        if one.metric.name == "fid"
    ]


def common_settings(common: Common) -> dict[str, Any]:
    """What both forms keep in the results."""
    return plain_of(common, ("features", "labels", "classes", "against", "asset", "forbidden"))


def plain_of(options: Common | OfFolders | OfPipelines, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The flags that were given, as JSON can hold them; all if ``names`` is None."""
    told = {name: getattr(options, name) for name in names or vars(options)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in told.items() if value not in (None, [], ())}
