"""Folders of images: how they are put into groups, and what is wrong with those that cannot be read."""

import json

import numpy as np
import pytest
from PIL import Image

from negengine import png
from negengine.evaluate.folders import open_image, read_folder
from negengine.evaluate.groups import check_alike, rows_of
from negengine.evaluate.named import check_single, check_used, for_images, read_named


def save(folder, *names, size=(4, 4)):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 0, 0)).save(folder / name)
    return folder


def keys(drawn):
    return {group.key: list(group.names) for group in drawn.groups}


def test_subfolders_are_groups(tmp_path):
    drawn = read_folder(save(tmp_path / "mine", "cat/b.png", "cat/a.jpg", "dog/x.webp"))
    assert drawn.name == "mine"
    assert keys(drawn) == {"cat": ["cat/a.jpg", "cat/b.png"], "dog": ["dog/x.webp"]}
    assert rows_of(drawn.groups) == [[0, 1], [2]]


def test_names_up_to_a_number_are_groups(tmp_path):
    drawn = read_folder(save(tmp_path, "cat-01.png", "cat-02.png", "dog 3.png", ".hidden/dog4.png"))
    assert keys(drawn) == {"cat": ["cat-01.png", "cat-02.png"], "dog": ["dog 3.png"]}


def test_other_names_are_one_group_and_a_flag_decides(tmp_path):
    save(tmp_path, "a.png", "b2.png")
    assert keys(read_folder(tmp_path)) == {"all": ["a.png", "b2.png"]}
    assert keys(read_folder(tmp_path, by="name")) == {"a.png": ["a.png"], "b": ["b2.png"]}


def test_what_pngs_tell_makes_groups(tmp_path):
    for name, told in {
        "0": {"prompt": "x", "seed": 3, "run": {"seed": 3}},
        "1": {"prompt": "x", "seed": 3, "run": {"seed": 3}},
        "2": {"prompt": "x", "seed": 4, "run": {"seed": 4}},
        "3": {"prompt": "y", "seed": 8, "run": {"seed": [7, 8]}},
        "4": {"prompt": "y", "group": "y, seed 1", "group seed": 1, "run": {"seed": [5, 6]}},
    }.items():
        png.write(Image.new("RGB", (4, 4)), tmp_path / f"{name}.png", told)
    drawn = read_folder(tmp_path)
    assert keys(drawn) == {"x, seed 3": ["0.png", "1.png"], "x, seed 4": ["2.png"], "y": ["3.png"], "y, seed 1": ["4.png"]}
    assert [(group.prompt, group.seed) for group in drawn.groups] == [("x", 3), ("x", 4), ("y", None), ("y", 1)]
    assert list(drawn.by_seed()) == [3, 4, None, 1]


def test_so_many_of_each_group(tmp_path):
    save(tmp_path, "a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png")
    with pytest.raises(ValueError, match=r"the groups are unequal: a .* has 3 images and b .* 2; --per-group 2 takes so many"):
        check_alike([read_folder(tmp_path)])
    drawn = read_folder(tmp_path, per_group=2)
    check_alike([drawn])
    assert keys(drawn) == {"a": ["a/1.png", "a/2.png"], "b": ["b/1.png", "b/2.png"]}
    with pytest.raises(ValueError, match="the group b has 2 images, fewer than --per-group 3"):
        read_folder(tmp_path, per_group=3)


def test_unequal_sizes_are_one_clear_error(tmp_path):
    one, other = save(tmp_path / "one", "a.png"), save(tmp_path / "other", "a.png", size=(5, 4))
    with pytest.raises(ValueError, match=r"unequal size: a.png \(one\) has 4 x 4 pixels and a.png \(other\) 5 x 4; resize them"):
        check_alike([read_folder(one), read_folder(other)])


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="nothing is no folder"):
        read_folder(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"there is no image in .*; endings that are read: .png"):
        read_folder(tmp_path)
    for content in (b"no image", png.encode(Image.effect_noise((64, 64), 50), {})[:600]):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken.png cannot be read as an image"):
            read_folder(tmp_path)


