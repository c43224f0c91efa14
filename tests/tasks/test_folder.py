"""Any images sorted into folders or zips, with or without split lists."""

import io
import zipfile

import numpy as np
import pytest

import tasks
from tasks.pool import shuffled_split

SPLITS = ("train", "val", "test")


def png(value, size=(8, 8)):
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, value).save(file, "PNG")
    return file.getvalue()


def write(root, files):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def by_class(classes=12, each=3, prefix=""):
    """Class c's image i has red 10c + i, so a pixel names both."""
    return {
        f"{prefix}c{c:02d}/{i}.png": png((10 * c + i, 0, 0))
        for c in range(classes)
        for i in range(each)
    }


def by_split():
    return {
        f"{s}/c{c}/{i}.png": png((10 * c + i, 0, 0))
        for s, cs in zip(SPLITS, ((0, 1), (2, 3), (4, 5)), strict=True)
        for c in cs
        for i in range(3)
    }


def mini_imagenet(lists=None):
    files = {f"images/n{c}{i}.jpg": png((10 * c + i, 0, 0)) for c in range(6) for i in range(3)}
    for split, classes in zip(SPLITS, ((0, 1), (2, 3), (4, 5)), strict=True):
        rows = [f"n{c}{i}.jpg,n{c}" for c in classes for i in range(3)]
        files[f"{split}.csv"] = "\n".join(["filename,label", *rows, ""])
    return files | (lists or {})


def load(root, **options):
    return tasks.load(
        "folder", data_root=root, **({"ways": 2, "shots": 1, "queries": 2, "size": 8} | options)
    )


def classes(splits):
    return [list(family.pool.names) for family in (splits.train, splits.validation, splits.test)]


def test_classes_without_splits_are_shuffled_64_16_20(tmp_path):
    splits = load(write(tmp_path, by_class(25)))
    assert [len(names) for names in classes(splits)] == [16, 4, 5]
    assert sorted(name for names in classes(splits) for name in names) == [
        f"c{c:02d}" for c in range(25)
    ]
    assert classes(load(tmp_path)) == classes(splits)
    assert classes(load(tmp_path, seed=1)) != classes(splits)
    assert [len(part) for part in shuffled_split(100, 0)] == [64, 16, 20]


def test_images_and_labels_belong_together(tmp_path):
    splits = load(write(tmp_path, by_class()))
    episodes = splits.train.sample(20, np.random.default_rng(0))
    assert episodes.query[0].shape == (20, 4, 3, 8, 8)
    for inputs, targets in (episodes.support, episodes.query):
        red = (inputs[:, :, 0, 4, 4] * 255).round().long()
        assert (red // 10 == episodes.labels["classes"].gather(1, targets)).all()
        assert inputs[:, :, 1:].max() == 0


@pytest.mark.parametrize("validation", ["val", "validation", "valid"])
@pytest.mark.parametrize("below", ["", "cifar100/data/"])
def test_split_folders_are_used(tmp_path, validation, below):
    files = {
        below + path.replace("val/", f"{validation}/"): data for path, data in by_split().items()
    }
    assert classes(load(write(tmp_path, files))) == [["c0", "c1"], ["c2", "c3"], ["c4", "c5"]]


def test_mini_imagenet_lists_are_used(tmp_path):
    assert classes(load(write(tmp_path, mini_imagenet()))) == [
        ["n0", "n1"],
        ["n2", "n3"],
        ["n4", "n5"],
    ]


def test_lists_may_lie_elsewhere_and_name_paths(tmp_path):
    lists = {
        f"{split}.csv": "filename,label\n"
        + "".join(f"c{c:02d}/{i}.png,k{c}\n" for c in cs for i in range(3))
        for split, cs in zip(SPLITS, ((5, 6), (1, 2), (3, 4)), strict=True)
    }
    write(tmp_path / "lists", lists)
    splits = load(write(tmp_path / "data", by_class()), split_lists=tmp_path / "lists")
    assert classes(splits) == [["k5", "k6"], ["k1", "k2"], ["k3", "k4"]]
    assert splits.test.pool.images_of(0)[:, 0, 0, 0].tolist() == [30, 31, 32]


def test_a_zip_reads_as_its_tree_does_and_rubbish_is_passed_over(tmp_path):
    write(tmp_path / "tree", by_class())
    rubbish = {"data/.DS_Store": b"x", "__MACOSX/data/c00/._0.png": b"x", "data/readme.txt": b"x"}
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for path, data in (by_class(prefix="data/") | rubbish).items():
            file.writestr(path, data)
    tree, zipped = load(tmp_path / "tree"), load(tmp_path / "data.zip")
    assert classes(tree) == classes(zipped)
    assert (tree.test.pool.images == zipped.test.pool.images).all()
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "data.zip"}


