"""What a forward needs, computed beforehand, is what torch counts when it runs."""

import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from negengine.bench import architectures
from negengine.bench import footprint as footprints
from negengine.bench.architectures import ARCHITECTURES, made_on
from negengine.bench.footprint import check_fits, footprint

SIZES = {"flux-dev": 128, "sdxl-base": 512}


def forget():
    footprints._followed.cache_clear()
    footprints._weights.cache_clear()


@pytest.fixture
def width(monkeypatch):
    """How many attention heads there are instead of the true number; what was computed of other widths is forgotten."""
    forget()

    def set_to(heads):
        monkeypatch.setitem(architectures.FLUX_DEV, "num_attention_heads", heads)
        monkeypatch.setitem(architectures.SDXL_BASE, "block_out_channels", (32 * heads, 64 * heads, 64 * heads))
        monkeypatch.setitem(architectures.SDXL_BASE, "attention_head_dim", [heads] * 3)

    yield set_to
    forget()


def counted(run):
    """The most bytes that a run held beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    del result
    events = seen.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"]
    assert sizes
    held = most = 0
    for size in sizes:
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("flux-dev", torch.float32),
        pytest.param("sdxl-base", torch.float32, marks=pytest.mark.exhaustive),
        pytest.param("flux-dev", torch.bfloat16, marks=pytest.mark.exhaustive),
    ],
)
def test_computed_memory_is_what_torch_counts(name, dtype, width):
    width(2)
    architecture, size, images = ARCHITECTURES[name], SIZES[name] // 2, 2
    with torch.no_grad(), made_on("cpu", dtype):
        model, inputs = architecture.denoiser((1, 2)), architecture.inputs(size, images)
        given = sum(
            tensor.nbytes for tensor in [*inputs.values(), *inputs.get("added_cond_kwargs", {}).values()] if torch.is_tensor(tensor)
        )
        model(**inputs, return_dict=False)
        most = counted(lambda: model(**inputs, return_dict=False))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    needs = footprint(architecture, (1, 2), size, images, dtype)
    assert needs.weights == weights
    assert needs.peak - weights == pytest.approx(given + most, rel=0.1)
    assert needs.published >= needs.peak


@pytest.mark.parametrize(
    "name, config", [("flux-dev", "FLUX_VAE"), pytest.param("sdxl-base", "SDXL_VAE", marks=pytest.mark.exhaustive)]
)
def test_decoding_takes_what_torch_counts(name, config, width, monkeypatch):
    width(1)
    monkeypatch.setitem(getattr(architectures, config), "block_out_channels", (32, 32, 64, 64))
    architecture, size, images = ARCHITECTURES[name], SIZES[name] // 2, 2
    needs = (architecture, (1, 1), size, images)
    footprints._decoded.cache_clear()
    computed, alone = footprint(*needs, torch.float32, vae=True), footprint(*needs, torch.float32)
    in_half = footprint(*needs, torch.float16, vae=True)
    footprints._decoded.cache_clear()
    with torch.no_grad(), made_on("cpu", torch.float32):
        vae = architecture.vae()
        latents = torch.randn(images, vae.config.latent_channels, size // 8, size // 8)
        vae.decode(latents, return_dict=False)
        most = counted(lambda: vae.decode(latents, return_dict=False))
    assert computed.beside == sum(parameter.nbytes for parameter in vae.parameters())
    assert computed.decoding == pytest.approx(latents.nbytes + most, rel=0.1)
    assert alone.most == alone.published
    assert computed.most == computed.weights + computed.beside + max(alone.published - alone.weights, computed.decoding)
    assert in_half.beside == (
        computed.beside if name == "sdxl-base" else computed.beside // 2
    )  # SDXL's pipeline decodes in float32


def test_text_encoders_and_vae_must_fit_too(width, monkeypatch):
    width(1)
    needs = (ARCHITECTURES["flux-dev"], (1, 1), 64, 2, torch.float32)
    alone, whole = footprint(*needs), footprint(*needs, encoders=True, vae=True)
    assert whole.beside > 19e9  # T5-XXL's 4.8 billion parameters and CLIP's
    monkeypatch.setattr(footprints, "free_bytes", lambda device: (alone.most + whole.most) // 2)
    check_fits(*needs, "cpu")
    with pytest.raises(ValueError, match=r"of depth 1\+1, its text encoders, its VAE with 2 images .* nothing of this model fits"):
        check_fits(*needs, "cpu", encoders=True, vae=True)


@pytest.mark.parametrize("name", ["flux-dev", pytest.param("sdxl-base", marks=pytest.mark.exhaustive)])
def test_weights_and_work_grow_by_the_same_with_every_block(name, width):
    """Against models of that depth, followed operator by operator."""
    width(1)
    architecture, needs = ARCHITECTURES[name], (SIZES[name], 2, torch.float32)
    computed, followed = footprint(architecture, (2, 3), *needs), footprints._followed(architecture, (2, 3), *needs)
    assert (computed.weights, computed.flops, computed.search_flops) == (followed.weights, followed.flops, followed.search_flops)
    assert computed.peak == pytest.approx(followed.peak, rel=0.01)
    assert computed.published == pytest.approx(followed.published, rel=0.01)


@pytest.mark.parametrize(
    "share", [pytest.param(0.9, marks=pytest.mark.exhaustive), pytest.param(0.5, marks=pytest.mark.exhaustive)]
)
def test_what_is_said_to_fit_fits_and_one_step_more_does_not(share, width, monkeypatch):
    width(1)
    architecture, depth, size, images, dtype = ARCHITECTURES["flux-dev"], (19, 38), 256, 4, torch.float32

    def needed(depth=depth, size=size, images=images):
        return footprint(architecture, depth, size, images, dtype).published

    free = int(share * needed())
    monkeypatch.setattr(footprints, "free_bytes", lambda device: free)
    with pytest.raises(ValueError, match="what fits: ") as raised:
        check_fits(architecture, depth, size, images, dtype, "cpu")
    said = dict(re.findall(r"--(\w+) ([\d+]+)", str(raised.value)))
    assert said
    if "depth" in said:
        first, second = map(int, said["depth"].split("+"))
        eighth = next(eighth for eighth in range(1, 8) if (19 * eighth // 8, 38 * eighth // 8) == (first, second))
        assert needed(depth=(first, second)) <= free
        more = eighth + 1
        assert more == 8 or needed(depth=(19 * more // 8, 38 * more // 8)) > free
    if "images" in said:
        assert needed(images=int(said["images"])) <= free
        assert needed(images=int(said["images"]) + 1) > free
    if "size" in said:
        assert needed(size=int(said["size"])) <= free
        assert needed(size=int(said["size"]) + 16) > free
    for name, value in said.items():
        changed = {"depth": depth, "size": size, "images": images}
        changed[name] = (first, second) if name == "depth" else int(value)
        check_fits(architecture, changed["depth"], changed["size"], changed["images"], dtype, "cpu")


def test_where_nothing_fits_it_is_said(width, monkeypatch):
    width(1)
    monkeypatch.setattr(footprints, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="nothing of this model fits; free some memory"):
        check_fits(ARCHITECTURES["flux-dev"], (1, 1), 64, 2, torch.float32, "cpu")


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("limit, found", [(500**2, 500), (1, 1), (0.5, None), (777.5**2, 777)])
def test_the_largest_that_fits_is_found_in_few_looks(power, limit, found):
    looks = []
    assert footprints.largest_within(1, 1000, lambda n: looks.append(n) or n**2, limit, power) == found
    assert len(looks) <= 20


def test_hundreds_of_images_are_refused_after_a_few_forwards(width, monkeypatch):
    width(1)
    architecture, needs = ARCHITECTURES["flux-dev"], (torch.float32, False, False)
    free = footprints._most(architecture, (1, 1), 64, 200, *needs)
    assert free == footprint(architecture, (1, 1), 64, 200, torch.float32).most
    forget()
    monkeypatch.setattr(footprints, "free_bytes", lambda device: free)
    with pytest.raises(ValueError, match=r"--images 200$"):
        check_fits(architecture, (1, 1), 64, 500, torch.float32, "cpu")
    assert footprints._followed.cache_info().misses <= 12
    small = footprints._most(architecture, (1, 1), 64, 1, *needs)
    monkeypatch.setattr(footprints, "free_bytes", lambda device: small)
    with pytest.raises(ValueError, match=re.escape("needs 0.")) as raised:
        check_fits(architecture, (1, 1), 64, 3, torch.float32, "cpu", least=2)
    assert "--images" not in str(raised.value)
