"""A family described from outside the package works as the built-in ones do."""

import dataclasses

import pytest
import torch
from torch import nn

import negengine
from negengine import reference
from negengine.diffusers import Conditioning, Family, Latents, Site, Tokens, families, register_family


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(12, 12)
        self.out = nn.Linear(12, 12)

    def forward(self, x, text):
        x = x + self.attn(torch.cat([text, x], 1))[:, text.shape[1] :]
        return x + self.out(x)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states, encoder_hidden_states):
        x = hidden_states.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, encoder_hidden_states)
        return (x,)


def sites(model):
    for i in range(len(model.blocks)):
        yield Site(f"blocks.{i}.attn", f"blocks.{i}.attn", "output", text_first=True)
        yield Site(f"blocks.{i}.out", f"blocks.{i}.out", "input")


TOY = Family(
    name="Toy",
    component="transformer",
    pipelines=("ToyPipeline",),
    matches=lambda module: isinstance(module, Toy),
    tokens=Tokens(
        sites=sites,
        text=lambda inputs: inputs["encoder_hidden_states"].shape[1],
        grids=lambda height, width: {height * width: (height, width)},
    ),
    latents=Latents(size=lambda inputs: tuple(inputs["hidden_states"].shape[-2:])),
    conditioning=Conditioning(sample="hidden_states", batched=("encoder_hidden_states",)),
    defaults={"negtome": {"alpha": 0.9, "threshold": 0.2, "timesteps": (0, 1000), "blocks": ("blocks",), "min_grid": 3}},
)


@pytest.fixture
def toy_family(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    register_family(TOY)


def expected(model, x, text):
    table = reference.group_references("first", len(x), 2)
    x = x.flatten(2).transpose(1, 2)
    for block in model.blocks:
        x = x + reference.negtome_batch(block.attn(torch.cat([text, x], 1))[:, text.shape[1] :], table, 0.9, 0.2)
        # `out` reads what was merged in place: the sum itself
        x = reference.negtome_batch(x, table, 0.9, 0.2)
        x = x + block.out(x)
    return x


@torch.no_grad()
def test_a_registered_family_works(toy_family):
    torch.manual_seed(0)
    model, x, text = Toy(), torch.randn(4, 12, 3, 5), torch.randn(4, 2, 12)
    plain, merged = model(x, text)[0], expected(model, x, text)
    negengine.apply(model, negengine.NegToMe(group_size=2))
    torch.testing.assert_close(model(x, encoder_hidden_states=text)[0], merged)
    status = negengine.status(model)[negengine.NegToMe]
    assert (status.family, status.blocks, status.active_blocks) == ("Toy", 4, 4)
    assert torch.equal(negengine.remove(model)(x, text)[0], plain)


@torch.no_grad()
def test_its_defaults_hold(toy_family):
    """Its grid of 2 x 5 is below its min_grid of 3."""
    model, x, text = Toy(), torch.randn(4, 12, 2, 5), torch.randn(4, 2, 12)
    plain = model(x, text)[0]
    negengine.apply(model, negengine.NegToMe(group_size=2))
    assert torch.equal(model(x, text)[0], plain)


def test_messages_name_it(toy_family):
    with pytest.raises(TypeError, match=r"It knows .*, Toy\."):
        negengine.apply(nn.Linear(1, 1), negengine.NegToMe())


def test_unregistered_it_is_refused():
    with pytest.raises(TypeError, match="does not know Toy"):
        negengine.apply(Toy(), negengine.NegToMe())


def test_a_name_is_taken_once(toy_family):
    with pytest.raises(ValueError, match="family 'Toy' is registered already"):
        register_family(TOY)


def test_a_family_can_be_registered_for_a_while():
    """A second of that name does not displace the first."""
    with families.registered(TOY):
        with pytest.raises(ValueError, match="registered already"), families.registered(TOY):
            pass
        assert families.find_denoiser(Toy())[1] is TOY
    with pytest.raises(TypeError, match="does not know Toy"):
        families.find_denoiser(Toy())


def test_it_is_gone_after_an_error_too():
    with pytest.raises(RuntimeError, match="on purpose"), families.registered(TOY):
        raise RuntimeError("on purpose")
    with pytest.raises(TypeError, match="does not know Toy"):
        families.find_denoiser(Toy())


# --- a wrong description -----------------------------------------------------------------------------------------


def described(**changes):
    """The family with some fields of its parts changed."""
    parts = {
        name: dataclasses.replace(getattr(TOY, name), **{f: v for f, v in changes.items() if hasattr(getattr(TOY, name), f)})
        for name in ("tokens", "latents", "conditioning")
    }
    return dataclasses.replace(TOY, **parts, **{name: value for name, value in changes.items() if hasattr(TOY, name)})


def text_but(number):
    return lambda inputs: inputs["encoder_hidden_states"].shape[1] + number


def the_other_way(model):
    return [dataclasses.replace(site, text_first=not site.text_first) for site in sites(model)]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "wrong, expected",
    [
        ({"text": text_but(1)}, r"\[4, 3 \+ 15, channels\] .* at 'blocks.0.attn' of Toy, but there is \[4, 17, 12\]"),
        ({"text": text_but(-1)}, r"\[4, 1 \+ 15, channels\]"),
        ({"grids": lambda height, width: {height * width // 2: (height, width // 2)}}, r"\[4, 2 \+ 7, channels\]"),
        ({"grids": lambda height, width: {15: (3, 5), 18: (3, 6)}, "text": text_but(1)}, r"\[4, 3 \+ 15 or 18, channels\]"),
        ({"sites": the_other_way}, r"\[4, 0 \+ 15, channels\]"),
        ({"size": lambda inputs: (5, 5)}, r"\[4, 2 \+ 25, channels\]"),
    ],
    ids=["text too long", "text too short", "grids", "several grids", "sites", "size"],
)
@torch.no_grad()
def test_tokens_that_are_not_what_was_said(wrong, expected, compiled):
    """They were merged all the same, and the status was content."""
    model, x, text = Toy(), torch.randn(4, 12, 3, 5), torch.randn(4, 2, 12)
    plain = model(x, text)[0]
    with families.registered(described(**wrong)):
        negengine.apply(model, negengine.NegToMe(group_size=2))
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="eager")
        with pytest.raises(ValueError, match=rf"tokens {expected}.*; check the site, `text` and `grids` of its Tokens"):
            model(x, text)
        assert torch.equal(negengine.remove(model)(x, text)[0], plain)


@torch.no_grad()
def test_a_right_description_stays_one_graph(toy_family):
    torch._dynamo.reset()
    model, x, text = Toy(), torch.randn(4, 12, 3, 5), torch.randn(4, 2, 12)
    expected = negengine.apply(model, negengine.NegToMe(group_size=2))(x, text)[0]
    model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x, text)[0], expected)


