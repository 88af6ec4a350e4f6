"""NegToMe on modules that nobody here wrote: merged at the places that the caller names, as the rule by hand merges there."""

import copy
import gc
import pickle
import re

import diffusers
import pytest
import torch
import transformers
from guards import guarded
from torch import nn
from torch._inductor.compile_fx import compile_fx

import negengine
from negengine import NegToMe, reference
from negengine.diffusers import families

GRID = (4, 6)
SETTINGS = {"group_size": 2, "alpha": 0.8, "threshold": 0.3}


def dit():
    """Of diffusers, of a family that negengine does not know: classes in the place of text, and a timestep."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=1000
    )
    return model.eval().requires_grad_(False)


def vit():
    """Of transformers: a class token precedes the image's."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, drop_path_rate=0.0
    )
    model = transformers.Dinov2Model(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # as it is made, the tokens of an image are nearly one
        parameter.normal_(0, 0.4)
    return model


def encoder():
    """Of torch itself: the first five tokens are text."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(2)]

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, x, t=None):
            return self.layers(x)

    return Denoiser().requires_grad_(False)  # in training mode layers call their submodules; without dropout they compute the same


def calm(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def inputs(model):
    torch.manual_seed(1)
    if isinstance(model, diffusers.DiTTransformer2DModel):
        return {
            "hidden_states": torch.randn(4, 4, 8, 8), "timestep": torch.full((4,), 950), "class_labels": torch.tensor([1, 1, 2, 2])
        }  # fmt: skip
    if isinstance(model, transformers.Dinov2Model):
        return {"pixel_values": torch.randn(4, 3, 16, 24)}
    return {"x": torch.randn(4, 5 + 24, 16)}


CASES = {
    "DiT": (dit, "transformer_blocks.*.attn1", "output", 0, (4, 4)),
    "DiT before the projection": (dit, "transformer_blocks.*.attn1.to_out.0", "input", 0, (4, 4)),
    "DINOv2": (vit, "*.attention", "output", 1, GRID),
    "DINOv2, residual stream": (vit, "*.norm2", "input", 1, GRID),
    "torch": (lambda: calm(encoder()), "layers.*.self_attn", "output", 5, GRID),
}


def by_hand(model, names, where, text, merge):
    """The rule at these places, in hooks of the test's own."""

    def merged(x):
        return torch.cat([x[:, :text], merge(x[:, text:])], 1)

    def after(module, args, output):
        return (merged(output[0]), *output[1:]) if isinstance(output, tuple) else merged(output)

    def before(module, args):
        return (merged(args[0]), *args[1:])

    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(before) if where == "input" else module.register_forward_hook(after)
    return model


def named(model, pattern):
    expression = re.escape(pattern).replace(r"\*", ".*")
    return [name for name, _ in model.named_modules() if re.fullmatch(expression, name)]


def output(model, **given):
    with torch.no_grad():
        result = model(**{**inputs(model), **given})
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("mode", ["first", "others"])
@pytest.mark.parametrize("case", CASES)
def test_as_the_rule_by_hand(case, mode):
    make, pattern, where, text, grid = CASES[case]
    model = make()
    if case.startswith("DINOv2") and where == "output":  # the block's attention, not what is inside it
        pattern = "*.?.attention"
        names = [name for name in named(model, "*.attention") if re.search(r"\d\.attention$", name)]
    else:
        names = named(model, pattern)
    assert len(names) == 2
    table = reference.group_references(mode, 4, 2)

    def merge(x):  # in float64: random tokens can lie so close that float32 does not tell which of two is the better match
        return reference.negtome_batch(x.double(), table, 0.8, 0.3).to(x.dtype)

    plain = output(model)
    expected = output(by_hand(copy.deepcopy(model), names, where, text, merge))
    with negengine.attach(model, NegToMe(**SETTINGS, reference=mode), tokens=names, where=where, text=text, grid=grid) as handle:
        got, report = output(model), handle.status()
    assert (report.blocks, report.active_blocks) == (2, 2)
    assert report.eligible_tokens == 2 * (2 if mode == "first" else 4) * grid[0] * grid[1]
    assert 0 < report.merged_tokens <= report.eligible_tokens
    assert not torch.allclose(got, plain, atol=1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(output(model), plain)  # nothing of it remains


def test_patterns_and_functions():
    """Globs select; grid and text may depend on the inputs."""
    model = dit()
    with negengine.attach(model, NegToMe(**SETTINGS), tokens="transformer_blocks.*.attn1", grid=(4, 4)):
        expected = output(model)

    def grid(inputs):
        height, width = inputs["hidden_states"].shape[-2:]
        return height // 2, width // 2

    with negengine.attach(model, NegToMe(**SETTINGS), tokens="transformer_blocks.[01].attn1", grid=grid, text=lambda inputs: 0):
        assert torch.equal(output(model), expected)


def test_the_timestep_is_told_by_an_argument():
    model = dit()
    plain = {t: output(model, timestep=torch.full((4,), t)) for t in (950, 500)}
    with negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=(4, 4), timestep="timestep") as handle:
        for t in (950, 500, 950, 500):
            same = torch.equal(output(model, timestep=torch.full((4,), t)), plain[t])
            assert same == (t == 500)
        assert (handle.status().steps, handle.status().active_steps) == (4, 2)
    unit = NegToMe(**SETTINGS, timesteps=(400, 600))
    with negengine.attach(model, unit, tokens="*.attn1", grid=(4, 4), timestep="timestep", noisiest=2000) as handle:
        assert not torch.equal(output(model), plain[950])
        assert torch.equal(output(model, timestep=torch.full((4,), 500)), plain[500])


def test_time_that_runs_the_other_way():
    """At 50 it is where 950 of the usual time is."""
    model, call = dit(), {"timestep": "timestep", "noisiest": 0, "cleanest": 1000}
    plain = {t: output(model, timestep=torch.full((4,), t)) for t in (950, 50)}
    with negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=(4, 4), **call) as handle:
        assert torch.equal(output(model, timestep=torch.full((4,), 950)), plain[950])
        assert not torch.equal(output(model, timestep=torch.full((4,), 50)), plain[50])
        assert (handle.status().steps, handle.status().active_steps) == (2, 1)


