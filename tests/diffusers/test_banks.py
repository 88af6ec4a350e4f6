"""Recorded references: the same as the picture's own row in the batch, without that row; refused where they do not fit."""

import collections
import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import diffusers
import pytest
import tiny_more
import tiny_z_image
import torch
from compare import THRESHOLD
from guards import guarded
from safetensors import safe_open
from tiny import (
    BUILDERS,
    NEGATIVES,
    PROMPTS,
    SIZE,
    _parts,
    _quiet,
    denoiser,
    draw,
    flux,
    half_mask,
    kind,
    picture,
    sd,
    sdxl,
    watched,
)
from torch._inductor.compile_fx import compile_fx
from torch.utils._python_dispatch import TorchDispatchMode

import negengine
from negengine import NegToMe, ReferenceBank, ReferenceImage, models, reference
from negengine.diffusers.apply import applied_to
from negengine.methods.plain import as_plain, from_plain

SETTINGS = {"timesteps": (400, 1000), "threshold": THRESHOLD, "min_grid": 1}
GUIDED = {"flux": {"true_cfg_scale": 2.0, "negative_prompt": NEGATIVES[0]}, "sdxl": {}, "sd": {}}
PLAIN = {"flux": {}, "sdxl": {"guidance_scale": 1.0}, "sd": {"guidance_scale": 1.0}}

# Pictures of one noise are nearly alike where there is much of it, and the rounding of float32 would choose between their tokens
SEVERAL = torch.float64

FAMILIES = pytest.mark.parametrize("family", guarded([("flux",), ("sdxl",)], lambda family: family == "flux"))


def pictures(masked=True, count=1, **kwargs):
    return [ReferenceImage(picture(i), mask=half_mask() if masked and i == 0 else None, **kwargs) for i in range(count)]


def record(pipe, path, prompt=PROMPTS[0], given=None, settings=SETTINGS, **call):
    """With the arguments that ``draw`` gives a pipeline."""
    call = {**SIZE[kind(pipe)], "num_inference_steps": 3, **call}
    call |= {"max_sequence_length": 11} if kind(pipe) == "flux" else {}
    if kind(pipe) != "flux":
        call.setdefault("negative_prompt", NEGATIVES[0])
    return negengine.record_bank(pipe, NegToMe(**settings, reference=given or pictures()), path, prompt=prompt, **call)


def drawn(pipe, given, settings=SETTINGS, **call):
    """Latents of three images of a prompt, the report, and the rows with which the denoiser was called."""
    negengine.apply(pipe, NegToMe(**settings, reference=given))
    with watched(denoiser(pipe)) as calls:
        latents = draw(pipe, prompts=1, n=3, **call)
    return latents, negengine.status(pipe)[NegToMe], {rows for _, rows in calls}


def tensors(bank):
    with safe_open(bank.path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)


CASES = [
    (family, guided, matching, count)
    for family in ("flux", "sdxl", "sd")
    for guided in (True, False)
    for matching, count in (("paper", 1), ("paper", 2), ("release", 1))
]
EVERY_CHANGE = {("flux", True, "paper", 2), ("flux", False, "release", 1), ("sdxl", True, "paper", 1)}


@pytest.mark.parametrize("family,guided,matching,count", guarded(CASES, lambda *case: case in EVERY_CHANGE))
def test_a_bank_does_what_the_joined_row_does(family, guided, matching, count, tmp_path):
    """Under the run's own prompt: the same tokens are merged, and the images differ by rounding alone.

    Not to the bit, as a product over fewer rows may be blocked differently, also that of the images' own rows.
    """
    call = (GUIDED if guided else PLAIN)[family]
    settings, given = {**SETTINGS, "matching": matching}, pictures(count=count)
    pipe = BUILDERS[family]().to(torch.float32 if count == 1 else SEVERAL)
    plain = draw(pipe, prompts=1, n=3, **call)
    bank = record(pipe, tmp_path / "bank", given=given, settings=settings, **call)
    assert torch.equal(draw(pipe, prompts=1, n=3, **call), plain)  # nothing is left on the pipeline
    joined, expected, _ = drawn(pipe, given, settings, **call)
    recorded, status, rows = drawn(pipe, bank, settings, **call)
    assert rows == {6 if guided and family != "flux" else 3}
    assert (status.merged_tokens, status.eligible_tokens) == (expected.merged_tokens, expected.eligible_tokens)
    assert 0 < status.merged_tokens < status.eligible_tokens
    scale = (joined - plain).abs().amax().item()
    torch.testing.assert_close(recorded, joined, rtol=0, atol=scale * 1e-4)
    assert "references recorded under this prompt" in str(status)


