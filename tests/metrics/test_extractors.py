"""Who sees: the pixels, functions of one's own, and large networks whose packages or weights are not here."""

import sys
import types
import urllib.error

import pytest
import torch
from PIL import Image

from negengine.metrics import METRICS, MissingWeights, pairwise_lpips, perceptual, vqa_scores
from negengine.metrics.extractors import EXTRACTORS, batched, load_extractor
from negengine.metrics.libraries import weights


def pictures(n, size=(4, 3)):
    generator = torch.Generator().manual_seed(n)
    return [
        Image.frombytes("RGB", size, torch.randint(0, 256, (size[0] * size[1] * 3,), generator=generator).byte().numpy().tobytes())
        for _ in range(n)
    ]


def mean_colour(images):
    return torch.tensor([[float(sum(image.tobytes())) / len(image.tobytes())] for image in images])


def wrong_rows(images):
    return torch.zeros(1, 2)


def no_tensor(images):
    return [0.0]


def own_error(images):
    return {}["weights"]


def test_a_function_in_the_working_folder_is_found_as_an_installed_command_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    (tmp_path / "my_own_eyes.py").write_text("import torch\ndef see(images):\n    return torch.ones(len(images), 2)\n")
    (tmp_path / "my_blind_eyes.py").write_text("raise RuntimeError('no eyes')\n")
    before = list(sys.path)
    assert load_extractor("my_own_eyes:see").features(pictures(3)).tolist() == [[1, 1]] * 3
    with pytest.raises(ValueError, match="my_blind_eyes:see cannot be imported: RuntimeError: no eyes"):
        load_extractor("my_blind_eyes:see")
    assert sys.path == before


def test_pixels_are_the_pixels():
    images = pictures(3)
    found = load_extractor("pixels").features(images)
    assert found.shape == (3, 36)
    assert found[1].tolist() == pytest.approx(
        [value / 127.5 - 1 for c in range(3) for value in images[1].tobytes()[c::3]], abs=1e-6
    )


def test_a_function_of_ones_own_is_asked_in_batches():
    images = pictures(70)
    found = load_extractor(f"{__name__}:mean_colour").features(images)
    assert torch.equal(found, mean_colour(images))
    sizes = []
    batched(lambda part: torch.zeros(sizes.append(len(part)) or len(part), 1))(images)
    assert sizes == [32, 32, 6]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("dreamsam", ValueError, "there is no feature extractor 'dreamsam'; there are pixels, dreamsim"),
        (f"{__name__}:nothing", ValueError, "cannot be imported"),
        ("no_such_module:f", ValueError, "cannot be imported"),
        (f"{__name__}:sys", ValueError, "is no function"),
        (f"{__name__}:wrong_rows", ValueError, r"returned \[1, 2\] for 3 images"),
        (f"{__name__}:no_tensor", ValueError, r"no_tensor failed: TypeError: .* must return a tensor \[N, F\], got list"),
        (f"{__name__}:own_error", ValueError, r"own_error failed: KeyError: 'weights'"),
    ],
)
def test_what_cannot_see_is_one_clear_error(name, error, message):
    with pytest.raises(error, match=message):
        load_extractor(name).features(pictures(3))


def fails(*args, **kwargs):
    raise urllib.error.URLError("no network")


FAKES = {
    "dreamsim": ("dreamsim", {"dreamsim": fails}),
    "inception": (
        "torch_fidelity.feature_extractor_inceptionv3",
        {"FeatureExtractorInceptionV3": fails, "URL_INCEPTION_V3": "a/b"},
    ),
    "clip": ("open_clip", {"create_model_and_transforms": fails}),
}


@pytest.mark.parametrize("name", FAKES)
def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path, name):
    """The package is there, its download fails: stand-ins for both, as tests need no network."""
    module, content = FAKES[name]
    fake = types.ModuleType(module)
    vars(fake).update(content)
    for part in {module.partition(".")[0], module}:
        monkeypatch.setitem(sys.modules, part, fake)
    monkeypatch.setenv("DREAMSIM_CACHE", str(tmp_path / "kept"))
    with pytest.raises(MissingWeights, match=r"the weights of .* are not here .*no network.*run it once with network, or copy"):
        load_extractor(name)


@pytest.mark.parametrize(("name", "module"), [("dreamsim", "dreamsim"), ("inception", "torch_fidelity"), ("clip", "open_clip")])
def test_missing_packages_say_how_to_install_them(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"the feature extractor {name} needs .*pip install 'negengine\[evaluate\]'"):
        EXTRACTORS[name]("cpu", ())


