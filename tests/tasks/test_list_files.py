"""Lists in JSON, and the names that the parts of a split have."""

import json

import numpy as np
import pytest
from image_files import class_folders, write_tar, write_tree, write_zip

import tasks

PARTS = ("train", "val", "test")
NAMES = {"train": ["c03", "c00"], "val": ["c11", "c01"], "test": ["c02", "c10"]}
SYNONYMS = [
    ("base", "val", "novel"),
    ("Meta-Train", "meta_valid", "metatest"),
    ("training", "validation", "testing"),
]


def load(root, **options):
    return tasks.load("folder", ways=2, shots=1, queries=2, size=8, data_root=root, **options)


def loaded_classes(splits):
    families = (splits.train, splits.validation, splits.test)
    return dict(zip(PARTS, (list(family.classes) for family in families), strict=True))


def images(name, prefix=""):
    return [f"{prefix}{name}/{i}.png" for i in range(3)]


def of_images(names, prefix=""):
    """The form of Chen et al. (2019), with absolute paths of another machine if `prefix` is one."""
    paths = [path for name in names for path in images(name, prefix)]
    numbers = [number for number in range(len(names)) for _ in range(3)]
    return {"label_names": names, "image_names": paths, "image_labels": numbers}


FORMS = {
    "classes": lambda names: names,
    "images": of_images,
    "images of another machine": lambda names: of_images(names, "/home/someone/filelists/"),
    "images of Windows": lambda names: of_images(names, "C:\\data\\"),
    "images from here": lambda names: of_images(names, "./"),
    "images with the separators of Windows": lambda names: [
        [path.replace("/", "\\"), name] for name in names for path in images(name, ".\\")
    ],
    "labels as names": lambda names: {
        **of_images(names),
        "image_labels": np.repeat(names, 3).tolist(),
    },
    "files of each class": lambda names: {name: images(name) for name in names},
    "pairs": lambda names: [[path, name] for name in names for path in images(name)],
    "triples": lambda names: [[path, 7, name] for name in names for path in images(name)],
}


# A list is read alike from a tree and from an archive.
@pytest.mark.parametrize(
    ("form", "write"),
    [
        *((form, write_tree) for form in FORMS),
        *(("images", write) for write in (write_zip, write_tar)),
    ],
)
def test_json_lists_split_the_classes(tmp_path, form, write):
    lists = {
        f"filelists/{name}.json": json.dumps(FORMS[form](NAMES[part])).encode()
        for part, name in zip(PARTS, SYNONYMS[0], strict=True)
    }
    splits = load(write(tmp_path / "data", class_folders() | lists))
    assert loaded_classes(splits) == NAMES
    assert splits.test.pool.images_of(1)[:, 0, 0, 0].tolist() == [100, 101, 102]
    assert "filelists/base.json" in splits.source


@pytest.mark.parametrize("form", ["classes", "pairs", "triples"])
def test_one_json_file_may_hold_all_parts(tmp_path, form):
    content = {part: FORMS[form](names) for part, names in NAMES.items()}
    files = {"split_of_mine.json": json.dumps(content), "notes.json": json.dumps(content)}
    splits = load(write_tree(tmp_path, class_folders() | files))
    assert loaded_classes(splits) == NAMES
    assert splits.source.endswith("split by lists split_of_mine.json")


@pytest.mark.parametrize("names", SYNONYMS)
def test_synonyms_of_the_parts_are_known_for_folders_and_lists(tmp_path, names):
    called = dict(zip(PARTS, names, strict=True))
    folders = {
        f"{called[part]}/{path}": data
        for part, classes in NAMES.items()
        for path, data in class_folders().items()
        if path[:3] in classes
    }
    splits = load(write_tree(tmp_path / "folders", folders))
    assert loaded_classes(splits) == {part: sorted(classes) for part, classes in NAMES.items()}
    assert splits.source.endswith(f"split by folders {', '.join(names)}")

    for suffix in ("txt", "csv"):
        lists = {f"lists/{called[part]}.{suffix}": "\n".join(NAMES[part]) for part in PARTS}
        if suffix == "csv":
            for part in PARTS:
                rows = [f"{path},{name}" for name in NAMES[part] for path in images(name)]
                lists[f"lists/{called[part]}.csv"] = "\n".join(["filename,label", *rows])
        root = write_tree(tmp_path / suffix, class_folders() | lists)
        assert loaded_classes(load(root)) == NAMES


def replaced(**lists):
    return {f"{part}.json": json.dumps(names) for part, names in (NAMES | lists).items()}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (replaced(val=["c11", "c99"]), r"val\.json, entry 1: 0 classes are called 'c99'"),
        (replaced(val=["c11", "c00"]), "class 'c00' is in train and in val"),
        (replaced(val={}), r"has no val\.json that names a class"),
        (replaced(val="c11"), r"has no val\.json that names a class"),
        (replaced() | {"val.json": '["c11", "c'}, r"has no val\.json that names a class"),
        (replaced() | {"b/test.json": '["c05"]'}, r"has b/test\.json and test\.json, expected one"),
        (
            {f"{part}.json": json.dumps(of_images(NAMES[part])) for part in PARTS[:2]},
            r"has no test\.json that lists images",
        ),
        (
            {
                f"{part}.json": json.dumps(of_images(NAMES[part]) | {"image_labels": [0]})
                for part in PARTS
            },
            r"test\.json: got 6 image_names and 1 image_labels, expected as many",
        ),
        (
            {f"{part}.json": json.dumps([["c00/0.png", "k"]]) for part in PARTS},
            r"val\.json, entry 0: 'c00/0\.png' is listed twice",
        ),
    ],
)
def test_what_is_wrong_with_json_lists_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load(write_tree(tmp_path, class_folders() | files))


def test_json_of_other_forms_leaves_the_shuffle_as_it_was(tmp_path):
    before = load(write_tree(tmp_path, class_folders()))
    others = {"train.json": '{"images": [{"id": 3}]}', "val.json": "no JSON", "test.json": "[1, 2]"}
    others |= {"c/base.json": '[["some", "pair"]]', "c/novel.json": '{"a": ["b"]}'}
    after = load(write_tree(tmp_path, others | {"split.json": '["train"]'}))
    assert after.digests == before.digests
    assert "shuffled by seed 0" in after.source
