"""The folder family on arrays: the published pickles, and features that another network gave."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from image_files import red_square, write_tar, write_tree, write_zip

import tasks
from tasks import class_images

PARTS = ("train", "val", "test")
ROWS = 4  # of a class
CACHE = "mini-imagenet-cache-{}.pkl"


def images(part, classes=2, side=8):
    """Images `[n, side, side, 3]` whose value, 100·part + row, tells where they come from."""
    values = 100 * part + np.arange(classes * ROWS)
    return np.broadcast_to(values[:, None, None, None], (len(values), side, side, 3)).astype("u1")


def features(part, classes=2, shape=(5,)):
    """Features `[n, *shape]` in [0, 1], whose values are (100·part + row) / 255."""
    values = (100 * part + np.arange(classes * ROWS)) / 255
    return np.broadcast_to(values[:, None], (len(values), np.prod(shape))).reshape(-1, *shape)


def names(part, classes=2):
    return [f"{PARTS[part]}{c}" for c in range(classes)]


def labels(part, classes=2):
    return np.repeat(names(part, classes), ROWS)


def class_dict(part, classes=2):
    return {name: list(range(ROWS * c, ROWS * (c + 1))) for c, name in enumerate(names(part))}


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pt(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def of_parts(name, content):
    """A file for each part, `{name: bytes}`, with `content(part)` in it."""
    return {name.format(part): content(number) for number, part in enumerate(PARTS)}


def cache(part, **replaced):
    return pickle.dumps({"image_data": images(part), "class_dict": class_dict(part)} | replaced)


def data_and_labels(part):
    names_of_labels = {"catname2label": {"cat": 0}, "label2catname": {0: "cat"}}
    content = {"data": images(part), "labels": labels(part).tolist()}
    return pickle.dumps(content | names_of_labels, 2)


def of_classes(part):
    """A dictionary from each class to its features."""
    return dict(zip(names(part), np.split(features(part), 2), strict=True))


def channels_first(part):
    return torch.from_numpy(images(part).transpose(0, 3, 1, 2).copy())


# The name of each layout, and the files of it.
LAYOUTS = {
    "mini-ImageNet": of_parts(CACHE, cache),
    "MetaOptNet's CIFAR-FS": of_parts("CIFAR_FS_{}.pickle", data_and_labels),
    "MetaOptNet's mini-ImageNet": {
        "miniImageNet_category_split_train_phase_train.pickle": data_and_labels(0),
        "miniImageNet_category_split_train_phase_val.pickle": b"images of training classes",
        "miniImageNet_category_split_train_phase_test.pickle": b"images of training classes",
        "miniImageNet_category_split_val.pickle": data_and_labels(1),
        "miniImageNet_category_split_test.pickle": data_and_labels(2),
    },
    "tieredImageNet": of_parts("{}_images.npz", lambda part: npz(images=images(part)))
    | of_parts("{}_labels.pkl", lambda part: pickle.dumps({"label_specific": list(labels(part))})),
    "npz of images": of_parts("{}.npz", lambda part: npz(x=images(part), y=labels(part))),
    "npz of features": of_parts("{}.npz", lambda part: npz(x=features(part), y=labels(part))),
    "npy": of_parts("{}_features.npy", lambda part: npy(features(part, shape=(2, 3))))
    | of_parts("{}_labels.npy", lambda part: npy(labels(part))),
    "folders": of_parts("{}/features.npy", lambda part: npy(features(part)))
    | of_parts("{}/labels.npy", lambda part: npy(labels(part))),
    "a file a class": {
        f"{PARTS[part]}/{name}.npy": npy(array)
        for part in range(3)
        for name, array in of_classes(part).items()
    },
    "pt of a pair": of_parts(
        "{}.pt", lambda part: pt((channels_first(part), torch.arange(8) // ROWS + 2 * part))
    ),
    "pt of bfloat16": of_parts(
        "{}.pth",
        lambda part: pt({"x": torch.ones(8, 3).bfloat16(), "y": torch.arange(8) // 4 + 2 * part}),
    ),
    "a pickle of classes": of_parts("{}_emb.pkl", lambda part: pickle.dumps(of_classes(part))),
    "wrapped": of_parts("a/Features_{}.npz", lambda part: npz(**of_classes(part))),
    "validation": {
        path.replace("val", "Validation"): data for path, data in of_parts(CACHE, cache).items()
    },
}


def load(root, **options):
    numbers = {"ways": 2, "shots": 1, "queries": 2, "size": 8}
    return tasks.load("folder", data_root=root, **(numbers | options))


def families(splits):
    return (splits.train, splits.validation, splits.test)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [write_tree, write_tar, write_zip])
def test_every_layout_gives_the_inputs_of_its_classes(tmp_path, layout, write):
    splits = load(write(tmp_path / "data", LAYOUTS[layout]))
    for part, family in enumerate(families(splits)):
        numbered = [str(2 * part), str(2 * part + 1)]
        assert list(family.classes) in (names(part), numbered)
        episodes = family.sample(20, np.random.default_rng(0))
        for inputs, targets in (episodes.support, episodes.query):
            assert inputs.dtype == torch.float32
            assert inputs.shape[2:] == family.input_shape
            if "bfloat16" in layout:
                assert (inputs == 1).all()
                continue
            rows = (inputs.flatten(2)[..., 0] * 255).round().long() - 100 * part
            ids = episodes.labels["classes"].gather(1, targets)
            assert torch.equal(rows // ROWS, ids - 2 * part)


def test_a_class_may_be_called_as_labels_are(tmp_path):
    letters = [*"abcdefghijklmnopqrstuvwxyz", "label"]
    write_tree(tmp_path, {f"{name}.npy": npy(images(0)[:4] + i) for i, name in enumerate(letters)})
    splits = load(tmp_path)
    assert sorted(name for part in families(splits) for name in part.classes) == sorted(letters)


@pytest.mark.parametrize("suffix", ["npz", "pt", "pkl"])
def test_one_file_without_a_split_is_shuffled_or_split_by_text_lists(tmp_path, suffix):
    content = {"x": torch.rand(25 * 4, 3), "y": torch.arange(25).repeat_interleave(4)}
    arrays = {name: value.numpy() for name, value in content.items()}
    data = {"npz": npz(**arrays), "pt": pt(content), "pkl": pickle.dumps(arrays)}[suffix]
    write_tree(tmp_path, {f"one.{suffix}": data})
    splits = load(tmp_path / f"one.{suffix}")
    assert [len(family.classes) for family in families(splits)] == [16, 4, 5]
    assert splits.train.input_shape == (3,)

    lists = {"train.txt": "0\n3\n", "val.txt": "7\n8\n", "test.txt": "24\n1\n"}
    write_tree(tmp_path / "lists", lists)
    splits = load(tmp_path / f"one.{suffix}", split_lists=tmp_path / "lists")
    assert [family.classes for family in families(splits)] == [("0", "3"), ("7", "8"), ("24", "1")]


def test_lists_of_images_beside_arrays_are_passed_over_with_a_warning(tmp_path):
    lists = {f"{part}.csv": f"filename,label\n1.png,{i}\n" for i, part in enumerate(PARTS)}
    data = npz(x=np.zeros((100, 3), np.float32), y=np.arange(100) // 4)
    write_tree(tmp_path, lists | {"one.npz": data})
    with pytest.warns(UserWarning, match=r"train\.csv, val\.csv .* list no images that are here"):
        splits = load(tmp_path)
    assert [len(family.classes) for family in families(splits)] == [16, 4, 5]


def test_images_in_arrays_are_resized_as_files_are(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 8, 9, 14, 3), np.uint8)
    files = of_parts(CACHE, lambda part: cache(part, image_data=pixels[part]))
    write_tree(tmp_path / "arrays", files)
    from PIL import Image

    for part in range(3):
        for row, image in enumerate(pixels[part]):
            path = tmp_path / "files" / PARTS[part] / names(part)[row // ROWS] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    for options in ({"size": 5}, {"size": 8, "color": False}, {"size": 14}):
        expected, got = (load(tmp_path / root, **options) for root in ("files", "arrays"))
        assert torch.equal(got.test.pool.images, expected.test.pool.images)
        assert got.digests == expected.digests


@pytest.mark.parametrize("layout", ["mini-ImageNet", "npz of features", "pt of a pair"])
def test_large_files_are_read_once_and_split_by_lists_all_the_same(
    tmp_path, empty_cache, monkeypatch, layout
):
    root = write_tree(tmp_path / "data", LAYOUTS[layout])
    expected = load(root)
    monkeypatch.setattr(class_images, "CACHED_BYTES", 1)
    built = load(root)
    monkeypatch.setattr(class_images, "array_classes", None)  # It is not called.
    for splits in (built, load(root)):
        assert splits.digests == expected.digests
        for got, whole in zip(families(splits), families(expected), strict=True):
            assert torch.equal(got.pool.images, whole.pool.images)
            assert got.pool.counts.tolist() == whole.pool.counts.tolist()
    assert len(list(empty_cache.iterdir())) == 1

    first, second, third, *others = (name for f in families(expected) for name in f.classes)
    lists = {"train.txt": [second, first], "val.txt": [third, others[0]], "test.txt": others[1:]}
    write_tree(tmp_path / "lists", {name: "\n".join(text) for name, text in lists.items()})
    splits = load(root, split_lists=tmp_path / "lists")
    assert [list(family.classes) for family in families(splits)] == list(lists.values())


def test_features_are_inputs_as_they_are(tmp_path):
    values = np.random.default_rng(0).normal(0, 1e6, (8, 2, 3)).astype(np.float32)
    write_tree(tmp_path, of_parts("{}.npz", lambda part: npz(x=values, y=labels(part))))
    splits = load(tmp_path, size=3)
    assert torch.equal(splits.train.pool.images[:8], torch.from_numpy(values))
    assert splits.train.input_shape == (2, 3)


def test_image_files_go_before_arrays(tmp_path):
    files = {f"c{c}/{i}.png": red_square(c) for c in range(10) for i in range(3)}
    assert load(write_tree(tmp_path, files | LAYOUTS["mini-ImageNet"])).train.input_shape == (
        3,
        8,
        8,
    )
    classes = [name for family in families(load(tmp_path)) for name in family.classes]
    assert sorted(classes) == [f"c{c}" for c in range(10)]


class Command:
    def __reduce__(self):
        return os.system, ("touch called",)


VAL = CACHE.format("val")
REFUSED = {
    "truncated": (cache(1)[:-50], "got 1.* bytes that cannot be read"),
    "empty": (b"", "got 0 bytes that cannot be read"),
    "text": (b"not a pickle", "got 12 bytes that cannot be read"),
    "command": (pickle.dumps(Command()), r"it names \w+\.system, .*was not called"),
    "hidden": (cache(1, more=[Command()]), r"it names \w+\.system, .*was not called"),
    "no classes": (pickle.dumps({"image_data": images(1)}), r"got \['image_data'\]; expected an"),
    "number": (pickle.dumps(3), r"expected an array and its class_dict"),
    "empty class": (cache(1, class_dict={"a": [0, 1, 2], "b": []}), "class 'b' has no rows"),
    "rows beyond": (
        cache(1, class_dict={"a": [0, 1], "b": [7, 8]}),
        "'b' has rows 7 … 8.*0 … 7",
    ),
    "negative row": (cache(1, class_dict={"a": [0, 1, 2], "b": [-1]}), "'b' has rows -1 … -1"),
    "row twice": (cache(1, class_dict={"a": [0, 1, 2], "b": [3, 2]}), "row 2 is listed twice"),
    "list": (cache(1, class_dict=[0, 1]), "got class_dict of type list, expected a dictionary"),
    "text rows": (cache(1, class_dict={"a": ["0"], "b": [1]}), "class 'a' has no rows"),
    "two arrays": (cache(1, flipped=images(1)), r"got \['flipped', 'image_data'\] beside"),
    "no array": (cache(1, image_data=None), "got no array beside the classes"),
    "integers": (cache(1, image_data=images(1).astype(int)), "got int64 of shape .*, expected im"),
    "channels": (cache(1, image_data=np.zeros((8, 5, 5, 4), np.uint8)), "got uint8 of shape"),
    "few labels": (
        pickle.dumps({"x": images(1), "labels": [0, 1]}),
        r"got labels of shape \(2,\), expected \(8,\)",
    ),
    "one hot": (
        pickle.dumps({"x": images(1), "labels": [[0], [1]]}),
        r"expected one array|got labels of shape",
    ),
    "missing label": (
        pickle.dumps({"x": images(1), "y": np.array([0.0] * 6 + [np.nan, 1.0])}),
        r"label 6: got nan, expected a number or name; leave this example out",
    ),
    "missing label in a list": (
        pickle.dumps({"x": images(1), "y": ["a", None, *"abbbbb"]}),
        r"label 1: got None, expected a number or name",
    ),
    "class of train": (cache(1, class_dict=class_dict(0)), "class 'train0' is in train and in val"),
    "class of train with a blank": (
        cache(1, class_dict={"train0 ": [0, 1], "b": [2, 3]}),
        r"classes 'train0' \(train\) and 'train0 ' \(val\) differ in blanks",
    ),
    "features": (cache(1, image_data=features(1)), "got inputs of the types and shapes float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_pickle_is_named_with_its_file(tmp_path, monkeypatch, case):
    data, message = REFUSED[case]
    root = write_tree(tmp_path / "data", LAYOUTS["mini-ImageNet"] | {VAL: data})
    monkeypatch.chdir(tmp_path)
    about_one_file = "class of train" not in case and case != "features"
    where = rf"{VAL}.*" if about_one_file else ""
    with pytest.raises(ValueError, match=f"(?s){where}{message}"):
        load(root)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.pt", pt({"x": Command()}), r"x\.pt: got .* \(it names \w+\.system, .*was not called"),
        ("x.pt", pt({"x": torch.zeros(2, 3)})[:-40], r"x\.pt: got .* bytes that cannot be read"),
        ("x.npy", npy(np.array([Command()])), r"x\.npy: got .* cannot be read \(.*pickle"),
        ("x.npy", npy(np.zeros((2, 3)))[:-1], r"x\.npy: got .* bytes that cannot be read"),
        ("x.npz", npz(x=np.zeros((9, 3)))[:-9], r"x\.npz: got .* bytes that cannot be read"),
        ("x.npz", b"PK", r"x\.npz: got 2 bytes that cannot be read"),
    ],
)
def test_a_damaged_or_unsafe_file_of_any_kind_is_named(tmp_path, monkeypatch, name, data, message):
    write_tree(tmp_path, {name: data})
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=message):
            load(root)
    assert not (tmp_path / "called").exists()


def test_a_class_that_is_called_after_another_part_stays_in_its_folder(tmp_path):
    rng = np.random.default_rng(0)
    called = {
        path: npy(rng.random((ROWS, 5), np.float32))
        for path in ("train/test-tube.npy", "test/training_shoe.npy")
    }
    splits = load(write_tree(tmp_path, LAYOUTS["a file a class"] | called))
    assert "tube" in splits.train.classes
    assert "shoe" in splits.test.classes
    assert [len(family.classes) for family in families(splits)] == [3, 2, 3]


def test_a_part_without_a_file_is_named(tmp_path):
    files = {path: data for path, data in LAYOUTS["mini-ImageNet"].items() if "val" not in path}
    with pytest.raises(ValueError, match=r"mini-imagenet-cache-train\.pkl.* each of train, val"):
        load(write_tree(tmp_path, files))


def test_an_entry_in_two_files_is_refused(tmp_path):
    files = LAYOUTS["mini-ImageNet"] | {"train_copy.pkl": cache(0)}
    with pytest.raises(ValueError, match=r"train_copy\.pkl: 'image_data' is in another file too"):
        load(write_tree(tmp_path, files))


def test_a_class_may_be_called_after_a_part_that_no_other_file_is_called_after(tmp_path):
    rng = np.random.default_rng(0)
    called = ["train", "boat", *"abcdefgh"]
    files = {f"{name}.npy": npy(rng.random((ROWS, 5), np.float32)) for name in called}
    splits = load(write_tree(tmp_path, files), ways=1)
    assert {name for family in families(splits) for name in family.classes} == set(called)


@pytest.mark.parametrize("shape", [(8, 8, 3), (20, 30), (16,)])
@pytest.mark.parametrize("part", ["", "{}/"])
def test_a_file_for_each_example_is_refused(tmp_path, shape, part):
    """The rows of an image or a spectrogram were taken for the examples of a class."""
    kind = np.uint8 if shape[-1] == 3 else np.float32
    files = {
        f"{part.format(split)}{split}-{label}/{split}{label}_{i}.npy": npy(np.ones(shape, kind))
        for split in PARTS
        for label in "ab"
        for i in range(4)
    }
    with pytest.raises(ValueError, match="several arrays in each of several folders, such as"):
        load(write_tree(tmp_path, files))


def test_two_arrays_of_labels_that_differ_are_refused(tmp_path):
    fine = np.concatenate([labels(part) for part in range(3)])
    inputs = np.concatenate([features(part) for part in range(3)])
    coarse = np.array([name[:-1] for name in fine])
    for number, other in enumerate((fine, coarse)):
        root = write_tree(tmp_path / str(number), {"x.npz": npz(x=inputs, labels=fine, y=other)})
        if number == 0:
            assert len(load(root, ways=1).train.classes) == 4
            continue
        with pytest.raises(ValueError, match="labels in 'labels' and others in 'y', expected one"):
            load(root, ways=1)


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
def test_several_parts_in_one_file_are_refused(tmp_path, names):
    inputs, targets = names
    content = {inputs.format(part): features(i) for i, part in enumerate(PARTS)}
    content |= {targets.format(part): labels(i) for i, part in enumerate(PARTS)}
    root = write_tree(tmp_path, {"x.npz": npz(**content)})
    message = rf"got '{targets.format('train')}', the labels of one of several parts, .* train\.npz"
    with pytest.raises(ValueError, match=message):
        load(root)


@pytest.mark.parametrize("form", [tuple, list])
def test_a_file_may_hold_a_pair_of_inputs_and_labels(tmp_path, form):
    def content(part):
        numbers = torch.arange(2 * part, 2 * part + 2).repeat_interleave(ROWS)
        return pt(form([torch.tensor(features(part)).float(), numbers]))

    splits = load(write_tree(tmp_path, of_parts("{}.pt", content)))
    assert torch.equal(splits.train.pool.images[: 2 * ROWS], torch.tensor(features(0)).float())
    assert splits.test.classes == ("4", "5")


def test_a_pt_file_may_hold_arrays_of_numpy(tmp_path):
    for kind, values in (("f4", features), ("u1", images)):
        files = of_parts(
            "{}.pt",
            lambda part, kind=kind, values=values: pt(
                {"x": np.asfortranarray(values(part).astype(kind)), "y": labels(part)}
            ),
        )
        splits = load(write_tree(tmp_path / kind, files))
        expected = torch.from_numpy(values(0).astype(kind))
        expected = expected if kind == "f4" else expected.permute(0, 3, 1, 2)
        assert torch.equal(splits.train.pool.images[:8], expected)
        assert splits.train.classes == ("train0", "train1")


@pytest.mark.parametrize(
    "value", [np.array([{}], object), np.zeros(2, [("a", "i4")])], ids=["objects", "records"]
)
def test_a_pt_file_with_other_arrays_is_refused_without_torchs_advice(tmp_path, value):
    root = write_tree(tmp_path, {"x.pt": pt({"x": value})})
    with pytest.raises(ValueError, match=r"\(it has an array of '[OV]\d', expected numbers or te"):
        load(root)
