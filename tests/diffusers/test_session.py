"""Several methods on one pipeline: what each may see and change, in which order, and that nothing of them remains."""

import copy
import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from guards import guarded
from test_apply_remove import state
from tiny import BUILDERS, denoiser, draw, half_mask, picture
from torch.utils._python_dispatch import TorchDispatchMode

import negengine
from negengine import (
    CADS,
    DynamicNegativeGuidance,
    GuidanceInterval,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    SafeLatentDiffusion,
    SeedVariance,
)
from negengine.diffusers.apply import _of
from negengine.diffusers.effect import Effect
from negengine.diffusers.effects import EFFECTS
from negengine.diffusers.places import Place
from negengine.diffusers.report import Report
from negengine.diffusers.rows import Join, Owners
from negengine.diffusers.running import RunningCall
from negengine.diffusers.session import Session
from negengine.methods.base import Method

AVOID = "the sea"


@dataclass(frozen=True, kw_only=True)
class Recorded(Method):
    """Uses every door and changes nothing."""

    name: ClassVar[str] = "recorded"
    title: ClassVar[str] = "recorded"


@dataclass(frozen=True, kw_only=True)
class RecordedToo(Recorded):
    name: ClassVar[str] = "recorded-too"
    title: ClassVar[str] = "recorded too"


class Recording(Effect):
    log: ClassVar[list] = []

    def note(self, door, *more):
        self.log.append((self.settings.name, door, *more))

    def sites(self):
        return self._sites

    def __init__(self, settings, family, model, unscheduled=False):
        super().__init__(settings, family, model, unscheduled)
        self._sites = list(family.tokens.sites(model))

    def begin(self, call):
        self.note("begin", call.images, call.images_per_prompt)
        self.images = call.images

    def scheduled(self, clock):
        self.note("scheduled", len(clock.timesteps))

    def at(self, clock):
        self.note("at", clock.position)
        return True

    def stepped(self, step, clock):
        self.note("stepped", step.position, step.sample.clone(), step.previous.clone())

    def finish(self):
        self.note("finish")

    def report(self, clock):
        return Report("recorded", self.family.name, clock.steps, clock.steps)

    def inputs(self, inputs, rows):
        self.note("inputs", rows.base)
        return inputs

    def joins(self, inputs, rows):
        self.note("joins", rows.base)
        return Join(Owners(range(self.images), torch.device("cpu")))

    def tokens(self, x, number, rows):
        self.note("tokens", number, len(x))

    def prediction(self, base, own):
        self.note("prediction", len(base), len(own))
        return base


@pytest.fixture
def recorder(monkeypatch):
    for kind in (Recorded, RecordedToo):
        monkeypatch.setitem(EFFECTS, kind, Recording)
    monkeypatch.setattr(Recording, "log", [])
    return Recording.log


def doors(log):
    return [entry[:2] for entry in log]


def test_every_door_in_its_order(recorder, family):
    pipe = negengine.apply(BUILDERS[family](), Recorded(), RecordedToo())
    draw(pipe, num_inference_steps=2)
    attentions = [name for name, _ in denoiser(pipe).named_modules() if name.endswith((".attn1", ".attn2"))]
    sites, halves = (4, 1) if family == "flux" else (len(attentions), 2)
    one, two = "recorded", "recorded-too"
    step = [(one, "inputs"), (two, "inputs"), (one, "joins"), (two, "joins"), *[(one, "tokens"), (two, "tokens")] * sites]
    step += [(one, "prediction"), (two, "prediction"), (one, "stepped"), (two, "stepped")]
    forward = [entry for entry in doors(recorder) if entry[1] not in ("begin", "scheduled", "at", "finish")]
    assert forward == step * 2
    assert {entry[2] for entry in recorder if entry[1] == "inputs"} == {4 * halves}
    # each sees the pipeline's rows and its own four, whatever the other has joined; at a site all rows are there
    assert {entry[2:] for entry in recorder if entry[1] == "prediction"} == {(4 * halves, 4)}
    assert {entry[3] for entry in recorder if entry[1] == "tokens"} == {4 * halves + 8}
    assert doors(recorder)[-2:] == [(one, "finish"), (two, "finish")]


