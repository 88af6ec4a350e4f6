"""The embedded models' worlds in the laboratory: who reads their pictures, what is said of them, and how a class is left open."""

import pytest
import torch
from PIL import Image

from negengine.evaluate import people
from negengine.evaluate.measure import class_in
from negengine.evaluate.worlds import EMBEDDED, world_of
from negengine.models.people import prompts
from negengine.models.people.attributes import ATTRIBUTES, PROFESSIONS, STYLES, TONES
from negengine.models.people.world import shares


@pytest.fixture(scope="module")
def real():
    return people.real_people()


def test_a_sentence_says_what_the_models_were_taught_to_read():
    for text in people.EVERYTHING[::7]:
        labels = prompts.named(text)
        assert people.sentence(*people.values_of(torch.tensor(labels))) == text
    assert people.sentence("artist") == "an artist"
    assert people.sentence("cook", style="noto") == "a cook, in noto style"
    assert prompts.named(people.sentence("judge", tone="medium dark")) == (PROFESSIONS.index("judge"), 3, 4, 3)


def test_every_sentence_is_a_class_that_is_found_in_it_alone():
    assert len(set(people.EVERYTHING)) == 1080
    for text in people.EVERYTHING[::101]:
        assert class_in(text, people.EVERYTHING) == text


def test_the_captioner_says_what_a_real_picture_shows(real):
    images, words = real
    captioner = people.PeopleCaptioner()
    rows = range(0, 1080, 27)
    right = [captioner(images[row]) == people.sentence(*words[row]) for row in rows]
    assert sum(right) >= 0.9 * len(right)
    with pytest.raises(ValueError, match="people of 64 x 64 pixels, and the picture has 32 x 32"):
        captioner(Image.new("RGB", (32, 32)))


def test_readers_of_one_attribute_of_looks_and_of_everything_agree(real):
    images = real[0][5:1080:97]
    read = {name: EMBEDDED[name]("cpu", ()) for name in EMBEDDED if name.startswith("people")}
    found = {name: [reader.classes[i] for i in reader.logits(images).argmax(-1).tolist()] for name, reader in read.items()}
    singles = list(zip(*(found[people.reader_of(attribute)] for attribute in ATTRIBUTES), strict=True))
    assert found["people-everything"] == [people.sentence(*words) for words in singles]
    assert found["people-look"] == [", ".join(words[1:]) for words in singles]
    assert read["people-look"].features(images).shape == (len(images), 128)


def test_of_each_embedded_model():
    assert world_of("mnist-sdxl").prompts[3] == "a handwritten three"
    assert world_of("people-flux").prompts[7] == "a firefighter"
    assert world_of("people-flux").reader in EMBEDDED
    assert all(metric.partition(":")[2] in EMBEDDED for metric in world_of("people-sdxl").diversity)
    for name in (None, "people", "people-vae", "owner/people-flux", "sdxl"):
        assert world_of(name) is None


def test_a_digit_is_left_open_by_a_prompt():
    removable = world_of("mnist-flux").removable("three")
    assert (removable.prompt, removable.avoid, removable.reader) == ("a digit", "a handwritten three", "mnist-classifier")
    with pytest.raises(ValueError, match="there is no class 'ten'; there are zero, one"):
        world_of("mnist-flux").removable("ten")


@pytest.mark.parametrize("word", ["noto", "woman", "dark", "yellow", "judge"])
def test_what_a_prompt_leaves_open_has_equal_shares_in_the_world(word):
    removable = world_of("people-sdxl").removable(word)
    attribute = people.attribute_of(word)
    place = list(ATTRIBUTES).index(attribute)
    assert removable.reader == people.reader_of(attribute)
    assert removable.reader in EMBEDDED
    said, avoided = prompts.named(removable.prompt), prompts.named(removable.avoid)
    assert ATTRIBUTES[attribute][avoided[place]] == word
    assert said[place] == len(ATTRIBUTES[attribute])
    if attribute == "profession":
        assert removable.prompt == ""
        return
    assert [a for i, a in enumerate(said) if i != place] == [a for i, a in enumerate(avoided) if i != place]
    table = shares()[said[0]]
    for axis, value in enumerate(said[1:]):
        if value < table.shape[axis]:
            table = table.index_select(axis, torch.tensor([value]))
    left = table.sum([axis for axis in range(3) if axis != place - 1])
    assert left.max() == pytest.approx(left.min())


def test_a_class_of_people_that_does_not_exist():
    with pytest.raises(ValueError, match="there is no class 'sailor'; there are artist, astronaut"):
        world_of("people-flux").removable("sailor")


def test_real_people_carry_their_words(real):
    images, words = real
    assert len(images) == len(words) == 1080
    assert images[0].size == (64, 64)
    assert {word[2] for word in words} == set(TONES)
    assert {word[3] for word in words} == set(STYLES)