def joined_rows(pipe, given, **call):
    """What every block gives the joined rows, as they are at the places where NegToMe listens: those of each step and call."""
    seen, model = {}, denoiser(pipe)
    settings = {**SETTINGS, "alpha": 0.0}

    def note(name, x, own):
        seen.setdefault(name, []).append(x[own:].clone())

    own, hooks = (2 if kind(pipe) == "flux" else 4), []
    for name, module in model.named_modules():
        if kind(pipe) != "flux" and name.endswith((".attn1", ".attn2")):
            hooks.append(module.register_forward_hook(lambda _, args, y, name=name: note(name, y, own)))
        elif name.endswith("to_out.0"):
            block = name.removesuffix(".attn.to_out.0")
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=block: note(name, args[0], own)))
        elif name.startswith("single_transformer_blocks") and name.endswith(".attn"):
            block = name.removesuffix(".attn")
            hooks.append(module.register_forward_hook(lambda _, args, y, name=block: note(name, y[:, 11:], own)))
    negengine.apply(pipe, NegToMe(**settings, reference=given))
    draw(pipe, prompts=1, n=2, **call)
    [hook.remove() for hook in hooks]
    negengine.remove(pipe)
    return seen


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_what_is_recorded_is_the_joined_row_bit_for_bit(family, tmp_path):
    """In float32, from a batch of as many rows: three pictures are recorded where the run has two images and a picture."""
    pipe, call = BUILDERS[family](), GUIDED[family]
    pipe.vae.enable_slicing()  # one picture at a time
    given = ReferenceImage(picture(), noise=False)
    bank = record(pipe, tmp_path / "bank", given=[given] * 3, **call)
    rows, checked = joined_rows(pipe, given, **call), 0
    for name, tensor in tensors(bank).items():
        step, _, block = name.partition("/")
        if family == "flux":  # a call for each branch
            calls = rows[block][2 * int(step) : 2 * int(step) + 2]
            expected = torch.stack([call[0] for call in calls])
        else:
            expected = rows[block][int(step)]
        tokens = expected.shape[1]
        assert torch.equal(tensor[:, -tokens:], expected), name
        checked += 1
    assert checked == len(bank.about.steps) * len(bank.about.blocks) > 4


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("matching", ["paper", "release"])
def test_a_block_gives_what_the_mathematics_says(matching, masked, tmp_path):
    """Against negengine.reference on the captured attention output, with the rows that are in the file."""
    pipe, block, seen = sdxl(), "up_blocks.1.attentions.1.transformer_blocks.0.attn2", []
    settings = {**SETTINGS, "timesteps": (0, 1000), "matching": matching, "threshold": 0.3, "alpha": 0.8, "blocks": (block,)}
    call = {"num_inference_steps": 1}
    bank = record(pipe, tmp_path / "bank", given=pictures(masked), settings=settings, **call)
    module = denoiser(pipe).get_submodule(block)
    hooks = [module.register_forward_hook(lambda _, args, y: seen.append(y.clone()))]
    negengine.apply(pipe, NegToMe(**settings, reference=bank))
    hooks.append(module.register_forward_hook(lambda _, args, y: seen.append(y.clone())))
    draw(pipe, prompts=1, n=2, **call)
    [hook.remove() for hook in hooks]
    before, after = seen
    held = tensors(bank)
    rows, mask = held[f"0/{block}"], held.get(f"mask/{9 * 7}")
    assert list(rows.shape[:2]) == [2, (9 * 7 if matching == "release" or not masked else 9 * 3)]
    assert (mask is not None) == (masked and matching == "release")
    for image in range(4):
        expected = reference.negtome(before[image], rows[image // 2], 0.8, 0.3, mask, matching)
        torch.testing.assert_close(after[image], expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(after[image], before[image])


def test_half_precision(tmp_path):
    pipe = flux().to(torch.bfloat16)
    bank = record(pipe, tmp_path / "bank")
    assert {tensor.dtype for tensor in tensors(bank).values()} == {torch.bfloat16}
    joined, expected, _ = drawn(pipe, pictures())
    recorded, status, _ = drawn(pipe, bank)
    assert status.eligible_tokens == expected.eligible_tokens
    assert abs(status.merged_tokens - expected.merged_tokens) < 0.05 * status.eligible_tokens
    plain = drawn(pipe, bank, {**SETTINGS, "alpha": 0.0})[0]
    assert (recorded - joined).float().norm() < 0.3 * (joined - plain).float().norm()
    with pytest.raises(ValueError, match="from a model that computes in bfloat16, and this one computes in float32"):
        negengine.apply(flux(), NegToMe(**SETTINGS, reference=bank))


@pytest.mark.parametrize(
    "family,noise",
    guarded(
        [("flux", True), ("sdxl", True), ("flux", False), ("sdxl", False)],
        lambda family, noise: family == "flux" and noise,
    ),
)
def test_several_banks(family, noise, tmp_path):
    """Recorded one by one, they are the pictures recorded together; the order does not matter but for equal cosines."""
    pipe, call = BUILDERS[family]().to(SEVERAL), GUIDED[family]
    given = [ReferenceImage(picture(0), half_mask(), noise=noise), ReferenceImage(picture(1), noise=noise)]
    one, two = (record(pipe, tmp_path / str(i), given=p, **call) for i, p in enumerate(given))
    joined, expected, _ = drawn(pipe, given, **call)
    for banks in ([one, two], [two, one], record(pipe, tmp_path / "both", given=given, **call)):
        recorded, status, _ = drawn(pipe, banks, **call)
        assert status.merged_tokens == expected.merged_tokens
        torch.testing.assert_close(recorded, joined, rtol=0, atol=1e-6 * joined.abs().amax().item())
    alone, _, _ = drawn(pipe, one, **call)
    assert not torch.allclose(alone, joined, rtol=0, atol=1e-2)


def test_another_prompt_is_an_approximation_and_the_report_says_so(tmp_path):
    pipe = flux()
    bank = record(pipe, tmp_path / "bank", prompt="the sea")
    joined, _, _ = drawn(pipe, pictures())
    recorded, status, _ = drawn(pipe, bank)
    plain, _, _ = drawn(pipe, bank, {**SETTINGS, "alpha": 0.0})
    assert not torch.allclose(recorded, joined, rtol=0, atol=1e-4)
    assert not torch.equal(recorded, plain)
    assert "recorded under another prompt ('the sea')" in str(status)


@pytest.mark.parametrize("family", ["flux", "sdxl", pytest.param("sd", marks=pytest.mark.exhaustive)])
def test_another_negative_prompt_is_reported(family, tmp_path):
    """Where the run guides: otherwise it has none."""
    pipe, call, another = BUILDERS[family](), *({**GUIDED[family], "negative_prompt": [text]} for text in NEGATIVES[:2])
    bank = record(pipe, tmp_path / "bank", **GUIDED[family])
    said = f"recorded under this prompt but another negative prompt ('{NEGATIVES[0]}')"
    assert drawn(pipe, bank, **call)[1].bank == "recorded under this prompt"
    assert drawn(pipe, bank, **another)[1].bank == said
    unguided = {"true_cfg_scale" if family == "flux" else "guidance_scale": 1.0}
    assert drawn(pipe, bank, **another | unguided)[1].bank == "recorded under this prompt"
    if family == "sdxl":
        assert drawn(pipe, bank, **call, negative_prompt_2="grey")[1].bank == said
        assert drawn(pipe, bank, **call | {"negative_prompt": None})[1].bank == said
    elsewhere = record(pipe, tmp_path / "elsewhere", prompt="the sea", **GUIDED[family] | {"negative_prompt": "grey"})
    both = drawn(pipe, [elsewhere, bank], **call)[1].bank
    assert both == "recorded under another prompt ('the sea') and another negative prompt ('grey')"


class Counted(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


def test_a_call_does_not_compare_row_by_row(tmp_path):
    """Each comparison waits for the device, and FLUX has a row of positions for every token of a text."""
    pipe, call = flux(), GUIDED["flux"]
    apply(pipe, record(pipe, tmp_path / "bank", **call))
    with Counted() as counted:
        draw(pipe, prompts=1, n=3, **call)
    assert counted.calls[torch.ops.aten.equal] == 0
    assert counted.calls[torch.ops.aten.all] < 10


def test_two_prompts_of_a_run_share_a_bank(tmp_path):
    pipe = sdxl()
    bank = record(pipe, tmp_path / "bank")
    negengine.apply(pipe, NegToMe(**SETTINGS, reference=bank))
    both = draw(pipe, prompts=2, n=2)
    assert "recorded under another prompt" in str(negengine.status(pipe))
    assert negengine.status(pipe)[NegToMe].merged_tokens > 0
    assert len(both) == 4


def test_a_narrower_run(tmp_path):
    """Fewer blocks, coarser grids left out, fewer of the steps: all of them are in the bank."""
    pipe = sdxl()
    bank = record(pipe, tmp_path / "bank")
    narrow = {**SETTINGS, "timesteps": (900, 1000), "blocks": ("up_blocks.1",), "min_grid": 6}
    joined, expected, _ = drawn(pipe, pictures(), narrow)
    recorded, status, _ = drawn(pipe, bank, narrow)
    assert status.active_steps == expected.active_steps == 1
    assert status.merged_tokens == expected.merged_tokens > 0
    torch.testing.assert_close(recorded, joined, rtol=0, atol=1e-4 * joined.abs().amax().item())


@FAMILIES
def test_a_recording_with_guidance_serves_a_run_without(family, tmp_path):
    pipe = BUILDERS[family]()
    bank = record(pipe, tmp_path / "bank", **GUIDED[family])
    joined, expected, _ = drawn(pipe, pictures(), **PLAIN[family])
    recorded, status, _ = drawn(pipe, bank, **PLAIN[family])
    assert status.merged_tokens == expected.merged_tokens > 0
    torch.testing.assert_close(recorded, joined, rtol=0, atol=1e-4 * joined.abs().amax().item())


def test_recording_ends_with_the_last_active_step(tmp_path):
    pipe = flux()
    with watched(pipe.transformer) as calls:
        bank = record(pipe, tmp_path / "bank", num_inference_steps=8)
    assert [t for t, _ in calls] == pytest.approx([step.timestep for step in bank.about.steps])
    assert 1 < len(calls) < 8
    assert {rows for _, rows in calls} == {1}


def test_methods_that_are_applied_do_not_act_on_a_recording(tmp_path):
    pipe = flux()
    plain = tensors(record(pipe, tmp_path / "plain"))
    negengine.apply(pipe, NegToMe(threshold=-1), negengine.CADS())
    within = tensors(record(pipe, tmp_path / "within"))
    assert plain.keys() == within.keys()
    assert all(torch.equal(plain[name], within[name]) for name in plain)
    draw(pipe, prompts=1, n=2)
    assert negengine.status(pipe)[NegToMe].merged_tokens > 0  # and act again afterwards


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,inductor",
    guarded([("flux", False), ("flux", True), ("sdxl", False)], lambda family, inductor: family == "flux" and not inductor),
)
def test_compiled(family, inductor, tmp_path):
    """No graph more for another step, and recording does not run compiled code."""
    graphs = []

    def backend(graph, inputs):
        if len(graph.graph.nodes) >= 100:  # not that of the hook before the denoiser, which has a few nodes
            graphs.append(graph)
        return compile_fx(graph, inputs) if inductor else graph

    torch._dynamo.reset()
    pipe = flux(num_layers=1, num_single_layers=1) if family == "flux" else BUILDERS[family]()
    settings, call = {**SETTINGS, "timesteps": (0, 1000)}, {**GUIDED[family], "num_inference_steps": 4}
    bank = record(pipe, tmp_path / "bank", settings=settings, **call)
    negengine.apply(pipe, NegToMe(**settings, reference=bank))
    eager, expected = draw(pipe, prompts=1, n=3, **call), negengine.status(pipe)[NegToMe]
    assert expected.active_steps == expected.steps == 4
    denoiser(pipe).compile(backend=backend, fullgraph=True)
    again = record(pipe, tmp_path / "again", settings=settings, **call)
    assert not graphs
    assert all(torch.equal(a, b) for a, b in zip(tensors(bank).values(), tensors(again).values(), strict=True))
    compiled, status = draw(pipe, prompts=1, n=3, **call), negengine.status(pipe)[NegToMe]
    assert status.merged_tokens == pytest.approx(expected.merged_tokens, abs=2 if inductor else 0)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    torch._dynamo.reset()


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return record(sdxl(), tmp_path_factory.mktemp("bank") / "asset.safetensors")


def no_step(pipe):
    """Fails if the denoiser is called."""

    def fail(*_):
        raise AssertionError("a step was made")

    denoiser(pipe).register_forward_pre_hook(fail)
    return pipe


def apply(pipe, bank, **settings):
    return negengine.apply(pipe, NegToMe(**{**SETTINGS, **settings}, reference=bank))


def lora(pipe):
    torch.manual_seed(0)
    pipe.unet.up_blocks[1].attentions[0].proj_in.weight.data.add_(0.1)
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(1.001)
    return pipe


@pytest.mark.parametrize(
    "make,message",
    [
        (sd, "asset.safetensors was recorded from a model of the family SDXL, and this is one of Stable Diffusion 1.x and 2.x"),
        (flux, "asset.safetensors was recorded from a model of the family SDXL, and this is one of FLUX.1; load the model as it"),
        (functools.partial(sdxl, sample_size=64), "was recorded from a model of another configuration"),
        (functools.partial(sdxl, 1), r"a model with other weights .*; load the model as it was, or record it again"),
        (lambda: lora(sdxl()), r"a model with other weights .another checkpoint, or a LoRA"),
    ],
    ids=["family", "family of other blocks", "config", "weights", "merged lora"],
)
def test_another_model(bank, make, message):
    with pytest.raises(ValueError, match=message):
        apply(make(), bank)


def test_weights_that_changed_after_apply(bank):
    pipe = apply(no_step(sdxl()), bank)
    lora(pipe)
    with pytest.raises(ValueError, match="other weights"):
        draw(pipe, prompts=1)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"matching": "release"}, "was recorded for matching='paper', and these settings have matching='release'"),
        ({"blocks": ("*",)}, r"does not hold the block 'down_blocks.1.*' \(.* selected blocks\); select with `blocks`"),
        ({"min_grid": 1}, "was recorded with min_grid=4, .* min_grid=1 takes in; raise it, or record it again"),
    ],
)
def test_other_settings(settings, message, tmp_path):
    pipe = sdxl()
    held = record(pipe, tmp_path / "bank", settings={**SETTINGS, "min_grid": 4})
    with pytest.raises(ValueError, match=message):
        apply(pipe, held, **{"min_grid": 4, **settings})


