"""Methods that a callback applies or removes in the middle of a run: what acts, and that the reports tell it."""

import gc
import logging
import threading
import weakref

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FirstBlockCacheConfig
from test_apply_remove import state
from tiny import BETAS, BUILDERS, SIZE, draw, half_mask, picture

import negengine
from negengine import CADS, DynamicNegativeGuidance, NegToMe, NormalizedAttentionGuidance, SeedVariance
from negengine.ops import verdicts

FIRST_STEP, LATER, WHOLE = (999, 1000), (0, 998), (0, 1000)
NEXT = "in the middle of a run; it begins with the next"


def negtome(timesteps=WHOLE, alpha=0.9):
    return NegToMe(threshold=-1, timesteps=timesteps, min_grid=1, alpha=alpha)


def nag(timesteps=WHOLE):
    return NormalizedAttentionGuidance(negative_prompt="the sea", scale=3.0, alpha=0.5, timesteps=timesteps)


def draw_and(pipe, change, step=0, **call):
    """Latents of a run in which ``change(pipe)`` is called at the end of a step."""

    def callback(pipe, i, timestep, tensors):
        if i == step:
            change(pipe)
        return {}

    return draw(pipe, callback_on_step_end=callback, **call)


def logged(caplog):
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "negengine"]


def test_what_is_applied_in_mid_run_begins_with_the_next(family, caplog):
    pipe, fresh = BUILDERS[family](), negengine.apply(BUILDERS[family](), negtome(), SeedVariance())
    plain = draw(pipe)
    with caplog.at_level(logging.INFO, logger="negengine"):
        got = draw_and(pipe, lambda pipe: negengine.apply(pipe, negtome(), SeedVariance()))
    assert torch.equal(got, plain)
    for report in negengine.status(pipe):
        assert (report.steps, report.active_steps) == (0, 0)
        assert "begins with the next" in report.idle_reason
        assert NEXT in str(report)
    assert logged(caplog) == [("WARNING", str(report)) for report in negengine.status(pipe)]
    assert torch.equal(draw(pipe), draw(fresh))
    assert negengine.status(pipe) == negengine.status(fresh)


APPLIED = {
    "NegToMe": lambda window: negtome(window),
    "NAG": lambda window: nag(window),
    "a picture": lambda window: NegToMe(
        threshold=-1, timesteps=window, min_grid=1, reference=negengine.ReferenceImage(picture(), half_mask())
    ),
    "seed variance": lambda window: SeedVariance(share=0.5, strength=3.0, timesteps=window),
}


@pytest.mark.parametrize("name", APPLIED)
def test_what_is_applied_beside_another_acts_from_the_next_step_on(family, name, caplog):
    """As if its window had begun there; the other goes on."""
    other = negtome() if name == "NAG" else nag()
    expected = draw(negengine.apply(BUILDERS[family](), other, APPLIED[name](LATER)))
    pipe = negengine.apply(BUILDERS[family](), other)
    alone = draw(pipe)
    reports = []

    def change(pipe):
        negengine.apply(pipe, APPLIED[name](WHOLE))
        reports.extend(negengine.status(pipe))

    with caplog.at_level(logging.INFO, logger="negengine"):
        got = draw_and(pipe, change)
    assert torch.equal(got, expected)
    assert not torch.equal(got, alone)
    assert [(report.stage, report.steps, report.active_steps) for report in reports] == [("running", 1, 1), ("running", 1, 0)]
    assert [(report.steps, report.active_steps) for report in negengine.status(pipe)] == [(3, 3), (3, 2)]
    assert logged(caplog) == [("INFO", str(report)) for report in negengine.status(pipe)]
    assert torch.equal(draw(pipe), draw(negengine.apply(BUILDERS[family](), other, APPLIED[name](WHOLE))))


def test_a_method_that_decides_the_prediction_is_told_of_the_call():
    pipe = negengine.apply(BUILDERS["sdxl"](), negtome())
    alone = draw(pipe)
    dng = DynamicNegativeGuidance(prompt="the sea", surrogate="ancestral")
    got = draw_and(pipe, lambda pipe: negengine.apply(pipe, dng), step=1)
    report = negengine.status(pipe)[DynamicNegativeGuidance]
    assert (report.steps, report.active_steps, len(report.p)) == (3, 1, 2)
    assert not torch.equal(got, alone)