def test_image_tokens_before_the_text():
    """The same as with the text first, the tokens turned round; nothing in this model tells places apart."""
    model = calm(encoder())
    given = inputs(model)["x"]
    turned = given.roll(-5, 1)
    call = {"tokens": "layers.*.self_attn", "grid": GRID, "text": 5}
    with negengine.attach(model, NegToMe(**SETTINGS), **call):
        expected = output(model, x=given).roll(-5, 1)
        assert not torch.allclose(output(model, x=turned), expected, atol=1e-4)
    with negengine.attach(model, NegToMe(**SETTINGS), **call, text_first=False) as handle:
        torch.testing.assert_close(output(model, x=turned), expected, rtol=1e-5, atol=1e-5)
        assert handle.status().eligible_tokens == 2 * 2 * 24


class Shared(nn.Module):
    """One module in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = self.second = nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, x, height=4, *, t=None):
        return self.second(self.first(x))


def test_a_module_in_two_places_is_merged_in_both():
    model, x = Shared(), torch.randn(2, 24, 8)
    table = reference.group_references("first", 2, 2)

    def layer(x):
        return reference.negtome_batch(model.first(x), table, 0.8, 0.3)

    with torch.no_grad():
        expected = layer(layer(x))
        with negengine.attach(model, NegToMe(**SETTINGS), tokens=("first", "second"), grid=GRID) as handle:
            torch.testing.assert_close(model(x), expected)
            assert handle.status().blocks == 1
    for tokens in ("first", "second"):
        with pytest.raises(ValueError, match=rf"'first', 'second' are one module.* at '{tokens}' alone"):
            negengine.attach(model, NegToMe(**SETTINGS), tokens=tokens, grid=GRID)


def test_functions_of_the_inputs_see_defaults():
    seen = []

    def grid(inputs):
        seen.append(inputs["height"])
        return inputs["height"], 24 // inputs["height"]

    def text(inputs):
        return 0 if inputs["t"] is None else 1

    model, x = Shared(), torch.randn(2, 24, 8)
    with negengine.attach(model, NegToMe(**SETTINGS), tokens=("first", "second"), grid=grid, text=text) as handle, torch.no_grad():
        model(x)
        model(x, 3)
        assert handle.status().merged_tokens > 0
    assert set(seen) == {3, 4}


@pytest.mark.parametrize("given", [{}, {"timestep": "timestep"}])
def test_a_module_is_not_pickled_with_the_method_on_it(given):
    model = dit()
    plain, weights = output(model), {name: value.clone() for name, value in model.state_dict().items()}
    with negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=(4, 4), **given):
        with pytest.raises(TypeError, match=r"not pickled with the methods of negengine.*take them off first.*state_dict\(\)"):
            pickle.dumps(model)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert torch.equal(output(copy.deepcopy(model)), plain)
    assert torch.equal(output(pickle.loads(pickle.dumps(model))), plain)


def test_alpha_as_a_function_of_the_timestep():
    model, seen = dit(), []

    def alpha(t):
        seen.append(t)
        return 0.5

    settings = NegToMe(group_size=2, alpha=alpha, threshold=0.3, timesteps=(0, 1000))
    with negengine.attach(model, settings, tokens="*.attn1", grid=(4, 4), timestep="timestep"):
        output(model)
    assert 950.0 in seen


COMPILED = [("torch", False), ("torch", True), ("DiT", False), ("DiT", True)]


@pytest.mark.parametrize("case,inductor", guarded(COMPILED, lambda case, inductor: (case, inductor) == COMPILED[0]))
def test_compiled(case, inductor):
    """One graph, also where it is attached anew with other values; and, once removed, that of the module alone."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        if len(graph.graph.nodes) >= 30:  # not that of the hook that lays out the groups, which has a few nodes
            graphs.append(graph)
        return compile_fx(graph, inputs) if inductor else graph

    make, tokens, where, text, grid = CASES[case]
    model, compiled = make(), make()
    plain = output(model)
    compiled.compile(backend=backend, fullgraph=True)
    for changes in ({}, {"alpha": 0.4}, {"threshold": 0.5}):
        given = {"settings": NegToMe(**{**SETTINGS, **changes}), "tokens": tokens, "where": where, "text": text, "grid": grid}
        with negengine.attach(model, **given), negengine.attach(compiled, **given) as handle:
            expected = output(model)
            torch.testing.assert_close(output(compiled), expected, rtol=1e-4, atol=1e-4)
            assert handle.status().merged_tokens > 0
        assert not torch.allclose(expected, plain, atol=1e-4)
        assert len(graphs) == 1
    torch.testing.assert_close(output(compiled), plain, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_removed_by_hand_and_by_the_collector():
    model, before = dit(), set(families._FAMILIES)
    handle = negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=(4, 4))
    handle.remove()
    handle.remove()
    assert set(families._FAMILIES) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="was removed from this DiTTransformer2DModel; attach it again"):
        handle.status()
    negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=lambda inputs: (4, 4), timestep="timestep")
    output(model)
    del model, handle
    gc.collect()
    assert set(families._FAMILIES) == before


