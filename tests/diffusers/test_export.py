"""torch.export and AOTInductor of a denoiser with merging inside, in Python and in a C++ program."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import tiny_more
import tiny_z_image
import torch
from tiny import flux, sdxl

import negengine

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"group_size": 2, "timesteps": (0, 1000), "threshold": 0.3}


def flux_inputs(seed=0, images=4, grid=(5, 7), text=11):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = grid[0] * grid[1]
    ids = torch.zeros(tokens, 3)
    ids[:, 1], ids[:, 2] = torch.arange(tokens) // grid[1], torch.arange(tokens) % grid[1]
    return {
        "hidden_states": random(images, tokens, 16),
        "encoder_hidden_states": random(images, text, 32),
        "pooled_projections": random(images, 32),
        "timestep": torch.full((images,), 0.9),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((images,), 3.5),
    }


def sdxl_inputs(seed=0, images=4):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    added = {"text_embeds": random(images, 32), "time_ids": torch.tensor([[72.0, 56, 0, 0, 72, 56]] * images)}
    return {
        "sample": random(images, 4, 9, 7),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": random(images, 16, 64),
        "added_cond_kwargs": added,
    }


DENOISERS = {"flux": (lambda: flux().transformer, flux_inputs), "sdxl": (lambda: sdxl().unet, sdxl_inputs)}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def merging(family, **changes):
    build, inputs = DENOISERS[family]
    settings = SETTINGS | ({"min_grid": 1} if family == "sdxl" else {}) | changes
    return negengine.apply(build().eval(), negengine.NegToMe(**settings)), inputs


def exported(denoiser, inputs):
    return torch.export.export(denoiser, (), {**inputs(), "return_dict": False}, strict=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_an_exported_denoiser_merges(family, tmp_path):
    denoiser, inputs = merging(family)
    with pytest.raises(RuntimeError, match="call the denoiser once with 4 images"):
        exported(denoiser, inputs)
    denoiser(**inputs())
    program = exported(denoiser, inputs)
    assert (
        sum("negtome_" in str(node.target) for node in program.graph.nodes) == negengine.status(denoiser)[negengine.NegToMe].blocks
    )
    torch.export.save(program, tmp_path / "denoiser.pt2")
    loaded = torch.export.load(tmp_path / "denoiser.pt2").module()
    plain = negengine.remove(DENOISERS[family][0]().eval())
    for seed in (0, 5):
        expected = denoiser(**inputs(seed), return_dict=False)[0]
        torch.testing.assert_close(loaded(**inputs(seed), return_dict=False)[0], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, plain(**inputs(seed), return_dict=False)[0], atol=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [({"timesteps": (500, 1000)}, "knows no pipeline and no timestep"), ({"dropout": 0.2}, "the same tokens in every call")],
)
def test_what_cannot_be_exported_says_so(settings, message):
    scheduler = flux().scheduler
    denoiser, inputs = DENOISERS["flux"][0]().eval(), flux_inputs
    windowed = "timesteps" in settings
    negengine.apply(denoiser, negengine.NegToMe(**SETTINGS | settings), **({"scheduler": scheduler} if windowed else {}))
    with pytest.raises(RuntimeError, match=message):
        exported(denoiser, inputs)


def test_methods_on_a_pipeline_are_not_exported():
    pipe = negengine.apply(flux(), negengine.NegToMe())
    with pytest.raises(RuntimeError, match=r"apply NegToMe.* to the denoiser itself"):
        exported(pipe.transformer, flux_inputs)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The C++ program that runs packages."""
    if shutil.which("cmake") is None:
        pytest.skip("CMake is not installed")
    build = tmp_path_factory.mktemp("build")
    options = ["-DNEGENGINE_TORCH=ON", "-DNEGENGINE_PROGRAMS=OFF", f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build), "-j"], check=True, capture_output=True)
    return build / "negengine_exported"


@pytest.mark.exhaustive
@pytest.mark.skipif(os.name != "posix", reason="the build of the program is written for Unix")
def test_a_package_runs_in_python_and_in_a_program_without_python(program, tmp_path):
    denoiser, inputs = merging("flux")
    expected = denoiser(**inputs(5), return_dict=False)[0]
    package = torch._inductor.aoti_compile_and_package(exported(denoiser, inputs), package_path=str(tmp_path / "denoiser.pt2"))
    in_python = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(in_python(**inputs(5), return_dict=False)[0], expected, rtol=1e-4, atol=1e-4)
    # in the order of the graph's inputs: that of the call
    torch.save([*inputs(5).values()], tmp_path / "inputs.pt")
    command = [str(program), str(package), str(tmp_path / "inputs.pt"), str(tmp_path / "output.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "inputs.pt").write_bytes(b"nothing")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def called_with(pipe):
    """The denoiser's inputs in the first step of a pipeline's call."""
    found = []
    draw = tiny_z_image.draw if tiny.kind(pipe) == "z_image" else tiny_more.draw
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    draw(pipe, num_inference_steps=1)
    hook.remove()
    return found[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["sd3", "qwen", "chroma", "flux2", "z_image", "lumina"])
def test_every_family_exports_or_is_known_not_to(family):
    """Lumina-Image 2.0 reads the lengths of its texts on the host, with or without the method."""
    pipe = tiny_z_image.z_image() if family == "z_image" else tiny_more.BUILDERS[family]()
    args, kwargs = called_with(pipe)
    model, given = pipe.transformer, {**kwargs, "return_dict": False}
    if family == "lumina":
        with pytest.raises(TypeError, match="SymInt"):
            torch.export.export(model, args, given, strict=False)
        return
    plain = model(*args, **given)[0]
    negengine.apply(model, negengine.NegToMe(**SETTINGS))
    expected = model(*args, **given)[0]
    got = torch.export.export(model, args, given, strict=False).module()(*args, **given)[0]
    for own, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-5, atol=1e-5)
    assert any(not torch.allclose(own, without, atol=1e-4) for own, without in zip(expected, plain, strict=True))
