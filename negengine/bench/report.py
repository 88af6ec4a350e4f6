"""What is shown of result files: every number is computed from their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from negengine.bench import svg
from negengine.bench.documents import Row, Source, base, noise
from negengine.bench.look import axis_percent, axis_seconds, percent, precise
from negengine.bench.page import Figure, Headline, Page, Section, Table
from negengine.interleave import Timing
from negengine.models import NAMES as TOYS

# what others report of FLUX: seconds without and with the method
REPORTED = (("the paper", 13.2, 13.7), ("the release's notebook", 30.62, 31.71))
UNKNOWN = "–"
INDISTINCT = "not distinguishable from none here"
UNITS = (("GB", 1e9, 2), ("MB", 1e6, 0), ("kB", 1e3, 0))  # of bytes, and how many decimals are told
EXTRAPOLATED = "extrapolated"
GPU_UNITS = {
    "clock_mhz": "{:,.0f} MHz",
    "power_w": "{:,.0f} W",
    "temperature_c": "{:.0f} °C",
    "energy_j_per_image": "{:,.0f} J",
}
SERIES = {"without": "without a method", "ours": "ours", "published": "published algorithm"}


@dataclass(frozen=True)
class Cost:
    """What a row says of a whole loop: seconds without and with the method, and how that is known."""

    without: float
    loop: float
    overhead: float
    kind: str
    scope: str

    @property
    def extrapolated(self) -> bool:
        return self.kind == EXTRAPOLATED

    @property
    def change(self) -> str:
        return f"{precise(self.without)} → {precise(self.loop)}, {self.kind}"


def report(sources: Sequence[Source]) -> Page:
    """The page of these files, of which at least one is needed; what they do not hold is left out."""
    models = [source for source in sources if source.what == "model"]
    sections = [section for source in models for section in model(source, len(models) > 1)]
    sections += [operator(source) for source in sources if source.what == "operator"]
    left = left_out(sources)
    dates = sorted({source.document["date"] for source in sources})
    where = " · ".join(dict.fromkeys(place(source.document) for source in sources))
    return Page(
        title="What negative guidance costs",
        subtitle=f"{where} · {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        headline=headline(models, len(sources) > 1),
        sections=[*sections, machines(sources), *([left] if left else [])],
    )


def cost(row: Row, without: Row) -> Cost:
    """Of the whole model where that was computed, else of what was measured."""
    full = row["full"]
    if full:
        scope = f"{'whole model' if full['depth'] == 'full' else full['depth'] + ' blocks'}, {full['steps']} steps"
        return Cost(full["without"], full["loop"], full["overhead"], EXTRAPOLATED, f"{scope}, {full['active']} of them active")
    scope = f"{blocks(row)}, {row['steps']} steps, {sum(row['active'])} of them active"
    kind = "measured" if row["depth"] == "full" else f"measured on {row['depth']} blocks"
    return Cost(without["median"], row["median"], row["overhead"], kind, scope)


def blocks(row: Row) -> str:
    return "whole model" if row["depth"] == "full" else f"{row['depth']} blocks, not the whole model"


def main(rows: Sequence[Row], method: str = "negtome") -> dict[str, Row]:
    """By role: without, ours and (if it ran) published, in eager mode with PyTorch's attention where that was measured."""
    mine = sorted((row for row in rows if row["role"] == "ours" and row["method"] == method), key=eager)
    if not mine:
        return {}
    without = base(mine[0], rows)
    same = [
        row for row in rows if row["role"] == "published" and (row["method"] or "negtome") == method and base(row, rows) is without
    ]
    return {"without": without, "ours": mine[0]} | ({"published": same[0]} if same else {})


def eager(row: Row) -> tuple[bool, bool]:
    """The later in order, the less the row is as users first run it."""
    return row["compiled"] is not None, row["attention"] != "native"


