"""A recorded reference is refused where the model, or what it is told, is another; of an approximation the report tells."""

import functools
import re

import pytest
import torch
from guards import guarded
from test_banks import GUIDED, SETTINGS, apply, drawn, no_step, pictures, record
from test_beside_ip_adapter import add_flux_ip_adapter
from test_beside_lora import add
from tiny import BUILDERS, NEGATIVES, denoiser, draw, flux, picture, sdxl, sdxl_controlnet

import negengine
from negengine import NegToMe
from negengine.diffusers.families import find_denoiser
from negengine.diffusers.fingerprint import fingerprint

FAMILIES = ["flux", "sdxl"]


def known(pipe):
    denoiser, family = find_denoiser(pipe)
    return fingerprint(family, denoiser)


def differing(pipe, change):
    """Names of what tells a model from what it was before."""
    before = known(pipe)
    change(pipe)
    after = known(pipe)
    return {name for name in before if before[name] != after[name]}


def adapted(family):
    pipe = BUILDERS[family]()
    add(pipe, "one", 11), add(pipe, "two", 12)
    pipe.set_adapters("one")
    return pipe


def swapped(pipe):
    """As hot-swapping does, which writes past the counters of changes, and in one layer alone."""
    weight = next(p for name, p in denoiser(pipe).named_parameters() if name.endswith("lora_A.one.weight"))
    weight.data.copy_(torch.randn_like(weight))


ACTED = "other adapters that act, one (scaling 4), and those of this one are "
CHANGES = {
    "weighted with 0": (lambda pipe: pipe.set_adapters("one", 0.0), ACTED + "none"),
    "weighted": (lambda pipe: pipe.set_adapters("one", 0.5), ACTED + "one (scaling 2)"),
    "disabled": (lambda pipe: pipe.disable_lora(), ACTED + "none"),
    "another": (lambda pipe: pipe.set_adapters("two"), ACTED + "two (scaling 4)"),
    "both": (lambda pipe: pipe.set_adapters(["one", "two"]), ACTED + "one (scaling 4), two (scaling 4)"),
    "swapped": (swapped, "other weights"),
}


@pytest.fixture(scope="module")
def bank_of(tmp_path_factory):
    """Family -> a bank that was recorded with an adapter, of two that are loaded."""
    folder = tmp_path_factory.mktemp("banks")
    return functools.cache(lambda family: record(adapted(family), folder / family))


@pytest.mark.parametrize(
    "family,change", guarded([(f, c) for f in FAMILIES for c in CHANGES], lambda family, change: family == "flux")
)
def test_adapters(family, change, bank_of):
    """Before the call, and after apply in it."""
    act, message = CHANGES[change]
    pipe = no_step(apply(adapted(family), bank_of(family)))
    act(pipe)
    with pytest.raises(ValueError, match=f"was recorded from a model with {re.escape(message)}"):
        draw(pipe, prompts=1)
    with pytest.raises(ValueError, match=re.escape(message)):
        apply(pipe, bank_of(family))


def test_one_layer_of_an_adapter(bank_of):
    """Its scales are told apart layer by layer, also where another layer has the same."""
    pipe = adapted("flux")
    pipe.transformer.transformer_blocks[0].attn.to_q.scaling["one"] = 0.5
    pipe.transformer.transformer_blocks[1].attn.to_q.scaling["one"] = 0.25
    with pytest.raises(ValueError, match=r"one \(scaling 0.25/0.5/4\)"):
        apply(pipe, bank_of("flux"))
    other = adapted("flux")
    other.transformer.transformer_blocks[0].attn.to_q.scaling["one"] = 0.25
    other.transformer.transformer_blocks[1].attn.to_q.scaling["one"] = 0.5
    assert {name for name, value in known(pipe).items() if known(other)[name] != value} == {"numbers"}