@pytest.mark.parametrize("timestep", [None, "timestep"])
@pytest.mark.parametrize("kinds", [(), (NegToMe,)], ids=["all", "by its kind"])
def test_removed_as_methods_are(timestep, kinds):
    """Hooks stayed behind, and the module could not be attached to again."""
    model, before = dit(), set(families._FAMILIES)
    plain = output(model)
    handle = negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=(4, 4), timestep=timestep)
    merged = output(model)
    assert negengine.remove(model, negengine.CADS) is model
    assert torch.equal(output(model), merged)
    assert not torch.equal(merged, plain)
    negengine.remove(model, *kinds)
    assert set(families._FAMILIES) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="attach it again"):
        handle.status()
    with negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=(4, 4), timestep=timestep) as again:
        handle.remove()
        assert torch.equal(output(model), merged)
        assert again.status().active_blocks == 2
    assert torch.equal(output(model), plain)


def test_rows_at_several_timesteps():
    """The first one decided for all."""
    model = dit()
    with (
        negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=(4, 4), timestep="timestep"),
        pytest.raises(ValueError, match=r"at several timesteps \('timestep' runs from 100 to 999\).* attach without `timestep`"),
    ):
        output(model, timestep=torch.tensor([999, 999, 100, 100]))


@pytest.mark.parametrize(
    "name, asked, message",
    [
        ("grid", lambda inputs: None, r"TypeError: grid must be \(height, width\).*, got None"),
        ("grid", lambda inputs: "44", "TypeError: grid must be .*got '44'"),
        ("grid", lambda inputs: (4, 4.0), "ValueError: grid must be a positive integer, got 4.0"),
        ("grid", lambda inputs: inputs["height"], "KeyError: 'height'"),
        ("text", lambda inputs: "x", "ValueError: text must be 0 or a positive integer, got 'x'"),
        ("text", lambda inputs: None, "ValueError: text must be 0 or a positive integer, got None"),
        ("text", lambda inputs: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_functions_that_fail(name, asked, message):
    model = dit()
    given = {"tokens": "*.attn1", "grid": (4, 4), name: asked}
    expected = rf"`{name}` of negengine.attach, a function of the inputs of DiT\w+ by name \(hidden_states, .*\), failed: {message}"
    with negengine.attach(model, NegToMe(**SETTINGS), **given), pytest.raises(ValueError, match=expected):
        output(model)


@pytest.mark.parametrize(
    "settings,given,error,message",
    [
        ({}, {"tokens": "*.attn9"}, ValueError, r"no submodule of this DiTTransformer2DModel is named '\*.attn9'; there are pos"),
        ({}, {"tokens": ()}, ValueError, "tokens is empty"),
        ({}, {"grid": (4,)}, TypeError, r"grid must be \(height, width\)"),
        ({}, {"grid": (4, 0)}, ValueError, "grid must be a positive integer"),
        ({}, {"text": -1}, ValueError, "text must be 0 or a positive integer"),
        ({}, {"where": "inside"}, ValueError, "where must be one of"),
        ({}, {"timestep": "t"}, ValueError, "has no parameter 't'; there are hidden_states, timestep, class_labels"),
        ({}, {"timestep": "timestep", "noisiest": 0}, ValueError, "cannot both be 0; for a time"),
        ({}, {"text_first": 1.5}, ValueError, "text_first must be"),
        ({"group_size": None}, {}, ValueError, r"set NegToMe\(group_size=...\)"),
        ({"timesteps": (900, 1000)}, {}, ValueError, "a window of timesteps needs `timestep`"),
        ({"alpha": lambda t: 1.0}, {}, ValueError, "a window of timesteps needs `timestep`"),
        ({"blocks": ("up",)}, {}, ValueError, "is named 'up'"),
    ],
)
def test_what_cannot_work(settings, given, error, message):
    model, before = dit(), set(families._FAMILIES)
    with pytest.raises(error, match=message):
        negengine.attach(model, NegToMe(**{**SETTINGS, **settings}), **{"tokens": "*.attn1", "grid": (4, 4), **given})
    assert set(families._FAMILIES) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_no_unknown_module():
    settings = NegToMe(**SETTINGS)
    with pytest.raises(TypeError, match=r"attach takes a torch.nn.Module, got str"):
        negengine.attach("model", settings, tokens="*", grid=(4, 4))
    with pytest.raises(TypeError, match="attach takes NegToMe, got CADS"):
        negengine.attach(dit(), negengine.CADS(), tokens="*", grid=(4, 4))
    model = dit()
    with (
        negengine.attach(model, settings, tokens="*.attn1", grid=(4, 4)),
        pytest.raises(ValueError, match=r"or is attached to it; use negengine.apply, or negengine.remove first"),
    ):
        negengine.attach(model, settings, tokens="*.attn1", grid=(4, 4))


INPUT = {"tokens": "*.attn1.to_out.0", "where": "input"}


@pytest.mark.parametrize("given", [{"grid": (4, 5)}, {"text": 1}, {"tokens": "*.norm1.linear"}, {**INPUT, "text": 1}])
def test_tokens_that_are_not_what_was_said(given):
    model = dit()
    with (
        negengine.attach(model, NegToMe(**SETTINGS), **{"tokens": "*.attn1", "grid": (4, 4), **given}),
        pytest.raises(ValueError, match=r"were expected at 'transformer_blocks.0.*check `tokens`, `where`, `text` and `grid`"),
    ):
        output(model)
    output(model)


def test_a_call_without_its_timestep():
    model = dit()
    with (
        negengine.attach(model, NegToMe(**SETTINGS), tokens="*.attn1", grid=(4, 4), timestep="timestep"),
        pytest.raises(ValueError, match="was called without 'timestep'"),
    ):
        model(torch.randn(4, 4, 8, 8))