def test_heard_and_never_altered(recorder, family):
    """An effect at every door that changes nothing: the same pictures, and the scheduler's steps are heard as they were."""
    plain, steps = BUILDERS[family](), []
    step = plain.scheduler.step

    def noting(model_output, timestep, sample, **kwargs):
        result = step(model_output, timestep, sample, **kwargs)
        steps.append((sample.clone(), result[0].clone()))
        return result

    plain.scheduler.step = noting
    expected = draw(plain)
    got = draw(negengine.apply(BUILDERS[family](), Recorded()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)  # further rows block products differently
    heard = [entry[3:] for entry in recorder if entry[1] == "stepped"]
    for (sample, previous), (theirs, following) in zip(heard, steps, strict=True):
        torch.testing.assert_close(sample, theirs, rtol=0, atol=1e-3)
        torch.testing.assert_close(previous, following, rtol=0, atol=1e-3)


# --- all pairs ---------------------------------------------------------------------------------------------------

NEGTOME = NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1)
DNG = DynamicNegativeGuidance(prompt=AVOID, scale=2.0, tau=0.05, surrogate="ancestral")
METHODS = {
    "negtome": NEGTOME,
    "dng": DNG,
    "np": NegativePrompting(prompt=AVOID, scale=2.0),
    "sld": SafeLatentDiffusion(prompt=AVOID, scale=50.0, threshold=1.0, warmup=0, variant="dng"),
    "interval": GuidanceInterval(low=1.0, high=8.0),
    "nag": NormalizedAttentionGuidance(negative_prompt=AVOID, scale=3.0, alpha=0.5),
    "cads": CADS(tau1=0.1, tau2=1.0),
    "seed-variance": SeedVariance(timesteps=(0, 1000)),
}
PAIRS = list(itertools.combinations(METHODS, 2))
# of a UNet, which takes thrice as long, the pairs with a method that changes its attention or its own guidance
ON_A_UNET = ("negtome", "interval")
PAIRS_OF_FAMILIES = guarded(
    itertools.product(PAIRS, ("flux", "sdxl")), lambda names, family: family == "flux" or {*names} & {*ON_A_UNET}
)


def named(value):
    return value if isinstance(value, str) else "+".join(value)


def usable(names, family):
    """FLUX has no guidance in one batch to be limited."""
    return not (family == "flux" and "interval" in names)


@pytest.mark.parametrize("names, family", PAIRS_OF_FAMILIES, ids=named)
def test_all_pairs_in_both_orders(names, family):
    if not usable(names, family):
        with pytest.raises(ValueError, match=r"which FLUX\.1 has not"):
            negengine.apply(BUILDERS[family](), *(METHODS[name] for name in names))
        return
    owners = [METHODS[name].title for name in names if METHODS[name].owns_prediction]
    call = {} if family == "flux" else {"guidance_scale": 3.0}
    if len(owners) == 2:
        pipe = negengine.apply(BUILDERS[family](), METHODS[names[0]])
        alone = draw(pipe, num_inference_steps=2, **call)
        with pytest.raises(ValueError, match=f"{owners[0]} and {owners[1]} would both decide the prediction"):
            negengine.apply(pipe, METHODS[names[1]])
        assert torch.equal(draw(pipe, num_inference_steps=2, **call), alone)
        return
    drawn = []
    for order in (names, names[::-1]):
        pipe = BUILDERS[family]()
        for name in order:
            negengine.apply(pipe, METHODS[name])
        drawn.append(draw(pipe, num_inference_steps=2, **call))
        assert [report.method for report in negengine.status(pipe)] == [METHODS[name].title for name in order]
        assert all(report.active_steps for report in negengine.status(pipe))
        # taken off in the order in which they came, not its reverse
        single = negengine.remove(pipe, type(METHODS[order[0]]))
        assert torch.equal(draw(single, num_inference_steps=2, **call), only(family, order[1], call))
        negengine.remove(pipe, type(METHODS[order[1]]))
        assert torch.equal(draw(pipe, num_inference_steps=2, **call), only(family, None, call))
    assert torch.equal(*drawn) or ("cads" in names and "seed-variance" in names)  # both edit the embedding, one after the other


