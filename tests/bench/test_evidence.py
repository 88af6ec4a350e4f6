"""The evidence: what is drawn and what it costs, numbers from pictures, verdicts by rule, tables, and the gallery in a browser."""

import base64
import html
import io
import itertools
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import chromium, faults, screenshot
from PIL import Image

from negengine.evaluate.groups import Drawn, Group
from negengine.evaluate.people import sentence
from negengine.metrics.intervals import mean_interval
from negengine.models.people import pictures, prompts
from negengine.models.people.attributes import STYLES
from negengine.models.people.world import shares

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import evidence  # noqa: E402
import evidence_claims  # noqa: E402
import evidence_tables  # noqa: E402
from laboratory import asset, avoiding, diversity, gallery, numbers, pairs, plots, removal, rivals, together  # noqa: E402
from laboratory.job import FULL, QUICK, Studio  # noqa: E402

# --- results in their form, with numbers that are told ----------------------------------------------------------------

GROUPS = [f"a cook, seed {seed}, {k}" for seed in range(3) for k in range(8)]


def row(job, variant, metric, mean, base=None, spread=0.02):
    """A row whose values scatter little around a mean."""
    generator = random.Random(f"{job}{variant}{metric}")
    values = {key: mean + generator.uniform(-spread, spread) for key in GROUPS}
    rows = numbers.rows_of(metric, {"base": base["values"], variant: values} if base else {variant: values})
    return rows[-1] | {"variant": variant, "job": job}


def table_of(job, variants, metrics, mean):
    found = []
    for metric in metrics:
        base = row(job, variants[0], metric, mean(variants[0], metric))
        found += [base, *(row(job, variant, metric, mean(variant, metric), base) for variant in variants[1:])]
    return found


SIZE = {"seeds": [0, 1, 2], "images": 4, "steps": None, "prompts": None}


def told(part, rows, **more):
    setting = {"prompts": ["a cook"] * 8, "size": SIZE}
    jobs = dict.fromkeys([row["job"] for row in rows], setting)
    jobs |= {name.rpartition(", ")[0]: setting | {"size": SIZE | {"seeds": [7]}} for name in more.get("posterior", {})}
    about = {"machine": {"processor": "P"}, "versions": {"torch": "2"}, "date": "2026-11-26", "images": 9}
    return {"part": part, "rows": rows, "settings": jobs, **about, **more}


def sample():
    """Of every part: NegToMe gains a look, DNG removes, DNP does nothing."""
    looks, cost = list(evidence_tables.LOOKS), list(evidence_tables.COST)

    def gain(variant, metric):
        return 0.5 + (metric in looks) * (1 + ("negtome" in variant))

    modes = ["without", *(f"negtome {mode}" for mode in ("others", "first", "previous", "first, release"))]
    others = ["CADS 0.25", "CADS 1", "seed variance 1", "seed variance 3", "guidance interval", "rewriting", "rewriting + negtome"]
    alphas = ["without", *(f"{kind}, {alpha}" for kind in ("others, paper", "first, paper") for alpha in (0.5, 1))]
    scales = [f"{name}, {scale}" for scale in (1, 2, 3, 5, 8) for name in ("without", "negtome")]
    rows = table_of("flux", modes, looks + cost, gain)
    rows += table_of("alpha", alphas, looks + cost, gain) + table_of("guidance", scales, looks + cost, gain)
    away = ["without", "negtome 1x", "negtome 1x, its head", "negative prompting", "NAG"]
    of_b = [
        one
        for model, names in itertools.product(("people-flux", "people-sdxl"), ("profession", "everything"))
        for one in table_of(f"{model}, {names}", away, list(evidence_tables.AWAY), lambda variant, metric: 0.5)
    ]
    methods = ["without", "negative prompting 0.25", "negative prompting 1", "DNG 2", "DNG 10", "SLD weak", "SLD max"]
    left = dict(zip(methods, (0.33, 0.3, 0.11, 0.25, 0.1, 0.3, 0.2), strict=True))
    kl = {"DNG 10": 0.2, "negative prompting 1": 0.4}
    of_c = table_of("removal, people-sdxl", methods, ["forbidden", "kl", "fid", "as-prompted"], lambda variant, metric:
                    left[variant] if metric == "forbidden" else kl.get(variant, 0.3))  # fmt: skip
    trace = {"images": 3, "p10": [0.1] * 6, "p50": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "p90": [0.9] * 6}
    of_d = table_of("pairs", ["without", "opposite", "random", "standard", "dnp"], list(evidence_tables.PROMPTED), lambda *_: 0.9)
    choice = {"mean": 0.5, "low": 0.4, "high": 0.6}
    four = [{"opponent": one, "pictures": 120, "choices": [{"who": "dnp", "correctness": choice, "quality": choice}]}
            for one in (None, "opposite", "random", "standard")]  # fmt: skip
    both = [
        one
        for job in ("DNG", "NAG")
        for one in table_of(f"{job}, people-flux", ["without", "negtome", job, f"negtome + {job}"],
                            ["forbidden", *looks, "as-prompted", "kl"], gain)
    ]  # fmt: skip
    return {
        "a": told("a", rows),
        "rivals": told("rivals", table_of("sdxl", modes + others, looks + cost, gain)),
        "b": told("b", of_b),
        "c": told("c", of_c, posterior={f"{prompts}, people-sdxl, {one}": {"show it": trace} for prompts in ("related", "unrelated")
                                        for one in ("watched", "guided")}),
        "d": told("d", of_d, pairs=four),
        "e": told("e", both),
    }  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return sample()