def test_an_adapter_that_does_nothing_is_none(tmp_path):
    """Loaded after the recording and switched off; and an adapter that is fused is part of the weights."""
    pipe = flux()
    bank = record(pipe, tmp_path / "bank")
    add(pipe, "one", 11)
    pipe.disable_lora()
    joined, expected, _ = drawn(pipe, pictures())
    recorded, status, _ = drawn(pipe, bank)
    assert status.merged_tokens == expected.merged_tokens > 0
    torch.testing.assert_close(recorded, joined, rtol=0, atol=1e-4 * joined.abs().amax().item())
    pipe.enable_lora()
    pipe.fuse_lora(components=["transformer"])
    with pytest.raises(ValueError, match="other weights"):
        apply(pipe, bank)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_projections(family, tmp_path):
    """Their arithmetic is the same."""
    pipe, call = BUILDERS[family](), GUIDED[family]
    bank = record(pipe, tmp_path / "bank", **call)
    denoiser(pipe).fuse_qkv_projections()
    joined, expected, _ = drawn(pipe, pictures(), **call)
    recorded, status, _ = drawn(pipe, bank, **call)
    assert status.merged_tokens == expected.merged_tokens > 0
    torch.testing.assert_close(recorded, joined, rtol=0, atol=1e-4 * joined.abs().amax().item())


def test_every_tensor_counts():
    """Written past the counters of changes, with a buffer among them; and the layout in memory does not."""
    pipe = flux()
    pipe.transformer.register_buffer("shift", torch.zeros(3))
    before = known(pipe)
    for name, tensor in (*pipe.transformer.named_parameters(), *pipe.transformer.named_buffers()):
        kept = tensor.data.clone()
        tensor.data.mul_(1.01).add_(0.01)
        after = known(pipe)
        assert {key for key in before if before[key] != after[key]} == {"weights"}, name
        tensor.data.copy_(kept)
    assert known(pipe) == before


def test_a_change_of_some_columns():
    """The values that are looked at do not lie in one column of a matrix."""
    pipe = flux()
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
    for columns in weight.data.split(16, 1):
        assert differing(pipe, lambda pipe, columns=columns: columns.add_(0.01)) == {"weights"}


def test_what_changes_nothing():
    pipe = sdxl()
    assert not differing(pipe, lambda pipe: pipe.unet.to(memory_format=torch.channels_last))
    assert not differing(pipe, lambda pipe: pipe.enable_attention_slicing(1))
    assert not differing(pipe, lambda pipe: pipe.unet.train())


class Another:
    """Of a processor its name and its numbers are enough here."""

    def __init__(self, strength=1.0):
        self.strength = strength


class AnotherModule(torch.nn.Identity):
    """A processor may have weights."""


def test_free_u_and_processors(tmp_path):
    pipe = sdxl()
    bank = record(pipe, tmp_path / "bank")
    pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)
    with pytest.raises(ValueError, match=r"other numbers in its modules \(FreeU, or the scale of an adapter\) or other attention"):
        apply(pipe, bank)
    pipe.disable_freeu()
    apply(pipe, bank)
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    for processor in (Another(), Another(2.0), AnotherModule()):
        assert differing(pipe, lambda pipe, to=processor: attention.set_processor(to)) == {"numbers"}
    adapter = flux()
    add_flux_ip_adapter(adapter)
    assert differing(adapter, lambda pipe: pipe.set_ip_adapter_scale(0.5)) == {"numbers"}


# --- what the denoiser is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [{"original_size": (512, 512)}, {"crops_coords_top_left": (64, 8)}, {"target_size": (64, 64)}],
    ids=lambda call: next(iter(call)),
)
def test_other_sizes(call, tmp_path):
    """What SDXL is told of its pictures; the unconditional branch may be told something else."""
    pipe = sdxl()
    bank, own = record(pipe, tmp_path / "bank"), record(pipe, tmp_path / "own", **call)
    assert drawn(pipe, own, **call)[1].bank == "recorded under this prompt"
    no_step(apply(pipe, bank))
    message = r"another value of the denoiser's input added_cond_kwargs.time_ids .*; call the pipeline as for the recording, or rec"
    for given in (call, {f"negative_{name}": value for name, value in call.items()} | {"negative_target_size": (64, 64)}):
        given = given | ({"negative_original_size": (64, 64)} if "original_size" not in given and given is not call else {})
        with pytest.raises(ValueError, match=message):
            draw(pipe, prompts=1, **given)
    with pytest.raises(ValueError, match=message):
        draw(apply(pipe, own), prompts=1)