def test_sixteen_bits_become_eight(tmp_path):
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        picture = open_image(tmp_path / name)
        assert [picture.getpixel((x, 0)) for x in range(4)] == [(value,) * 3 for value in (0, 1, 128, 255)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(tmp_path, mode):
    Image.new(mode, (2, 2), 300).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif cannot be read as an image: its mode {mode} holds numbers of no certain range"):
        open_image(tmp_path / "a.tif")


def test_what_is_transparent_lies_on_white(tmp_path):
    picture = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (200, 0, 0, 0))
    picture.putpixel((2, 0), (0, 0, 0, 51))
    picture.save(tmp_path / "a.png")
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "b.png", transparency=0)
    assert [open_image(tmp_path / "a.png").getpixel((x, 0)) for x in range(3)] == [(200, 0, 0), (255,) * 3, (204,) * 3]
    assert open_image(tmp_path / "b.png").getpixel((0, 0)) == (255,) * 3


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    picture = Image.new("RGB", (2, 4), "black")
    picture.paste("white", (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    picture.save(tmp_path / "a.png", exif=exif)
    turned = open_image(tmp_path / "a.png")
    assert turned.size == (4, 2)
    assert [turned.getpixel((x, 0)) for x in (0, 3)] == [(0, 0, 0), (255, 255, 255)]


def test_groups_that_do_not_fit(tmp_path):
    save(tmp_path, "a.png", "b/c.png")
    with pytest.raises(ValueError, match="grouped by settings, folder, name, none, not by 'prompt'"):
        read_folder(tmp_path, by="prompt")
    with pytest.raises(ValueError, match=r"a\.png does not tell how it was made"):
        read_folder(tmp_path, by="settings")
    with pytest.raises(ValueError, match=r"a\.png lies in no subfolder"):
        read_folder(tmp_path, by="folder")


def test_names_say_something_of_images_and_groups(tmp_path):
    drawn = read_folder(save(tmp_path / "mine", "cat/1.png", "cat/2.png", "dog/1.png"))
    file = tmp_path / "labels.csv"
    file.write_text("name,label\ncat,tabby\nmine/cat/2.png,lion\ndog/1.png,pug\n")
    told = read_named(file, "label")
    check_used(file, told, [drawn], "label")
    assert for_images(file, told, drawn, "label") == ["tabby", "lion", "pug"]
    other = tmp_path / "labels.json"
    other.write_text(json.dumps(told))
    assert read_named(other, "label") == told


def test_a_name_of_several_folders_says_which_it_means(tmp_path):
    both = [read_folder(save(tmp_path / name, "cat-0.png", "cat-1.png")) for name in ("A", "B")]
    for shared in ("cat-0.png", "cat"):
        with pytest.raises(ValueError, match=rf"one label for {shared}, which A and B hold; write A/{shared}, and a row for each"):
            check_single(tmp_path / "labels.csv", {shared: "x"}, both, "label")
        check_single(tmp_path / "labels.csv", {shared: "x"}, both[:1], "label")
    told = {"A/cat-0.png": "x", "A/cat": "y", "B/cat": "z"}
    check_used(tmp_path, told, both, "label")
    check_single(tmp_path, told, both, "label")
    assert [for_images(tmp_path, told, drawn, "label") for drawn in both] == [["x", "y"], ["z", "z"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "must be a .csv or a .json file"),
        ("a.csv", "name,label\n", "has no row below its header"),
        ("a.csv", "name,label\ncat,x,y\n", "every row must be a name and its label, got 'cat,x,y'"),
        ("a.csv", "name,label\ncat,x\ncat,y\n", "has cat twice"),
        ("a.csv", "name,label\ncat,x\n cat,y\n", "has cat twice"),
        ("a.json", '{"cat": "x", "dog": "y", "cat": "z"}', r"a\.json has cat twice"),
        ("a.csv", "name,label\ncat,caf\xe9\n".encode("latin-1"), r"a\.csv is not in UTF-8"),
        ("a.json", '{"cat": "caf\xe9"}'.encode("latin-1"), r"a\.json is not in UTF-8"),
        ("a.json", "{", "does not parse"),
        ("a.json", '{"cat": 3}', "an object of names and their label"),
        ("a.csv", "name,label\ncat,x\n", r"has no label for dog/1.png of mine; it names cat"),
        ("a.csv", "name,label\ncat,x\ndog,y\nelk,z\n", r"has a label for elk, which is neither an image nor a group"),
    ],
)
def test_files_of_names_that_do_not_fit(tmp_path, name, content, message):
    drawn = read_folder(save(tmp_path / "mine", "cat/1.png", "dog/1.png"))
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())

    def use():
        told = read_named(file, "label")
        check_used(file, told, [drawn], "label")
        return for_images(file, told, drawn, "label")

    with pytest.raises(ValueError, match=message):
        use()