def headline(models: Sequence[Source], several: bool = False) -> Headline | None:
    """Of the case that says most: FLUX before others, the whole model before parts, with the published algorithm before without.

    Args:
        several: there are other files, so that it must be said of which this is.
    """
    cases = [(chosen, source) for source in models for rows in source.cases().values() if (chosen := main(rows))]
    if not cases:
        return None

    def order(case: tuple[Mapping[str, Row], Source]) -> tuple[bool, bool, bool, bool]:
        row = case[0]["ours"]
        part = not (row["full"] or row["depth"] == "full")
        return row["model"] in TOYS, not row["model"].startswith("flux"), part, "published" not in case[0]

    chosen, source = min(cases, key=order)
    ours = chosen["ours"]
    costs = {role: cost(chosen[role], chosen["without"]) for role in ("ours", "published") if role in chosen}
    told = [
        svg.Bar(
            name,
            costs[role].change,
            100 * costs[role].overhead,
            percent(costs[role].overhead),
            role,
            hollow=costs[role].extrapolated,
        )
        for role, name in (("ours", f"ours ({ours['variant']})"), ("published", "the published algorithm, in the same run"))
        if role in costs
    ]
    if ours["model"] not in TOYS:
        told += [
            svg.Bar(
                f"{name} (FLUX)",
                f"{before:g} s → {after:g} s, reported",
                100 * (after / before - 1),
                percent(after / before - 1),
                "reported",
            )
            for name, before, after in REPORTED
        ]
    title = f"added by NegToMe to the time of a loop of {ours['model']}"
    known = "was measured in this run, or is reported by others" if len(told) > len(costs) else "was measured"
    caption = f"A filled bar {known}; an outlined one is extrapolated."
    table = Table(title, ("", "added", "seconds, and how they are known"), [(bar.label, bar.text, bar.note) for bar in told])
    return Headline(
        percent(costs["ours"].overhead),
        costs["ours"].kind + (f", {INDISTINCT}" if indistinct(ours) else ""),
        title,
        about(chosen, costs["ours"], source if several else None),
        drawn("Time added to the loop, in percent", caption, told),
        table,
    )


def about(chosen: Mapping[str, Row], mine: Cost, source: Source | None) -> list[str]:
    """What must be known beside the headline's number."""
    ours = chosen["ours"]
    notes = [f"{sentence(mine.scope)} Measured case: {ours['case']}."]
    if source is not None:
        notes.append(f"Measured on {place(source.document)}: {source.name}.")
    if ours["full"]:
        notes.append(sentence(ours["full"]["how"]))
    if ours["model"] in TOYS:
        notes.append(
            f"{ours['model']} is a toy model that comes with the package: its milliseconds say nothing of FLUX.1, and do not stand "
            "beside the 13.2 s → 13.7 s that the paper reports of it."
        )
    less = "smaller differences say nothing"
    if indistinct(ours):
        low, high = percent(ours["overhead_p10"]), percent(ours["overhead_p90"])
        less = f"what was added to it, {low} to {high}, is {INDISTINCT}"
    notes.append(f"The measured loop without a method, timed twice a round, differs by up to {share(noise(ours))}: {less}.")
    if "published" not in chosen:
        notes.append("The published algorithm did not run in this case.")
    return notes


def indistinct(row: Row) -> bool:
    """Whether the rounds do not agree that anything was added, or what was added is less than the noise."""
    return row["overhead_p10"] <= 0 <= row["overhead_p90"] or abs(row["overhead"]) <= noise(row)


def model(source: Source, named: bool) -> list[Section]:
    """The sections of a file of whole models; ``named``: there are several such files."""
    cases = source.cases()
    suffix = f" ({source.name})" if named else ""
    sections = []
    if len(cases) > 1:
        sections.append(Section(f"All cases{suffix}", figures=scaling(source), tables=[overview(cases)]))
    return sections + [case(name + suffix, rows) for name, rows in cases.items()]


def overview(cases: Mapping[str, Sequence[Row]]) -> Table:
    lines = []
    for name, rows in cases.items():
        chosen = main(rows)
        if not chosen:
            continue
        found = {role: cost(row, chosen["without"]) for role, row in chosen.items() if role != "without"}
        theirs = percent(found["published"].overhead) if "published" in found else UNKNOWN
        mine = found["ours"]
        times = precise(mine.without), precise(mine.loop)
        lines.append((name, percent(mine.overhead), theirs, *times, share(noise(chosen["ours"])), mine.kind))
    head = ("case", "ours adds", "published adds", "without", "ours", "noise", "how known")
    return Table("NegToMe in every case: time of the loop", head, lines)


def scaling(source: Source) -> list[Figure]:
    """Over images, and over resolution, of cases that differ in nothing else."""
    figures = []
    chosen = [one for rows in source.cases().values() if (one := main(rows))]
    for key, other, under in (("images", "size", "images"), ("size", "images", "pixels of a side")):
        families: dict[tuple[Any, ...], list[dict[str, Row]]] = {}
        for one in chosen:
            row = one["ours"]
            fixed = (
                row["model"],
                row["depth"],
                row["dtype"],
                row["steps"],
                tuple(row["active"]),
                row["compiled"],
                row["attention"],
            )
            families.setdefault((*fixed, row[other]), []).append(one)
        for family in families.values():
            places = {one["ours"][key] for one in family}
            if 1 < len(places) == len(family):
                figures.append(scaled(sorted(family, key=lambda one: one["ours"][key]), key, other, under))
    return figures


