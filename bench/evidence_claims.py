"""What the papers claim, as differences that would show it, and what the results say: decided by rule, before any result was there.

A claim shows where the whole 95 % interval of its difference lies on the claimed side of its limit; it does not show where the
interval holds the limit; the contrary shows where the whole interval lies on the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evidence_tables import AGREEING, NO_WIDTH, Row, contrast, number, regrouped

Document = Callable[[str], Mapping[str, Any] | None]
MORE, LESS = 1, -1
AT_MOST_LOST = 0.03  # of fidelity, as a share of the images
STRONG = 10  # scale of DNG
AS_MANY = 0.05  # difference of two shares of what is forbidden that are compared with each other
MODELS = ("people-flux", "people-sdxl")
RIVALS = ("negative prompting", "SLD")


@dataclass(frozen=True)
class Claim:
    """``variant`` minus ``base`` in ``metric`` lies above (``MORE``) or below (``LESS``) ``limit``."""

    text: str
    part: str
    job: str
    metric: str
    variant: str
    base: str
    side: int
    limit: float = 0.0


def _looks(part: str, job: str, model: str) -> list[Claim]:
    metrics = {"distinct:people-look": "distinct looks", **{f"label-entropy:people-{name}": f"entropy of {name}" for name in
               ("gender", "tone", "style")}}  # fmt: skip
    found = [
        Claim(f"NegToMe raises the {title} of a group ({model})", part, job, metric, "negtome others", "without", MORE)
        for metric, title in metrics.items()
    ]
    text = f"and costs less than 3 points of profession as prompted ({model})"
    return [*found, Claim(text, part, job, "as-prompted", "negtome others", "without", MORE, -AT_MOST_LOST)]


def _similar(model: str, names: str, variant: str, base: str, text: str) -> Claim:
    return Claim(f"{text} ({model}, prompted by {names})", "b", f"{model}, {names}", "asset-similarity", variant, base, LESS)


def _both(method: str, model: str) -> list[Claim]:
    job, name = f"{method}, {model}", f"negtome + {method}"
    return [
        Claim(
            f"NegToMe and {method} together draw less of what is forbidden ({model})", "e", job, "forbidden", name, "without", LESS
        ),
        Claim(f"and more distinct looks than {method} alone ({model})", "e", job, "distinct:people-look", name, method, MORE),
    ]


CLAIMS = (
    *_looks("a", "flux", "people-flux"),
    *_looks("rivals", "sdxl", "people-sdxl"),
    *(Claim(f"`others` gives more distinct looks than `{mode}` ({job})", part, job, "distinct:people-look", "negtome others",
            f"negtome {mode}", MORE) for part, job in (("a", "flux"), ("rivals", "sdxl")) for mode in ("first", "previous")),
    *(Claim(f"NegToMe gives more distinct looks than {rival}", "rivals", "sdxl", "distinct:people-look", "negtome others", rival,
            MORE) for rival in ("CADS 0.25", "CADS 1", "seed variance 1", "seed variance 3", "guidance interval")),
    Claim("NegToMe adds to prompt rewriting", "rivals", "sdxl", "distinct:people-look", "rewriting + negtome", "rewriting", MORE),
    *(Claim(f"NegToMe raises distinct looks at guidance {scale}", "a", "guidance", "distinct:people-look", f"{scale}, negtome",
            f"{scale}, without", MORE) for scale in ("1", "2", "3", "5", "8")),
    *(_similar(model, names, "negtome 1x", "without", "NegToMe makes pictures less like the character")
      for model in ("people-flux", "people-sdxl") for names in ("profession", "everything")),
    *(_similar(model, "profession", "negtome 1x, its head", "without", "also if only its head is to be avoided")
      for model in ("people-flux", "people-sdxl")),
    *(_similar("people-sdxl", "profession", "negtome 1x", rival, f"NegToMe makes them less like it than {rival}")
      for rival in ("negative prompting", "NAG")),  # prompted by everything, both would avoid the very words of the prompt
    *(Claim(f"DNG draws less of what is forbidden than without ({model})", "c", f"removal, {model}", "forbidden", f"DNG {STRONG}",
            "without", LESS) for model in MODELS),
    *(Claim(f"DNG {text} than {rival} that leaves as many ({model})", "c", f"removal, {model}", metric,
            f"DNG {STRONG}", rival, LESS)
      for model, rivals in (("people-flux", RIVALS[:1]), ("people-sdxl", RIVALS)) for rival in rivals
      for metric, text in (("kl", "changes the rest less"), ("fid", "is nearer to what is allowed"))),
    *(Claim(f"DNP shows all that is named with higher probability than {rival}", "d", "pairs",
            "prompt-probability:people-everything", "dnp", rival, MORE) for rival in ("without", "opposite", "random", "standard")),
    *(claim for method, model in (("DNG", "people-flux"), ("DNG", "people-sdxl"), ("NAG", "people-flux"))
      for claim in _both(method, model)),
)  # fmt: skip


def table(document: Document) -> str:
    lines = ["| claim | measured | |", "| --- | ---: | --- |"]
    for claim in CLAIMS:
        told = document(claim.part)
        if told is None or all(row["job"] != claim.job for row in told["rows"]):
            lines.append(f"| {claim.text} | | not measured yet |")
            continue
        row, base = rows_of(claim, told)
        difference = contrast(row, base)
        shown = f"{number(base['mean'], claim.metric)} → {number(row['mean'], claim.metric)}, " + _difference(
            difference, claim.metric
        )
        against, said = "", verdict(claim, difference)
        if base["variant"] != claim.base:
            left, aim = (forbidden(claim, told, one) for one in (base["variant"], claim.variant))
            against = f" ({base['variant']}: {number(left, 'forbidden')}, DNG: {number(aim, 'forbidden')})"
            said = said if abs(left - aim) <= AS_MANY else "none leaves as many"
        lines.append(f"| {claim.text}{against} | {shown} | {said} |")
    return "\n".join(lines) + "\n"


def rows_of(claim: Claim, told: Mapping[str, Any]) -> tuple[Row, Row]:
    rows = regrouped(told["rows"]) if claim.job == "guidance" else [row for row in told["rows"] if row["job"] == claim.job]
    found = {(row["variant"], row["metric"]): row for row in rows}
    row = found[claim.variant, claim.metric]
    return row, found[nearest(claim, found), claim.metric]


def forbidden(claim: Claim, told: Mapping[str, Any], variant: str) -> float:
    """What a variant leaves of what is forbidden, as a share."""
    rows = (row for row in told["rows"] if (row["job"], row["metric"], row["variant"]) == (claim.job, "forbidden", variant))
    return float(next(rows)["mean"])


def nearest(claim: Claim, found: Mapping[tuple[str, str], Row]) -> str:
    """The base; of a method at several scales the one that leaves the share of what is forbidden most like the variant's."""
    if (claim.base, claim.metric) in found:
        return claim.base
    left = {
        variant: row["mean"] for (variant, metric), row in found.items() if metric == "forbidden" and variant.startswith(claim.base)
    }
    aim = found[claim.variant, "forbidden"]["mean"]
    return min(left, key=lambda variant: abs(left[variant] - aim))


def verdict(claim: Claim, difference: Mapping[str, float | None]) -> str:
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return "one value: nothing can be said"
    if high - low < NO_WIDTH and (difference.get("units") or 0) < AGREEING:  # fewer that agree are no evidence, as in a sign test
        return "does not show"
    near, far = (low, high) if claim.side == MORE else (-high, -low)
    limit = claim.limit * claim.side
    if near > limit:
        return "**shows**"
    return "the contrary shows" if far < limit else "does not show"


def _difference(difference: Mapping[str, float | None], metric: str) -> str:
    low, high = (
        None if one is None else number(one, metric, "+").replace(" %", "") for one in (difference["low"], difference["high"])
    )
    mean = difference["mean"]
    assert mean is not None
    return number(mean, metric, "+") + ("" if low is None else f" [{low}, {high}]")