@pytest.mark.parametrize(
    "text, first, more, refused",
    [(2, 0, 0, False), (3, 0, 0, True), (None, 0, 0, False), (None, 0, 5, False)],
    ids=["told", "told wrong", "not told", "more than one could tell"],
)
@torch.no_grad()
def test_tokens_behind_the_image(text, first, more, refused):
    """Where `text` does not tell how many follow the image, any number may."""

    class Behind(Toy):
        def forward(self, hidden_states, encoder_hidden_states):
            x = torch.cat([hidden_states.flatten(2).transpose(1, 2), encoder_hidden_states], 1)
            return (self.blocks[0].out(x),)

    place = Site("out", "blocks.0.out", "output", image_first=True)
    told = {} if text is None else {"text": lambda inputs: text}
    tokens = Tokens(sites=lambda model: [place], grids=TOY.tokens.grids, **told)
    defaults = {"negtome": {**TOY.defaults["negtome"], "blocks": ("out",)}}
    with families.registered(dataclasses.replace(TOY, tokens=tokens, defaults=defaults)):
        model, x = Behind(), torch.randn(4, 12, 3, 5)
        negengine.apply(model, negengine.NegToMe(group_size=2))
        if refused:
            with pytest.raises(ValueError, match="were expected at 'out' of Toy"):
                model(x, torch.randn(4, 2 + more, 12))
        else:
            model(x, torch.randn(4, 2 + more, 12))
            assert negengine.status(model).active_blocks == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"sample": "hidden"},
            r"Conditioning\(sample=...\) of .* names 'hidden', but the inputs of Toy are hidden_states",
        ),
        ({"batched": ("encoder_hidden_state",)}, r"Conditioning\(batched=...\) .* names 'encoder_hidden_state', but"),
        ({"mask": "encoder_mask"}, r"Conditioning\(mask=...\) .* names 'encoder_mask', but"),
        ({"sites": lambda model: [Site("a", "blocks.0.attn", "in")]}, r"Site\(where=...\) at 'blocks.0.attn' must be one of"),
        ({"sites": lambda model: []}, r"the family Toy names no attention block of this denoiser \(Tokens.sites\)"),
        ({"defaults": {}}, "the family Toy has no defaults for NegToMe's alpha, threshold, blocks, min_grid; give them"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_apply_can_see(wrong, message):
    model = Toy()
    with families.registered(described(**wrong)), pytest.raises(ValueError, match=message):
        negengine.apply(model, negengine.NegToMe(group_size=2, timesteps=(0, 1000)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"cfg": "half"}, ValueError, r"Conditioning\(cfg=...\) must be one of \('halves', 'calls'\), got 'half'"),
        ({"counted": "rows"}, ValueError, r"Conditioning\(counted=...\) must be one of"),
        ({"batched": "timestep"}, TypeError, r"Conditioning\(batched=...\) must be a tuple of names, got 'timestep'"),
        (
            {"defaults": {"negtom": {}}},
            ValueError,
            "defaults of the family Toy name 'negtom', which is no method; there are",
        ),
        ({"defaults": {"negtome": {"treshold": 0.5}}}, ValueError, "defaults of the family Toy name 'treshold'; negtome has alpha"),
        ({"defaults": {"negtome": {"threshold": 2.0}}}, ValueError, r"must lie in \[-1, 1\], got 2.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_registering_can_see(wrong, error, message):
    before = dict(families._FAMILIES)
    with pytest.raises(error, match=message):
        register_family(described(**wrong))
    assert before == families._FAMILIES