@pytest.mark.parametrize(
    "call,message",
    [
        ({"num_inference_steps": 5}, r"this run merges at timestep 749.25, which .* does not hold: it was recorded with the Euler"),
        ({"height": 80}, r"was recorded for latents of 9 x 7 \(height, width\), and those of this run are 10 x 7; run at its size"),
    ],
)
def test_another_call(bank, call, message):
    with pytest.raises(ValueError, match=message):
        draw(apply(no_step(sdxl()), bank), prompts=1, **call)


def test_another_noise_level(bank):
    """The same timesteps, but the schedule of another model of noise."""
    pipe = apply(no_step(sdxl()), bank)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(ValueError, match="does not hold at this run's noise level"):
        draw(pipe, prompts=1)


def test_a_refused_call_leaves_the_pipeline_as_it_was(bank):
    pipe = apply(sdxl(), bank)
    for call in ({"num_inference_steps": 5}, {"height": 80}):
        with pytest.raises(ValueError, match="record it again"):
            draw(pipe, prompts=1, **call)
    after = draw(pipe, prompts=1, n=3)
    assert torch.equal(after, drawn(sdxl(), bank)[0])


def test_guidance_that_was_not_recorded(family, tmp_path):
    pipe = BUILDERS[family]()
    held = record(pipe, tmp_path / "bank", **PLAIN[family])
    apply(no_step(pipe), held)
    with pytest.raises(ValueError, match="was recorded without classifier-free guidance, and this run guides"):
        draw(pipe, prompts=1, **{**GUIDED[family], "guidance_scale": 5.0})


