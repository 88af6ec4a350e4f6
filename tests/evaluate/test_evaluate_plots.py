"""The laboratory's plot: a panel for each metric that can be told from the others."""

from itertools import pairwise

import pytest

from negengine.evaluate import plots

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'negengine[metrics]'")


def about(title, extractor, percent=False):
    return {"title": title, "extractor": extractor, "percent": percent, "better": "higher"}


@pytest.fixture(scope="module")
def axes():
    metrics = {
        "label-entropy:gender": about("entropy within a group", "gender"),
        "label-entropy:tone": about("entropy within a group", "tone"),
        "as-prompted:jobs": about("read as prompted", "jobs", percent=True),
        "lpips": about("pairwise LPIPS", None),
    }
    rows = [{"variant": "without", "metric": key, "mean": 0.123456, "low": None, "high": None} for key in metrics]
    figure = plots.figure({"variants": {"without": {}}, "metrics": metrics, "rows": rows})
    figure.draw_without_rendering()
    return dict(zip(metrics, figure.axes, strict=False))


def test_panels_say_who_sees(axes):
    titles = [axis.get_title(loc="left") for axis in axes.values()]
    assert len(set(titles)) == 4
    assert "entropy within a group, gender (more is better)" in titles
    assert "pairwise LPIPS (more is better)" in titles


def test_shares_are_per_cent(axes):
    assert {label.get_text()[-2:] for label in axes["as-prompted:jobs"].get_xticklabels()} == {" %"}
    assert not any("%" in label.get_text() for label in axes["lpips"].get_xticklabels())


def test_tick_labels_of_one_value_do_not_overlap(axes):
    for axis in axes.values():
        low, high = axis.get_xlim()
        shown = [label for label in axis.get_xticklabels() if low <= label.get_position()[0] <= high]
        boxes = sorted((box.x0, box.x1) for box in (label.get_window_extent() for label in shown))
        assert len(boxes) >= 2
        assert all(one[1] < other[0] for one, other in pairwise(boxes))
