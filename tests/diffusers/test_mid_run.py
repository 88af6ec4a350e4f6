"""Methods that a callback applies or removes in the middle of a run: what acts, and that the reports tell it."""

import logging

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from test_apply_remove import state
from tiny import BETAS, BUILDERS, draw

import negengine
from negengine import CADS, NegToMe, NormalizedAttentionGuidance, SeedVariance
from negengine.ops import verdicts

FIRST_STEP, WHOLE = (999, 1000), (0, 1000)
NEXT = "in the middle of a run; it begins with the next"


def negtome(timesteps=WHOLE, alpha=0.9):
    return NegToMe(threshold=-1, timesteps=timesteps, min_grid=1, alpha=alpha)


def nag(timesteps=WHOLE):
    return NormalizedAttentionGuidance(negative_prompt="the sea", scale=3.0, alpha=0.5, timesteps=timesteps)


def draw_and(pipe, change, step=0):
    """Latents of a run in which ``change(pipe)`` is called at the end of a step."""

    def callback(pipe, i, timestep, tensors):
        if i == step:
            change(pipe)
        return {}

    return draw(pipe, callback_on_step_end=callback)


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


def test_what_was_there_goes_on_beside_what_is_applied(family, caplog):
    pipe = negengine.apply(BUILDERS[family](), negtome(), nag())
    expected, reports = draw(pipe), list(negengine.status(pipe))
    with caplog.at_level(logging.INFO, logger="negengine"):
        assert torch.equal(draw_and(pipe, lambda pipe: negengine.apply(pipe, CADS())), expected)
    assert list(negengine.status(pipe))[:2] == reports
    assert NEXT in str(negengine.status(pipe)[CADS])
    assert [level for level, _ in logged(caplog)] == ["INFO", "INFO", "WARNING"]
    draw(pipe)
    assert negengine.status(pipe)[CADS].active_steps


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


def test_other_settings_in_mid_run_begin_with_the_next(family):
    expected = draw(negengine.apply(BUILDERS[family](), negtome(FIRST_STEP)))
    pipe = negengine.apply(BUILDERS[family](), negtome())
    assert torch.equal(draw_and(pipe, lambda pipe: negengine.apply(pipe, negtome(alpha=0.3))), expected)
    assert NEXT in str(negengine.status(pipe)[NegToMe])
    assert torch.equal(draw(pipe), draw(negengine.apply(BUILDERS[family](), negtome(alpha=0.3))))
    assert negengine.status(pipe)[NegToMe].steps == 3


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