def scaled(family: Sequence[Mapping[str, Row]], key: str, other: str, under: str) -> Figure:
    """All points of one kind: extrapolated if every row is, else as measured."""
    rows = [row for one in family for role, row in one.items() if role != "without"]
    extrapolated = all(row["full"] for row in rows)
    series = []
    for role in ("ours", "published"):
        points = []
        for one in family:
            if role in one:
                value = 100 * (one[role]["full"] if extrapolated else one[role])["overhead"]
                points.append((float(one[role][key]), value, value, value))
        if points:
            series.append(svg.Series(SERIES[role], role, points))
    row = family[0]["ours"]
    fixed = f"{row['size']} x {row['size']} pixels" if other == "size" else f"{row['images']} images"
    title = f"{row['model']}, {fixed}: time added, over {under}"
    kind = "extrapolated to the whole model" if extrapolated else f"as measured, {blocks(row)}, {row['steps']} steps"
    caption = f"In percent of the loop without a method, {kind}."
    wide, narrow = (
        svg.lines(title, series, under, width, axis_percent, lambda value: percent(value / 100)) for width in (svg.WIDE, svg.NARROW)
    )
    return Figure(title, caption, wide, narrow)


def case(title: str, rows: Sequence[Row]) -> Section:
    first = rows[0]
    inside = [name for name, key in (("text encoders", "text_encoders"), ("the VAE", "vae")) if first[key]]
    within = f"The time includes {' and '.join(inside)}." if inside else "Text encoders and VAE are not within the time."
    scope = f"{blocks(first)}, {counted(first['steps'], 'step')}, {counted(first['rounds'], 'round')}"
    notes = [f"{first['images']} images, {first['size']} x {first['size']}, {first['dtype']}, {scope}. {within}"]
    figures = [figure for figure in (*added(rows), per_step(rows), memory(rows)) if figure]
    tables = [table for table in (loops(rows), whole(rows), load(rows)) if table]
    return Section(title, notes, figures, tables)


def added(rows: Sequence[Row]) -> list[Figure]:
    """Bars of the variants over their base, NegToMe apart from other methods, which may cost many times as much."""
    figures = []
    acting = [row for row in rows if row["role"] != "without"]
    groups = (
        ("Time that NegToMe adds", [row for row in acting if row["role"] == "published" or row["method"] == "negtome"]),
        ("Time that other methods add", [row for row in acting if row["role"] == "ours" and row["method"] != "negtome"]),
    )
    for title, mine in groups:
        told = [spread(row, base(row, rows)) for row in mine]
        most = max(map(noise, mine), default=0.0)
        caption = "Of the measured loop, over the loop without it in the same round: the median. Whiskers: 10th to 90th percentile"
        caption += f"; the shaded band is the noise, ±{share(most)}."
        if told:
            figures.append(drawn(f"{title}, in percent", caption, told, (-100 * most, 100 * most)))
    return figures


def spread(row: Row, without: Row) -> svg.Bar:
    low, high = 100 * row["overhead_p10"], 100 * row["overhead_p90"]
    note = f"{precise(without['median'])} → {precise(row['median'])}"
    return svg.Bar(row["variant"], note, 100 * row["overhead"], percent(row["overhead"]), tone(row), low, high)


def tone(row: Row) -> str:
    return "other" if row["role"] == "ours" and row["method"] != "negtome" else row["role"]


def per_step(rows: Sequence[Row]) -> Figure | None:
    """Without, ours and published, each step with its median and spread over the rounds."""
    methods = dict.fromkeys(["negtome", *(row["method"] for row in rows if row["role"] == "ours")])
    chosen = next(filter(None, (main(rows, method) for method in methods)), {})
    if not chosen:
        return None
    active = chosen["ours"]["active"]
    series = []
    for role, row in chosen.items():
        points = []
        for number, values in enumerate(zip(*row["step_seconds"], strict=True), 1):
            timing = Timing(tuple(values))
            points.append((float(number), timing.median, timing.percentile(10), timing.percentile(90)))
        series.append(svg.Series(SERIES[role], role, points))
    acting = (
        f"in the shaded steps ({sum(active)} of {len(active)}) the method acts" if any(active) else "the method acts in no step"
    )
    title = "Time of each step"
    caption = f"Ours is {chosen['ours']['variant']}. Median over the rounds, with the 10th to 90th percentile; {acting}."
    caption += " The axis does not begin at zero."
    wide, narrow = (svg.steps(title, series, active, width, axis_seconds) for width in (svg.WIDE, svg.NARROW))
    return Figure(title, caption, wide, narrow)


