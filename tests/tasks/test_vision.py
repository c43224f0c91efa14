"""CIFAR-10 and MNIST: from the real files where they are, from small ones of each layout, and what is said without."""

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import tasks
from tasks import vision, cifar

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CIFAR10, MNIST = DATA / "cifar10", DATA / "mnist"
needs_cifar10 = pytest.mark.skipif(
    not CIFAR10.is_dir(), reason=f"the CIFAR-10 zips are not in {CIFAR10}"
)
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason=f"MNIST is not in {MNIST}")

EACH = {
    "train": 5,
    "test": 1,
}  # images a class of the small copies, so ten a file in the binary one


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(cache, monkeypatch):
    monkeypatch.setattr(cifar, "PER_CLASS", EACH)
    return cache


def no_network(*args, **options):
    raise OSError("no network")


def encoded(pixels, format="PNG"):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def picture(red):
    """`[32, 32, 3]`: all of one red, rows counted in green and columns in blue."""
    rows, columns = np.mgrid[:32, :32]
    return np.stack([np.full_like(rows, red), rows, columns], 2).astype(np.uint8)


def images(format="PNG", offset=0):
    """Image i of class c has red 10c + i + offset, so a pixel names both."""
    return {
        f"{part}/{name}/{i}.{format.lower()}": encoded(picture(10 * c + i + offset), format)
        for part, each in EACH.items()
        for c, name in enumerate(cifar.CLASSES)
        for i in range(each)
    }


def binary():
    """File j of the training set holds image j of every class; red as in `images`."""

    def record(c, red):
        return bytes([c]) + picture(red).transpose(2, 0, 1).tobytes()

    files = {
        f"data_batch_{j + 1}.bin": b"".join(record(c, 10 * c + j) for c in range(10))
        for j in range(5)
    }
    return files | {
        "test_batch.bin": b"".join(record(c, 10 * c) for c in range(10)),
        "readme.html": b"x",
    }


def write(root, files):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def write_zips(root, files, prefix=""):
    root.mkdir(parents=True, exist_ok=True)
    for part in EACH:
        with zipfile.ZipFile(root / f"{part}.zip", "w") as file:
            for path, data in files.items():
                if path.startswith(part):
                    file.writestr(prefix + path, data)
    return root


