"""The laboratory's numbers against the same metrics computed by hand, and the shape of its results."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from negengine import metrics
from negengine.evaluate import results
from negengine.evaluate.asked import FROM_FILE, asked_for, check_needs, load_all
from negengine.evaluate.groups import Drawn, Group
from negengine.evaluate.measure import Beside, Row, class_in, measure
from negengine.evaluate.pairs import NOBODY, pair_tables
from negengine.evaluate.plots import plot
from negengine.evaluate.protocols import CATEGORIES, PREFIXES, Diversity, Pairs, Removal, protocol_named
from negengine.evaluate.published import BESIDE, NEGTOME
from negengine.evaluate.tables import markdown, tables
from negengine.metrics.extractors import Extractor

CLASSES = ("cat", "dog", "elk")


def seen(images):
    return torch.tensor([[image.getpixel((0, 0))[c] / 255 for c in range(3)] for image in images])


READER = Extractor("colours", seen, lambda images: 9 * seen(images), CLASSES)
EXTRACTORS = {"colours": READER}


def drawn(name, seed, groups=4, images=3, prompts=("a cat", "a dog"), seeds=2):
    generator = np.random.default_rng(seed)
    made = []
    for number in range(groups):
        pixels = generator.integers(0, 256, size=(images, 3))
        prompt, seed = prompts[number // seeds % len(prompts)], number % seeds  # groups of different seeds alternate
        key = f"{prompt}, seed {seed}, {number}"
        names = tuple(f"{key}/{k}" for k in range(images))
        pictures = tuple(Image.new("RGB", (2, 2), tuple(map(int, colour))) for colour in pixels)
        made.append(Group(key, pictures, names, prompt, seed))
    return Drawn(name, tuple(made))


BASE, OTHER = drawn("without", 0), drawn("negtome", 1)


def rows_of(*texts, beside=None, variants=(BASE, OTHER)):
    asked = asked_for(texts, "colours", "colours")
    found = measure(variants, asked, EXTRACTORS, beside or Beside(base="without"))
    return {(row.variant, row.metric): row for row in found}


def test_values_of_groups_and_their_differences():
    rows = rows_of("vendi")
    for variant in (BASE, OTHER):
        row = rows[variant.name, "vendi:colours"]
        expected = {group.key: metrics.vendi_score(seen(group.images)).item() for group in variant.groups}
        assert row.values == pytest.approx(expected)
        assert row.interval.mean == pytest.approx(np.mean(list(expected.values())))
    base, other = (np.array(list(rows[name, "vendi:colours"].values.values())) for name in ("without", "negtome"))
    row = rows["negtome", "vendi:colours"]
    assert row.paired
    assert row.difference == metrics.difference_interval(other, base, paired=True)
    assert rows["without", "vendi:colours"].difference is None


def test_images_are_averaged_in_their_group_and_kept():
    expected = {v.name: [g.prompt.removeprefix("a ") for g in v.groups for _ in g.images] for v in (BASE, OTHER)}
    rows = rows_of("as-prompted", beside=Beside(base="without", expected={"colours": expected}))
    row = rows["negtome", "as-prompted:colours"]
    read = [CLASSES[number] for number in READER.logits(OTHER.images).argmax(-1)]
    right = [float(a == b) for a, b in zip(read, expected["negtome"], strict=True)]
    keys = [group.key for group in OTHER.groups]
    assert row.by_image == {f"{keys[k // 3]}/{k % 3}": one for k, one in enumerate(right)}
    assert row.values == pytest.approx({key: sum(right[3 * k : 3 * k + 3]) / 3 for k, key in enumerate(keys)})
    assert 0 <= row.interval.low <= row.interval.high <= 1


def parts(variant):
    """The images of seed 0 and of seed 1."""
    return [[image for group in variant.groups if group.seed == seed for image in group.images] for seed in range(2)]


def test_sets_have_a_value_for_each_seed():
    beside = Beside(base="without", forbidden="dog")
    rows = rows_of("entropy", "kl", "forbidden", beside=beside)
    labels = [READER.logits(part).argmax(-1) for part in parts(OTHER)]
    assert rows["negtome", "entropy:colours"].values == pytest.approx(
        {f"seed {seed}": metrics.label_entropy(labels[seed]).item() for seed in range(2)}
    )
    base = [READER.logits(part).argmax(-1) for part in parts(BASE)]
    for name, own in (("without", base), ("negtome", labels)):  # both are compared with the base's other seed
        assert rows[name, "kl:colours"].values == pytest.approx(
            {f"seed {seed}": metrics.label_divergence(own[seed], base[1 - seed], 3, without=1).item() for seed in range(2)}
        )
    assert rows["negtome", "forbidden:colours"].interval.mean == pytest.approx(float((torch.cat(labels) == 1).double().mean()))


def test_labels_of_a_file_need_no_reader():
    labels = {"without": ["old"] * 12, "negtome": ["old", "new", "odd"] * 4}
    asked = asked_for(["label-entropy", "distinct"], labels=FROM_FILE)
    found = measure([BASE, OTHER], asked, {}, Beside(base="without", labels=labels))
    means = {(row.variant, row.metric): row.interval.mean for row in found}
    assert means["without", "label-entropy:file"] == 0
    assert means["negtome", "label-entropy:file"] == pytest.approx(np.log2(3))
    assert means["negtome", "distinct:file"] == 3


def test_the_base_comes_first_and_other_groups_are_not_paired():
    strange = drawn("strange", 2, prompts=("an elk",))
    found = measure([strange, OTHER, BASE], asked_for(["vendi:colours"]), EXTRACTORS, Beside(base="without"))
    assert [row.variant for row in found] == ["without", "strange", "negtome"]
    assert [row.paired for row in found] == [False, False, True]


def test_a_class_that_is_not_read_is_one_clear_error():
    with pytest.raises(ValueError, match="the class 'cow' is none of those that are read: cat, dog, elk"):
        rows_of("forbidden", beside=Beside(base="without", forbidden="cow"))


def test_a_long_list_of_classes_is_shortened():
    many = Extractor("colours", seen, lambda images: torch.zeros(len(images), 1080), tuple(f"class {k}" for k in range(1080)))
    with pytest.raises(ValueError, match=r"none of those that are read: class 0, .*, class 9, … and 1070 others") as error:
        measure([BASE], asked_for(["forbidden:colours"]), {"colours": many}, Beside(base="without", forbidden="cow"))
    assert len(str(error.value)) < 250


def test_each_reader_has_a_class_that_is_asked_for():
    other = Extractor("animals", seen, READER.logits, ("a tabby", "a pug", "a moose"))
    expected = {"colours": {"without": ["cat"] * 12}, "animals": {"without": ["a pug"] * 12}}
    asked = asked_for(["as-prompted:colours", "as-prompted:animals"])
    rows = measure([BASE], asked, {"colours": READER, "animals": other}, Beside(base="without", expected=expected))
    read = READER.logits(BASE.images).argmax(-1)
    assert [row.interval.mean for row in rows] == pytest.approx([float((read == k).double().mean()) for k in (0, 1)])


def test_a_class_that_no_label_of_a_file_is_can_be_asked_for_and_forbidden():
    labels = {"without": ["cat"] * 12}
    asked = asked_for(["as-prompted", "forbidden"], labels=FROM_FILE)
    expected = {FROM_FILE: {"without": ["cat", "dog", "dog"] * 4}}
    rows = measure([BASE], asked, {}, Beside(base="without", labels=labels, expected=expected, forbidden="elk"))
    assert [row.interval.mean for row in rows] == pytest.approx([1 / 3, 0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one metric"),
        (["fidd"], "there is no metric 'fidd'"),
        (["vendi:a", "vendi:a"], "vendi:a is given twice"),
        (["lpips:clip"], "lpips takes no feature extractor"),
    ],
)
def test_metrics_that_cannot_be_asked_for(texts, message):
    with pytest.raises(ValueError, match=message):
        asked_for(texts)


def test_who_sees_where_nobody_says():
    keys = [one.key for one in asked_for(["vendi", "entropy", "clip-score", "inception-score", "fid:pixels"], "dinov2", "clip")]
    assert keys == ["vendi:dinov2", "entropy:clip", "clip-score:clip", "inception-score:clip", "fid:pixels"]
    assert [one.key for one in asked_for(["vendi", "fid", "asset-correlation"])] == [
        "vendi:dreamsim",
        "fid:inception",
        "asset-correlation",
    ]


def test_what_a_metric_lacks_is_one_clear_error():
    with pytest.raises(ValueError, match="entropy needs an extractor that reads classes, and pixels reads none"):
        load_all(asked_for(["entropy:pixels"]), "cpu", ())
    with pytest.raises(ValueError, match="clip-score needs an extractor that reads texts, and pixels reads none"):
        load_all(asked_for(["clip-score:pixels"]), "cpu", ())
    with pytest.raises(ValueError, match="fid needs reference images: give --against"):
        check_needs(asked_for(["fid"]), [], 4, 40, {"reference": "give --against FOLDER"})
    with pytest.raises(ValueError, match="vendi needs 2 images or more in a group, and there are 1"):
        check_needs(asked_for(["vendi"]), [], 1, 40, {})
    with pytest.raises(ValueError, match="recall needs 4 images or more in all, and there are 3"):
        check_needs(asked_for(["recall"]), ["reference"], 3, 3, {})


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A photo of a Cat.", "cat"),
        ("a cat and a dog", None),
        ("a catalogue", None),
        ("a guide dog, sitting", "guide dog"),
        ("nothing", None),
    ],
)
def test_the_class_that_a_prompt_names(prompt, name):
    assert class_in(prompt, ("cat", "dog", "guide dog")) == name


def test_results_can_be_read_and_shown(tmp_path):
    asked = asked_for(["vendi", "forbidden"], "colours", "colours")
    beside = Beside(base="without", forbidden="dog")
    told = results.document(measure([BASE, OTHER], asked, EXTRACTORS, beside), [BASE, OTHER], asked, {"protocol": "diversity"})
    results.write(told, tmp_path / "evaluate.json")
    assert results.read(tmp_path / "evaluate.json") == told
    assert list(told["variants"]) == ["without", "negtome"]
    assert "fewer than three seeds" in told["remarks"][0]
    page = markdown(told, "negengine evaluate")
    row = next(row for row in told["rows"] if (row["variant"], row["metric"]) == ("negtome", "vendi:colours"))
    assert "| Vendi score (colours) ↑ | " in page
    assert f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in page
    assert "0.743" in page  # of the paper
    assert [table.title for table in tables(told)][:2] == ["Means", "Differences from without"]
    for name, change, message in (
        ("a", {"schema": 2}, "has schema 2; this version"),
        ("b", {"what": "model"}, "is no result of `negengine evaluate`"),
        ("c", {"rows": [{"variant": "x"}]}, "'metric' is a required property"),
    ):
        (tmp_path / name).write_text(json.dumps(told | change))
        with pytest.raises(ValueError, match=message):
            results.read(tmp_path / name)
    (tmp_path / "d").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        results.read(tmp_path / "d")


def pair_protocol(**changes):
    return Pairs(prompts=("x",), metrics=("as-prompted", "reference-distance"), correctness="as-prompted", **changes)


def test_pairs_are_judged_by_metrics_with_or_without_their_extractor():
    metrics = ("as-prompted:a", "reference-distance:b")
    for correctness, quality in (metrics, ("as-prompted", "reference-distance")):
        protocol = Pairs(prompts=("x",), metrics=metrics, correctness=correctness, quality=quality, variants=("without", "dnp"))
        rows = [fake(name, metric, [place]) for place, name in enumerate(protocol.variants) for metric in metrics]
        (table,) = pair_tables(rows, protocol)
        assert {choice.who: (choice.correctness.mean, choice.quality.mean) for choice in table.choices} == {
            NOBODY: (0, 0), "without": (0, 1), "dnp": (1, 0),
        }  # fmt: skip


@given(st.integers(0, 10**6), st.floats(0, 2))
@settings(deadline=None, max_examples=30)
def test_the_best_picture_by_more_than_the_margin(seed, margin):
    protocol = pair_protocol(margin=margin)
    scores = np.random.default_rng(seed).normal(size=(4, 7))
    rows = [
        row
        for number, variant in enumerate(protocol.variants)
        for row in (
            fake(variant, "as-prompted:r", scores[number]),
            fake(variant, "reference-distance:r", -scores[number]),
        )
    ]
    for table, opponent in zip(pair_tables(rows, protocol), (1, 2), strict=True):
        three = scores[[0, opponent, 3]]
        expected = dict.fromkeys((NOBODY, "without", protocol.variants[opponent], "dnp"), 0)
        for picture in range(7):
            second, best = sorted(three[:, picture])[1:]
            clear = best - second > margin * three.std()
            names = ("without", protocol.variants[opponent], "dnp")
            expected[names[three[:, picture].argmax()] if clear else NOBODY] += 1 / 7
        for choice in table.choices:
            assert choice.correctness.mean == choice.quality.mean == pytest.approx(expected[choice.who])


def fake(variant, metric, values):
    by_image = {str(k): float(value) for k, value in enumerate(values)}
    return Row(variant, metric, {}, metrics.Interval(0, 0, 0), by_image=by_image)


def test_protocols_are_the_papers_by_default():
    protocol = Diversity()
    assert len(CATEGORIES) == 20
    assert len(PREFIXES) == 5
    assert len(protocol.prompts) == 100
    assert protocol.images == 4
    assert {"a photo of a bird", "a photo of an airplane", "a photo of the insect"} <= set(protocol.prompts)
    seeds = [seed for s in protocol.seeds for case in protocol.cases(s) for seed in case.image_seeds]
    assert len(set(seeds)) == len(seeds) == 3 * 100 * 4
    repeated = list(Removal(prompts=("x", "y"), forbidden="z", images=2, repeats=3, seeds=(7,)).cases(7))
    assert len({case.key for case in repeated}) == 6
    assert len({seed for case in repeated for seed in case.image_seeds}) == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: protocol_named("diverse"), "there is no protocol 'diverse'; there are diversity, asset, removal, pairs"),
        (lambda: Diversity(prompts=()), "the protocol diversity needs prompts"),
        (lambda: Diversity(prompts=("x", "x")), "has 'x' twice among its prompts"),
        (lambda: Diversity(prompts=("x", " ")), "an empty prompt"),
        (lambda: Diversity(images=0), "1 to 1000 images"),
        (lambda: Diversity(seeds=(-1,)), "seeds must lie in"),
        (lambda: pair_protocol(margin=-1), "margin must be 0 or more"),
        (lambda: pair_protocol(variants=("without", "standard")), "compares dnp with at least one other"),
        (lambda: pair_protocol(variants=("dnp", "without")), "the first variant, which must be another"),
        (lambda: Pairs(prompts=("x",), correctness="as-prompted"), "not among its metrics"),
        (lambda: Pairs(prompts=("x",), correctness="clip-score:a"), "not among its metrics"),
        (lambda: Pairs(prompts=("x",), metrics=("vendi", "reference-distance"), correctness="vendi"), "compares single images"),
    ],
)
def test_protocols_that_cannot_be_run(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_picture_is_seen_once_by_each_extractor():
    looked = []

    def features(images):
        looked.append(len(images))
        return seen(images)

    counting = {"colours": Extractor("colours", features)}
    reference = OTHER.images[:5]
    asked = asked_for(["vendi", "distance", "reference-distance"], "colours")
    measure([BASE, OTHER], asked, counting, Beside(base="without", reference=reference))
    assert sorted(looked) == [5, 12, 12]


def test_groups_of_seeds_that_alternate_have_their_own_prompts_and_features():
    """As folders sort them: by prompt first."""
    colours = {"a red": (255, 0, 0), "a blue": (0, 0, 255)}
    keys = [(prompt, seed) for prompt in colours for seed in range(2)]
    groups = [Group(f"{p}, {s}", (Image.new("RGB", (2, 2), colours[p]),) * 2, ("x",) * 2, p, s) for p, s in keys]
    reader = Extractor("words", seen, texts=lambda texts: torch.tensor([colours[text] for text in texts]) / 255)
    (row,) = measure([Drawn("a", tuple(groups))], asked_for(["clip-score:words"]), {"words": reader}, Beside(base="a"))
    assert row.values == pytest.approx({group.key: 1.0 for group in groups})


def test_a_method_that_changes_nothing_has_the_divergence_of_the_base():
    """Compared with a pool that holds them, the base's seeds would have half the divergence of the same distribution."""
    generator = np.random.default_rng(0)
    kinds = [Image.new("RGB", (1, 1), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]

    def labelled(name):
        groups = [[kinds[k] for k in generator.choice(3, size=20)] for _ in range(3)]
        return Drawn(name, tuple(Group(f"{k}", tuple(group), ("x",) * 20, "a cat", k) for k, group in enumerate(groups)))

    found = {"without": [], "same": []}
    for _ in range(300):
        rows = rows_of("kl", beside=Beside(base="without", forbidden="dog"), variants=[labelled(name) for name in found])
        for name, values in found.items():
            values.append(rows[name, "kl:colours"].interval.mean)
    assert np.mean(found["without"]) == pytest.approx(np.mean(found["same"]), rel=0.3)


def test_with_one_seed_the_divergence_of_the_base_is_unknown(tmp_path):
    variants = [drawn("without", 0, seeds=1), drawn("negtome", 1, seeds=1)]
    asked = asked_for(["kl"], "colours", "colours")
    rows = measure(variants, asked, EXTRACTORS, Beside(base="without", forbidden="dog"))
    assert rows[0].values == {}
    assert rows[0].interval is rows[0].difference is rows[1].difference is None
    labels = [READER.logits(variant.images).argmax(-1) for variant in reversed(variants)]
    assert rows[1].values == pytest.approx({"seed 0": metrics.label_divergence(*labels, 3, without=1).item()})
    told = results.document(rows, variants, asked, {"protocol": "removal"})
    means, differences = tables(told)[:2]
    plot(told, tmp_path / "evaluate.png")
    assert means.rows[0][1] == "-"
    assert differences.rows[0][1] == "-"


def test_prompts_are_what_is_resampled_where_there_are_eight():
    prompts = tuple(f"prompt {number}" for number in range(8))
    variants = [drawn(name, k, groups=24, prompts=prompts, seeds=3) for k, name in enumerate(("without", "negtome"))]
    rows = rows_of("vendi", "entropy", variants=variants)
    of_prompt = {
        name: [
            np.mean([rows[name, "vendi:colours"].values[g.key] for g in both.groups if g.prompt == prompt]) for prompt in prompts
        ]
        for name, both in zip(("without", "negtome"), variants, strict=True)
    }
    row = rows["negtome", "vendi:colours"]
    assert (row.over, row.difference_over, row.interval.units, row.pairs) == ("prompts", "prompts", 8, 24)
    mine, base = (np.array(of_prompt[name]) for name in ("negtome", "without"))
    assert row.interval == metrics.mean_interval(mine).within(1, 3)
    assert row.difference.low == pytest.approx(metrics.difference_interval(mine, base, paired=True).low)
    assert (rows["negtome", "entropy:colours"].over, rows["negtome", "entropy:colours"].interval.units) == ("seeds", 3)
    asked = asked_for(["vendi", "entropy"], "colours", "colours")
    told = results.document(list(rows.values()), variants, asked, {})
    assert "mean, over 8 prompts (each the mean of its groups) or 3 seeds." in tables(told)[0].note


def test_intervals_hold_no_impossible_values():
    pure = [(Image.new("RGB", (2, 2), colour),) * 3 for colour in ((255, 0, 0), (255, 0, 0), (0, 255, 0))]
    mixed = (*pure[0][:1], *pure[2][:1], Image.new("RGB", (2, 2), (0, 0, 255)))
    images = [*pure[:2], mixed]
    groups = tuple(Group(f"{k}", of, ("x",) * 3, "a cat", 0) for k, of in enumerate(images))
    expected = {"colours": {"without": ["cat"] * 9}}
    beside = Beside(base="without", expected=expected, forbidden="dog")
    rows = rows_of("vendi", "distinct", "label-entropy", "prompt-probability", beside=beside, variants=[Drawn("without", groups)])
    bounds = {"vendi": (1, 3), "distinct": (1, 3), "label-entropy": (0, np.log2(3)), "prompt-probability": (0, 1)}
    for name, (least, most) in bounds.items():
        found = rows["without", f"{name}:colours"].interval
        assert least <= found.low <= found.mean <= found.high <= most
    assert (rows["without", "distinct:colours"].interval.low, rows["without", "distinct:colours"].interval.high) == (1, 3)


def test_pictures_of_a_group_are_averaged_before_pairs_are_resampled():
    protocol = pair_protocol(variants=("without", "dnp"), margin=0.0)
    better = np.repeat([1.0, -1.0] * 6, 10)  # the ten pictures of a group have the same winner
    rows = []
    for variant, scores in (("without", 0 * better), ("dnp", better)):
        for metric in ("as-prompted:r", "reference-distance:r"):
            by_image = {f"group {k // 10}/{k % 10}": float(one) for k, one in enumerate(scores)}
            rows.append(Row(variant, metric, {}, metrics.Interval(0, 0, 0), by_image=by_image))
    (table,) = pair_tables(rows, protocol)
    choice = next(one for one in table.choices if one.who == "dnp")
    assert choice.correctness == metrics.mean_interval(np.array([1.0, 0.0] * 6)).within(0, 1)
    assert (table.pictures, choice.correctness.units) == (120, 12)
    nobody = table.choices[0].correctness
    assert nobody.low == 0 < nobody.high < 0.3


@pytest.mark.parametrize(("groups", "verdict"), [(5, ""), (6, " better"), (12, " better")])
def test_differences_that_are_all_equal_are_told_from_six_on(groups, verdict):
    red, green, blue = (Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    kinds = {"without": (red, red, green), "negtome": (red, blue, green)}
    variants = [
        Drawn(name, tuple(Group(f"{k}", images, ("x",) * 3, "a cat", 0) for k in range(groups))) for name, images in kinds.items()
    ]
    asked = asked_for(["distinct"], "colours", "colours")
    told = results.document(measure(variants, asked, EXTRACTORS, Beside(base="without")), variants, asked, {})
    table = tables(told)[1]
    assert table.rows[0][1] == f"+1.000 [1.000, 1.000]{verdict}"
    assert "an interval of no width: all of them agree" in table.note


def test_variants_with_other_groups_are_paired_by_those_that_both_have():
    fewer = Drawn("negtome", OTHER.groups[:3])
    rows = rows_of("vendi", "entropy", variants=(BASE, fewer))
    row, base = rows["negtome", "vendi:colours"], rows["without", "vendi:colours"]
    keys = [group.key for group in fewer.groups]
    assert row.paired
    assert row.pairs == 3
    mine, theirs = (np.array([one.values[key] for key in keys]) for one in (row, base))
    assert row.difference.mean == pytest.approx((mine - theirs).mean())
    asked = asked_for(["vendi", "entropy"], "colours", "colours")
    means, differences = tables(results.document(list(rows.values()), [BASE, fewer], asked, {}))[:2]
    assert means.columns[1:] == ("without (12 images in 4 groups, 2 seeds)", "negtome (9 images in 3 groups, 2 seeds)")
    assert "of each" not in means.note
    assert "entropy of all labels: of sets, whose values depend on the number of images, which is unequal here" in means.note
    assert "by the 3 groups that both have" in differences.note
    one = rows_of("vendi", variants=(BASE, Drawn("negtome", OTHER.groups[:1])))["negtome", "vendi:colours"]
    assert not one.paired


def test_a_table_stands_beside_the_protocol_that_it_is_of():
    assert [name for name, tables_ in BESIDE.items() if NEGTOME in tables_] == ["diversity"]