def memory(rows: Sequence[Row]) -> Figure | None:
    told = []
    for row in rows:
        if row["peak_bytes"] is None:
            continue
        more, computed = extra_bytes(row, base(row, rows)), row["computed_bytes"]
        text = size(row["peak_bytes"]) + ("" if more is None else f" ({size(more, '+')})")
        mark = None if computed is None else computed / 1e9
        told.append(svg.Bar(row["variant"], "", row["peak_bytes"] / 1e9, text, tone(row), mark=mark))
    if not told:
        return None
    marked = " The stroke is what was computed beforehand." if any(bar.mark is not None for bar in told) else ""
    return drawn("Memory at its peak", f"Of torch's allocator; in brackets, over the same without a method.{marked}", told)


def loops(rows: Sequence[Row]) -> Table:
    """Every variant, as measured."""
    head = (
        "variant",
        "added",
        "loop",
        "10th to 90th percentile",
        "noise",
        "active step",
        "inactive step",
        "active step adds",
        "merged",
    )
    lines = []
    for row in rows:
        without = row["role"] == "without"
        lines.append(
            (
                row["variant"],
                UNKNOWN if without else percent(row["overhead"]),
                precise(row["median"]),
                f"{precise(row['p10'])} to {precise(row['p90'])}",
                share(noise(row)),
                *(known(row[key], precise) for key in ("active_step", "inactive_step")),
                known(row["overhead_active_step"], percent),
                known(row["merged_share"], share),
                UNKNOWN if row["graphs"] is None else f"{row['graphs']['graphs']}, {row['graphs']['recompiles']}",
            )
        )
    return without_empty(Table("Every variant, as measured", (*head, "graphs, recompiles"), lines))


def whole(rows: Sequence[Row]) -> Table | None:
    """What the measured share makes of the whole model."""
    lines = []
    for row in rows:
        if row["full"] and row["role"] != "without":
            full = row["full"]
            times = precise(full["without"]), precise(full["loop"])
            lines.append([row["variant"], percent(full["overhead"]), f"{full['active']} of {full['steps']}", *times, full["how"]])
    if not lines:
        return None
    head = ["variant", "added", "active steps", "without", "with", "how it is computed"]
    caption, ways = "The whole model, extrapolated and not measured", {line[-1] for line in lines}
    if len(ways) > 1:
        return Table(caption, head, lines)
    return Table(f"{caption}. {sentence(ways.pop())}", head[:-1], [line[:-1] for line in lines])


def load(rows: Sequence[Row]) -> Table | None:
    """Memory, and the GPU while the loops ran."""
    head = (
        "variant",
        "peak memory",
        "over without",
        "computed",
        "clock",
        "power",
        "temperature",
        "energy per image",
        "energy added",
    )
    lines = []
    for row in rows:
        seen, without = row["gpu"] or {}, base(row, rows)
        compared = None if without is row else (without["gpu"] or {}).get("energy_j_per_image")
        energy = seen.get("energy_j_per_image")
        lines.append(
            (
                row["variant"],
                known(row["peak_bytes"], size),
                known(extra_bytes(row, without), lambda value: size(value, "+")),
                known(row["computed_bytes"], size),
                *(known(seen.get(key), unit.format) for key, unit in GPU_UNITS.items()),
                percent(energy / compared - 1) if energy and compared else UNKNOWN,
                ", ".join(map(str, seen["throttling"])) or "nothing" if seen else UNKNOWN,
            )
        )
    caption = "Memory and GPU during the loops" if any(row["gpu"] for row in rows) else "Memory during the loops"
    table = without_empty(Table(caption, (*head, "throttled by"), lines))
    return table if len(table.head) > 1 else None


def extra_bytes(row: Row, without: Row) -> float | None:
    known_both = row is not without and row["peak_bytes"] is not None and without["peak_bytes"] is not None
    return row["peak_bytes"] - without["peak_bytes"] if known_both else None


def operator(source: Source) -> Section:
    """One call of the operator: bars of the main case of each shape; a table of each case, folded."""
    tables = []
    for name, rows in source.cases().items():
        rivals = list(dict.fromkeys(rival for row in rows for rival in row["ratio"]))
        head = (
            "variant",
            "median",
            "10th to 90th percentile",
            *(f"{rival} / it" for rival in rivals),
            "of the floor",
            "memory added",
        )
        lines = [
            (
                row["variant"],
                precise(row["median"]),
                f"{precise(row['p10'])} to {precise(row['p90'])}",
                *(known(row["ratio"].get(rival), "{:.2f}".format) for rival in rivals),
                known(row["floor_reached"], share),
                known(row["extra_bytes"], size),
            )
            for row in rows
        ]
        tables.append(without_empty(Table(name, head, lines)))
    note = "Ratios are the other's time over this variant's, of one interleaved run: above 1, this variant is faster."
    return Section(f"One call of the operator ({source.name})", [note], calls(source), tables, folded=True)