def write_archive(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path.parent


def check_small(train, test):
    for part, each in ((train, EACH["train"]), (test, EACH["test"])):
        assert part.inputs.shape == (10 * each, 3, 32, 32)
        assert part.inputs.dtype == torch.uint8
        assert part.inputs.is_contiguous()
        assert part.targets.dtype == torch.int64
        assert part.counts() == [each] * 10
        assert torch.equal(part.inputs[:, 0, 5, 9] // 10, part.targets.to(torch.uint8))
        assert part.inputs[:, 0].flatten(1).unique(dim=1).shape[1] == 1
        assert part.inputs[:, 0, 0, 0].unique().numel() == len(part)
        assert (part.inputs[:, 1] == torch.arange(32)[:, None]).all()
        assert (part.inputs[:, 2] == torch.arange(32)).all()


@needs_cifar10
def test_the_real_cifar10_zips(cache, monkeypatch):
    """test.zip to the pixel; of train.zip, which takes a quarter of a minute to decode, all but the decoding."""
    decode = vision._decode
    monkeypatch.setattr(
        vision,
        "_decode",
        lambda files, paths: (
            decode(files, paths)
            if len(paths) == 10_000
            else {"images": np.zeros((len(paths), 1), np.uint8)}
        ),
    )
    train, test = tasks.cifar10(DATA)
    assert train.counts() == [5000] * 10
    assert test.counts() == [1000] * 10
    assert test.inputs.shape == (10_000, 3, 32, 32)
    means = test.inputs.transpose(0, 1).flatten(1).double().mean(1) / 255
    assert torch.allclose(
        means, torch.tensor([0.4942, 0.4851, 0.4504], dtype=torch.float64), atol=5e-4
    )

    from PIL import Image

    with zipfile.ZipFile(CIFAR10 / "test.zip") as file:
        frog = np.asarray(Image.open(io.BytesIO(file.read("test/frog/0123.jpg"))))
    assert cifar.CLASSES[test.targets[6123]] == "frog"
    assert np.array_equal(test.inputs[6123].permute(1, 2, 0).numpy(), frog)

    monkeypatch.setattr(vision, "_decode", None)
    assert torch.equal(tasks.cifar10(CIFAR10)[1].inputs, test.inputs)


@needs_mnist
@pytest.mark.parametrize("root", [MNIST, DATA])
def test_the_real_mnist(root, cache):
    train, test = tasks.mnist(root)
    assert train.inputs.shape == (60_000, 1, 28, 28)
    assert test.inputs.shape == (10_000, 1, 28, 28)
    assert train.inputs.dtype == torch.uint8
    assert train.targets.dtype == torch.int64
    assert train.counts() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.counts() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    scaled = train.inputs.double() / 255
    assert (round(float(scaled.mean()), 4), round(float(scaled.std()), 4)) == (0.1307, 0.3081)
    tasks.check_disjoint(train, test)


@pytest.mark.parametrize("below", ["", "cifar10"])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_the_binary_version_is_read_exactly(tmp_path, small, below, inner):
    write(tmp_path / "data" / below / inner, binary())
    train, test = tasks.cifar10(tmp_path / "data")
    check_small(train, test)
    assert train.targets.tolist() == [*range(10)] * 5  # file by file
    assert train.inputs[::10, 0, 0, 0].tolist() == [*range(5)]
    assert not small.exists()


def test_the_binary_archive_is_read_without_being_extracted(tmp_path, small):
    root = write_archive(tmp_path / "data" / "cifar-10-binary.tar.gz", binary())
    check_small(*tasks.cifar10(root))
    assert [path.name for path in root.iterdir()] == ["cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("format", ["PNG", "BMP", "JPEG"])
def test_class_folders_of_images_are_read_as_trees_and_as_zips(tmp_path, small, format):
    files = images(format)
    rubbish = {"train/.DS_Store": b"x", "train/frog/readme.txt": b"x"}
    one = tasks.cifar10(write(tmp_path / "tree", files | rubbish))
    others = [
        tasks.cifar10(write_zips(tmp_path / "zips" / "cifar10", files).parent),
        tasks.cifar10(write_zips(tmp_path / "wrapped", files, prefix="CIFAR-10-images/")),
    ]
    if format != "JPEG":
        check_small(*one)
    for other in others:
        for part, same in zip(one, other, strict=True):
            assert torch.equal(part.inputs, same.inputs)
            assert torch.equal(part.targets, same.targets)
    assert one[0].targets.tolist() == [c for c in range(10) for _ in range(5)]


@pytest.mark.parametrize("layout", [write, write_zips])
def test_decoded_images_are_cached_by_what_they_were_decoded_from(
    tmp_path, small, monkeypatch, layout
):
    exact = layout(tmp_path / "exact", images("BMP"))
    other = layout(tmp_path / "other", images("BMP", offset=5))  # of the same names and sizes
    first, second = tasks.cifar10(exact), tasks.cifar10(other)
    assert len(list(small.glob("cifar10-images-*.npz"))) == 4
    monkeypatch.setattr(vision, "_decode", None)
    for again, before, red in ((tasks.cifar10(exact), first, 0), (tasks.cifar10(other), second, 5)):
        assert torch.equal(again[0].inputs, before[0].inputs)
        assert again[0].inputs[0, 0, 0, 0] == red


def test_the_exact_version_comes_before_images(tmp_path, small):
    write(tmp_path / "data", images("BMP", offset=5))
    assert tasks.cifar10(tmp_path / "data")[0].inputs[0, 0, 0, 0] == 5
    write(tmp_path / "data" / "cifar-10-batches-bin", binary())
    check_small(*tasks.cifar10(tmp_path / "data"))


def test_cifar10_is_downloaded_as_the_binary_archive_with_its_checksum(small, monkeypatch):
    asked = []

    def download(url, root, md5):
        asked.append((url, root, md5))
        write_archive(Path(root) / url.rsplit("/", 1)[-1], binary())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    check_small(*tasks.cifar10())
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert asked == [(url, str(small), "c32a1d4ab5d03f1284b67883e8d87530")]


def without(files, path):
    return {name: data for name, data in files.items() if name != path}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            without(images(), "train/cat/3.png"),
            r"data/train: got 4 images of 'cat', expected 5: 5 each of airplane, .*, truck; download or extract",
        ),
        (without(images(), "test/truck/0.png"), r"data/test: got 0 images of 'truck', expected 1"),
        (
            {"train/a.txt": b"x", "test/a.txt": b"x"},
            r"data/train: got 0 images of 'airplane', expected 5",
        ),
        (
            images() | {"train/plane/0.png": encoded(picture(0))},
            r"got 1 images of 'plane', expected 0",
        ),
        (images() | {"train/0.png": encoded(picture(0))}, r"got 1 images of '', expected 0"),
        (images() | {"train/dog/1.png": b"x"}, r"dog/1\.png: got 1 bytes that do not decode"),
        (
            without(binary(), "data_batch_3.bin"),
            r"data_batch_3\.bin: got no bytes, expected records of 3073",
        ),
        (without(binary(), "test_batch.bin"), r"test_batch\.bin: got no bytes"),
        (
            binary() | {"data_batch_1.bin": b"\0" * 3072},
            r"data_batch_1\.bin: got 3072 bytes, expected records of",
        ),
        (
            binary() | {"data_batch_1.bin": b"\0" * 30730},
            r"got 14 images of 'airplane', expected 5",
        ),
        (
            binary() | {"data_batch_5.bin": binary()["data_batch_5.bin"] + b"\12" * 3073},
            "got 1 images of 'class 10', expected 0",
        ),
        (
            {"cifar-10-binary.tar.gz": b"no archive"},
            r"binary\.tar\.gz: got an unreadable archive .*download it again",
        ),
        ({"cifar-10-binary.tar.gz": gzip.compress(b"x" * 9999)[:-20]}, "got an unreadable archive"),
    ],
)
def test_incomplete_and_damaged_cifar10_is_named_and_not_cached(tmp_path, small, files, message):
    with pytest.raises(ValueError, match=message):
        tasks.cifar10(write(tmp_path / "data", files))
    assert len(list(small.glob("*"))) == 0


