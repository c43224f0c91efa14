"""Any images sorted into folders or zips, with or without split lists."""

import re

import numpy as np
import pytest
from image_files import class_folders, red_square, write_tree, write_zip

import tasks
from tasks import class_images
from tasks.files import Files

SPLIT_CLASSES = {"train": (0, 1), "val": (2, 3), "test": (4, 5)}


def split_folders(names=("train", "val", "test")):
    """Files of split/class/image, under other names of the splits if given."""
    return {
        f"{name}/c{c}/{i}.png": red_square(10 * c + i)
        for name, classes in zip(names, SPLIT_CLASSES.values(), strict=True)
        for c in classes
        for i in range(3)
    }


def csv_list(rows):
    return "\n".join(["filename,label", *rows, ""])


def mini_imagenet(lists=None):
    """Images in one folder, and three CSV lists, of which some may be replaced."""
    files = {f"images/n{c}{i}.jpg": red_square(10 * c + i) for c in range(6) for i in range(3)}
    for split, classes in SPLIT_CLASSES.items():
        rows = [f"n{c}{i}.jpg,n{c}" for c in classes for i in range(3)]
        files[f"{split}.csv"] = csv_list(rows)
    return files | (lists or {})


def without(files, part):
    return {path: data for path, data in files.items() if part not in path}


def load(root, **options):
    numbers = {"ways": 2, "shots": 1, "queries": 2, "size": 8}
    return tasks.load("folder", data_root=root, **(numbers | options))


def classes(splits):
    return [list(family.classes) for family in (splits.train, splits.validation, splits.test)]


def all_classes(splits):
    return [name for names in classes(splits) for name in names]


def test_classes_without_splits_are_shuffled_into_64_16_20_percent(tmp_path):
    splits = load(write_tree(tmp_path, class_folders(25)))
    assert [len(names) for names in classes(splits)] == [16, 4, 5]
    assert sorted(all_classes(splits)) == [f"c{c:02d}" for c in range(25)]
    assert classes(load(tmp_path)) == classes(splits)
    assert classes(load(tmp_path, seed=1)) != classes(splits)


def test_images_and_labels_belong_together(tmp_path):
    splits = load(write_tree(tmp_path, class_folders()))
    episodes = splits.train.sample(20, np.random.default_rng(0))
    assert episodes.query[0].shape == (20, 4, 3, 8, 8)
    for inputs, targets in (episodes.support, episodes.query):
        red = (inputs[:, :, 0, 4, 4] * 255).round().long()
        assert (red // 10 == episodes.labels["classes"].gather(1, targets)).all()
        assert inputs[:, :, 1:].max() == 0


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("train", "validation", "test"), ("Train", "VALID", "Test")],
)
@pytest.mark.parametrize("wrapper", ["", "cifar100/data/"])
def test_split_folders_are_used_under_any_of_their_names(tmp_path, names, wrapper):
    files = {wrapper + path: data for path, data in split_folders(names).items()}
    splits = load(write_tree(tmp_path, files))
    assert classes(splits) == [["c0", "c1"], ["c2", "c3"], ["c4", "c5"]]


def test_images_have_any_of_their_suffixes_in_upper_or_lower_case(tmp_path):
    suffixes = (".PNG", ".jpg", ".Jpeg", ".jpe", ".jfif", ".tif", ".BMP", ".pnm")
    files = {f"c{c:02d}/1{suffix}": red_square(c) for c in range(12) for suffix in suffixes}
    splits = load(write_tree(tmp_path, files))
    assert splits.train.pool.counts.tolist() == [len(suffixes)] * len(splits.train.pool)


def test_images_of_a_format_that_is_not_read_are_warned_of(tmp_path):
    files = class_folders() | {"holiday/1.heic": b"pixels", "holiday/2.heic": b"pixels"}
    with pytest.warns(UserWarning, match=r"left out images .* \(2, such as holiday/1\.heic\)"):
        load(write_tree(tmp_path / "some", files))
    with pytest.raises(ValueError, match=r"found only images .* \(1, such as cat/1\.heic\)"):
        load(write_tree(tmp_path / "none", {"cat/1.heic": b"pixels", "logo.svg": b"lines"}))