_alone = {}


def only(family, name, call):
    """What the method of that name draws alone, or the pipeline without any."""
    if (family, name) not in _alone:
        pipe = BUILDERS[family]()
        if name is not None:
            negengine.apply(pipe, METHODS[name])
        _alone[family, name] = draw(pipe, num_inference_steps=2, **call)
    return _alone[family, name]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2])
def test_three_methods_leave_nothing(order, family):
    pipe = BUILDERS[family]()
    plain, before = draw(pipe), state(pipe)
    methods = (NEGTOME, DNG, METHODS["cads"])
    negengine.apply(pipe, *methods)
    together = draw(pipe)
    assert not torch.equal(together, plain)
    for number in order:
        negengine.remove(pipe, type(methods[number]))
    assert state(pipe) == before
    assert torch.equal(draw(pipe), plain)
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(pipe)


# --- what an effect sees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["first", "picture"])
def test_negtome_merges_the_rows_of_guidance_as_groups_of_their_own(reference, family):
    """The avoided branch is merged as often as one of the pipeline's, and no image of the pipeline's is merged with it."""
    given = negengine.ReferenceImage(picture(), mask=half_mask()) if reference == "picture" else reference
    settings = NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1, reference=given)
    pipe = negengine.apply(BUILDERS[family](), settings)
    alone = draw(pipe)
    before = negengine.status(pipe)[NegToMe]
    negengine.apply(pipe, NegativePrompting(prompt=AVOID, scale=0.0))  # rows, but no push
    both = draw(pipe)
    after, branches = negengine.status(pipe)[NegToMe], 1 if family == "flux" else 2
    assert after.merged_tokens == after.eligible_tokens == before.eligible_tokens * (branches + 1) // branches > 0
    change = (alone - draw(BUILDERS[family]())).abs().max().item()
    torch.testing.assert_close(both, alone, rtol=0, atol=change / 100)


def test_no_hook_on_a_block_for_a_method_that_works_on_predictions(family):
    pipe = BUILDERS[family]()
    model = denoiser(pipe)
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    for name in ("dng", "cads", "seed-variance"):
        negengine.apply(pipe, METHODS[name])
    after = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert {name for name in after if after[name] != before[name]} == {""}
    negengine.remove(pipe, DynamicNegativeGuidance)
    assert len(model._forward_hooks) == before[""][0]  # conditioning is edited on the way in
    negengine.apply(pipe, NEGTOME)
    assert len(model._forward_hooks) == before[""][0]  # without pictures, no row is joined


class Waits(TorchDispatchMode):
    """Counts the reads of a tensor by the host: on a GPU each is a wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


WAITING = itertools.product((("dng", "negtome", "cads"), ("np",), ("sld",), ("seed-variance",)), ("flux", "sdxl"))


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_a_block_of_an_inactive_step_reads_one_attribute(family, monkeypatch):
    pipe = BUILDERS[family]()
    negengine.apply(pipe, NegToMe(timesteps=(0, 0)), NormalizedAttentionGuidance(negative_prompt=AVOID, timesteps=(0, 0)))
    hooked = [
        (module, hook)
        for name, module in denoiser(pipe).named_modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
        if name
    ]
    assert hooked
    read = []
    for kind in (Session, Place, RunningCall):

        def reading(owner, name, usual=kind.__getattribute__):
            read.append(name)
            return usual(owner, name)

        monkeypatch.setattr(kind, "__getattribute__", reading)
    for module, hook in hooked:
        ends = {"at_input": (), "at_output": (torch.ones(1),), "at_arguments": ({},)}[hook.func.__name__]
        assert hook(module, (torch.ones(1),), *ends) is None
    assert read == ["active"] * len(hooked)


def test_a_copied_denoiser_is_told_of_no_call():
    """Its hooks and its session share one call, which never begins; the original's goes on in its own."""
    pipe = BUILDERS["flux"]()
    negengine.apply(pipe, NegToMe())
    (session,) = _of(denoiser(pipe))
    session.running.open = session.running.active = True  # as in the middle of a call
    twin = copy.deepcopy(denoiser(pipe))
    session.running.open = session.running.active = False
    place, other = "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0"
    running = {}
    for model in (denoiser(pipe), twin):
        hooks = [next(iter(model.get_submodule(name)._forward_pre_hooks.values())) for name in (place, other)]
        (running[model],) = {hook.args[0] for hook in hooks}
        assert all(hook.args[1].running is running[model] for hook in hooks)
    draw(pipe)
    assert running[denoiser(pipe)].clock.steps
    assert not running[twin].clock.steps
    assert not running[twin].open
    assert not running[twin].active