def test_size_and_colour(tmp_path):
    splits = load(
        write(tmp_path, by_class(each=3) | {"c00/0.png": png((200, 0, 0), (40, 16))}),
        size=5,
        color=False,
    )
    assert splits.train.input_shape == (1, 5, 5)
    grey = splits.train.pool.images[0]
    assert grey.unique().tolist() == [60]  # 0.299 · 200: the luma of ITU-R 601


def lists_with(name, text):
    return mini_imagenet({name: text})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b"x"}, r"data_root: found no images in .*expected class/image files"),
        ({"a.png": png(0)}, r"data_root: a\.png is in no class folder; expected class/image files"),
        (by_class() | {"c01/1.png": b""}, r"c01/1\.png: got an empty file, expected an image"),
        (by_class() | {"c01/1.png": png(0)[:45]}, r"c01/1\.png: got 45 bytes that do not decode"),
        (by_class() | {"c01/1.png": b"text"}, r"c01/1\.png: got 4 bytes that do not decode"),
        (by_split() | {"test/c0/0.png": png(0)}, "class 'c0' is in train and in test"),
        (
            by_split() | {"test/loose.png": png(0)},
            r"test/loose\.png is in a split but in no class folder",
        ),
        (
            {p: d for p, d in by_split().items() if "val/" not in p},
            r"only the split folders \['test', 'train'\]",
        ),
        (
            {p: d for p, d in mini_imagenet().items() if p != "val.csv"},
            r"split lists: .* has no val\.csv",
        ),
        (
            lists_with("val.csv", "file;label\n"),
            r"val\.csv: got columns \['file;label'\], expected filename,label",
        ),
        (lists_with("val.csv", ""), r"val\.csv: got columns \[\], expected filename,label"),
        (lists_with("val.csv", b"filename,label\n\xff\xfe"), r"val\.csv: got an unreadable list"),
        (
            lists_with("val.csv", "filename,label\nn20.jpg\n"),
            r"val\.csv, line 2: got no label for 'n20\.jpg'",
        ),
        (
            lists_with("val.csv", "filename,label\nx.jpg,n2\n"),
            r"val\.csv, line 2: 0 images are called 'x\.jpg'",
        ),
        (
            lists_with("val.csv", "filename,label\nn20.jpg,n2\nn20.jpg,n2\n"),
            r"line 3: 'n20\.jpg' is listed twice",
        ),
        (
            lists_with("val.csv", "filename,label\nn20.jpg,n0\n"),
            "class 'n0' is in train and in val",
        ),
        (by_class(6), "ways: got 2, but folder/validation has 1 classes"),
        (
            by_class(each=2),
            r"shots \+ queries: got 1 \+ 2 = 3, but class 'c\d\d' of folder/train has 2 images",
        ),
    ],
)
def test_what_is_wrong_with_the_data_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, files))


def test_damaged_zips_are_named(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match=r"data\.zip: got an unreadable zip"):
        load(tmp_path / "data.zip")
    with zipfile.ZipFile(tmp_path / "flip.zip", "w") as file:
        for path, data in by_class().items():
            file.writestr(path, data)
        at = file.getinfo("c01/1.png").header_offset + 60
    data = bytearray((tmp_path / "flip.zip").read_bytes())
    data[at] ^= 255
    (tmp_path / "flip.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"flip\.zip: c01/1\.png is damaged"):
        load(tmp_path / "flip.zip")


def test_a_missing_root_and_a_senseless_size_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: nothing there, expected a folder or a zip"
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"data_root: got none.*expected class/image files"):
        load(None)
    with pytest.raises(ValueError, match="size: got 0, expected at least 1 pixel"):
        load(write(tmp_path, by_class()), size=0)