def test_a_folder_called_train_beside_other_classes_is_a_class(tmp_path):
    files = {f"train/{i}.png": red_square(i) for i in range(3)}
    splits = load(write_tree(tmp_path, class_folders() | files))
    assert "train" in all_classes(splits)


def test_the_lists_of_mini_imagenet_are_used(tmp_path):
    splits = load(write_tree(tmp_path, mini_imagenet()))
    assert classes(splits) == [["n0", "n1"], ["n2", "n3"], ["n4", "n5"]]


def test_lists_may_lie_elsewhere_and_name_paths(tmp_path):
    for split, numbers in {"train": (5, 6), "val": (1, 2), "test": (3, 4)}.items():
        rows = [f"c{c:02d}/{i}.png,k{c}" for c in numbers for i in range(3)]
        write_tree(tmp_path / "lists", {f"{split}.csv": csv_list(rows)})
    write_tree(tmp_path / "data", class_folders())
    splits = load(tmp_path / "data", split_lists=tmp_path / "lists")
    assert classes(splits) == [["k5", "k6"], ["k1", "k2"], ["k3", "k4"]]
    assert splits.test.pool.images_of(0)[:, 0, 0, 0].tolist() == [30, 31, 32]


def test_lists_may_lie_in_a_folder_whose_name_is_a_number(tmp_path, monkeypatch):
    images = {path: data for path, data in mini_imagenet().items() if path.endswith(".jpg")}
    lists = {path: data for path, data in mini_imagenet().items() if path.endswith(".csv")}
    root = write_tree(tmp_path / "data", images)
    write_tree(tmp_path / "2024", lists)
    monkeypatch.chdir(tmp_path)
    assert classes(load(root, split_lists=2024)) == classes(load(root, split_lists="2024"))


def test_a_csv_of_another_name_is_no_list(tmp_path):
    log = "epoch,loss\n1,2\n"
    files = class_folders() | dict.fromkeys(("my_train.csv", "training.csv", "base.csv"), log)
    splits = load(write_tree(tmp_path, files))
    assert len(all_classes(splits)) == 12


def test_three_csv_files_that_are_no_lists_are_passed_over_with_a_warning(tmp_path):
    names = ("base.csv", "valid.csv", "novel.csv")
    files = class_folders() | dict.fromkeys(names, "image,class\nc00/0.png,c00\n")
    with pytest.warns(UserWarning, match=r"base\.csv, .* and list no images that are here"):
        splits = load(write_tree(tmp_path, files))
    assert len(all_classes(splits)) == 12


def test_a_zip_loads_as_its_tree_and_is_not_extracted(tmp_path):
    write_tree(tmp_path / "tree", class_folders())
    write_zip(tmp_path / "data.zip", class_folders(prefix="data/") | {"data/readme.txt": b"x"})
    tree = load(tmp_path / "tree")
    zipped = load(tmp_path / "data.zip")
    assert classes(tree) == classes(zipped)
    assert (tree.test.pool.images == zipped.test.pool.images).all()
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "data.zip"}


