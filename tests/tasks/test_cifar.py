"""CIFAR-10: the real images if they are there, small copies of each layout, and the errors."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import REAL_DATA, encode, no_network, write_tree, write_zip
from PIL import Image

import tasks
from tasks import cifar
from tasks.files import Files

DATA = REAL_DATA / "cifar10"
ARCHIVE = "cifar-10-binary.tar.gz"
PER_CLASS = {"train": 5, "test": 1}  # images of the small copies


@pytest.fixture
def small(empty_cache, monkeypatch):
    """Expect as many images as the small copies have."""
    monkeypatch.setattr(cifar, "PER_CLASS", PER_CLASS)
    return empty_cache


def picture(red):
    """`[32, 32, 3]`: all of one red, rows counted in green and columns in blue."""
    rows, columns = np.mgrid[:32, :32]
    return np.stack([np.full_like(rows, red), rows, columns], 2).astype(np.uint8)


def class_images(format="PNG", offset=0):
    """Image i of class c has red 10c + i + offset, so that a pixel tells both."""
    return {
        f"{part}/{name}/{i}.{format.lower()}": encode(picture(10 * c + i + offset), format)
        for part, count in PER_CLASS.items()
        for c, name in enumerate(cifar.CLASSES)
        for i in range(count)
    }


def binary_files():
    """File j of the training set holds image j of every class, with the red of `class_images`."""

    def record(c, red):
        return bytes([c]) + picture(red).transpose(2, 0, 1).tobytes()

    files = {
        f"data_batch_{j + 1}.bin": b"".join(record(c, 10 * c + j) for c in range(10))
        for j in range(5)
    }
    files["test_batch.bin"] = b"".join(record(c, 10 * c) for c in range(10))
    files["readme.html"] = b"x"
    return files


def without(files, name):
    return {path: data for path, data in files.items() if path != name}


def write_zips(root, files, prefix=""):
    """train.zip and test.zip, with the files of each part below `prefix`."""
    for part in PER_CLASS:
        members = {prefix + path: data for path, data in files.items() if path.startswith(part)}
        write_zip(root / f"{part}.zip", members)
    return root


def write_archive(root, files):
    """The official archive, in the folder `root`, which is returned."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / ARCHIVE, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return root