def test_split_folders_may_be_written_as_one_likes_but_nothing_lies_beside(tmp_path):
    for split, name in zip(SPLITS, ("Train", "VAL", "Test"), strict=True):
        write(
            tmp_path / "cased",
            {p.replace(f"{split}/", f"{name}/"): d for p, d in by_split().items() if split in p},
        )
    assert classes(load(tmp_path / "cased")) == [["c0", "c1"], ["c2", "c3"], ["c4", "c5"]]
    write(tmp_path / "beside", by_split() | {"extra/1.png": png((0, 0, 0))})
    with pytest.raises(
        ValueError,
        match=r"got 'extra' beside the split folders \['test', 'train', 'val'\]; move it",
    ):
        load(tmp_path / "beside")
    write(
        tmp_path / "trains", by_class() | {f"train/{i}.png": png((0, 0, i)) for i in range(3)}
    )  # a class
    assert "train" in [name for part in classes(load(tmp_path / "trains")) for name in part]


def test_linked_folders_are_followed_but_not_round_and_round(tmp_path):
    write(tmp_path / "elsewhere", by_class(classes=4))
    write(tmp_path / "data", {p: d for p, d in by_class().items() if p >= "c04"})
    for c in range(4):
        (tmp_path / "data" / f"c{c:02d}").symlink_to(tmp_path / "elsewhere" / f"c{c:02d}")
    (tmp_path / "data" / "c05" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c05" / "gone.png").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "plain", by_class())
    assert classes(load(tmp_path / "data")) == classes(load(tmp_path / "plain"))


def test_a_list_of_another_name_is_no_split(tmp_path):
    write(tmp_path, by_class() | {"my_train.csv": "epoch,loss\n1,2\n"})
    assert sum(map(len, classes(load(tmp_path)))) == 12


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_images_of_other_kinds_keep_what_is_on_them(tmp_path, mode):
    """Black on nothing is black on white; of greys of 16 bits the upper 8 count."""
    from PIL import Image

    left = np.arange(8) < 4
    if mode == "I;16":
        image, expected = (
            Image.fromarray(np.where(left, 0x3310, 0xCC20).astype(np.uint16)[None].repeat(8, 0)),
            (51, 204),
        )
    else:
        alpha = Image.fromarray(np.where(left, 255, 0).astype(np.uint8)[None].repeat(8, 0))
        image = Image.merge("LA", (Image.new("L", (8, 8), 0), alpha))
        image, expected = image.convert("RGBA" if mode == "P" else mode), (0, 255)
        image = image.quantize(4) if mode == "P" else image
    file = io.BytesIO()
    image.save(file, "PNG")
    write(tmp_path, {f"c{c:02d}/{i}.png": file.getvalue() for c in range(12) for i in range(3)})
    found = load(tmp_path, color=False).train.pool.images[0, 0, 0]
    assert (found[0].item(), found[7].item()) == expected


def test_options_of_another_type_are_refused(tmp_path):
    write(tmp_path, by_class())
    for option, value, expected in (
        ("color", "no", "bool, such as True"),
        ("size", "abc", "int, such as 84"),
        ("size", True, "int"),
    ):
        with pytest.raises(
            ValueError, match=rf"folder {option}: got {value!r}, expected {expected}"
        ):
            load(tmp_path, **{option: value})


def test_digests_tell_other_classes(tmp_path):
    before = load(write(tmp_path, by_class())).digests
    assert len(set(before.values())) == 3
    assert load(tmp_path, ways=1, shots=2, queries=1, size=4).digests == before
    after = load(write(tmp_path, by_class(classes=13))).digests
    assert after["test"] != before["test"]
