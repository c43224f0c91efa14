"""CIFAR-FS, FC100 and mini-ImageNet in each layout, by their own splits and no other."""

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from image_files import encode, no_network, write_tar, write_tree, write_zip

import tasks
from tasks import cifar100
from tasks.cifar_fs import CIFAR_FS
from tasks.fc100 import FC100

PARTS = ("train", "val", "test")
NAMES = {"train": ["n3", "n0"], "val": ["n5", "n1"], "test": ["n2", "n4"]}
KNOWN = {"cifar-fs": CIFAR_FS.known_parts, "fc100": FC100.known_parts}


def picture(number):
    """`[3, 32, 32]`, all of one colour that tells the number, except for a corner."""
    pixels = np.full((3, 32, 32), [[[number // 256]], [[number % 256]], [[7]]], np.uint8)
    pixels[:, 0, 0] = 200
    return pixels


def number_of(images):
    """The numbers of pictures `[n, 3, height, width]`."""
    return (images[:, 0, -1, -1].int() * 256 + images[:, 1, -1, -1].int()).tolist()


def cifar_pickles():
    """CIFAR-100 as it is published, with 2 training images and 1 test image of each class.

    Image i of class c has the number 3c + i.
    """

    def part(images):
        # Not sorted by class, as in the official files.
        order = [(c, i) for i in images for c in np.random.default_rng(i).permutation(100)]
        data = np.stack([picture(3 * c + i).ravel() for c, i in order])
        return pickle.dumps({"data": data, "fine_labels": [int(c) for c, _ in order]}, protocol=2)

    names = {"fine_label_names": list(cifar100.CLASSES)}
    return {"meta": pickle.dumps(names, protocol=2), "train": part([0, 1]), "test": part([2])}


def archive(path):
    files = {f"cifar-100-python/{name}": data for name, data in cifar_pickles().items()}
    return write_tar(path, files, "gz")


def extracted(root):
    write_tree(root / "cifar-100-python", cifar_pickles())
    return root


def class_images(names, prefix="", suffix="png"):
    return {
        f"{prefix}{name}/{i}.{suffix}": encode(picture(3 * c + i).transpose(1, 2, 0))
        for c, name in enumerate(cifar100.CLASSES if names is None else names)
        for i in range(3)
    }


def load(family, root, **options):
    return tasks.load(family, ways=2, shots=1, queries=2, data_root=root, **options)


def families(splits):
    return (splits.train, splits.validation, splits.test)


def loaded_classes(splits):
    return {p: list(f.classes) for p, f in zip(PARTS, families(splits), strict=True)}


LAYOUTS = {
    "archive": lambda root: archive(root / cifar100.ARCHIVE).parent,
    "the archive itself": lambda root: archive(root / cifar100.ARCHIVE),
    "folder": extracted,
    "the folder itself": lambda root: extracted(root) / "cifar-100-python",
    "class folders": lambda root: write_tree(root, class_images(None, "cifar100/data/")),
    "zip": lambda root: write_zip(root / "data.zip", class_images(None, "data/")),
}


@pytest.mark.parametrize(
    ("family", "layout"),
    [*(("cifar-fs", layout) for layout in LAYOUTS), ("fc100", "archive"), ("fc100", "zip")],
)
def test_cifar_100_is_split_by_the_published_names(tmp_path, empty_cache, family, layout):
    root = LAYOUTS[layout](tmp_path)
    splits = load(family, root)
    assert splits.train.input_shape == (3, 32, 32)
    for part, names in zip(families(splits), KNOWN[family], strict=True):
        assert part.classes == names
        for position, name in enumerate(names):
            c = cifar100.CLASSES.index(name)
            assert number_of(part.pool.images_of(position)) == [3 * c, 3 * c + 1, 3 * c + 2]
    assert "split by the published names of classes into" in splits.source
    assert "published: " not in splits.source


def test_the_published_names_are_all_of_cifar_100_and_fixed():
    """A name that moves by accident would change every reported figure."""
    assert len(cifar100.CLASSES) == len(set(cifar100.CLASSES)) == 100
    assert cifar100.CLASSES[:3] == ("apple", "aquarium_fish", "baby")
    for parts, counts in ((CIFAR_FS.known_parts, (64, 16, 20)), (FC100.known_parts, (60, 20, 20))):
        assert tuple(map(len, parts)) == counts
        assert sorted(name for part in parts for name in part) == list(cifar100.CLASSES)
    superclass_of = {
        name: superclass for superclass, names in cifar100.SUPERCLASSES.items() for name in names
    }
    superclasses = [{superclass_of[name] for name in part} for part in FC100.known_parts]
    assert list(map(len, superclasses)) == [12, 4, 4]
    assert superclasses[2] == {"aquatic_mammals", "insects", "medium_mammals", "people"}


def folders_of(names):
    return {
        f"{names[s]}/{path}": data
        for s, part in enumerate(PARTS)
        for path, data in class_images(sorted(c for p in PARTS for c in NAMES[p])).items()
        if path.split("/")[0] in NAMES[part]
    }


def all_images():
    return class_images([f"n{c}" for c in range(6)], "images/", "jpg")


def lists(suffix, text, names=PARTS):
    return {f"{name}.{suffix}": text(NAMES[part]) for name, part in zip(names, PARTS, strict=True)}


def csv_text(names):
    return "\n".join(["filename,label", *(f"{n}/{i}.jpg,{n}" for n in names for i in range(3))])


def json_text(names):
    paths = [f"/home/me/filelists/images/{n}/{i}.jpg" for n in names for i in range(3)]
    numbers = [number for number in range(len(names)) for _ in range(3)]
    return json.dumps({"label_names": names, "image_names": paths, "image_labels": numbers})


def arrays(part):
    numbers = np.repeat([3 * int(name[1]) for name in NAMES[part]], 3) + [0, 1, 2] * 2
    return np.stack([picture(number).transpose(1, 2, 0) for number in numbers])


def cache_pickle(part):
    first, second = NAMES[part]
    classes = {first: [0, 1, 2], second: [3, 4, 5]}
    return pickle.dumps({"image_data": arrays(part), "class_dict": classes})


def label_pickle(part):
    return pickle.dumps({"data": arrays(part), "labels": np.repeat(NAMES[part], 3).tolist()})


def npz(part):
    file = io.BytesIO()
    np.savez(file, images=arrays(part), labels=np.repeat(NAMES[part], 3))
    return file.getvalue()


DIVIDED = {
    "folders": folders_of(PARTS),
    "other names": folders_of(("base", "val", "novel")),
    "csv": all_images() | lists("csv", csv_text),
    "json": all_images() | lists("json", json_text, ("base", "val", "novel")),
    "text": all_images() | lists("txt", "\n".join),
    "cache pickles": {f"mini-imagenet-cache-{part}.pkl": cache_pickle(part) for part in PARTS},
    "label pickles": {f"CIFAR_FS_{part}.pickle": label_pickle(part) for part in PARTS},
    "npz": {f"fc100-{part}.npz": npz(part) for part in PARTS},
}


FAMILY_OF = {"text": "cifar-fs", "label pickles": "cifar-fs", "folders": "fc100", "npz": "fc100"}


@pytest.mark.parametrize("layout", DIVIDED)
@pytest.mark.parametrize("write", [write_tree, write_tar])
def test_a_split_that_comes_with_the_data_is_used(tmp_path, layout, write):
    family = FAMILY_OF.get(layout, "mini-imagenet")
    files = {
        path: data if isinstance(data, bytes) else data.encode()
        for path, data in DIVIDED[layout].items()
    }
    splits = load(family, write(tmp_path / "data", files), size=16)
    assert {part: sorted(names) for part, names in loaded_classes(splits).items()} == {
        part: sorted(names) for part, names in NAMES.items()
    }
    for part in families(splits):
        for position, name in enumerate(part.classes):
            c = int(name[1])
            assert number_of(part.pool.images_of(position)) == [3 * c, 3 * c + 1, 3 * c + 2]
    assert "into 2 + 2 + 2 classes (published: 6" in splits.source
    assert splits.train.name == f"{family}/train"


@pytest.mark.parametrize("family", ["cifar-fs", "fc100", "mini-imagenet"])
@pytest.mark.parametrize("files", [all_images(), class_images(["n0", "n1"])])
def test_classes_that_nothing_splits_are_refused_and_never_shuffled(tmp_path, family, files):
    message = f"{family}: .* has . classes and nothing that splits them.*take the folder family"
    with pytest.raises(ValueError, match=message):
        load(family, write_tree(tmp_path, files))


def test_lists_that_name_no_class_are_refused_and_named(tmp_path):
    unknown = lists("txt", lambda names: "\n".join(f"no {name}" for name in names))
    write_tree(tmp_path, class_images(None) | unknown)
    message = r"cifar-fs: .* has test\.txt, train\.txt, val\.txt, which name no class, such as 'a"
    with pytest.raises(ValueError, match=message):
        load("cifar-fs", tmp_path)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", ["folders", "csv", "json", "text", "cache pickles", "npz"])
def test_a_part_that_is_missing_is_named(tmp_path, layout, part):
    word = {"train": "base", "test": "novel"}.get(part, part) if layout == "json" else part
    files = {path: data for path, data in DIVIDED[layout].items() if word not in path}
    with pytest.raises(ValueError, match=r"only the split folders|has no \w+\.\w+|each of train"):
        load("mini-imagenet", write_tree(tmp_path, files))


def test_lists_may_lie_elsewhere(tmp_path, empty_cache):
    moved = {"train": ["fox", "bee"], "val": ["boy", "cup"], "test": ["sea", "ray"]}
    write_tree(tmp_path / "lists", {f"{part}.txt": "\n".join(n) for part, n in moved.items()})
    splits = load("cifar-fs", extracted(tmp_path / "data"), split_lists=tmp_path / "lists")
    assert loaded_classes(splits) == moved
    assert "(published: 64 + 16 + 20)" in splits.source


def test_equal_images_in_two_splits_are_told_and_not_refused(tmp_path):
    copy = {"test/n2/copy.png": DIVIDED["folders"]["train/n3/0.png"]}
    splits = load("mini-imagenet", write_tree(tmp_path, DIVIDED["folders"] | copy))
    assert "equal images in two splits: 1, the first being train/n3/0.png" in splits.source


def test_damaged_cifar_100_is_named(tmp_path, empty_cache):
    for name, damaged in (
        ("train", cifar_pickles()["train"][:-99]),
        ("meta", pickle.dumps({"names": []})),
        ("test", pickle.dumps(print)),
    ):
        write_tree(tmp_path / name, cifar_pickles() | {name: damaged})
        with pytest.raises(ValueError, match=rf"{name}: .*download"):
            load("cifar-fs", tmp_path / name)
    (tmp_path / cifar100.ARCHIVE).write_bytes(gzip.compress(b"x" * 9999)[:-20])
    with pytest.raises(ValueError, match=r"tar\.gz: got an unreadable archive"):
        load("fc100", tmp_path)
    with tarfile.open(tmp_path / cifar100.ARCHIVE, "w:gz"):
        pass
    with pytest.raises(ValueError, match="has no meta, train, test; download"):
        load("fc100", tmp_path)


def test_without_a_root_cifar_100_is_downloaded_and_mini_imagenet_is_not(empty_cache, monkeypatch):
    calls = []

    def download_url(url, root, md5):
        calls.append((url, md5))
        empty_cache.mkdir(exist_ok=True)
        archive(empty_cache / cifar100.ARCHIVE)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    assert len(load("fc100", None).test.classes) == 20
    assert calls == [(cifar100.URL, "eb9058c3a382ffc7106e4002c42a8d85")]
    with pytest.raises(FileNotFoundError, match="mini-ImageNet cannot be downloaded"):
        load("mini-imagenet", None)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    with pytest.raises(FileNotFoundError, match=r"could not download it \(no network\); put http"):
        load("cifar-fs", None)
