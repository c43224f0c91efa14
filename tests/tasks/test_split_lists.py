"""Text lists that name the classes of each split, as CIFAR-FS has them."""

import pytest
from image_files import class_folders, write_tar, write_tree, write_zip

import tasks

LISTS = {"train": ["c03", "c00", "c07"], "val": ["c11", "c01"], "test": ["c02", "c10"]}
PREFIX = "cifar100/data/"


def text_lists(folder="cifar100/splits/bertinetto/", line="{}", end="\n", lists=LISTS):
    """Files of one class a line."""
    return {
        f"{folder}{part}.txt": end.join([*map(line.format, names), ""])
        for part, names in lists.items()
    }


def load(root, **options):
    return tasks.load("folder", ways=2, shots=1, queries=2, size=8, data_root=root, **options)


def loaded_classes(splits):
    families = (splits.train, splits.validation, splits.test)
    return dict(zip(LISTS, (list(family.classes) for family in families), strict=True))


LAYOUTS = {
    "CIFAR-FS": class_folders(prefix=PREFIX) | text_lists(),
    "lists at the top": class_folders(prefix="data/") | text_lists(""),
    "lists beside the classes": class_folders() | text_lists(""),
    "carriage returns": class_folders() | text_lists(end="\r\n"),
    "blank lines and spaces": class_folders() | text_lists(line=" {} ", end="\n\n"),
    "byte order mark": class_folders() | text_lists(lists=LISTS | {"val": ["\ufeffc11", "c01"]}),
    "other names": class_folders()
    | {
        f"lists/{name}": "\n".join(LISTS[part])
        for part, name in {"train": "TRAIN.txt", "val": "Valid.TXT", "test": "test.txt"}.items()
    },
    "slashes": class_folders() | text_lists(line="{}/"),
    "from here": class_folders() | text_lists(line="./{}/"),
    "absolute paths": class_folders() | text_lists(line="/home/someone/data/{}"),
    "the separators of Windows": class_folders(prefix="a/b/") | text_lists(line="C:\\b\\{}\\"),
    "UTF-16": class_folders()
    | {path: text.encode("utf-16") for path, text in text_lists(end="\r\n").items()},
    "other lists that name no class": class_folders()
    | text_lists()
    | text_lists("docs/", line="see {}"),
    "another list of all": class_folders() | text_lists() | {"trainval.txt": "c00\nc01\nc02\n"},
    "a class that is listed twice": class_folders()
    | text_lists(lists=LISTS | {"val": ["c11", "c01", "c11"]}),
}


# A list is read alike from a tree and from an archive.
@pytest.mark.parametrize(
    ("layout", "write"),
    [
        *((layout, write_tree) for layout in LAYOUTS),
        *((layout, write_zip) for layout in ("CIFAR-FS", "lists beside the classes", "UTF-16")),
        *((layout, write_tar) for layout in ("CIFAR-FS", "lists at the top", "other names")),
    ],
)
def test_the_classes_of_the_lists_are_used_and_no_others(tmp_path, layout, write):
    files = {
        path: data if isinstance(data, bytes) else data.encode()
        for path, data in LAYOUTS[layout].items()
    }
    splits = load(write(tmp_path / "data", files), seed=5)
    assert loaded_classes(splits) == LISTS
    red = splits.test.pool.images_of(1)[:, 0, 0, 0].tolist()
    assert red == [100, 101, 102]  # class c10


def test_the_lists_may_lie_elsewhere_and_go_before_split_folders(tmp_path):
    for root in ("flat", "wrapped/train", "wrapped/val", "wrapped/test"):
        part = "" if root == "flat" else root[8:]
        names = [path for path in class_folders() if not part or path[:3] in LISTS[part]]
        write_tree(tmp_path / root, {path: class_folders()[path] for path in names})
    moved = {"train": ["c03", "c10"], "val": ["c07", "c11"], "test": ["c00", "c01"]}
    write_tree(tmp_path / "lists", text_lists("", lists=moved))
    for root in ("flat", "wrapped"):
        splits = load(tmp_path / root, split_lists=tmp_path / "lists")
        assert loaded_classes(splits) == moved
    assert loaded_classes(load(tmp_path / "wrapped"))["test"] == sorted(LISTS["test"])


def test_a_class_may_be_named_by_the_end_of_its_path(tmp_path):
    files = {f"set{c // 6}/{path}": data for c in range(12) for path, data in one_class(c).items()}
    lists = {"train": ["set0/c00", "c03"], "val": ["c07", "set1/c08"], "test": ["c02", "c10"]}
    splits = load(write_tree(tmp_path, files | text_lists(lists=lists)))
    expected = {"train": ["0/c00", "0/c03"], "val": ["1/c07", "1/c08"], "test": ["0/c02", "1/c10"]}
    for part, names in expected.items():
        assert loaded_classes(splits)[part] == [f"set{name}" for name in names]


def one_class(number):
    return {path: data for path, data in class_folders().items() if path[:3] == f"c{number:02d}"}


@pytest.mark.parametrize("present", [[], ["test"], ["train", "test"]])
def test_files_that_are_no_lists_leave_the_shuffle_as_it_was(tmp_path, present):
    before = load(write_tree(tmp_path, class_folders())).digests
    texts = {f"{part}.txt": "c00/0.png 0\nc01/0.png 1\n" for part in present}
    assert load(write_tree(tmp_path, texts | {"notes.txt": "c00\n"})).digests == before


def test_three_lists_of_something_else_are_passed_over_with_a_warning(tmp_path):
    before = load(write_tree(tmp_path, class_folders())).digests
    write_tree(tmp_path, text_lists(line="images/{}/0.png"))
    with pytest.warns(UserWarning, match=r"bertinetto/train\.txt, .* name no class, such as 'c00'"):
        assert load(tmp_path).digests == before


def lists_with(**replaced):
    return text_lists(lists=LISTS | replaced)


def without(part):
    return {path: text for path, text in text_lists().items() if part not in path}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (without("val"), r"split lists: .* has no val\.txt that names a class; expected tr"),
        (without("test"), r"split lists: .* has no test\.txt"),
        (lists_with(val=["c11", "c99"]), r"val\.txt, line 2: 0 classes are called 'c99'"),
        (lists_with(val=["c11", "c00"]), "class 'c00' is in train and in val"),
        (lists_with(val=["c11"]), "ways: got 2, but folder/validation has 1 classes"),
        (lists_with(val=[]), r"has no val\.txt that names a class"),
        (text_lists() | text_lists("other/"), r"has cifar100/.*/test\.txt and other/test\.txt"),
        (
            text_lists() | {"more/c00/1.png": class_folders()["c00/1.png"]},
            r"train\.txt, line 2: 2 classes are called 'c00'",
        ),
    ],
)
def test_what_is_wrong_with_the_lists_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load(write_tree(tmp_path, class_folders() | files))


def test_lists_that_are_asked_for_have_to_be_there(tmp_path):
    write_tree(tmp_path / "data", class_folders())
    write_tree(tmp_path / "lists", text_lists(line="x{}"))
    with pytest.raises(ValueError, match=r"split lists: .*lists has no train\.csv.*train\.txt"):
        load(tmp_path / "data", split_lists=tmp_path / "lists")