# --- what the claims and tables say of them ----------------------------------------------------------------------------


def said(results, words):
    lines = [line for line in evidence_claims.table(results.get).splitlines() if words in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_each_verdict_is_that_of_the_interval(results):
    shows = said(results, "raises the distinct looks of a group (people-flux)")
    assert "1.50 → 2.50, +1.00 [" in shows
    assert shows.endswith("| **shows** |")
    assert said(results, "less than 3 points of profession as prompted (people-flux)").endswith("| **shows** |")
    assert said(results, "`others` gives more distinct looks than `first` (flux)").endswith("| does not show |")
    assert said(results, "higher probability than random").endswith("| does not show |")
    assert said(results, "more distinct looks than CADS 1").endswith("| **shows** |")


def test_methods_are_compared_where_they_leave_as_many(results):
    line = said(results, "DNG changes the rest less than negative prompting that leaves as many (people-sdxl)")
    assert "(negative prompting 1: 11.1 %, DNG: 10.3 %)" in line
    assert line.endswith("| **shows** |")
    other = {**results, "c": {**results["c"], "rows": [
        row | ({"values": {k: v + 1 for k, v in row["values"].items()}, "mean": row["mean"] + 1}
               if (row["variant"], row["metric"]) == ("DNG 10", "kl") else {}) for row in results["c"]["rows"]]}}  # fmt: skip
    assert said(other, "the rest less than negative prompting that leaves as many (people-sdxl)").endswith("| the contrary shows |")


def test_a_rival_that_leaves_far_more_or_fewer_is_no_equal(results):
    far = {**results, "c": {**results["c"], "rows": [
        row | ({"mean": 0.9} if row["metric"] == "forbidden" and row["variant"].startswith("negative") else {})
        for row in results["c"]["rows"]]}}  # fmt: skip
    line = said(far, "changes the rest less than negative prompting that leaves as many (people-sdxl)")
    assert line.endswith("| none leaves as many |")


def test_the_committed_results_are_of_these_models_and_settings():
    for name in evidence.NAMES:
        page = evidence.ROOT / "docs" / "gallery.html"
        path = page if name == "gallery" else evidence.RESULTS / f"{name}.json"
        assert evidence.is_there(path, evidence.settings_of(name, FULL)), f"run `python bench/evidence.py --part {name}`"


def test_a_part_without_results_is_said_to_be_none():
    table = evidence_claims.table(lambda part: None)
    assert table.count("not measured yet") == len(evidence_claims.CLAIMS)


def test_tables_have_every_variant_and_mark_what_is_sure(results, monkeypatch):
    monkeypatch.setattr(evidence_tables, "document", results.get)
    text = evidence_tables.modes()
    assert "| negtome others | 2.50, **+1.00 [" in text
    assert "8 prompts, groups of 4, 3 seeds: 96 images of each variant." in text
    assert "`python bench/evidence.py --part a`: 9 images, seeds 0, 1, 2; P, torch 2, 2026-11-26." in text
    assert "| seed variance 3 | 1.5" in evidence_tables.rivals()
    assert evidence_tables.guidance().count(", **+") == 5 * 4
    assert evidence_tables.pairs().count("| DNP against") == 4
    assert "| related, people-sdxl, watched, those that show it | 3 | 0.1 | 0.6 | 0.6 | 0.6 |" in evidence_tables.posterior()
    assert "seeds 7;" in evidence_tables.posterior()  # of its own jobs
    for _, make in evidence_tables.TABLES.values():
        assert "nan" not in make()


def test_the_plots_of_the_results(results, tmp_path):
    for name, (part, plot) in {"d": ("a", plots.diversity), "r": ("c", plots.removal), "p": ("c", plots.posterior)}.items():
        plot(results[part], tmp_path / f"{name}.png")
        assert Image.open(tmp_path / f"{name}.png").width > 900


# --- numbers from pictures -----------------------------------------------------------------------------------------------


def real(prompt, looks):
    labels = prompts.named(prompt)
    rows = [pictures.row_of(labels[0], gender, labels[2], style) for gender, style in looks]
    pixels = (pictures.all_people().images[rows].permute(0, 2, 3, 1) * 255).byte().numpy()
    return tuple(Image.fromarray(one) for one in pixels)


def drawn_(name, looks, prompt=avoiding.PROMPTS[1]):
    images = real(prompt, looks)
    return Drawn(name, tuple(Group(f"{prompt}, seed {seed}", images, ("a",) * len(images), prompt, seed) for seed in range(3)))


def test_what_is_forbidden_and_what_became_of_the_rest_is_counted():
    wrong = STYLES.index(avoiding.forbidden(avoiding.PROMPTS[1]))
    others = [style for style in range(3) if style != wrong]
    even = [(gender, style) for gender in range(3) for style in (wrong, *others)]
    base = drawn_("without", even)
    cleared = drawn_("cleared", [(gender, style) for gender in range(3) for style in others])
    biased = drawn_("biased", [(1, others[0])] * 6)
    rows = {(row["variant"], row["metric"]): row["mean"] for row in avoiding.removal_rows([base, cleared, biased])}
    assert rows["without", "forbidden"] == pytest.approx(1 / 3, abs=0.12)
    assert rows["cleared", "forbidden"] == rows["biased", "forbidden"] == 0
    assert rows["cleared", "kl"] < 0.15 < 1 < rows["biased", "kl"]
    assert rows["cleared", "fid"] < rows["biased", "fid"]
    assert rows["cleared", "as-prompted"] > 0.8


def test_the_divergence_is_from_the_base_s_other_seeds():
    wrong = STYLES.index(avoiding.forbidden(avoiding.PROMPTS[1]))
    first, second = (style for style in range(3) if style != wrong)
    text = avoiding.PROMPTS[1]

    def of(name, *styles):
        looks = [[(gender, style) for gender in range(3)] * 2 for style in styles]
        groups = (Group(f"{text}, seed {k}", real(text, one), ("a",) * 6, text, k) for k, one in enumerate(looks))
        return Drawn(name, tuple(groups))

    found = avoiding.removal_rows([of("without", first, second), of("other", second, first)])
    rows = {row["variant"]: row["values"] for row in found if row["metric"] == "kl"}
    assert min(rows["without"].values()) > 1  # each of its seeds draws the other style
    assert max(rows["other"].values()) < 0.3
    with pytest.raises(ValueError, match="two seeds or more"):
        avoiding.removal_rows([of("without", first)])


def test_seeds_that_alternate_have_the_labels_and_features_of_their_own_groups():
    looks = [(gender, style) for gender in range(3) for style in range(3)]
    both = avoiding.PROMPTS[1], avoiding.PROMPTS[4]
    groups = [Group(f"{text}, {seed}", real(text, looks), ("a",) * 9, text, seed) for text in both for seed in range(2)]
    reading = numbers.Reading([Drawn("without", tuple(groups))])
    whole = reading.features([image for group in groups[::2] for image in group.images])

    def as_prompted(read, seen, groups):
        assert seen.shape == whole.shape
        assert (seen - whole).abs().max() < 1e-4  # both seeds hold the same pictures
        asked = [prompts.named(group.prompt)[0] for group in groups for _ in group.images]
        return sum(int(a) == b for a, b in zip(read[:, 0], asked, strict=True)) / len(asked)

    found = reading.by_seed(as_prompted)["without"]
    assert list(found) == ["seed 0", "seed 1"]
    assert min(found.values()) > 0.8


def test_the_prompts_leave_the_style_open_with_equal_shares():
    assert len({avoiding.forbidden(prompt) for prompt in avoiding.PROMPTS}) == 3
    for prompt in avoiding.PROMPTS:
        profession, gender, tone, style = prompts.named(prompt)
        assert (gender, style) == (3, 3)
        left = shares()[profession][:, tone].sum(0)
        assert left.max() == pytest.approx(left.min())
        assert prompts.named(avoiding.avoided(prompt)) == (profession, 3, tone, STYLES.index(avoiding.forbidden(prompt)))
    methods = avoiding.away(lambda texts: list(texts))
    assert methods(0, avoiding.PROMPTS[:2]) == [avoiding.avoided(prompt) for prompt in avoiding.PROMPTS[:2]]


def test_rows_are_paired_by_their_keys_and_shares_stay_shares():
    base, other = {"a": 0.9, "b": 1.0, "c": 1.0}, {"c": 1.0, "a": 0.8, "b": 0.9}
    first, second = numbers.rows_of("as-prompted", {"base": base, "other": other})
    assert first["difference"] is None
    assert first["high"] == 1
    assert second["difference"]["mean"] == pytest.approx(-0.2 / 3, abs=1e-4)
    again = numbers.pooled([[first], [first | {"values": {"d": 0.5}}]])
    assert again[0]["mean"] == pytest.approx(3.4 / 4)
    with pytest.raises(ValueError, match="a is measured twice"):
        numbers.pooled([[first], [first]])


def test_groups_of_one_prompt_are_no_independent_values():
    generator = random.Random(0)
    of_prompt = {f"prompt {k}": generator.gauss(0.5, 0.1) for k in range(12)}
    values = {f"{prompt}, seed {seed}": mean for prompt, mean in of_prompt.items() for seed in range(3)}
    base = dict.fromkeys(values, 0.3)
    one, other = numbers.rows_of("vendi", {"base": base, "other": {key: 1 + value for key, value in values.items()}})
    assert one["units"] == other["units"] == other["difference"]["units"] == 12
    alone = mean_interval(np.array([0.7 + mean for mean in of_prompt.values()]))
    assert (other["difference"]["low"], other["difference"]["high"]) == pytest.approx((alone.low, alone.high), abs=1e-4)
    few = {key: value for key, value in values.items() if int(key.split()[1].strip(",")) < 7}
    assert numbers.rows_of("vendi", {"base": few})[0]["units"] == 21
    assert numbers.rows_of("fid", {"base": {f"seed {k}": 2.0 * k for k in range(3)}})[0]["low"] == 0
    none, all_ = numbers.rows_of("forbidden", {"none": dict.fromkeys(values, 0.0), "all": dict.fromkeys(values, 1.0)})
    assert (none["low"], none["high"]) == pytest.approx((0, 0.2425), abs=1e-3)  # Wilson's of 0 in 12
    assert (all_["low"], all_["high"]) == pytest.approx((1 - 0.2425, 1), abs=1e-3)


def test_differences_that_are_all_equal_need_six_to_be_sure():
    claim = evidence_claims.CLAIMS[0]
    for units, said_ in ((5, "does not show"), (6, "**shows**" if claim.side == evidence_claims.MORE else "the contrary shows")):
        difference = {"mean": 9.0, "low": 9.0, "high": 9.0, "units": units}
        assert evidence_claims.verdict(claim, difference) == said_
        assert evidence_tables.sure(difference) == (units == 6)
        rounded = difference | {"high": 9.0 + 2e-15}  # equal but for rounding
        assert evidence_tables.sure(rounded) == (units == 6)


def test_rewritten_prompts_name_a_look_of_their_own_for_each_image():
    texts = rivals.rewritten("a farmer", 4)
    looks = {prompts.named(text) for text in texts}
    assert len(looks) == 4
    assert {look[0] for look in looks} == {prompts.named("a farmer")[0]}
    assert texts == rivals.rewritten("a farmer", 4)


def test_the_opposite_of_a_prompt_differs_in_all_but_the_profession():
    prompt = sentence("judge", "woman", "dark", "noto")
    for seed in range(6):
        other = prompts.named(pairs.opposite(prompt, seed))
        assert other[0] == prompts.named(prompt)[0]
        assert all(a != b for a, b in zip(other[1:], prompts.named(prompt)[1:], strict=True))
        assert pairs.any_other(prompt, seed) != prompt


# --- jobs: known before they are drawn, kept, and drawn ------------------------------------------------------------------


@pytest.mark.parametrize("part", [diversity, rivals, asset, removal, pairs, together])
def test_what_a_part_draws_is_known_before(part):
    full, quick = part.jobs(FULL), part.jobs(QUICK)
    assert [job.name for job in full][:1] == [job.name for job in quick][:1]
    for job in full:
        assert job.cost > 0
        assert len(job.size.seeds) == 3 or job.name.startswith(("related", "unrelated"))
        assert len({variant.name for variant in job.variants}) == len(job.variants)
    assert sum(job.images for job in quick) < 0.2 * sum(job.images for job in full)


def test_a_part_is_kept_as_long_as_its_settings_and_weights_are_the_same(tmp_path, monkeypatch):
    settings = evidence.settings_of("e", QUICK)
    file = tmp_path / "e.json"
    assert not evidence.is_there(file, settings)
    file.write_text(json.dumps({"settings": settings}))
    assert evidence.is_there(file, evidence.settings_of("e", QUICK))
    assert not evidence.is_there(file, evidence.settings_of("e", FULL))
    monkeypatch.setattr("laboratory.job.weights", lambda model: "other")
    assert not evidence.is_there(file, evidence.settings_of("e", QUICK))


def test_a_few_pictures_in_two_steps_are_no_evidence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--quick"])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "give --results another folder" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(evidence.NAMES))
def test_each_part_is_drawn_and_measured(tmp_path, name):
    file = tmp_path / ("gallery.html" if name == "gallery" else f"{name}.json")
    evidence.measure(name, QUICK, file)
    settings = evidence.settings_of(name, QUICK)
    assert evidence.is_there(file, settings)
    if name == "gallery":
        assert len(gallery.data_of(file)["methods"]) >= 3
        return
    found = json.loads(file.read_text())
    wanted = [(job.name, variant.name) for job in evidence.part_of(name).jobs(QUICK) for variant in job.variants]
    if name == "b":  # its characters are told together
        wanted = [(job.rpartition(", ")[0], variant) for job, variant in wanted]
    measured = {(row["job"], row["variant"]) for row in found["rows"]}
    if name == "c":
        assert {f"{a}, people-flux, {b}" for a in ("related", "unrelated") for b in ("watched", "guided")} <= set(
            found["posterior"]
        )
        wanted = [pair for pair in wanted if pair[0].startswith("removal")]
    assert measured == set(wanted)


def test_pictures_that_were_drawn_are_taken_again(tmp_path, monkeypatch):
    job, *_ = together.jobs(QUICK)
    calls = []

    def anew(self, job, drawn, watch):
        calls.append(job.name)
        return [drawn_("without", [(0, 0), (1, 1)]), drawn_("DNG", [(2, 2), (1, 1)])]

    monkeypatch.setattr(Studio, "_draw", anew)
    first, again = Studio(tmp_path).draw(job), Studio(tmp_path).draw(job)
    assert calls == [job.name]
    for one, other in zip(first, again, strict=True):
        assert (one.name, one.about) == (other.name, other.about)
        for a, b in zip(one.groups, other.groups, strict=True):
            assert (a.key, a.prompt, a.seed, a.names, a.image_seeds) == (b.key, b.prompt, b.seed, b.names, b.image_seeds)
            assert [image.tobytes() for image in a.images] == [image.tobytes() for image in b.images]
    Studio(tmp_path).draw(together.jobs(FULL)[0])
    Studio().draw(job)
    Studio(tmp_path).draw(job, watch=lambda variant, reports: None)
    assert len(calls) == 4


def test_a_studio_measures_seconds_and_changes_samplers():
    studio = Studio()
    assert studio.seconds("people-flux") > 0
    own = type(studio.pipe("people-flux").scheduler).__name__
    assert type(studio.pipe("people-flux", "FlowMatchHeunDiscreteScheduler").scheduler).__name__ != own
    assert type(studio.pipe("people-flux").scheduler).__name__ == own


# --- the gallery in a browser --------------------------------------------------------------------------------------------


def strip(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (256, 64), colour).save(buffer, "WEBP")
    return base64.b64encode(buffer.getvalue()).decode()


def a_page():
    def at(hue, number):
        return {"strip": strip((hue, 40 * number, 90)), "read": [f"cook, man, {word}, noto" for word in "abcd"[: number + 1]]}

    def method(name, hue, strengths):
        seeds = [{"seed": seed, "at": [at(hue + 20 * seed, n) for n in range(len(strengths))]} for seed in (0, 1)]
        texts = [{"prompt": text, "avoid": "noto", "seeds": seeds} for text in ("a cook", "a judge </script>")]
        return {"title": name, "about": "It does it.", "setting": "alpha", "strengths": strengths, "prompts": texts}

    methods = [method("NegToMe", 10, [0, 1, 2]), method("DNG", 120, [0, 5])]
    return gallery.page({"methods": methods, "images": 80, "date": "2026-11-26", "settings": {}})


def pages():
    return {"small": a_page, "committed": (ROOT / "docs" / "gallery.html").read_text}


TURN = """
<pre id="found"></pre><script>
const seen = [], image = document.getElementById("with"), slider = document.getElementById("strength");
const said = () => [document.getElementById("value").textContent, image.alt];
const say = what => seen.push([what, image.src.slice(-60) + image.src.length, ...said()]);
function turn(value) { slider.value = value; slider.dispatchEvent(new Event("input", {bubbles: true})); }
function pick(id, value) { const box = document.getElementById(id); box.value = value; box.dispatchEvent(new Event("change")); }
turn(0); say("without"); seen.push(["base", document.getElementById("without").src === image.src]);
turn(slider.max); say("most"); turn(1); say("some");
pick("seed", 1); say("seed"); pick("prompt", 1); say("prompt"); pick("method", 1); say("method");
const keys = [...document.querySelectorAll("select, input")].filter(one => one.tabIndex >= 0 && one.labels.length);
seen.push(["keys", keys.map(one => one.id).join(" ")]);
window.addEventListener("load", () => {  // when the pictures are there, too
  seen.push(["size", image.naturalWidth]);
  document.getElementById("found").textContent = "seen" + JSON.stringify(seen);
});
</script>
"""


@pytest.fixture(params=["small", "committed"])
def page(request):
    return pages()[request.param]()


def test_the_slider_changes_the_picture_and_no_script_fails(page, tmp_path):
    file = tmp_path / "turned.html"
    file.write_text(page.replace("</body>", TURN + "</body>"), encoding="utf-8")
    done = chromium(tmp_path, "--dump-dom", file.as_uri())
    assert not re.findall(r"CONSOLE.*", done.stderr)
    found = re.search(r'<pre id="found">seen(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = json.loads(html.unescape(found[1]))
    shown = {what: rest for what, *rest in seen}
    assert shown["base"] == [True]
    pictures_ = [shown[what][0] for what in ("without", "most", "some", "seed", "method")]
    assert len(set(pictures_)) == 5
    assert shown["without"][1].endswith("(without)")
    assert "pictures:" in shown["most"][2]
    assert shown["keys"] == ["method prompt seed strength"]
    assert shown["size"][0] >= 128


def test_the_page_fits_every_width_and_loads_nothing(page, tmp_path):
    assert faults(page, [340, 900], tmp_path) == []
    assert len(page.encode()) <= gallery.MOST


def test_it_is_light_and_dark(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(a_page(), encoding="utf-8")
    corners = [Image.open(screenshot(file, scheme, 600, 500)).convert("L").getpixel((2, 2)) for scheme in ("light", "dark")]
    assert corners[0] > 230
    assert corners[1] < 60


def test_a_page_keeps_what_it_was_made_from(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(a_page(), encoding="utf-8")
    assert gallery.data_of(file)["methods"][0]["prompts"][1]["prompt"] == "a judge </script>"
    file.write_text("<html></html>")
    with pytest.raises(ValueError, match="is no gallery"):
        gallery.data_of(file)
    with pytest.raises(ValueError, match=r"the gallery has 5\.\d MB, more than 4"):
        gallery.page({"methods": ["x" * 5_000_000]})