def pag(scale=3.0):
    pipe = diffusers.StableDiffusionXLPAGPipeline(**_parts(sdxl()), pag_applied_layers=["mid"], add_watermarker=False)
    return _quiet(pipe), {"pag_scale": scale}


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_perturbed_attention_guidance(bank, guidance, tmp_path):
    """Its third branch is not in a bank. Without its scale the pipeline is like any other."""
    pipe, call = pag()
    call |= {"guidance_scale": guidance}
    apply(no_step(pipe), bank)
    message = "has other rows: its perturbed attention guidance .*; leave out pag_scale, or give the picture itself"
    with pytest.raises(ValueError, match=message):
        draw(pipe, prompts=1, **call)
    with pytest.raises(ValueError, match=message):
        record(pipe, tmp_path / "bank", **call)
    assert not list(tmp_path.iterdir())
    pipe, call = pag(scale=0.0)
    call |= {"guidance_scale": guidance}
    expected = draw(apply(sdxl(), bank), prompts=1, n=2, guidance_scale=guidance)
    assert torch.equal(draw(apply(pipe, bank), prompts=1, n=2, **call), expected)
    assert record(pipe, tmp_path / "bank", **call).about.branches[-1] == "conditional"


def test_a_pipeline_of_further_rows(bank, tmp_path):
    """A class of which the family knows that its rows are others, here by its name."""
    pipe = sdxl()
    pipe.__class__ = type("StableDiffusionXLInstructPix2PixPipeline", (type(pipe),), {})
    apply(no_step(pipe), bank)
    message = "StableDiffusionXLInstructPix2PixPipeline has other rows: it guides by the text and by the image to be edited"
    with pytest.raises(ValueError, match=message):
        draw(pipe, prompts=1)
    with pytest.raises(ValueError, match=message):
        record(pipe, tmp_path / "bank")


