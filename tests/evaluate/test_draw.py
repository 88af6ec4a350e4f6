"""What a pipeline is asked to draw for every variant: prompts, negative prompts and noise, told by a pipeline that draws them."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from negengine import NegToMe, ReferenceImage, models, status
from negengine.evaluate import results
from negengine.evaluate.draw import Variant, draw
from negengine.evaluate.prompting import chosen_by_seed, negatives, rewriting
from negengine.evaluate.protocols import Diversity
from negengine.methods import CADS, DiffusionNegativePrompt, NegativePrompting

PROTOCOL = Diversity(prompts=("cat", "dog"), images=3, seeds=(0, 1), metrics=("vendi",))


class Pipe:
    """A picture's colour is its noise; its calls are kept."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, num_images_per_prompt, generator, **call):
        self.calls.append((prompt, num_images_per_prompt, call))
        assert len(generator) == len(prompt) * num_images_per_prompt
        colours = [tuple(torch.randint(0, 256, (3,), generator=one).tolist()) for one in generator]
        return SimpleNamespace(images=[Image.new("RGB", (2, 2), colour) for colour in colours])


def colours(drawn):
    return [image.getpixel((0, 0)) for image in drawn.images]


@pytest.mark.parametrize("groups_a_call", [1, 2, 5])
def test_every_image_has_noise_of_its_own_however_many_are_drawn_at_once(groups_a_call):
    pipe = Pipe()
    first, other = draw(pipe, PROTOCOL, [Variant(name="a"), Variant(name="b")], {"steps": 2}, groups_a_call)
    assert colours(first) == colours(other)
    expected = []
    for case in (case for seed in PROTOCOL.seeds for case in PROTOCOL.cases(seed)):
        for seed in case.image_seeds:
            expected.append(tuple(torch.randint(0, 256, (3,), generator=torch.Generator().manual_seed(seed)).tolist()))
    assert colours(first) == expected
    assert len(set(expected)) == 12
    assert [group.key for group in first.groups] == ["cat, seed 0", "dog, seed 0", "cat, seed 1", "dog, seed 1"]
    assert pipe.calls[0] == (["cat", "dog"][:groups_a_call], 3, {"steps": 2})


def test_prompts_and_negative_prompts_of_each_variant(tmp_path):
    lines = tmp_path / "rewritten.txt"
    lines.write_text("an old {prompt}\n\na young {prompt}\n")
    lists = tmp_path / "opposites.json"
    lists.write_text(json.dumps({"cat": ["no cat"], "dog": ["no dog"]}))
    variants = [
        Variant(name="own", call={"negative_prompt": "blurry"}),
        Variant(name="rewriting", rewrite=rewriting(lines)),
        Variant(name="opposites", negative=negatives(lists)),
    ]
    pipe = Pipe()
    drawn = draw(pipe, PROTOCOL, variants, {"negative_prompt": ""}, groups_a_call=2)
    assert pipe.calls[:3] == [
        (["cat", "dog"], 3, {"negative_prompt": ["blurry", "blurry"]}),
        (
            ["an old cat", "a young cat", "an old cat", "an old dog", "a young dog", "an old dog"],
            1,
            {"negative_prompt": [""] * 6},
        ),
        (["cat"] * 3 + ["dog"] * 3, 1, {"negative_prompt": ["no cat"] * 3 + ["no dog"] * 3}),
    ]
    assert colours(drawn[0]) == colours(drawn[1]) == colours(drawn[2])
    assert [group.prompt for group in drawn[1].groups] == ["cat", "dog"] * 2  # by which it is judged
    assert [(group.texts, group.negative_prompts) for group in drawn[0].groups] == [((), ())] * 4
    assert drawn[1].groups[1].texts == ("an old dog", "a young dog", "an old dog")
    assert drawn[2].groups[1].negative_prompts == ("no dog",) * 3
    told = results.document([], drawn, [], {})["variants"]
    assert told["rewriting"]["texts"]["dog, seed 1/1"] == "a young dog"
    assert told["opposites"]["negative_prompts"]["cat, seed 0/2"] == "no cat"
    assert not {"texts", "negative_prompts"} & set(told["own"])


def test_the_negative_prompt_that_is_suggested_is_kept(monkeypatch):
    def suggested(pipe, texts, settings, seed, **call):
        pictures = [Image.new("RGB", (2, 2))] * len(texts)
        return [
            SimpleNamespace(images=[picture], negative_prompt=f"no {text} {one}")
            for picture, text, one in zip(pictures, texts, seed, strict=True)
        ]

    monkeypatch.setattr(importlib.import_module("negengine.evaluate.draw"), "diffusion_negative_prompting", suggested)
    dnp = Variant(name="dnp", dnp=DiffusionNegativePrompt(captioner=lambda image: "x"))
    (drawn,) = draw(Pipe(), PROTOCOL, [dnp], {}, groups_a_call=2)
    assert drawn.groups[1].negative_prompts == ("no dog 1000", "no dog 1001", "no dog 1002")


def test_groups_are_kept_as_soon_as_they_are_drawn():
    kept = []
    draw(Pipe(), PROTOCOL, [Variant(name="a")], {}, keep=lambda name, group: kept.append((name, group.key, group.image_seeds)))
    assert [key for _, key, _ in kept] == ["cat, seed 0", "dog, seed 0", "cat, seed 1", "dog, seed 1"]
    assert kept[2][2] == (1_000_000, 1_000_001, 1_000_002)