@pytest.mark.parametrize(
    "names, family", guarded(WAITING, lambda names, family: family == "flux" or len(names) > 1 or "sld" in names), ids=named
)
def test_no_step_waits_for_the_device(names, family):
    """Between the first and the last call of the denoiser the host reads as much as without."""

    def reads(pipe):
        counts = []
        hook = denoiser(pipe).register_forward_hook(lambda module, args, output: counts.append(waits.count))
        with Waits() as waits:
            draw(pipe, num_inference_steps=5)
        hook.remove()
        return counts[-1] - counts[0]

    plain = BUILDERS[family]()
    pipe = negengine.apply(BUILDERS[family](), *(METHODS[name] for name in names))
    assert reads(pipe) == reads(plain)


def test_applying_a_kind_again_replaces_it_in_its_place(family):
    pipe = negengine.apply(BUILDERS[family](), NEGTOME, METHODS["np"])
    negengine.apply(pipe, NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1, alpha=0.2))
    fresh = NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1, alpha=0.2)
    fresh = negengine.apply(BUILDERS[family](), fresh, METHODS["np"])
    assert [report.method for report in negengine.status(pipe)] == ["NegToMe", "negative prompting"]
    assert torch.equal(draw(pipe), draw(fresh))


def test_bad_calls(family):
    pipe = BUILDERS[family]()
    with pytest.raises(TypeError, match=r"no method given; there are .*negengine\.NegToMe.*negengine\.CADS"):
        negengine.apply(pipe)
    with pytest.raises(ValueError, match="two settings of one method"):
        negengine.apply(pipe, NEGTOME, NegToMe())
    with pytest.raises(TypeError, match="is no method; there are"):
        negengine.remove(pipe, dict)
    negengine.apply(pipe, NEGTOME)
    negengine.remove(pipe, CADS)
    assert [report.method for report in negengine.status(pipe)] == ["NegToMe"]
    with pytest.raises(KeyError, match="no method CADS is applied; there are reports of NegToMe"):
        negengine.status(pipe)[CADS]


# --- the life of a session ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_guidance_that_a_callback_changes_is_followed_at_once(name):
    """At scale 0 negative prompting is the pipeline's own guidance, also after a change in mid-run."""

    def change(pipe, i, timestep, tensors):
        pipe._guidance_scale = 2.0
        return {}

    pipe, twin = (BUILDERS[name]().to(torch.float64) for _ in range(2))
    negengine.apply(pipe, NegativePrompting(prompt=AVOID, scale=0.0))
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "callback_on_step_end": change}
    got, expected = draw(pipe, **call), draw(twin, **call)
    plain = draw(twin, num_inference_steps=2, guidance_scale=5.0)
    change = (expected - plain).abs().max()
    assert (got - expected).abs().max() < change / 1000


