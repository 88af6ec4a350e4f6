"""What a server reads: reports as plain data, observers, counters for Prometheus, log records."""

import json
import logging

import pytest
import torch
from tiny import BUILDERS, draw

import negengine

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
METHODS = {
    "negtome": negengine.NegToMe(**MERGE),
    "dng": negengine.DynamicNegativeGuidance(prompt="the sea", surrogate="ancestral"),
    "nag": negengine.NormalizedAttentionGuidance(negative_prompt="the sea"),
    "cads": negengine.CADS(tau1=0.1, tau2=1.0),
    "seed-variance": negengine.SeedVariance(timesteps=(0, 1000)),
}
EVERY = {"method", "family", "steps", "active_steps", "stage", "idle_reason"}
KEYS = {
    "negtome": EVERY | {"blocks", "active_blocks", "eligible_tokens", "merged_tokens", "group_size", "kernels", "bank"},
    "dng": EVERY | {"p", "strength", "clamped", "unusable"},
    "nag": EVERY | {"blocks", "guides"},
    "cads": EVERY,
    "seed-variance": EVERY,
}


@pytest.fixture(params=["flux", "sdxl"])
def pipe(request):
    return negengine.apply(BUILDERS[request.param](), *METHODS.values())


@pytest.fixture
def heard():
    found = []
    end = negengine.observe(found.append)
    yield found
    end()


def test_reports_as_plain_data(pipe):
    before = negengine.status(pipe).as_dict()
    assert {name: set(report) for name, report in before.items()} == KEYS
    draw(pipe)
    after = negengine.status(pipe).as_dict()
    assert json.loads(json.dumps(after, allow_nan=False)) == after
    assert {name: set(report) for name, report in after.items()} == KEYS
    report = negengine.status(pipe)[negengine.NegToMe]
    assert after["negtome"]["merged_tokens"] == report.merged_tokens > 0
    assert after["negtome"]["idle_reason"] is None
    assert len(after["dng"]["p"]) == 4
    assert len(after["dng"]["p"][0]) == 4
    negengine.apply(pipe, negengine.SeedVariance(strength=0.0))
    draw(pipe)
    assert negengine.status(pipe).as_dict()["seed-variance"]["idle_reason"]


def test_observers_hear_every_run(pipe, heard):
    draw(pipe)
    assert heard == [negengine.status(pipe)]
    negengine.remove(pipe, negengine.CADS)
    draw(pipe, n=1)
    assert [len(status) for status in heard] == [5, 4]
    negengine.remove(pipe)
    draw(pipe)
    assert len(heard) == 2


class Stop(Exception):
    pass


def test_a_run_that_failed_is_heard_with_what_it_did(pipe, heard):
    def stop(pipe, i, timestep, tensors):
        raise Stop

    with pytest.raises(Stop):
        draw(pipe, callback_on_step_end=stop)
    assert [(report.steps, report.stage, report.idle_reason) for report in heard[0]] == [(1, "failed", None)] * 5
    assert list(heard[0]) == list(negengine.status(pipe))
    assert "then the run failed" in str(heard[0])
    try:
        raise Stop
    except Stop:
        draw(pipe)  # in somebody's `except`, which is no failure of ours
    assert [report.stage for report in heard[1]] == ["over"] * 5


def test_stages_of_a_run(pipe, heard):
    def stages():
        return {report.stage for report in negengine.status(pipe)}

    seen = []

    def note(pipe, i, timestep, tensors):
        seen.append(stages())
        return tensors

    assert stages() == {"new"}
    draw(pipe, callback_on_step_end=note)
    assert seen == [{"running"}] * 3
    assert stages() == {"over"}
    negengine.apply(pipe, negengine.CADS())
    assert [report.stage for report in negengine.status(pipe)] == ["over"] * 3 + ["new", "over"]


def refused_by_a_method(pipe):
    return "does not divide", {"n": 3, "prompts": 1}


def refused_before_it_begins(pipe):
    component = "transformer" if hasattr(pipe, "transformer") else "unet"
    setattr(pipe, component, getattr(BUILDERS["flux" if component == "transformer" else "sdxl"](), component))
    return "was replaced", {}