def test_a_control_net_that_adds_to_the_tokens_of_texts(tmp_path):
    """Z-Image's gives nothing to rows of further pictures, so that a bank would hold other tokens than these have."""
    pipe = no_step(tiny_z_image.z_image_controlnet())
    call = {**tiny_z_image.SIZE, "control_image": picture(9), "num_inference_steps": 2}
    asset = NegToMe(**SETTINGS, reference=pictures())
    with pytest.raises(ValueError, match="ZImageControlNetPipeline has other rows: its control net"):
        negengine.record_bank(pipe, asset, tmp_path / "bank", prompt="a cat", **call)


def test_rows_of_which_nobody_can_tell_the_branch(bank):
    pipe = apply(sdxl(), bank)
    draw(pipe, prompts=1, n=2)
    table = applied_to(pipe, NegToMe).banks.table
    assert (table(2, 2), table(4, 4)) == ([[1]] * 2, [[0]] * 2 + [[1]] * 2)
    assert table(2, 4) == [[1]] * 2 + [[0]] * 2  # a branch that a method joined
    with pytest.raises(RuntimeError, match=r"called with 6 rows for 2 images, .* \(unconditional and conditional\)"):
        table(6, 6)


def test_skipped_layers(tmp_path):
    """A recording is refused before anything is done, a run in the call with such layers: nothing tells of them earlier."""
    pipe, asset = tiny_more.BUILDERS["sd3"](), NegToMe(**SETTINGS, reference=pictures())
    call = {"prompt": "a cat", "num_inference_steps": 3, **tiny_more.CALL["sd3"], **tiny_more.SIZE["sd3"]}
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=r"skip_guidance_layers .*; leave it out of the rec"):
        negengine.record_bank(pipe, asset, tmp_path / "bank", **call, **skipped)
    assert not calls
    assert not list(tmp_path.iterdir())
    held = negengine.record_bank(pipe, asset, tmp_path / "bank", **call)
    with pytest.raises(RuntimeError, match=r"once more in a step, with skip_layers, for which .* holds nothing; switch that"):
        tiny_more.draw(apply(pipe, held), prompts=1, **skipped)
    tiny_more.draw(pipe, prompts=1)
    assert negengine.status(pipe)[NegToMe].merged_tokens


