"""``negengine evaluate --model M --protocol NAME``: a pipeline draws the protocol by every variant, and is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from negengine import png
from negengine.cli.choice import one_text
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
from negengine.cli.evaluate.options import Common, OfPipelines, own_keywords
from negengine.cli.evaluate.report import leave, prepare
from negengine.cli.evaluate.variants import Parts, calls_of, negatives_named, variants
from negengine.cli.loading import check_device, check_dtype, load
from negengine.cli.negative import captioner_named
from negengine.cli.runs import Run, call_of
from negengine.cli.words import in_flags, put_on
from negengine.environment import machine, versions
from negengine.evaluate import plots
from negengine.evaluate.asked import Asked, check_needs, load_all
from negengine.evaluate.draw import Variant, draw
from negengine.evaluate.files import read_lines
from negengine.evaluate.groups import Drawn, Group
from negengine.evaluate.measure import Beside
from negengine.evaluate.pairs import pair_tables
from negengine.evaluate.prompting import rewriting
from negengine.evaluate.protocols import Asset, Diversity, Pairs, Protocol, Removal, protocol_named
from negengine.evaluate.results import document
from negengine.evaluate.worlds import Removable, World, world_of
from negengine.metrics.extractors import Extractor

FLAGS = {"num_images_per_prompt": "--images"}
GROUPS_A_CALL = 5  # of an embedded model; of others 1


def of_pipeline(common: Common, own: OfPipelines) -> None:
    """Draw and judge.

    Raises:
        ValueError, TypeError, OSError: flags or files that do not fit.
        ImportError, MissingWeights: what a metric needs is not here.
    """
    if own.model is None or own.protocol is None:
        raise ValueError("give folders of images, or --model and --protocol")
    if is_file_of_labels(common.labels):
        raise ValueError(f"--labels {common.labels}: a file is for folders of images; give an extractor that reads classes")
    if common.plot:
        plots.check()
    kind, world, dtype = protocol_named(own.protocol), world_of(own.model), own.dtype or "float32"
    check_dtype(dtype)
    check_device(common.device)
    protocol = _protocol(kind, world, common, own)
    asked = asked_by(common, protocol.metrics, world, _removable(protocol, world))
    check_given(common, asked, exempt=("--asset", "--forbidden"))
    asset, _ = opened("--asset", common.asset), opened("--mask", own.mask)
    chosen = variants(protocol.variants, _parts(protocol, world, common, own))
    common_call, _ = calls_of(own.call, protocol.variants)
    call = call_of(own.model, {}, False, {}) | common_call
    extractors = load_all(asked, common.device, common.classes)
    expected = _expected(protocol, asked, extractors)
    reference = _reference(protocol, asked, common, world)
    there = ["prompts", "base_labels", *(["asset", "asset_image"] if isinstance(protocol, Asset) else [])]
    there += [name for name, value in (("expected", expected), ("reference", reference), ("forbidden", common.forbidden)) if value]
    in_a_set = protocol.images * protocol.repeats * len(protocol.prompts)
    check_needs(asked, there, protocol.images, in_a_set, WAYS, len(reference or ()))
    pictures = None if own.keep is False else common.output / "images"
    if pictures is not None and pictures.exists():
        raise ValueError(f"{pictures} exists; choose another --output, or remove it")
    prepare(common.output)
    pipe = load(own.model, dtype, common.device, own.scheduler)
    _check_pipeline(pipe, own.model, chosen, call, protocol)
    keep = _keeper(pipe, pictures, own, chosen, call, dtype, common.device)
    check = lambda group: check_size(reference if common.against else None, group.images[0])  # noqa: E731
    drawn = _drawn(pipe, protocol, chosen, call, own.groups_a_call or (GROUPS_A_CALL if world else 1), check, keep)
    named = [variant.name for variant in drawn]
    beside = Beside(
        base=protocol.variants[0],
        expected=None if expected is None else {reader: dict.fromkeys(named, words) for reader, words in expected.items()},
        reference=reference,
        asset=asset,
        forbidden=common.forbidden,
    )
    rows = measured(drawn, asked, extractors, beside)
    settings = {
        "protocol": protocol.name,
        "of the protocol": dataclasses.asdict(protocol),
        **{name: getattr(own, name) for name in ("model", "scheduler")},
        **plain_of(own, ("rewrite", "negatives", "captioner")),
        **{"dtype": dtype, "device": common.device, "call": call},
        **common_settings(common),
    }
    pairs = pair_tables(rows, protocol) if isinstance(protocol, Pairs) else ()
    leave(document(rows, drawn, asked, settings, pairs, few(asked, in_a_set)), common.output, common.plot)


def _protocol(kind: type[Protocol], world: World | None, common: Common, own: OfPipelines) -> Protocol:
    """The protocol with what flags say in place of its own, and for an embedded model that model's prompts and metrics."""
    if common.base is not None:
        raise ValueError("--base is for folders; the first --variant is the one with which the others are compared")
    values: dict[str, Any] = {"images": own.images, "repeats": own.repeats, "prompts": _prompts(kind, world, common, own)}
    values["metrics"] = tuple(common.metrics) or (_metrics(kind, world, common.forbidden) if world else None)
    values["seeds"] = tuple(own.seed) or None
    if kind is Asset and own.mask is not None and not own.variant:
        values["variants"] = ("without", "asset", "asset-masked")
    values["variants"] = tuple(own.variant) or values.get("variants")
    if kind is Pairs:
        values |= _judges(common.metrics, world)
    for flag, value, one in (("asset", common.asset, Asset), ("mask", own.mask, Asset), ("forbidden", common.forbidden, Removal)):
        if value is not None and kind is not one:
            raise ValueError(f"--{flag} is for the protocol {one.name}, not for {kind.name}")
        values[flag] = value
    for flag, one in (("asset", Asset), ("forbidden", Removal)):
        if kind is one and values[flag] is None:
            raise ValueError(f"the protocol {kind.name} needs --{flag}")
    return kind(**own_keywords(kind, values))