def test_images_have_the_size_and_the_channels_asked_for(tmp_path):
    files = class_folders() | {"c00/0.png": red_square(200, height=16, width=40)}
    splits = load(write_tree(tmp_path, files), size=5, color=False)
    assert splits.train.input_shape == (1, 5, 5)
    assert splits.train.pool.images[0].unique().tolist() == [60]  # the luma 0.299 · 200


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b"x"}, r"data_root: found no images in .*expected class/image files"),
        (
            {"a.png": red_square(0)},
            r"data_root: a\.png is in no class folder; expected class/image files",
        ),
        (class_folders() | {"c01/1.png": b"text"}, r"c01/1\.png: got 4 bytes that do not decode"),
        (split_folders() | {"test/c0/0.png": red_square(0)}, "class 'c0' is in train and in test"),
        (
            split_folders() | {"test/loose.png": red_square(0)},
            r"test/loose\.png is in a split but in no class folder",
        ),
        (without(split_folders(), "val/"), r"only the split folders \['test', 'train'\]"),
        (
            split_folders() | {"extra/1.png": red_square(0)},
            r"got 'extra' beside the split folders \['test', 'train', 'val'\]; move it",
        ),
        (without(mini_imagenet(), "val.csv"), r"split lists: .* has no val\.csv"),
        (class_folders(6), "ways: got 2, but folder/validation has 1 classes"),
        (
            {f"images/{i}.png": red_square(i) for i in range(9)} | {"labels.csv": b"id,label"},
            r"data_root: got images or features of 1 classes \('images'\), expected one class or "
            "more for each of train, val, test; expected class/image files",
        ),
        (
            class_folders(count=2),
            r"shots \+ queries: got 1 \+ 2 = 3, but class 'c\d\d' of folder/train has 2 images",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load(write_tree(tmp_path, files))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file;label\n", r"got columns \['file;label'\], expected filename,label"),
        ("filename;label\na;b;c\n", r"line 2: .* put fields that have a semicolon into quotes"),
        ("", r"got columns \[\], expected filename,label"),
        (b"filename,label\n\xff\xfe", "got an unreadable list"),
        (csv_list(["n20.jpg"]), r"line 2: got no label for 'n20\.jpg'"),
        (csv_list(["x.jpg,n2"]), r"line 2: 0 images are called 'x\.jpg'"),
        (csv_list(["n20.jpg,n2"] * 2), r"line 3: 'n20\.jpg' is listed twice"),
        (csv_list(["n20.jpg,n2", "", "n20.jpg,n2"]), r"line 4: 'n20\.jpg' is listed twice"),
        (csv_list(["n20.jpg,a,b"]), r"line 2: got 3 fields, expected 2; put fields that have a co"),
        (
            csv_list(['n20.jpg,"n2', "n21.jpg,n2"]),
            r"got an unreadable list \(unexpected end of data",
        ),
        ("filename,label,label\n", r"got columns \['filename', 'label', 'label'\]"),
    ],
)
def test_what_is_wrong_with_a_list_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"val\.csv.*{message}"):
        load(write_tree(tmp_path, mini_imagenet({"val.csv": text})))


CSV_FORMS = {
    "spaces": lambda text: text.replace(",", " , "),
    "a column with semicolons": lambda text: text.replace("\n", ',"a;b;c;d"\n'),
    "semicolons": lambda text: text.replace(",", ";"),
    "semicolons and quotes": lambda text: re.sub(r"([^,\n]+)", r'"\1"', text).replace(",", ";"),
    "tabs": lambda text: text.replace(",", "\t"),
    "spaces at the end": lambda text: text.replace("\n", "  \n"),
    "quotes": lambda text: text.replace("n2\n", '"n2"\n'),
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "byte order mark": lambda text: "\ufeff" + text,
    "UTF-16": lambda text: text.encode("utf-16"),
    "further columns": lambda text: text.replace("\n", ",x\n"),
    "a long field": lambda text: text.replace("\n", f",{'x' * 200_000}\n"),
    "a field of several lines": lambda text: text.replace("\n", ',"1\n2"\n'),
}


@pytest.mark.parametrize("form", CSV_FORMS)
def test_a_csv_list_may_have_any_form(tmp_path, form):
    files = {
        path: CSV_FORMS[form](data) if path.endswith(".csv") else data
        for path, data in mini_imagenet().items()
    }
    splits = load(write_tree(tmp_path, files))
    assert classes(splits) == [["n0", "n1"], ["n2", "n3"], ["n4", "n5"]]
    assert splits.test.pool.images_of(0)[:, 0, 0, 0].tolist() == [40, 41, 42]