def test_banks_that_do_not_go_together(tmp_path):
    pipe = sdxl()
    guided, alone = (record(pipe, tmp_path / name, **call) for name, call in (("a", {}), ("b", PLAIN["sdxl"])))
    with pytest.raises(ValueError, match=r"a was recorded with classifier-free guidance, .*b with no guidance; record them alike"):
        apply(pipe, [guided, alone])
    with pytest.raises(TypeError, match="reference has pictures and banks"):
        NegToMe(reference=[guided, ReferenceImage(picture())])
    held = record(pipe, tmp_path / "release", settings={**SETTINGS, "matching": "release"})
    with pytest.raises(ValueError, match="knows one reference bank only"):
        NegToMe(reference=[held, held], matching="release")


def test_a_bare_denoiser(bank):
    with pytest.raises(ValueError, match="apply to the pipeline"):
        negengine.apply(sdxl().unet, NegToMe(group_size=2, timesteps=(0, 1000), reference=bank))


def test_an_impossible_recording(tmp_path):
    pipe, path, asset = no_step(sdxl()), tmp_path / "bank", NegToMe(reference=ReferenceImage(picture()))
    call = {"prompt": "a cat", "height": 72, "width": 56}
    for settings, where, given, error, message in (
        (NegToMe(), path, call, ValueError, "a bank is recorded from pictures"),
        (negengine.CADS(), path, call, TypeError, "settings must be NegToMe"),
        (asset, path, {**call, "prompt": ["a", "b"]}, TypeError, "under one prompt"),
        (asset, path, {**call, "latents": None}, ValueError, "latents is not for a recording"),
        (asset, path, {**call, "guidance": 3}, TypeError, "StableDiffusionXLPipeline takes no guidance"),
        (asset, tmp_path / "no" / "bank", call, FileNotFoundError, "there is no folder .*; make it first"),
        (asset, tmp_path, call, ValueError, "is a folder; give the path of a file"),
        (
            dataclasses.replace(asset, timesteps=(998, 999)),
            path,
            {**call, "num_inference_steps": 2},
            ValueError,
            "widen `timesteps`",
        ),
    ):
        if "widen" in message:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="leading")
        with pytest.raises(error, match=message):
            negengine.record_bank(pipe, settings, where, **given)
    with pytest.raises(ValueError, match="give the pipeline, with its VAE"):
        negengine.record_bank(pipe.unet, asset, path, **call)
    with pytest.raises(ValueError, match="min_grid"):
        negengine.record_bank(sdxl(), asset, path, **call, num_inference_steps=3)  # SDXL's default of 32
    assert not list(tmp_path.iterdir())