def test_a_package_that_another_build_breaks_says_so(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "dreamsim":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "dreamsim", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match="installed but cannot be imported: operator torchvision::nms"):
        load_extractor("dreamsim")


def test_zero_shot_classes_are_the_nearest_texts(monkeypatch):
    """open_clip's place is taken by a model whose images and texts are colours."""
    colours = {"red": [1.0, 0, 0], "green": [0, 1.0, 0]}
    model = types.SimpleNamespace(
        eval=lambda: None,
        encode_text=lambda tokens, normalize: tokens,
        encode_image=lambda batch, normalize: torch.nn.functional.normalize(batch.flatten(2).mean(-1), dim=-1),
    )
    fake = types.ModuleType("open_clip")
    built = []
    fake.create_model_and_transforms = lambda *args, **kwargs: built.append((args, kwargs)) or (
        model, None, lambda image: torch.tensor(list(image.tobytes()), dtype=torch.float32).view(-1, 3).T[:, :, None],
    )  # fmt: skip
    fake.get_tokenizer = lambda name: lambda texts: torch.tensor([colours[text] for text in texts])
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    reader = load_extractor("clip", classes=("red", "green"))
    images = [Image.new("RGB", (2, 2), colour) for colour in ((200, 10, 0), (9, 80, 0), (255, 0, 3))]
    assert [reader.classes[number] for number in reader.logits(images).argmax(-1)] == ["red", "green", "red"]
    assert load_extractor("clip").logits is None
    for args, kwargs in built:  # OpenAI's weights were trained with another activation than the model's own
        assert (args, kwargs["pretrained"], kwargs["force_quick_gelu"]) == (("ViT-B-32",), "openai", True)


def test_lpips_is_the_mean_over_pairs():
    images = pictures(4)

    def network(a, b):
        assert a.min() >= -1
        assert b.max() <= 1
        return ((a - b) ** 2).mean((1, 2, 3), keepdim=True)

    pixels = [torch.tensor(list(image.tobytes()), dtype=torch.float64) / 127.5 - 1 for image in images]
    expected = [((pixels[i] - pixels[j]) ** 2).mean().item() for i in range(4) for j in range(i)]
    assert pairwise_lpips(images, network).item() == pytest.approx(sum(expected) / 6, abs=1e-6)
    with pytest.raises(ValueError, match="two or more"):
        pairwise_lpips(images[:1], network)
    with pytest.raises(ValueError, match="one size"):
        pairwise_lpips([*images, Image.new("RGB", (9, 9))], network)


class Recording(torch.nn.Module):
    """A network in place of LPIPS's, which says where and how many pairs it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.given = []

    def forward(self, a, b):
        self.given.append((len(a), a.device.type, b.device.type))
        return torch.full((len(a), 1, 1, 1), float(len(self.given)))


def test_lpips_takes_a_few_pairs_at_a_time_on_the_device_that_is_asked_for(monkeypatch):
    network = Recording()
    monkeypatch.setattr(perceptual, "lpips_network", lambda: network)
    METRICS["lpips"].prepare("meta")
    assert pairwise_lpips(pictures(7)).item() == pytest.approx((16 * 1 + 5 * 2) / 21)
    assert network.given == [(16, "meta", "meta"), (5, "meta", "meta")]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("invalid hash value (expected x)"), MissingWeights),
        (RuntimeError("Failed to download weights"), MissingWeights),
        (FileNotFoundError("x.pth"), MissingWeights),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("Error(s) in loading state_dict"), RuntimeError),
    ],
)
def test_only_what_could_not_be_fetched_is_missing(error, kind):
    with pytest.raises(kind) as found, weights("X", "fetch it"):
        raise error
    assert type(found.value) is kind


def test_vqa_score_asks_about_each_picture_and_its_own_prompt():
    images, asked = pictures(3), []

    def judge(images, texts):
        with Image.open(images[0]) as picture:
            asked.append((picture.tobytes(), texts))
        return torch.tensor([[0.25 * len(asked)]])

    assert vqa_scores(images, ["a", "b", "c"], judge).tolist() == [0.25, 0.5, 0.75]
    assert asked == [(image.tobytes(), [text]) for image, text in zip(images, "abc", strict=True)]
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        vqa_scores(images, ["a", "b"], judge)


def test_lpips_and_vqa_score_say_what_they_need(monkeypatch):
    for name, call, install in (
        ("lpips", perceptual.lpips_network, r"'negengine\[evaluate\]', or pip install lpips"),
        ("t2v_metrics", perceptual.vqa_judge, "pip install t2v-metrics"),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        call.cache_clear()
        with pytest.raises(ImportError, match=install):
            call()