def test_an_archive_cut_short_is_named(tmp_path, small):
    root = write_archive(tmp_path / "data" / "cifar-10-binary.tar.gz", binary())
    whole = (root / "cifar-10-binary.tar.gz").read_bytes()
    (root / "cifar-10-binary.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="got an unreadable archive"):
        tasks.cifar10(root)


def test_without_cifar10_the_message_says_the_layouts_and_the_source(tmp_path, small, monkeypatch):
    write(tmp_path / "data", {"train.zip": b"", "cifar-10-batches-py/data_batch_1": b"a pickle"})
    with pytest.raises(
        FileNotFoundError,
        match=r"data_root: found no CIFAR-10 in .*data_batch_1\.bin.*train\.zip.*https://.*binary",
    ):
        tasks.cifar10(tmp_path / "data")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    with pytest.raises(
        FileNotFoundError,
        match=r"cifar10: could not download it \(no network\); put https.*data_root",
    ):
        tasks.cifar10()


def idx(array):
    return (
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def small_mnist():
    pixels, digits = np.arange(6 * 28 * 28).reshape(6, 28, 28) % 251, np.array([3, 1, 4, 1, 5, 9])
    parts = {"train": slice(0, 4), "t10k": slice(4, 6)}
    return {
        f"MNIST/raw/{part}-images-idx3-ubyte": idx(pixels[at]) for part, at in parts.items()
    } | {f"MNIST/raw/{part}-labels-idx1-ubyte": idx(digits[at]) for part, at in parts.items()}


@pytest.mark.parametrize("source", ["data_root", "cache"])
def test_idx_files_are_read_from_data_root_and_from_an_earlier_download(
    tmp_path, cache, monkeypatch, source
):
    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    root = write(tmp_path / "data" if source == "data_root" else cache, small_mnist())
    train, test = tasks.mnist(root if source == "data_root" else None)
    assert (train.targets.tolist(), test.targets.tolist()) == ([3, 1, 4, 1], [5, 9])
    both = torch.cat([train.inputs, test.inputs])
    assert torch.equal(both, (torch.arange(6 * 28 * 28) % 251).to(torch.uint8).view(6, 1, 28, 28))


def test_mnist_is_downloaded_by_torchvision_into_the_cache_folder(cache, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.MNIST.download",
        lambda dataset: write(Path(dataset.root), small_mnist()),
    )
    assert tasks.mnist()[0].targets.tolist() == [3, 1, 4, 1]
    assert (cache / "MNIST" / "raw").is_dir()


def test_without_mnist_the_message_says_the_files(tmp_path, cache, monkeypatch):
    incomplete = without(small_mnist(), "MNIST/raw/t10k-labels-idx1-ubyte")
    with pytest.raises(
        FileNotFoundError,
        match=r"data_root: found no MNIST in .*train-images-idx3-ubyte.*MNIST/raw/",
    ):
        tasks.mnist(write(tmp_path / "data", incomplete))
    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    with pytest.raises(
        FileNotFoundError, match=r"mnist: could not download it \(no network\).*data_root"
    ):
        tasks.mnist()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", idx(np.zeros((4, 28, 28)))[:-1]),
        ("t10k-images-idx3-ubyte", idx(np.zeros(4))),
        ("t10k-labels-idx1-ubyte", b"<html>not found</html>"),
    ],
)
def test_damaged_mnist_is_named(tmp_path, cache, name, data):
    with pytest.raises(
        ValueError, match=r"MNIST/raw: got idx files that cannot be read .*remove them"
    ):
        tasks.mnist(write(tmp_path / "data", small_mnist() | {f"MNIST/raw/{name}": data}))