def test_labels_that_differ_by_blanks_are_one_class(tmp_path):
    """Before, the images of one class could be in training and in test."""
    rows = ["n00.jpg,polar bear", "n01.jpg,polar  bear", "n02.jpg, polar bear ", "n10.jpg,n1"]
    lists = {"train.csv": csv_list([*rows, "n11.jpg,n1", "n12.jpg,n1"])}
    splits = load(write_tree(tmp_path, mini_imagenet(lists)))
    assert classes(splits)[0] == ["polar bear", "n1"]
    assert splits.train.pool.counts.tolist() == [3, 3]

    lists["test.csv"] = csv_list([f"n4{i}.jpg,polar bear\u00a0" for i in range(3)])
    with pytest.raises(ValueError, match="class 'polar bear' is in train and in test"):
        load(write_tree(tmp_path, mini_imagenet(lists)))


@pytest.mark.parametrize(("name", "other"), [("c0", "c0 "), ("caf\u00e9", "cafe\u0301")])
def test_folders_whose_names_look_alike_are_refused(tmp_path, name, other):
    files = without(split_folders(), "c0/") | {
        f"{part}/{name}/{i}.png": red_square(90 + 3 * len(part) + i)
        for part, name in {"train": name, "test": other}.items()
        for i in range(3)
    }
    message = f"classes '{name}' .train. and '{other}' .test. differ in blanks or"
    with pytest.raises(ValueError, match=message):
        load(write_tree(tmp_path, files))


def test_many_images_are_decoded_once_until_a_file_or_a_list_changes(
    tmp_path, empty_cache, monkeypatch
):
    decoded = []
    decode = Files.images

    def count(files, paths, size, *, color):
        decoded.append(len(paths))
        return decode(files, paths, size, color=color)

    monkeypatch.setattr(Files, "images", count)
    root = write_tree(tmp_path / "data", class_folders())
    expected = load(root)
    assert not empty_cache.exists()  # They are few.
    monkeypatch.setattr(class_images, "CACHED_IMAGES", 36)
    for _ in range(2):
        splits = load(root)
        assert splits.digests == expected.digests
        assert splits.train.pool.images.equal(expected.train.pool.images)
    assert decoded == [36, 36]

    write_tree(root, {"c03/1.png": red_square(200)})
    assert 200 in load(root).train.pool.images
    write_tree(root, {"train.txt": "c01\nc00\n", "val.txt": "c02\nc03", "test.txt": "c04\nc05"})
    monkeypatch.setattr(class_images, "CACHED_IMAGES", 18)
    listed = load(root)
    assert listed.train.pool.images_of(0)[:, 0, 0, 0].tolist() == [10, 11, 12]
    assert decoded == [36, 36, 36, 18]
    # One file for each data set, size and number of channels.
    assert len(list(empty_cache.iterdir())) == 1
    load(root, size=4)
    assert len(list(empty_cache.iterdir())) == 2


def test_a_label_in_two_lists_is_refused(tmp_path):
    lists = {"val.csv": csv_list(["n20.jpg,n0"])}
    with pytest.raises(ValueError, match="class 'n0' is in train and in val"):
        load(write_tree(tmp_path, mini_imagenet(lists)))


def test_no_root_and_a_size_of_zero_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_root: got none.*expected class/image files"):
        load(None)
    with pytest.raises(FileNotFoundError, match="nowhere: nothing there"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="size: got 0, expected at least 1 pixel"):
        load(write_tree(tmp_path, class_folders()), size=0)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("color", "no", "bool, such as True"),
        ("size", "abc", "int, such as 84"),
        ("size", True, "int, such as 84"),
    ],
)
def test_an_option_of_another_type_is_refused(tmp_path, option, value, expected):
    write_tree(tmp_path, class_folders())
    message = rf"folder {option}: got {value!r}, expected {expected}"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **{option: value})


def test_digests_identify_the_classes_of_each_split_and_nothing_else(tmp_path):
    before = load(write_tree(tmp_path, class_folders())).digests
    assert len(set(before.values())) == 3
    assert load(tmp_path, ways=1, shots=2, queries=1, size=4).digests == before
    after = load(write_tree(tmp_path, class_folders(13))).digests
    assert after["test"] != before["test"]