def assert_small_copies(train, test):
    """Both sets hold exactly the pictures of `class_images`."""
    for part, count in ((train, PER_CLASS["train"]), (test, PER_CLASS["test"])):
        assert part.inputs.shape == (10 * count, 3, 32, 32)
        assert part.inputs.dtype == torch.uint8
        assert part.inputs.is_contiguous()
        assert part.targets.dtype == torch.int64
        assert part.counts() == [count] * 10
        red = part.inputs[:, 0]
        assert torch.equal(red[:, 5, 9] // 10, part.targets.to(torch.uint8))
        assert (red == red[:, :1, :1]).all()
        assert red[:, 0, 0].unique().numel() == len(part)
        assert (part.inputs[:, 1] == torch.arange(32)[:, None]).all()
        assert (part.inputs[:, 2] == torch.arange(32)).all()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the CIFAR-10 zips are not in {DATA}")
def test_the_real_zips_have_their_published_counts_and_pixels(empty_cache, monkeypatch):
    """To the pixel, for an image of each class in each part. The others are not decoded."""
    decode = Files.images

    def decode_the_24th_of_each_class(files, paths, size, *, color):
        images = np.zeros((len(paths), 32, 32, 3), np.uint8)
        each = len(paths) // 10
        images[23::each] = decode(files, paths[23::each], size, color=color)
        return images

    monkeypatch.setattr(Files, "images", decode_the_24th_of_each_class)
    sets = dict(zip(("train", "test"), tasks.cifar10(DATA.parent), strict=True))
    for part, each in (("train", 5000), ("test", 1000)):
        examples = sets[part]
        assert examples.counts() == [each] * 10
        assert examples.inputs.shape == (10 * each, 3, 32, 32)
        with zipfile.ZipFile(DATA / f"{part}.zip") as file:
            for c, name in enumerate(cifar.CLASSES):
                file_of_image = io.BytesIO(file.read(f"{part}/{name}/0023.jpg"))
                row = c * each + 23
                assert examples.targets[row] == c
                image = examples.inputs[row].permute(1, 2, 0)
                assert np.array_equal(image.numpy(), np.asarray(Image.open(file_of_image)))


@pytest.mark.parametrize("below", ["", "cifar10"])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_the_binary_version_is_read_exactly_and_not_cached(tmp_path, small, below, inner):
    write_tree(tmp_path / "data" / below / inner, binary_files())
    train, test = tasks.cifar10(tmp_path / "data")
    assert_small_copies(train, test)
    assert train.targets.tolist() == [*range(10)] * 5  # file by file
    assert train.inputs[::10, 0, 0, 0].tolist() == [*range(5)]
    assert not small.exists()


def test_the_binary_archive_is_read_without_being_extracted(tmp_path, small):
    root = write_archive(tmp_path / "data", binary_files())
    assert_small_copies(*tasks.cifar10(root))
    assert [path.name for path in root.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("format", ["PNG", "BMP", "JPEG"])
def test_class_folders_of_images_are_read_as_trees_and_as_zips(tmp_path, small, format):
    files = class_images(format)
    others = {"train/.DS_Store": b"x", "train/frog/readme.txt": b"x"}
    write_tree(tmp_path / "tree", files | others)
    write_zips(tmp_path / "zips" / "cifar10", files)
    write_zips(tmp_path / "wrapped", files, prefix="CIFAR-10-images/")
    tree = tasks.cifar10(tmp_path / "tree")
    if format != "JPEG":  # JPEG is lossy
        assert_small_copies(*tree)
    assert tree[0].targets.tolist() == [c for c in range(10) for _ in range(5)]
    for name in ("zips", "wrapped"):
        for part, same in zip(tree, tasks.cifar10(tmp_path / name), strict=True):
            assert torch.equal(part.inputs, same.inputs)
            assert torch.equal(part.targets, same.targets)


@pytest.mark.parametrize("write", [write_tree, write_zips])
def test_decoded_images_are_cached_by_what_they_were_decoded_from(
    tmp_path, small, monkeypatch, write
):
    """The files of both sources have the same names and sizes."""
    roots = {
        offset: write(tmp_path / str(offset), class_images("BMP", offset)) for offset in (0, 5)
    }
    first = {offset: tasks.cifar10(root)[0] for offset, root in roots.items()}
    assert len(list(small.glob("cifar10-images-*.arrays"))) == 4
    monkeypatch.setattr(Files, "images", None)
    for offset, root in roots.items():
        again, _ = tasks.cifar10(root)
        assert torch.equal(again.inputs, first[offset].inputs)
        assert again.inputs[0, 0, 0, 0] == offset


def test_the_binary_version_comes_before_images(tmp_path, small):
    root = write_tree(tmp_path / "data", class_images("BMP", offset=5))
    assert tasks.cifar10(root)[0].inputs[0, 0, 0, 0] == 5
    write_tree(root / "cifar-10-batches-bin", binary_files())
    assert_small_copies(*tasks.cifar10(root))


def test_the_binary_archive_is_downloaded_with_its_checksum(small, monkeypatch):
    calls = []

    def download_url(url, root, md5):
        calls.append((url, root, md5))
        write_archive(Path(root), binary_files())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    assert_small_copies(*tasks.cifar10())
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert calls == [(url, str(small), "c32a1d4ab5d03f1284b67883e8d87530")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            without(class_images(), "train/cat/3.png"),
            "data/train: got 4 images of 'cat', expected 5: "
            "5 each of airplane, .*, truck; download or extract",
        ),
        (
            without(class_images(), "test/truck/0.png"),
            "data/test: got 0 images of 'truck', expected 1",
        ),
        (
            {"train/a.txt": b"x", "test/a.txt": b"x"},
            "data/train: got 0 images of 'airplane', expected 5",
        ),
        (
            class_images() | {"train/plane/0.png": encode(picture(0))},
            "got 1 images of 'plane', expected 0",
        ),
        (class_images() | {"train/0.png": encode(picture(0))}, "got 1 images of '', expected 0"),
        (class_images() | {"train/dog/1.png": b"x"}, r"dog/1\.png: got 1 bytes that do not decode"),
        (
            without(binary_files(), "data_batch_3.bin"),
            r"data_batch_3\.bin: got no bytes, expected records of 3073",
        ),
        (without(binary_files(), "test_batch.bin"), r"test_batch\.bin: got no bytes"),
        (
            binary_files() | {"data_batch_1.bin": bytes(3072)},
            r"data_batch_1\.bin: got 3072 bytes, expected records of",
        ),
        (
            binary_files() | {"data_batch_1.bin": bytes(30730)},
            "got 14 images of 'airplane', expected 5",
        ),
        (
            binary_files()
            | {"data_batch_5.bin": binary_files()["data_batch_5.bin"] + b"\12" * 3073},
            "got 1 images of 'class 10', expected 0",
        ),
        ({ARCHIVE: b"no archive"}, r"tar\.gz: got an unreadable archive .*download it again"),
        ({ARCHIVE: gzip.compress(b"x" * 9999)[:-20]}, "got an unreadable archive"),
    ],
)
def test_incomplete_and_damaged_data_is_named_and_not_cached(tmp_path, small, files, message):
    with pytest.raises(ValueError, match=message):
        tasks.cifar10(write_tree(tmp_path / "data", files))
    assert len(list(small.glob("*"))) == 0


def test_an_archive_cut_short_is_named(tmp_path, small):
    root = write_archive(tmp_path / "data", binary_files())
    whole = (root / ARCHIVE).read_bytes()
    (root / ARCHIVE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="got an unreadable archive"):
        tasks.cifar10(root)


def test_without_data_the_error_says_the_layouts_and_the_source(tmp_path, small, monkeypatch):
    others = {"train.zip": b"", "cifar-10-batches-py/data_batch_1": b"a pickle"}
    write_tree(tmp_path / "data", others)
    message = r"data_root: found no CIFAR-10 in .*data_batch_1\.bin.*train\.zip.*https://.*binary"
    with pytest.raises(FileNotFoundError, match=message):
        tasks.cifar10(tmp_path / "data")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    message = r"cifar10: could not download it \(no network\); put https.*data_root"
    with pytest.raises(FileNotFoundError, match=message):
        tasks.cifar10()


def test_an_archive_with_a_file_in_two_folders_is_refused(tmp_path, small):
    root = write_archive(tmp_path, binary_files() | {"copy/test_batch.bin": b"x"})
    message = r"got test_batch\.bin in two folders, expected https://.*download it again"
    with pytest.raises(ValueError, match=message):
        tasks.cifar10(root)