def test_texts_are_chosen_by_the_seed_of_the_image(tmp_path):
    file = tmp_path / "lists.json"
    file.write_text(json.dumps({"cat": ["a", "b"]}))
    chosen = chosen_by_seed(("a", "b", "c"))
    found = {seed: chosen("cat", seed) for seed in range(40)}
    assert set(found.values()) == {"a", "b", "c"}
    assert all(chosen("dog", seed) == text for seed, text in found.items())
    assert rewriting(file)("cat", 3) == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("reader", "name", "content", "message"),
    [
        (rewriting, "a.csv", "x", "must be a .txt file"),
        (rewriting, "a.txt", "\n", "has no line"),
        (rewriting, "a.txt", "an old cat", r"by \{prompt\}; got 'an old cat'"),
        (rewriting, "a.json", "{", "does not parse"),
        (rewriting, "a.json", '{"cat": []}', "'cat' must have a list of texts"),
        (rewriting, "a.json", '{"elk": ["x"]}', "no rewritten prompts for 'cat'"),
        (rewriting, "a.txt", b"caf\xe9 {prompt}", r"a\.txt is not in UTF-8, the encoding that is read; save it anew"),
        (negatives, "a.json", b'{"cat": ["caf\xe9"]}', r"a\.json is not in UTF-8"),
        (negatives, "a.json", '{"cat": ["x"], "cat": ["y"]}', r"a\.json has cat twice"),
        (negatives, "a.json", "[]", "an object of prompts"),
        (negatives, "a.json", '{"elk": ["x"]}', "no negative prompts for 'cat'"),
    ],
)
def test_files_of_prompts_that_do_not_fit(tmp_path, reader, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        reader(file)("cat", 1)


def test_methods_that_depend_on_the_prompts_act_on_the_calls_with_them():
    pipe = models.load("mnist-sdxl")
    protocol = Diversity(prompts=("a handwritten two", "a handwritten six", "a digit"), images=1, seeds=(0,), metrics=("vendi",))

    def away(seed, prompts):
        return [NegativePrompting(prompt=tuple(f"{prompt} {seed}" for prompt in prompts), scale=1)]

    watched = []
    variants = [Variant(name="away", of_prompts=away), Variant(name="without")]
    call = models.preset("mnist-sdxl").call_kwargs() | {"num_inference_steps": 1}
    away_, plain = draw(pipe, protocol, variants, call, 2, watch=lambda name, reports: watched.append((name, len(reports))))
    assert watched == [("away", 1), ("away", 1), ("without", 0), ("without", 0)]
    assert away_.about["methods"][0]["prompt"] == ["a handwritten two 0", "a handwritten six 0"]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(away_.images, plain.images, strict=True))
    assert len(plain.images) == 3
    with pytest.raises(ValueError, match="no method is applied"):
        status(pipe)


def test_a_picture_that_is_in_no_file_is_said_to_be_in_memory():
    picture = Image.new("RGB", (32, 32), (9, 9, 9))
    reference = NegToMe(reference=ReferenceImage(picture, Image.new("L", (32, 32), 255)))
    (told,) = Variant(name="away", methods=lambda seed: [reference]).plain(0)["methods"]
    assert told["reference"] == [{"image": "in memory", "mask": True, "noise": True}]
    assert told["method"] == "negtome"


@pytest.mark.parametrize(("groups_a_call", "seeds"), [(1, [0, 1000, 1_000_000, 1_001_000]), (2, [0, 1_000_000])])
def test_methods_with_noise_of_their_own_are_seeded_anew_for_each_call(groups_a_call, seeds, monkeypatch):
    acted, asked = [], []
    monkeypatch.setattr("negengine.evaluate.draw.apply", lambda pipe, *methods: acted.append([one.seed for one in methods]))
    monkeypatch.setattr("negengine.evaluate.draw.remove", lambda pipe: None)
    monkeypatch.setattr("negengine.evaluate.draw.status", lambda pipe: [])

    def of_prompts(seed, prompts):
        asked.append((seed, len(prompts)))
        return [CADS(seed=seed)]

    variants = [Variant(name="a", methods=lambda seed: [CADS(seed=seed)]), Variant(name="b", of_prompts=of_prompts)]
    first, other = draw(Pipe(), PROTOCOL, variants, {}, groups_a_call)
    both = [[seed] for seed in seeds]
    half = len(both) // 2
    assert acted == both[:half] * 2 + both[half:] * 2  # a and b with the first seed, then with the second
    assert asked[: len(seeds)] == [(seed, groups_a_call) for seed in seeds]
    assert first.about["methods"] == other.about["methods"]
    assert [group.call_seed for group in first.groups] == [seed for seed in seeds for _ in range(groups_a_call)]


def test_the_groups_of_a_seed_have_noise_of_their_own_in_a_pipeline():
    """With the same image noise and prompt, CADS would draw the same pictures of every group if its noise began anew."""
    pipe, call = models.load("mnist-sdxl"), models.preset("mnist-sdxl").call_kwargs() | {"num_inference_steps": 3}
    noises = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: noises.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    protocol = Diversity(prompts=("a digit", "a handwritten digit"), images=1, seeds=(0,), metrics=("vendi",))
    draw(pipe, protocol, [Variant(name="cads", methods=lambda seed: [CADS(seed=seed)]), Variant(name="without")], call)
    hook.remove()
    added = [one - plain for one, plain in zip(noises[0:6:3], noises[6:12:3], strict=True)]
    assert added[0].abs().max() > 0.01
    cosine = torch.nn.functional.cosine_similarity(added[0].flatten(), added[1].flatten(), dim=0)
    assert cosine.abs() < 0.5