def test_removing_what_is_not_there_removes_nothing(family):
    pipe = negengine.apply(BUILDERS[family](), NEGTOME, METHODS["cads"])
    both = draw(pipe)
    negengine.remove(denoiser(pipe), SeedVariance)
    assert len(negengine.status(pipe)) == 2
    assert torch.equal(draw(pipe), both)
    negengine.remove(denoiser(pipe), CADS)
    assert [report.method for report in negengine.status(pipe)] == ["NegToMe"]


def test_methods_are_on_a_denoiser_or_on_its_pipelines(caplog):
    first = negengine.apply(BUILDERS["sdxl"](), NEGTOME)
    unet = first.unet
    with caplog.at_level("WARNING", logger="negengine"):
        negengine.apply(unet, negengine.NegToMe(group_size=2, timesteps=(0, 1000)))
    assert "those on the StableDiffusionXLPipeline are taken off" in caplog.text
    assert negengine.status(first) == negengine.status(unet)
    caplog.clear()
    with caplog.at_level("WARNING", logger="negengine"):
        negengine.apply(first, NEGTOME)
    assert "those on the denoiser are taken off" in caplog.text
    draw(first)
    assert negengine.status(unet)[negengine.NegToMe].steps == 3


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["negtome", "dng"])
def test_a_run_that_fails_leaves_other_pipelines_alone(name, family):
    """The session ends with the loop, also when the loop fails."""

    def stop(pipe, i, timestep, tensors):
        raise Stop

    pipe = BUILDERS[family]()
    parts = {key: part for key, part in pipe.components.items() if key != "scheduler"}
    extra = {} if family == "flux" else {"add_watermarker": False}
    other = type(pipe)(**parts, scheduler=BUILDERS[family]().scheduler, **extra)
    other.set_progress_bar_config(disable=True)
    plain = draw(other, n=3)
    negengine.apply(pipe, METHODS[name])
    with pytest.raises(Stop):
        draw(pipe, callback_on_step_end=stop)
    assert torch.equal(draw(other, n=3), plain)


def test_prompts_encoded_between_calls_begin_nothing(family):
    pipe = negengine.apply(BUILDERS[family](), NegativePrompting(prompt=("one", "two")))
    expected = draw(pipe)
    for _ in range(2):
        pipe.encode_prompt("just one", None)
    assert torch.equal(draw(pipe), expected)


def test_modular_pipelines_are_refused():
    from diffusers import StableDiffusionXLAutoBlocks

    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(unet=BUILDERS["sdxl"]().unet)
    with pytest.raises(TypeError, match=r"is a modular pipeline: .*with_negative_guidance.*act on its denoiser: .*pipe\.unet"):
        negengine.apply(pipe, NEGTOME)


def test_a_shared_scheduler_keeps_no_listener():
    """Two pipelines on one scheduler, their methods removed in the order in which they came."""
    one, two = BUILDERS["sdxl"](), BUILDERS["sdxl"]()
    two.scheduler = one.scheduler
    before = set(vars(one.scheduler))
    for _ in range(3):
        negengine.apply(one, NEGTOME), negengine.apply(two, NEGTOME)
        negengine.remove(one), negengine.remove(two)
        assert set(vars(one.scheduler)) == before


NOTHING = [
    (NegativePrompting(prompt=AVOID, scale=0.0), "`scale` is 0"),
    (SafeLatentDiffusion.preset("medium", prompt=AVOID), "ended within its warm-up of 10 steps"),
    (SeedVariance(strength=0.0), "`strength` is 0"),
    (NegToMe(alpha=0.0, threshold=-1, timesteps=(0, 1000), min_grid=1), "`alpha` is 0"),
    (GuidanceInterval(low=0.0, high=1000.0), "every step that the pipeline guides lies in the interval"),
]


@pytest.mark.parametrize("method,reason", NOTHING, ids=lambda value: getattr(value, "name", ""))
def test_a_setting_that_changes_nothing_is_visible(method, reason):
    pipe = negengine.apply(BUILDERS["sdxl"](), method)
    draw(pipe, guidance_scale=3.0)
    (report,) = negengine.status(pipe)
    assert reason in report.idle_reason
    assert reason in str(report)