def _judges(metrics: Sequence[str], world: World | None) -> dict[str, str]:
    """Of ``pairs``: which picture shows the prompt best, and which is the best picture."""
    if not metrics:
        return {"correctness": world.correctness} if world else {}
    if len(metrics) < 2:
        raise ValueError(
            f"--metric {metrics[0]}: the protocol pairs takes two, the first for correctness and the second for quality"
        )
    return {"correctness": metrics[0], "quality": metrics[1]}


def _metrics(kind: type[Protocol], world: World, forbidden: str | None) -> tuple[str, ...] | None:
    """Of an embedded model, whose classifier reads every picture."""
    if kind is Removal:
        return world.removable(forbidden).metrics if forbidden is not None else None
    of_kind: dict[type[Protocol], tuple[str, ...]] = {
        Diversity: ("distance", "vendi", *world.diversity, "as-prompted"),
        Asset: ("asset-similarity", "asset-correlation", "as-prompted"),
        Pairs: (world.correctness, "reference-distance"),
    }
    return of_kind[kind]


def _removable(protocol: Protocol, world: World | None) -> Removable | None:
    """How the class that is to be absent can be removed from an embedded model's pictures."""
    return world.removable(protocol.forbidden) if world is not None and isinstance(protocol, Removal) else None


def _prompts(kind: type[Protocol], world: World | None, common: Common, own: OfPipelines) -> tuple[str, ...] | None:
    if own.prompt and own.prompts:
        raise ValueError("--prompt and --prompts both say what is drawn; give one")
    if own.prompts is not None:
        return tuple(read_lines(own.prompts))
    if own.prompt:
        return tuple(own.prompt)
    if world is not None:
        if kind is Removal:
            return (world.removable(common.forbidden).prompt,) if common.forbidden is not None else ("",)
        if kind is Asset:
            return (world.captioner()(opened("--asset", common.asset)),) if common.asset else None  # prompted to draw just that
        return world.complete or world.prompts if kind is Pairs else world.prompts
    if kind is not Diversity:
        raise ValueError(f"the protocol {kind.name} needs --prompt or --prompts for a model that is not embedded")
    return None


def _parts(protocol: Protocol, world: World | None, common: Common, own: OfPipelines) -> Parts:
    removable = _removable(protocol, world)
    forbidden = protocol.forbidden if isinstance(protocol, Removal) else None
    _, calls = calls_of(own.call, protocol.variants)
    caption: Callable[[], Any] | None = None
    if "dnp" in protocol.variants:
        name = own.captioner or ("classifier" if world else None)
        if name is None:
            raise ValueError("the variant dnp needs --captioner: person, or the hub id or folder of an image-to-text model")
        model = str(own.model)
        caption = lambda: captioner_named(str(name), None, model, common.device)  # noqa: E731
    elif own.captioner is not None:
        raise ValueError("--captioner is for the variant dnp, which is not there")
    return Parts(
        model=str(own.model),
        images=protocol.images,
        sets=own.set,
        avoid=one_text("avoid", own.avoid),
        usual_avoid=removable.avoid if removable else forbidden,
        calls=calls,
        asset=common.asset,
        mask=own.mask,
        rewrite=None if own.rewrite is None else rewriting(own.rewrite),
        negatives=negatives_named(own.negatives),
        captioner=caption,
    )


