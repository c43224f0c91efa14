"""An image that stands in two splits is found, whatever its file is called, and named."""

import pickle

import numpy as np
import pytest
from image_files import encode, write_tree

import tasks
from tasks.repeats import copied_images, image_digests, repeated_images

PARTS = ("train", "val", "test")


def picture(number):
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)


def split_folders():
    """Two classes of three images in each split, all different."""
    return {
        f"{part}/k{s}{c}/{i}.png": encode(picture(100 * s + 10 * c + i))
        for s, part in enumerate(PARTS)
        for c in range(2)
        for i in range(3)
    }


def load(root, **options):
    numbers = {"ways": 2, "shots": 1, "queries": 2, "size": 8}
    return tasks.load("folder", data_root=root, **(numbers | options))


def test_the_rows_of_equal_images_in_two_splits_are_those_of_a_plain_search():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (60, 1, 2, 2), np.uint8)  # 16 different images, two of them blank
    split_of = rng.integers(-1, 3, 60)
    pairs = repeated_images(image_digests(images), split_of)
    shared = {
        images[i].tobytes()
        for i in range(60)
        for j in range(60)
        if np.array_equal(images[i], images[j])
        if split_of[i] != split_of[j] and min(split_of[i], split_of[j]) >= 0
        if images[i].min() != images[i].max()
    }
    assert len(shared) > 5
    assert {images[i].tobytes() for i, _ in pairs} == shared
    for i, j in pairs:
        assert np.array_equal(images[i], images[j])
        assert -1 != split_of[i] != split_of[j] != -1


@pytest.mark.parametrize("format", ["PNG", "BMP"])
def test_both_files_are_named_whatever_their_format(tmp_path, format):
    copy = {"test/k21/copy.bmp": encode(picture(1), format)}
    root = write_tree(tmp_path, split_folders() | copy)
    message = r"equal images in two splits: 1, the first being train/k00/1\.png \(train\) = "
    with pytest.raises(ValueError, match=message + r"test/k21/copy\.bmp \(test\)"):
        load(root)
    assert load(root, allow_repeats=True).test.pool.counts.tolist() == [3, 4]


def test_images_that_are_left_out_or_of_one_split_or_blank_are_no_repeats(tmp_path):
    files = split_folders() | {"train/k01/copy.png": encode(picture(1))}
    blank = {f"{part}/k{s}0/blank.png": encode(np.ones((8, 8, 3))) for s, part in enumerate(PARTS)}
    write_tree(tmp_path / "folders", files | blank)
    assert load(tmp_path / "folders").train.pool.counts.tolist() == [4, 4]

    lists = {f"{part}.txt": f"k{s}0\nk{s}1\n" for s, part in enumerate(PARTS)}
    flat = {path.split("/", 1)[1]: data for path, data in split_folders().items()}
    unlisted = {"k9/copy.png": encode(picture(1)), "k9/copy2.png": encode(picture(201))}
    load(write_tree(tmp_path / "lists", flat | unlisted | lists))


def test_images_in_arrays_are_named_by_their_classes(tmp_path):
    for s, part in enumerate(PARTS):
        numbers = range(100 * s, 100 * s + 8)
        images = np.stack([picture(12 if number == 203 else number) for number in numbers])
        if part == "train":
            images[5] = picture(12)
        classes = {f"{part}{c}": list(range(4 * c, 4 * c + 4)) for c in range(2)}
        data = pickle.dumps({"image_data": images, "class_dict": classes})
        write_tree(tmp_path, {f"{part}.pkl": data})
    message = r"image 1 of class 'train1' \(train\) = image 3 of class 'test0' \(test\)"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    # Lists that leave the first of them out.
    lists = {"train.txt": "train0\nval0", "val.txt": "val1", "test.txt": "test0\ntest1"}
    write_tree(tmp_path / "lists", lists)
    splits = load(tmp_path, ways=1, split_lists=tmp_path / "lists")
    assert splits.test.classes == ("test0", "test1")


def test_the_rows_of_copies_in_a_class_are_those_of_a_plain_search():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (60, 1, 2, 2), np.uint8)
    class_of = rng.integers(-1, 4, 60)
    pairs = copied_images(image_digests(images), class_of)
    expected = 0
    for c in range(4):
        members = [image.tobytes() for image in images[class_of == c] if image.min() < image.max()]
        expected += len(members) - len(set(members))
    assert len(pairs) == expected > 5
    for i, j in pairs:
        assert i != j
        assert class_of[i] == class_of[j] >= 0
        assert np.array_equal(images[i], images[j])


def test_copies_in_a_class_are_counted_and_named(tmp_path):
    files = split_folders() | {
        "train/k01/copy.png": encode(picture(12)),
        "test/k21/one.bmp": encode(picture(211), "BMP"),
        "test/k21/two.png": encode(picture(211)),
    }
    load(write_tree(tmp_path / "plain", split_folders()))
    root = write_tree(tmp_path / "copies", files)
    pair = r"(train/k01/2\.png = train/k01/copy\.png|test/k21/\S+ = test/k21/\S+);"
    with pytest.warns(UserWarning, match="copies of images in one class: 3, .* " + pair):
        splits = load(root)
    assert splits.train.pool.counts.tolist() == [3, 4]
    assert load(root, allow_repeats=True).digests == splits.digests

    # Classes that are in no split have no tasks.
    lists = {"train.txt": "k00", "val.txt": "k10\nk11", "test.txt": "k20"}
    flat = {path.split("/", 1)[1]: data for path, data in files.items()}
    load(write_tree(tmp_path / "lists", flat | lists), ways=1)