def test_a_recording_that_fails_leaves_nothing_behind(tmp_path):
    pipe = sdxl()
    late = pipe.unet.up_blocks[1].attentions[1]

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = late.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        record(pipe, tmp_path / "bank")
    hook.remove()
    assert not list(tmp_path.iterdir())
    record(pipe, tmp_path / "bank")
    assert [file.name for file in tmp_path.iterdir()] == ["bank"]


# --- the file ----------------------------------------------------------------------------------------------------


def changed(bank, path, edit):
    """A copy whose header was edited."""
    raw = bank.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(raw[:8] + text + raw[8 + length :])
    return path


def newer(header):
    header["__metadata__"]["format"] = "3"


def strange(header):
    header["__metadata__"]["about"] = "{}"


def older(header):
    header["__metadata__"]["format"] = "1"


def words_for_numbers(header):
    entry = next(entry for name, entry in header.items() if name != "__metadata__")
    entry["data_offsets"] = [str(offset) for offset in entry["data_offsets"]]


def another_prompt(header):
    header["__metadata__"]["about"] = header["__metadata__"]["about"].replace(PROMPTS[0], "a dog")


def tensors_alone(header):
    del header["__metadata__"]


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    """As large as before."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))


def replace(path):
    """The same bytes and the same time of change, in another file."""
    twin, there = path.with_suffix(".new"), path.stat()
    twin.write_bytes(path.read_bytes())
    os.utime(twin, ns=(there.st_atime_ns, there.st_mtime_ns))
    twin.replace(path)


CHANGES = [
    (truncate, "was overwritten in place"),
    (overwrite, "was overwritten in place"),
    (replace, "was replaced by another file"),
    (Path.unlink, "is gone"),
]


@pytest.mark.parametrize(
    "change,how,late",
    guarded(
        ((*change, late) for change in CHANGES for late in (True, False)),
        lambda change, how, late: late or change is truncate,
    ),
)
def test_a_file_that_changes(bank, change, how, late, tmp_path):
    """After apply, or before it. Truncated, what is mapped would not be there when it is read, which ends the process."""
    path, message = tmp_path / "bank", f"bank {how} after .* make a new ReferenceBank and apply it"
    path.write_bytes(Path(bank.path).read_bytes())
    held, pipe = ReferenceBank(path), no_step(sdxl())
    if late:
        apply(pipe, held)
    change(path)
    with pytest.raises(ValueError, match=message):
        draw(pipe, prompts=1) if late else apply(pipe, held)


def test_a_file_that_is_recorded_again(tmp_path):
    """Between two calls; the bank that was applied is not used for the second, and a new one is."""
    pipe = sdxl()
    drawn(pipe, record(pipe, tmp_path / "bank"))
    again = record(pipe, tmp_path / "bank", given=pictures(masked=False))
    with pytest.raises(ValueError, match="was replaced by another file"):
        draw(pipe, prompts=1)
    expected = drawn(sdxl(), record(pipe, tmp_path / "twin", given=pictures(masked=False)))[0]
    assert torch.equal(drawn(pipe, again)[0], expected)


@pytest.mark.parametrize(
    "edit,message",
    [
        (newer, "has format 3, and this version of negengine reads format 2; use the version that wrote it, or record it again"),
        (older, "has format 1, and this version of negengine reads format 2; use the version that wrote it, or record it again"),
        (strange, "is damaged: its header does not make sense"),
        (words_for_numbers, "is damaged: its header does not make sense"),
        (another_prompt, "is damaged: its checksum differs"),
        (tensors_alone, "holds tensors but is no reference bank"),
    ],
)
def test_a_header_that_was_changed(bank, tmp_path, edit, message):
    path = changed(Path(bank.path), tmp_path / "changed", edit)
    with pytest.raises(ValueError, match=message):
        ReferenceBank(path)


def test_a_damaged_file(bank, tmp_path):
    raw, path = Path(bank.path).read_bytes(), tmp_path / "damaged"
    for content, message in (
        (raw[:-1], "is truncated: .* bytes are there; record it again"),
        (raw[:100], "is truncated within its header"),
        (b"", "is truncated within its header"),
        (raw[:8] + b"x" + raw[9:], "is damaged: its header cannot be read"),
        (raw + b"x", "is damaged: its checksum differs"),
        (raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:], "is damaged: its checksum differs; record it again .*, or copy it again"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ReferenceBank(path)
    with pytest.raises(FileNotFoundError, match=re.escape("negengine.record_bank records one")):
        ReferenceBank(tmp_path / "none")
    with pytest.raises(ValueError, match="is a file"):
        ReferenceBank(tmp_path)
    with pytest.raises(TypeError, match="must be the path of a file"):
        ReferenceBank(3)


def test_a_relative_path(bank, tmp_path, monkeypatch):
    """It is that of the folder in which the bank was made, wherever the process works later."""
    expected = drawn(sdxl(), bank)[0]
    (tmp_path / "here").mkdir()
    (tmp_path / "bank").write_bytes(Path(bank.path).read_bytes())
    monkeypatch.chdir(tmp_path)
    held, early = ReferenceBank("bank"), sdxl()
    apply(early, held)
    monkeypatch.chdir(tmp_path / "here")
    assert torch.equal(draw(early, prompts=1, n=3), expected)
    assert torch.equal(drawn(sdxl(), held)[0], expected)
    assert as_plain(NegToMe(reference=held))["reference"] == [{"bank": "bank"}]
    with pytest.raises(FileNotFoundError):
        ReferenceBank("bank")


def test_what_a_bank_says_of_itself(bank):
    about = bank.about
    assert (about.family, about.denoiser, about.dtype) == ("SDXL", "UNet2DConditionModel", "float32")
    assert (about.size, about.matching, about.branches) == ((9, 7), "paper", ("unconditional", "conditional"))
    assert (about.prompt, about.negative_prompt, about.masked) == (PROMPTS[0], NEGATIVES[0], True)
    assert [round(step.timestep) for step in about.steps] == [999, 500]
    assert all(block.startswith("up_blocks") for block in about.blocks)
    assert ReferenceBank(bank.path) == bank


def test_a_bank_as_plain_data(bank):
    settings = NegToMe(reference=bank)
    plain = as_plain(settings)
    assert plain["reference"] == [{"bank": bank.path}]
    assert from_plain(json.loads(json.dumps(plain))) == settings
    with pytest.raises(ValueError, match=r"a bank \(negtome.reference\) has no setting 'mask'"):
        from_plain({"method": "negtome", "reference": {"bank": bank.path, "mask": "a.png"}})


# --- the embedded models -----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", models.DIGITS)
def test_embedded_models(name, tmp_path):
    """As with the asset in the batch, on weights that were trained."""
    pipe, preset = models.load(name), models.preset(name)
    asset = ReferenceImage(picture(3, (32, 32)), half_mask((32, 32)))
    settings = {"alpha": 0.9, "threshold": 0.5, "min_grid": 1}
    call = {**preset.call_kwargs(), "num_inference_steps": 8}  # with a list of one negative prompt on FLUX
    recorded = {k: v[0] if isinstance(v, list) else v for k, v in call.items()}
    bank = negengine.record_bank(
        pipe, NegToMe(**settings, reference=asset), tmp_path / "bank", prompt="a handwritten three", **recorded
    )

    def images(given):
        negengine.apply(pipe, NegToMe(**settings, reference=given))
        generator = torch.Generator().manual_seed(0)
        run = pipe(["a handwritten three"], num_images_per_prompt=3, generator=generator, output_type="latent", **call)
        return run.images, negengine.status(pipe)[NegToMe]

    (joined, expected), (held, status) = images(asset), images(bank)
    assert status.merged_tokens == pytest.approx(expected.merged_tokens, rel=1e-3)
    assert status.merged_tokens > 0
    torch.testing.assert_close(held, joined, rtol=0, atol=2e-3 * joined.abs().amax().item())