def _expected(protocol: Protocol, asked: Sequence[Asked], extractors: Mapping[str, Extractor]) -> dict[str, list[str]] | None:
    """Reader -> for every image in the order in which they are drawn, the class that its prompt names."""
    groups = [Group(case.key, (), (), case.prompt, seed) for seed in protocol.seeds for case in protocol.cases(seed)]
    found = expected_of(
        [Drawn("all", tuple(groups))],
        lambda drawn: [str(group.prompt) for group in drawn.groups for _ in range(protocol.images)],
        asked,
        extractors,
    )
    return None if found is None else {reader: words["all"] for reader, words in found.items()}


def _reference(protocol: Protocol, asked: Sequence[Asked], common: Common, world: World | None) -> Any:
    """Images of ``--against``, or of the embedded model's world; without the class that is to be absent."""
    if common.against is not None:
        return reference_images(common.against)
    if world is None or not any("reference" in one.metric.needs for one in asked):
        return None
    images, classes = world.real()
    forbidden = protocol.forbidden if isinstance(protocol, Removal) else None
    return [image for image, words in zip(images, classes, strict=True) if forbidden not in words]


def _check_pipeline(pipe: Any, model: str, chosen: Sequence[Variant], call: Mapping[str, Any], protocol: Protocol) -> None:
    """Raises ValueError for arguments that the pipeline does not take, and methods that cannot act on it."""
    from negengine import remove
    from negengine.diffusers.branches import parameters

    taken = parameters(pipe)
    for variant in chosen:
        arguments = {**call, **variant.call, **({"negative_prompt": ""} if variant.negative else {})}
        unknown = [name for name in arguments if name not in taken]
        if unknown:
            raise ValueError(f"the pipeline of {model}, {type(pipe).__name__}, takes no {', '.join(unknown)}")
        try:
            put_on(pipe, variant.methods(protocol.seeds[0]), arguments, f"give --call {variant.name}.true_cfg_scale=1", FLAGS)
        except ValueError as error:
            raise ValueError(f"the variant {variant.name}: {error}") from error
        finally:
            remove(pipe)


def _keeper(
    pipe: Any, folder: Path | None, own: OfPipelines, chosen: Sequence[Variant], call: Mapping[str, Any], dtype: str, device: str
) -> Callable[[str, Group], None]:
    """Writes a group's pictures as PNG files that carry how they were made."""
    by_name = {variant.name: variant for variant in chosen}
    numbers: dict[str, int] = dict.fromkeys(by_name, 0)

    def keep(name: str, group: Group) -> None:
        if folder is None:
            return
        variant, number = by_name[name], numbers[name]
        numbers[name] += 1
        seeds = group.image_seeds
        told: dict[str, Any] = {"prompt": group.prompt, "group": group.key, "group seed": group.seed, "variant": name}
        told.update(versions=versions(), machine=machine(), how=variant.plain(group.call_seed or 0))
        if variant.rewrite is variant.negative is variant.dnp is None:  # `negengine generate --like` repeats the group
            arguments = {**call, **variant.call}
            of_group = (list(seeds), dtype, device, arguments, variant.methods(group.call_seed or 0), own.scheduler)
            run = Run(str(own.model), [str(group.prompt)], len(seeds), *of_group)
            told["run"] = run.plain(pipe)
        for index, image in enumerate(group.images):
            file = folder / name.replace(":", "-") / f"{number:04d}-{png.slug(str(group.prompt))}-seed{group.seed}-{index:02d}.png"
            used = {"text": group.texts, "negative prompt": group.negative_prompts}
            drawn_with = {what: texts[index] for what, texts in used.items() if texts}
            png.write(image, file, told | drawn_with | {"seed": seeds[index], "index": index, "number": index})

    return keep


def _drawn(
    pipe: Any,
    protocol: Protocol,
    chosen: Sequence[Variant],
    call: Mapping[str, Any],
    groups_a_call: int,
    check: Callable[[Group], None],
    keep: Callable[[str, Group], None],
) -> list[Drawn]:
    """All of it, with a bar on the terminal.

    Args:
        check: raises for a group that cannot be judged, before the next is drawn. keep: writes a group's pictures.
    """
    total = len(chosen) * len(protocol.seeds) * protocol.repeats * len(protocol.prompts)
    acting = [settings for variant in chosen for settings in variant.methods(protocol.seeds[0])]
    with Progress(console=Console(stderr=True), transient=True) as progress, in_flags(acting, FLAGS):
        task = progress.add_task(f"drawing {total * protocol.images} images", total=total)

        def kept(name: str, group: Group) -> None:
            check(group)
            keep(name, group)
            progress.advance(task)

        return draw(pipe, protocol, chosen, call, groups_a_call, kept)