@pytest.mark.parametrize("name", ["a group of 3", "a method that needs guidance"])
def test_what_cannot_work_in_the_call_is_refused_and_changes_nothing(name, caplog):
    wrong, call = NegToMe(group_size=3), {}
    if name != "a group of 3":
        wrong, call = negengine.GuidanceInterval(low=0.2, high=3.0), {"guidance_scale": 1.0}
    pipe = negengine.apply(BUILDERS["sdxl"](), negtome())
    expected, report = draw(pipe, **call), str(negengine.status(pipe))

    def change(pipe):
        with pytest.raises(ValueError, match=r"group_size 3 does not divide|no classifier-free guidance in this call"):
            negengine.apply(pipe, wrong)

    assert torch.equal(draw_and(pipe, change, **call), expected)
    assert str(negengine.status(pipe)) == report


def test_rows_cannot_join_a_step_cache_in_mid_run():
    pipe = negengine.apply(BUILDERS["flux"](), negtome())
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    expected = draw(pipe)

    def change(pipe):
        with pytest.raises(ValueError, match=r"NAG joins rows .* a step cache keeps something .* apply it before the call"):
            negengine.apply(pipe, nag())

    assert torch.equal(draw_and(pipe, change), expected)


def test_what_another_thread_applies_begins_with_the_next(family):
    """The denoiser may be at work."""
    pipe = negengine.apply(BUILDERS[family](), nag())
    expected = draw(pipe)

    def change(pipe):
        thread = threading.Thread(target=negengine.apply, args=(pipe, negtome()))
        thread.start()
        thread.join()

    assert torch.equal(draw_and(pipe, change), expected)
    assert NEXT in str(negengine.status(pipe)[NegToMe])


def test_a_call_that_failed_keeps_no_pipeline_alive():
    """What newcomers are told is kept while a call runs, and names its pipeline."""
    pipe = negengine.apply(BUILDERS["sdxl"](), negtome())
    with pytest.raises(ValueError, match="generators of length 3"):
        pipe("a cat", num_images_per_prompt=2, generator=[torch.Generator()] * 3, **SIZE["sdxl"])
    gone = weakref.ref(pipe), weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_what_is_removed_acts_no_more_and_the_others_go_on(family, caplog):
    expected = draw(negengine.apply(BUILDERS[family](), nag(), negtome(FIRST_STEP)))
    pipe = negengine.apply(BUILDERS[family](), nag(), negtome())
    with caplog.at_level(logging.INFO, logger="negengine"):
        got = draw_and(pipe, lambda pipe: negengine.remove(pipe, NegToMe))
    assert torch.equal(got, expected)
    (report,) = negengine.status(pipe)
    assert (report.method, report.steps, report.active_steps) == ("NAG", 3, 3)
    (_, taken_off), (level, other) = logged(caplog)
    assert taken_off.startswith("NegToMe on")
    assert "1 of 1 steps" in taken_off
    assert taken_off.endswith("taken off in the middle of the run")
    assert (level, other) == ("INFO", str(report))
    assert torch.equal(draw(pipe), draw(negengine.apply(BUILDERS[family](), nag())))


def test_when_all_is_removed_nothing_remains(family, caplog):
    expected = draw(negengine.apply(BUILDERS[family](), negtome(FIRST_STEP)))
    pipe = BUILDERS[family]()
    plain, before = draw(pipe), state(pipe)
    negengine.apply(pipe, negtome())
    with caplog.at_level(logging.INFO, logger="negengine"):
        got = draw_and(pipe, lambda pipe: (negengine.remove(pipe), check_unpinned()))
    assert torch.equal(got, expected)
    assert len(logged(caplog)) == 1
    assert state(pipe) == before
    assert torch.equal(draw(pipe), plain)
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(pipe)


def check_unpinned():
    """A call that has ended sees what is found out about the kernels since."""
    assert verdicts._pinned.view is None


