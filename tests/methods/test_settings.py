"""``NegToMe`` and ``ReferenceImage``: what a setting may be, and what is said when it may not."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from negengine import NegToMe, ReferenceImage

PICTURE = Image.new("RGB", (8, 6))
WHITE, BLACK = Image.new("L", (8, 6), 255), Image.new("L", (8, 6), 127)
ASSET = ReferenceImage(PICTURE)


@pytest.mark.parametrize(
    "settings,error,message",
    [
        ({"alpha": "0.9"}, TypeError, "alpha must be a number, got '0.9'"),
        ({"alpha": True}, TypeError, "alpha must be a number, got True"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
        ({"alpha": math.inf}, ValueError, "alpha must be finite"),
        ({"alpha": []}, ValueError, "alpha is an empty sequence"),
        ({"alpha": [0.9, math.nan]}, ValueError, "alpha must be finite"),
        ({"alpha": [0.9, None]}, TypeError, "alpha must be a number, got None"),
        ({"threshold": 1.5}, ValueError, r"threshold .* \[-1, 1\], got 1.5"),
        ({"threshold": -1.5}, ValueError, r"threshold .* \[-1, 1\], got -1.5"),
        ({"threshold": math.nan}, ValueError, "threshold must be finite, got nan"),
        ({"threshold": "high"}, TypeError, "threshold must be a number"),
        ({"timesteps": (1000, 900)}, ValueError, "window 1000 … 900 is empty"),
        ({"timesteps": (1001, 1100)}, ValueError, "outside 0 … 1000"),
        ({"timesteps": (-9, -1)}, ValueError, "outside 0 … 1000"),
        ({"timesteps": (900, math.nan)}, ValueError, "timesteps must be finite"),
        ({"timesteps": (900,)}, TypeError, r"timesteps must be \(low, high\)"),
        ({"timesteps": 900}, TypeError, r"timesteps must be \(low, high\), got 900"),
        ({"timesteps": "90"}, TypeError, r"timesteps must be \(low, high\)"),
        ({"blocks": "up_blocks"}, TypeError, "blocks must be a sequence of names, got 'up_blocks'"),
        ({"blocks": [1]}, TypeError, "blocks must be a sequence of names"),
        ({"blocks": []}, ValueError, "blocks is empty"),
        ({"min_grid": 0}, ValueError, "min_grid must be a positive integer, got 0"),
        ({"min_grid": 1.5}, ValueError, "min_grid must be a positive integer"),
        ({"group_size": 0}, ValueError, "group_size must be a positive integer, got 0"),
        ({"group_size": 2.0}, ValueError, "group_size must be a positive integer"),
        ({"reference": "second"}, ValueError, "reference must be one of .*'others'.*, got 'second'"),
        ({"reference": None}, TypeError, "reference must be one of .* a ReferenceImage or several"),
        ({"reference": []}, ValueError, "empty sequence of pictures"),
        ({"reference": [ASSET, PICTURE]}, TypeError, "a ReferenceImage or several"),
        ({"reference": PICTURE}, TypeError, "a ReferenceImage or several"),
        ({"matching": "best"}, ValueError, r"matching must be one of \('paper', 'release'\), got 'best'"),
        ({"matching": "release", "reference": "others"}, ValueError, "one reference image only, reference='others'"),
        ({"matching": "release", "reference": "previous"}, ValueError, "reference='previous' has several"),
        ({"matching": "release", "reference": [ASSET, ASSET]}, ValueError, "one reference picture only"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must lie in \[0, 1\)"),
        ({"dropout": None}, TypeError, "dropout must be a number"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"seed": 2**70}, ValueError, r"seed must lie between -2\*\*32 and 2\*\*32"),
        ({"group_size": True}, ValueError, "group_size must be a positive integer, got True"),
        ({"search": "fast"}, ValueError, "search must be one of .*, got 'fast'"),
        ({"backend": "cuda13"}, ValueError, "unknown backend 'cuda13'; there are .*torch"),
        ({"merging_alpha": 0.9}, TypeError, "unexpected keyword argument 'merging_alpha'"),
    ],
)
def test_settings_that_cannot_work(settings, error, message):
    with pytest.raises(error, match=message) as caught:
        NegToMe(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": -1},
        {"alpha": (0.1, 0.2)},
        {"alpha": lambda t: t / 1000},
        {"threshold": -1},
        {"threshold": 1.0},
        {"timesteps": (0, 1000)},
        {"timesteps": [500, 500]},
        {"timesteps": (-5, 0)},
        {"blocks": ["up_blocks.*"]},
        {"min_grid": 1},
        {"group_size": 1},
        {"reference": ASSET},
        {"reference": [ASSET, ASSET]},
        {"matching": "release"},
        {"matching": "release", "reference": ASSET},
        {"dropout": 0.0},
        {"dropout": 0.99},
        {"seed": -3},
        {"search": "int8"},
        {"backend": "torch"},
    ],
)
def test_settings_at_the_edge_that_work(settings):
    NegToMe(**settings)


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match="positional argument"):
        NegToMe(0.9)


@pytest.mark.parametrize("settings", [NegToMe(), ASSET])
def test_settings_are_frozen(settings):
    for field in dataclasses.fields(settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, None)


def test_sequences_are_copied():
    alpha, blocks = [0.1, 0.2], ["a"]
    settings = NegToMe(alpha=alpha, blocks=blocks, timesteps=[1, 2])
    alpha.append(0.3)
    blocks.append("b")
    assert (settings.alpha, settings.blocks, settings.timesteps) == ((0.1, 0.2), ("a",), (1.0, 2.0))


def test_pictures():
    assert NegToMe().pictures == NegToMe(reference="others").pictures == ()
    assert NegToMe(reference=ASSET).pictures == (ASSET,)
    assert NegToMe(reference=[ASSET, ASSET]).pictures == (ASSET, ASSET)


def test_defaults_fill_what_was_left_open():
    settings = NegToMe(threshold=0.5).with_defaults(alpha=0.9, threshold=0.7, timesteps=(900, 1000), blocks=("b",), min_grid=32)
    assert settings == NegToMe(alpha=0.9, threshold=0.5, timesteps=(900, 1000), blocks=("b",), min_grid=32)
    assert NegToMe(alpha=0).with_defaults(alpha=0.9).alpha == 0  # zero is a value
    with pytest.raises(AttributeError):
        NegToMe().with_defaults(tau=0.7)
    with pytest.raises(ValueError, match="threshold"):
        NegToMe().with_defaults(threshold=7)


def test_alphas():
    assert NegToMe(alpha=2).alphas(500, 3) == (2.0, 2.0, 2.0)
    assert NegToMe(alpha=[0.1, 0.2]).alphas(500, 2) == (0.1, 0.2)
    assert NegToMe(alpha=lambda t: t / 1000).alphas(250, 2) == (0.25, 0.25)
    for images in (1, 3):
        with pytest.raises(ValueError, match=f"alpha has 2 values, one per image, but a group has {images} images"):
            NegToMe(alpha=[0.1, 0.2]).alphas(500, images)
    with pytest.raises(ValueError, match=r"alpha\(250\) must be finite, got nan"):
        NegToMe(alpha=lambda t: math.nan).alphas(250, 2)


@pytest.mark.parametrize(
    "image,mask,error,message",
    [
        ("picture.png", None, TypeError, "reference picture must be a PIL image, got str"),
        (PICTURE, [[1]], TypeError, "mask must be a PIL image, got list"),
        (PICTURE, Image.new("L", (6, 8), 255), ValueError, r"the mask is \(6, 8\), its picture \(8, 6\)"),
        (PICTURE, BLACK, ValueError, "black everywhere"),
    ],
)
def test_pictures_that_cannot_work(image, mask, error, message):
    with pytest.raises(error, match=message):
        ReferenceImage(image, mask)


def test_pictures_that_work():
    assert ReferenceImage(PICTURE, WHITE).noise
    grey = BLACK.copy()
    grey.putpixel((3, 3), 128)
    assert not ReferenceImage(PICTURE, grey, noise=False).noise
    with pytest.raises(TypeError, match="'blur'"):
        ReferenceImage(PICTURE, blur=True)


def logo(mode):
    """Opaque on the left, transparent on the right."""
    grey = Image.new("L", (6, 4), 90)
    grey.putalpha(Image.linear_gradient("L").rotate(90).resize((6, 4)).point(lambda v: 255 if v > 127 else 0))
    return grey.convert(mode)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_parts_are_not_avoided(mode):
    picture = logo(mode)
    opaque = np.asarray(picture.convert("RGBA"))[..., 3] > 127
    assert 0 < opaque.sum() < opaque.size
    found = ReferenceImage(picture)
    assert (np.asarray(found.mask.convert("L")) > 127).tolist() == opaque.tolist()
    upper = Image.new("1", picture.size)
    upper.paste(1, (0, 0, 6, 2))
    both = np.asarray(ReferenceImage(picture, upper).mask.convert("L")) > 127
    assert both.tolist() == (opaque & (np.asarray(upper) > 0)).tolist()
    hidden = Image.fromarray(np.where(opaque, 0, 255).astype(np.uint8))
    with pytest.raises(ValueError, match="transparent wherever it would be avoided"):
        ReferenceImage(picture, hidden)


def test_one_colour_of_a_palette_is_transparent():
    picture = Image.new("P", (4, 2), 1)
    picture.putpixel((0, 0), 7)
    picture.info["transparency"] = 7
    mask = np.asarray(ReferenceImage(picture).mask.convert("L"))
    assert (mask > 127).sum() == 7
    assert mask[0, 0] == 0


def test_an_alpha_channel_that_hides_nothing_makes_no_mask():
    assert ReferenceImage(PICTURE.convert("RGBA")).mask is None
    assert ReferenceImage(PICTURE.convert("RGBA"), WHITE).mask is WHITE
    with pytest.raises(ValueError, match="transparent wherever"):
        ReferenceImage(Image.new("RGBA", (4, 4)))