def calls(source: Source) -> list[Figure]:
    """A figure a shape, of the case that is most like what users run."""
    shapes: dict[str, list[Row]] = {}
    for rows in source.cases().values():
        one = rows[0]
        usual = (one["dtype"] == "bf16", one["matching"] == "paper", one["gate"] == "half")
        best = shapes.get(one["shape"])
        if best is None or usual > (best[0]["dtype"] == "bf16", best[0]["matching"] == "paper", best[0]["gate"] == "half"):
            shapes[one["shape"]] = rows
    figures = []
    for shape, rows in shapes.items():
        first = rows[0]
        sizes = f"{first['images']} images of {first['tokens']} tokens, {first['channels']} channels"
        caption = (
            f"{sizes}; {first['dtype']}, {first['matching']} matching, gate {first['gate']}. Whiskers: 10th to 90th percentile."
        )
        told = []
        for row in sorted(rows, key=lambda row: row["median"]):
            tone = {"ours": "ours", "rival": "published"}.get(row["role"], "without")
            notes = [f"{ratio:.2f} times as fast as release" for rival, ratio in row["ratio"].items() if rival == "release"]
            notes += ["searches only"] if row["role"] == "search" else []
            ends = (row["p10"], row["p90"])
            told.append(svg.Bar(row["variant"], ", ".join(notes), row["median"], precise(row["median"]), tone, *ends))
        figures.append(drawn(f"{shape}: time of one call", caption, told))
    return figures


def machines(sources: Sequence[Source]) -> Section:
    names = list(dict.fromkeys(name for source in sources for name, version in source.document["versions"].items() if version))
    lines = []
    for source in sources:
        seen, document = source.document["machine"], source.document
        lines.append(
            (
                source.name,
                document["date"],
                ", ".join(map(str, seen["gpus"])) or "none",
                f"{seen['processor']}, {counted(seen['cores'], 'core')}, {counted(seen['threads'], 'thread')}",
                document.get("isa") or UNKNOWN,
                seen["system"],
                *(str(document["versions"].get(name) or UNKNOWN) for name in names),
            )
        )
    told = without_empty(Table("", ("file", "date", "GPUs", "processor", "instruction set", "system", *names), lines))
    turned = [[name, *(line[place] for line in told.rows)] for place, name in enumerate(told.head)]
    return Section(
        "Machine and versions", tables=[Table("What was measured, where and with what", turned[0], turned[1:], len(lines) + 1)]
    )


def left_out(sources: Sequence[Source]) -> Section | None:
    """Reasons that several share are told once."""
    reasons: dict[str, list[str]] = {}
    for source in sources:
        for name, reason in source.document["left_out"].items():
            names = reasons.setdefault(str(reason), [])
            names += [name] if name not in names else []
    if not reasons:
        return None
    lines = [(reason, "; ".join(names)) for reason, names in reasons.items()]
    return Section("Left out", tables=[Table("What was not measured, and why", ("reason", "what"), lines, texts=2)])


def drawn(title: str, caption: str, told: Sequence[svg.Bar], band: tuple[float, float] | None = None) -> Figure:
    return Figure(title, caption, *(svg.bars(title, told, width, band) for width in (svg.WIDE, svg.NARROW)))


def without_empty(table: Table) -> Table:
    """Without columns in which nothing is known."""
    kept = [place for place in range(len(table.head)) if any(line[place] != UNKNOWN for line in table.rows)]
    head, *lines = ([cells[place] for place in kept] for cells in (table.head, *table.rows))
    return Table(table.caption, head, lines, table.texts)


def place(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    return str(machine["gpus"][0]) if machine["gpus"] else f"{machine['processor']}, {counted(machine['threads'], 'thread')}"


def counted(number: int | None, what: str) -> str:
    return f"{number or '?'} {what}{'' if number == 1 else 's'}"


def known(value: float | None, text: Callable[[float], str]) -> str:
    return UNKNOWN if value is None else text(value)


def share(value: float) -> str:
    return percent(value, "")


def size(value: float, sign: str = "") -> str:
    unit, scale, digits = next(one for one in UNITS if abs(value) >= one[1] or one is UNITS[-1])
    return f"{value / scale:{sign}.{digits}f} {unit}".replace("-", "−")


def sentence(text: str) -> str:
    """Begun with a capital and ended with a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."