@pytest.mark.parametrize("step", [0, 1])
def test_other_settings_in_mid_run_act_from_the_next_step_on(family, step, caplog):
    seen = []
    pipe = BUILDERS[family]()
    draw(pipe, callback_on_step_end=lambda pipe, i, timestep, tensors: seen.append(float(timestep)) or {})
    expected = draw(negengine.apply(pipe, negtome(alpha=lambda t: 0.9 if t >= seen[step] - 1e-3 else 0.3)))
    pipe = negengine.apply(BUILDERS[family](), negtome())
    with caplog.at_level(logging.INFO, logger="negengine"):
        got = draw_and(pipe, lambda pipe: negengine.apply(pipe, negtome(alpha=0.3)), step)
    assert torch.equal(got, expected)
    report = negengine.status(pipe)
    assert (report.steps, report.active_steps) == (3, 2 - step)
    assert [text.endswith("taken off in the middle of the run") for _, text in logged(caplog)] == [True, False]
    assert torch.equal(draw(pipe), draw(negengine.apply(BUILDERS[family](), negtome(alpha=0.3))))


def test_the_backend_stays_the_same_when_settings_change():
    pipe, pinned = negengine.apply(BUILDERS["sdxl"](), negtome()), []

    def change(pipe):
        before = verdicts._pinned.view is not None
        negengine.apply(pipe, negtome(alpha=0.3))
        pinned.append((before, verdicts._pinned.view is not None))

    draw_and(pipe, change)
    assert pinned == [(True, True)]
    check_unpinned()


def test_what_comes_and_goes_within_a_run_leaves_the_rest_alone(family):
    pipe = negengine.apply(BUILDERS[family](), negtome())
    expected = draw(pipe)

    def change(pipe):
        negengine.apply(pipe, CADS())
        negengine.remove(pipe, CADS)

    assert torch.equal(draw_and(pipe, change, step=1), expected)
    assert negengine.status(pipe)[NegToMe].active_steps == 3


def test_a_run_that_goes_on_is_not_judged(family):
    """Its window may lie ahead."""
    pipe = negengine.apply(BUILDERS[family](), negtome((0, 600)))
    told = []
    draw_and(pipe, lambda pipe: told.append(negengine.status(pipe)[NegToMe]))
    (report,) = told
    assert (report.steps, report.active_steps, report.idle_reason) == (1, 0, None)
    assert str(report).endswith("the run goes on")
    assert negengine.status(pipe)[NegToMe].active_steps
    assert "goes on" not in str(negengine.status(pipe))


def test_the_last_run_is_still_told_when_another_method_is_applied_after_it(family):
    pipe = negengine.apply(BUILDERS[family](), negtome())
    draw(pipe)
    report = negengine.status(pipe)[NegToMe]
    negengine.apply(pipe, CADS())
    assert negengine.status(pipe)[NegToMe] == report
    assert "applied, not run yet" in str(negengine.status(pipe)[CADS])
    negengine.remove(pipe, CADS)
    assert list(negengine.status(pipe)) == [report]


def test_steps_of_a_pipeline_that_shares_the_scheduler_are_not_counted(family):
    pipe, other = BUILDERS[family](), BUILDERS[family]()
    other.scheduler = pipe.scheduler
    negengine.apply(pipe, negtome())
    draw(other)
    assert "not run yet" in str(negengine.status(pipe))


@torch.no_grad()
def loop(unet, scheduler, change=lambda i: None):
    """Steps of a denoiser without its pipeline."""
    x, text = torch.randn(4, 4, 9, 7, generator=torch.Generator().manual_seed(0)), torch.ones(4, 16, 32)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
        change(i)
    return x


SETTINGS = NegToMe(threshold=-1, min_grid=1, group_size=2, timesteps=(500, 1000))


def test_a_bare_denoiser_whose_timesteps_are_laid_out_already():
    """Nobody need call ``set_timesteps`` after ``apply``."""
    drawn = []
    for before in (False, True):
        pipe = BUILDERS["sd"]()
        if before:
            pipe.scheduler.set_timesteps(4)
        negengine.apply(pipe.unet, SETTINGS, scheduler=pipe.scheduler)
        if not before:
            pipe.scheduler.set_timesteps(4)
        drawn.append(loop(pipe.unet, pipe.scheduler))
        report = negengine.status(pipe.unet)[NegToMe]
        assert (report.steps, report.active_steps) == (4, 2)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("after,counted", [(0, (3, 1)), (1, (2, 0))])
def test_a_bare_denoiser_in_the_middle_of_its_loop(after, counted):
    pipe = BUILDERS["sd"]()
    scheduler = EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(4)  # 999, 666, 333, 0
    loop(pipe.unet, scheduler, lambda i: i == after and negengine.apply(pipe.unet, SETTINGS, scheduler=scheduler))
    report = negengine.status(pipe.unet)[NegToMe]
    assert (report.steps, report.active_steps) == counted
