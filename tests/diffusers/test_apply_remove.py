"""`remove` leaves nothing behind; `apply` changes one pipeline, and only its last settings count."""

import copy
import gc
import itertools
import weakref

import diffusers
import pytest
import torch
from compare import hooked
from guards import guarded
from tiny import BUILDERS, denoiser, draw, picture, sdxl, watched

import negengine

HOOKS = [name for name in vars(torch.nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]
MERGE = {"threshold": -1, "timesteps": (0, 1000), "min_grid": 1}
WHICH = guarded(itertools.product((False, True), ("flux", "sdxl")), lambda *case: case != (False, "sdxl"))
GROUP_OR_PICTURE = pytest.mark.parametrize("pictures, family", WHICH)


def state(pipe):
    """Everything that `apply` could have left: attributes and hooks."""
    model = denoiser(pipe)
    hooks = {(name, kind): dict(getattr(module, kind)) for name, module in model.named_modules() for kind in HOOKS}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    own = {k: v for k, v in vars(pipe).items() if not k.startswith(("_guidance", "_joint", "_num", "_cross", "_interrupt"))}
    own = {k: v for k, v in own.items() if k not in ("_current_timestep", "_denoising_end", "_clip_skip")}
    return hooks, attributes, {k: id(v) for k, v in own.items()}, set(vars(pipe.scheduler))


@GROUP_OR_PICTURE
def test_nothing_remains(family, pictures):
    pipe = BUILDERS[family]()
    plain = draw(pipe)
    before = state(pipe)
    reference = {"reference": negengine.ReferenceImage(picture())} if pictures else {}
    negengine.apply(pipe, negengine.NegToMe(**MERGE, **reference))
    assert state(pipe) != before
    assert not torch.equal(draw(pipe), plain)
    negengine.remove(pipe)
    assert state(pipe) == before
    assert torch.equal(draw(pipe), plain)


class Stop(Exception):
    pass


def stop_at(step):
    def callback(pipe, i, timestep, tensors):
        if i == step:
            raise Stop
        return {}

    return callback


@GROUP_OR_PICTURE
def test_an_exception_mid_run_spoils_nothing(family, pictures):
    pipe = BUILDERS[family]()
    plain = draw(pipe)
    reference = {"reference": negengine.ReferenceImage(picture())} if pictures else {}
    merged, expected = hooked(pipe, draw, **MERGE, **reference)
    with pytest.raises(Stop):
        draw(pipe, n=3, callback_on_step_end=stop_at(1))
    assert torch.equal(draw(pipe), merged)
    assert negengine.status(pipe)[negengine.NegToMe] == expected
    with pytest.raises(Stop):
        draw(pipe, n=3, callback_on_step_end=stop_at(0))
    negengine.remove(pipe)
    assert torch.equal(draw(pipe), plain)


def test_an_exception_inside_a_block_spoils_nothing(family):
    pipe = BUILDERS[family]()
    merged, _ = hooked(pipe, draw, **MERGE, reference=negengine.ReferenceImage(picture()))
    last = [m for name, m in denoiser(pipe).named_modules() if name.endswith(("attn", "attn2"))][-1]

    def fail(module, args):
        raise Stop

    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        draw(pipe)
    hook.remove()
    assert torch.equal(draw(pipe), merged)


def test_only_this_pipeline_changes(family):
    one, two = BUILDERS[family](), BUILDERS[family]()
    plain = draw(two)
    negengine.apply(one, negengine.NegToMe(**MERGE))
    assert not torch.equal(draw(one), plain)
    assert torch.equal(draw(two), plain)
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(two)


def test_applied_twice_the_second_settings_hold(family):
    pipe, fresh = BUILDERS[family](), BUILDERS[family]()
    hooked(pipe, draw, **{**MERGE, "alpha": 2.0})
    second = {**MERGE, "alpha": 0.3, "reference": "others"}
    assert torch.equal(hooked(pipe, draw, **second)[0], hooked(fresh, draw, **second)[0])
    negengine.remove(pipe)
    assert torch.equal(draw(pipe), draw(BUILDERS[family]()))


def test_no_model_is_kept_alive(family):
    """A pipeline that is dropped with a method on it frees its memory."""
    pipe = BUILDERS[family]()
    hooked(pipe, draw, **MERGE)
    model = weakref.ref(denoiser(pipe))
    del pipe
    gc.collect()
    assert model() is None


def test_refused_settings_leave_the_first_in_place(family):
    pipe = BUILDERS[family]()
    merged, _ = hooked(pipe, draw, **MERGE)
    with pytest.raises(ValueError, match="no attention block"):
        negengine.apply(pipe, negengine.NegToMe(blocks=("nowhere",)))
    assert torch.equal(draw(pipe), merged)


def test_remove_without_apply_is_harmless(family):
    pipe = BUILDERS[family]()
    before = state(pipe)
    assert negengine.remove(pipe) is pipe
    assert state(pipe) == before


def test_apply_returns_its_target(family):
    pipe = BUILDERS[family]()
    assert negengine.apply(pipe, negengine.NegToMe()) is pipe


def test_a_replaced_scheduler_is_followed():
    pipe, fresh = sdxl(), sdxl()
    negengine.apply(pipe, negengine.NegToMe(**{**MERGE, "timesteps": (500, 1000)}))
    draw(pipe)
    first = pipe.scheduler
    for p in (pipe, fresh):
        p.scheduler = diffusers.DDIMScheduler.from_config(p.scheduler.config)
    expected, status = hooked(fresh, draw, **{**MERGE, "timesteps": (500, 1000)})
    assert torch.equal(draw(pipe), expected)
    assert negengine.status(pipe)[negengine.NegToMe] == status
    assert "step" not in vars(first)
    negengine.remove(pipe)
    assert "step" not in vars(pipe.scheduler)


def test_a_copied_scheduler_is_not_listened_to(family):
    pipe = BUILDERS[family]()
    merged, status = hooked(pipe, draw, **MERGE)
    twin = copy.deepcopy(pipe.scheduler)
    twin.set_timesteps(7, **({"mu": 1.0} if family == "flux" else {}))
    sample = torch.ones(1, 4)
    for t in twin.timesteps[:3]:
        twin.step(sample, t, sample)
    assert negengine.status(pipe)[negengine.NegToMe] == status
    assert len(pipe.scheduler.timesteps) == 3
    negengine.apply(pipe, negengine.NegToMe(**MERGE))
    assert torch.equal(draw(pipe), merged)


def replace_denoiser(pipe, seed):
    name = "transformer" if hasattr(pipe, "transformer") else "unet"
    setattr(pipe, name, denoiser(BUILDERS["flux" if name == "transformer" else "sdxl"](seed=seed)))


def test_a_replaced_denoiser_is_an_error_before_any_denoising(family):
    pipe = negengine.apply(BUILDERS[family](), negengine.NegToMe(**MERGE))
    replace_denoiser(pipe, seed=7)
    with watched(denoiser(pipe)) as calls, pytest.raises(RuntimeError, match=r"replaced after negengine\.apply; call apply"):
        draw(pipe)
    assert not calls


@pytest.mark.parametrize("again", [False, True], ids=["remove", "apply"])
def test_after_a_replaced_denoiser_apply_and_remove_work(family, again):
    """The error's advice ("call apply again (or remove)") helps."""
    pipe, fresh = BUILDERS[family](), BUILDERS[family](seed=7)
    fresh.text_encoder, fresh.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
    negengine.apply(pipe, negengine.NegToMe(**MERGE))
    replace_denoiser(pipe, seed=7)
    if again:
        assert torch.equal(hooked(pipe, draw, **MERGE)[0], hooked(fresh, draw, **MERGE)[0])
    else:
        assert torch.equal(draw(negengine.remove(pipe)), draw(fresh))


@pytest.mark.parametrize("ran", [False, True], ids=["before a run", "after a run"])
def test_an_untold_pipeline_that_shares_the_denoiser(ran):
    """Applied to the base pipeline only, another pipeline on its denoiser runs untouched."""
    base = sdxl()
    other = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(base)
    other.set_progress_bar_config(disable=True)
    plain = draw(other, n=3)
    negengine.apply(base, negengine.NegToMe(**MERGE))
    if ran:
        draw(base, n=2)
    assert torch.equal(draw(other, n=3), plain)


def test_a_copied_denoiser_is_not_merged_in(family):
    pipe, plain = BUILDERS[family](), draw(BUILDERS[family]())
    negengine.apply(denoiser(pipe), negengine.NegToMe(group_size=2, **MERGE))
    assert not torch.equal(draw(pipe), plain)
    component = "unet" if family == "sdxl" else "transformer"
    setattr(pipe, component, copy.deepcopy(denoiser(pipe)))
    assert torch.equal(draw(pipe), plain)