@pytest.mark.parametrize("refused", [refused_by_a_method, refused_before_it_begins])
def test_a_refused_call_has_failed_without_a_number_of_the_one_before(pipe, heard, refused):
    negengine.apply(pipe, negengine.NegToMe(**MERGE, group_size=2))
    draw(pipe)
    message, call = refused(pipe)
    with pytest.raises((ValueError, RuntimeError), match=message):
        draw(pipe, **call)
    assert len(heard) == 2
    for report in heard[1]:
        assert (report.stage, report.steps, report.active_steps, report.idle_reason) == ("failed", 0, 0, None)
    assert heard[1][negengine.NegToMe].eligible_tokens == 0
    assert heard[1][negengine.DynamicNegativeGuidance].clamped == 0
    assert len(heard[1][negengine.DynamicNegativeGuidance].p) <= 1
    assert "the run failed before its first step" in str(heard[1])


def test_what_raises_before_the_first_step_is_told_with_the_next_call(pipe, heard, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(pipe.scheduler, "set_timesteps", None)
        with pytest.raises(TypeError):
            draw(pipe)
    assert not heard
    draw(pipe)
    assert [{report.stage for report in status} for status in heard] == [{"failed"}, {"over"}]


def test_a_report_is_found_by_class_and_by_short_name(pipe):
    status = negengine.status(pipe)
    for name, settings in METHODS.items():
        assert status[name] is status[type(settings)]
        assert name in status
    assert "sld" not in status
    for missing, told in (("sld", "'sld'"), ("title", "'title'"), (negengine.SafeLatentDiffusion, "SafeLatentDiffusion"), (3, "3")):
        with pytest.raises(KeyError, match=rf"no method {told} is applied; there are reports of NegToMe \('negtome'\), Dynamic"):
            status[missing]


def test_an_observer_that_ended_hears_nothing_and_others_do(pipe, heard):
    found = []
    end = negengine.observe(found.append)
    draw(pipe, n=1)
    end()
    end()
    draw(pipe, n=1)
    assert (len(found), len(heard)) == (1, 2)


def test_an_observer_that_fails_is_logged_and_the_images_come(pipe, heard, caplog):
    def fail(status):
        raise Stop("full")

    expected = draw(pipe)
    end = negengine.observe(fail)
    try:
        with caplog.at_level(logging.ERROR, logger="negengine"):
            assert torch.equal(draw(pipe), expected)
    finally:
        end()
    assert "Stop: full" in caplog.text
    assert len(heard) == 2


def test_the_library_adds_no_log_handlers():
    assert not logging.getLogger("negengine").handlers
    assert logging.getLogger("negengine").propagate


def samples(registry):
    return {
        (s.name, *s.labels.values()): s.value for metric in registry.collect() for s in metric.samples if "created" not in s.name
    }


def test_counters_for_prometheus(pipe):
    client = pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    registry = client.CollectorRegistry()
    stop = negengine.prometheus.export(registry)
    with pytest.raises(ValueError, match="has counters of negengine already; call the function that the first export returned"):
        negengine.prometheus.export(registry)
    draw(pipe)
    merged = negengine.status(pipe)[negengine.NegToMe].merged_tokens
    draw(pipe)
    family = negengine.status(pipe)[negengine.NegToMe].family
    found = samples(registry)
    assert found["negengine_runs_total", "negtome", family] == 2
    assert found["negengine_steps_total", "dng", family] == 6
    assert found["negengine_merged_tokens_total", "negtome", family] == 2 * merged > 0
    assert found["negengine_idle_runs_total", "cads", family] == 0
    assert ("negengine_merged_tokens_total", "dng", family) not in found
    negengine.apply(pipe, negengine.SeedVariance(strength=0.0))
    draw(pipe)
    assert samples(registry)["negengine_idle_runs_total", "seed-variance", family] == 1
    assert samples(registry)["negengine_failed_runs_total", "dng", family] == 0
    negengine.apply(pipe, negengine.NegToMe(**MERGE, group_size=2))
    before = samples(registry)
    with pytest.raises(ValueError, match="does not divide"):
        draw(pipe, prompts=1, n=3)
    grown = {key for key, value in samples(registry).items() if value != before[key]}
    assert grown == {(f"negengine_{name}_total", method, family) for name in ("runs", "failed_runs") for method in METHODS}
    assert b"negengine_active_steps_total{" in client.generate_latest(registry)
    stop()
    draw(pipe)
    assert not samples(registry)
    stop()
    again = negengine.prometheus.export(registry)
    stop()  # ends nothing of what came after it
    draw(pipe)
    assert samples(registry)["negengine_runs_total", "negtome", family] == 1
    again()


def test_without_prometheus_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(ImportError, match="pip install prometheus-client"):
        negengine.prometheus.export()