def test_the_scale_of_adapters_in_a_call(bank_of):
    """It is 1 where it is not given."""
    pipe = adapted("flux")
    expected, said, _ = drawn(pipe, bank_of("flux"))
    assert torch.equal(drawn(pipe, bank_of("flux"), joint_attention_kwargs={"scale": 1.0})[0], expected)
    assert said.bank == "recorded under this prompt"
    with pytest.raises(ValueError, match=r"input joint_attention_kwargs.scale .* a scale is that of adapters"):
        draw(no_step(pipe), prompts=1, joint_attention_kwargs={"scale": 0.0})


COMPILED = {
    "flux": (functools.partial(flux, num_layers=1, num_single_layers=1), {"guidance_scale": 2.0}),
    "sdxl": (sdxl, {"original_size": (512, 512)}),
}


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive)])
def test_compiled_code_is_compared_after_its_first_step(family, tmp_path):
    """What it is called with, between the steps; nothing is compiled again for it."""
    torch._dynamo.reset()
    build, other = COMPILED[family]
    pipe, graphs, steps = build(), [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def note(pipe, step, t, given):
        steps.append(step)
        return given

    settings, call = {**SETTINGS, "timesteps": (0, 1000)}, {"num_inference_steps": 3, "callback_on_step_end": note}
    bank = record(pipe, tmp_path / "bank", settings=settings)
    negengine.apply(pipe, NegToMe(**settings, reference=bank))
    denoiser(pipe).compile(backend=backend, fullgraph=True)
    draw(pipe, prompts=1, **call)
    made = len(graphs)
    assert made
    assert negengine.status(pipe).bank == "recorded under this prompt"
    steps.clear()
    if family == "sdxl":
        with pytest.raises(ValueError, match=r"added_cond_kwargs\.time_ids"):
            draw(pipe, prompts=1, **other, **call)
        assert not steps
    else:
        draw(pipe, prompts=1, **other, **call)
        assert negengine.status(pipe).bank == "recorded under this prompt, with another guidance scale"
    steps.clear()
    draw(pipe, prompts=1, **call)
    assert (steps, len(graphs)) == ([0, 1, 2], made)
    torch._dynamo.reset()


def test_another_guidance_scale_is_an_approximation(tmp_path):
    pipe = flux()
    bank = record(pipe, tmp_path / "bank", guidance_scale=2.0)
    assert drawn(pipe, bank, guidance_scale=2.0)[1].bank == "recorded under this prompt"
    assert drawn(pipe, bank, guidance_scale=3.0)[1].bank == "recorded under this prompt, with another guidance scale"
    elsewhere = record(pipe, tmp_path / "elsewhere", prompt="the sea", guidance_scale=2.0)
    both = "recorded under another prompt ('the sea'), with another guidance scale"
    assert drawn(pipe, elsewhere, guidance_scale=3.0)[1].bank == both


def test_a_control_net_is_an_approximation(tmp_path):
    """Also where it is the same, as what it adds follows the image that is drawn."""
    controlled = sdxl_controlnet()
    with_control = record(controlled, tmp_path / "with", image=picture(9, (56, 72)))
    said = "recorded under this prompt, with a control net, whose additions are not those of the recording"
    assert drawn(controlled, with_control)[1].bank == said
    without = record(sdxl(), tmp_path / "without")
    assert drawn(controlled, without)[1].bank == said
    assert drawn(sdxl(), with_control)[1].bank == said
    assert drawn(sdxl(), without)[1].bank == "recorded under this prompt"


def test_another_image_prompt_is_an_approximation(tmp_path):
    pipe = flux()
    add_flux_ip_adapter(pipe)

    def shown(seed):
        embeds = [torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(seed))]
        return {"ip_adapter_image_embeds": embeds, "negative_ip_adapter_image_embeds": embeds}

    bank = record(pipe, tmp_path / "bank", negative_prompt=NEGATIVES[0], **shown(6))
    assert drawn(pipe, bank, **shown(6))[1].bank == "recorded under this prompt"
    assert drawn(pipe, bank, **shown(7))[1].bank == "recorded under this prompt, with other image prompts"
