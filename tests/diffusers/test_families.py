"""A family described from outside the package works as the built-in ones do."""

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
    with pytest.raises(TypeError, match="Toy: ToyPipeline"):
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
