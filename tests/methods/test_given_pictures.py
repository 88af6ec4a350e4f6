"""Reference pictures as users have them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from negengine import ReferenceImage

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
DEEP = np.linspace(0, 65535, 800).astype(np.uint16).reshape(20, 40)


def photographed(image, orientation, kind="PNG"):
    """As a camera stores it that is held in another way."""
    exif, file = image.getexif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, kind, exif=exif)
    file.seek(0)
    return Image.open(file)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_it_is_shown(orientation, kind):
    image = photographed(Image.fromarray(PIXELS), orientation, kind)
    shown = ImageOps.exif_transpose(image)
    given = ReferenceImage(image).image
    assert given.size == shown.size == ((40, 20) if orientation < 5 else (20, 40))
    assert given.tobytes() == shown.tobytes()
    assert ReferenceImage(given).image is given
    mask = photographed(Image.fromarray(PIXELS[..., 0]), orientation)
    assert ReferenceImage(image, mask).mask.tobytes() == ImageOps.exif_transpose(mask).tobytes()


def test_a_mask_of_the_size_that_is_stored_is_refused():
    with pytest.raises(ValueError, match=r"the mask is \(40, 20\), its picture \(20, 40\)"):
        ReferenceImage(photographed(Image.fromarray(PIXELS), 6), Image.new("L", (40, 20), 255))


@pytest.mark.parametrize("mode, values", [("I;16", "<u2"), ("I;16B", ">u2")])
def test_grey_of_16_bits(mode, values):
    """It became white."""
    image = Image.frombytes(mode, (40, 20), DEEP.astype(values).tobytes())
    given = ReferenceImage(Image.fromarray(PIXELS), image)
    for found in (ReferenceImage(image).image, given.mask):
        assert found.mode == "L"
        assert np.abs(np.asarray(found) - DEEP / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_that_do_not_say_what_is_white(mode):
    """Values of 0 to 65535 became white, values of 0 to 1 black."""
    image = Image.fromarray(DEEP.astype(np.int32 if mode == "I" else np.float32))
    with pytest.raises(ValueError, match=rf"the reference picture has the mode '{mode}', which does not say which value is white"):
        ReferenceImage(image)
    with pytest.raises(ValueError, match=rf"the mask has the mode '{mode}', .* scale it to 0 to 255"):
        ReferenceImage(Image.fromarray(PIXELS), image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_other_mode_of_pillow(mode):
    """As a picture and as its mask; those with a multiplied opacity as without."""
    opaque = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    image = Image.fromarray(PIXELS)
    if opaque:
        image = image.convert("RGBA").convert(opaque).convert(mode)
    elif mode == "LAB":
        image = Image.frombytes("LAB", (40, 20), PIXELS.tobytes())
    else:
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    given = ReferenceImage(image, image)
    assert given.image.convert("RGB").size == given.mask.convert("L").size == (40, 20)
    assert np.asarray(given.image.convert("RGB")).std() > 20


def test_a_mode_that_pillow_cannot_convert(monkeypatch):
    image = Image.fromarray(PIXELS).convert("HSV")
    monkeypatch.setattr(image, "convert", lambda mode: (_ for _ in ()).throw(ValueError("conversion not supported")))
    with pytest.raises(ValueError, match="picture has the mode 'HSV', which Pillow cannot convert; give one of"):
        ReferenceImage(image)


def test_16_bits_and_a_transparent_value():
    image = Image.fromarray(DEEP)
    image.info["transparency"] = 40000
    with pytest.raises(ValueError, match="has 16 bits and a transparent value; give one of mode RGBA or LA"):
        ReferenceImage(image)