def random_images(n, channels, seed):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (n, channels, 5, 7)) // random.integers(1, 6, (channels, 1, 1))
    return tasks.Examples(
        torch.from_numpy(pixels.astype(np.uint8)), torch.zeros(n, dtype=torch.int64)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_standardise_is_its_formula_per_channel(channels):
    train, test = random_images(40, channels, 0), random_images(9, channels, 1)
    exact = train.inputs.double().numpy() / 255
    mean, std = exact.mean((0, 2, 3), keepdims=True), exact.std((0, 2, 3), keepdims=True)
    for part, done in (
        (train, tasks.standardise(train)),
        (test, tasks.standardise(test, like=train)),
    ):
        assert done.inputs.dtype == torch.float32
        assert done.targets is part.targets
        expected = torch.from_numpy((part.inputs.numpy() / 255.0 - mean) / std)
        assert torch.allclose(done.inputs.double(), expected, rtol=0, atol=2e-6)
        assert part.inputs.dtype == torch.uint8


@pytest.mark.parametrize(
    ("examples", "like", "message"),
    [
        (
            tasks.Examples(torch.rand(2, 3, 4, 4), torch.zeros(2)),
            None,
            r"examples: got torch\.float32 of shape",
        ),
        (
            random_images(2, 3, 0),
            tasks.standardise(random_images(2, 3, 0)),
            r"like: got torch\.float32 of shape",
        ),
        (
            random_images(2, 3, 0),
            random_images(2, 1, 0),
            r"like: got torch\.uint8 of shape \(2, 1, 5, 7\)",
        ),
        (
            tasks.Examples(torch.zeros(2, dtype=torch.uint8), torch.zeros(2)),
            None,
            r"examples: got .* shape \(2,\)",
        ),
        (
            tasks.Examples(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8), torch.zeros(2)),
            None,
            "channel 0 with one",
        ),
    ],
)
def test_what_cannot_be_standardised_is_refused(examples, like, message):
    with pytest.raises(ValueError, match=message):
        tasks.standardise(examples, like)
