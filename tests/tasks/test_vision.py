"""MNIST: the real files if they are there, small ones, and the errors; standardised images."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import REAL_DATA, no_network, write_tree

import tasks

DATA = REAL_DATA / "mnist"
IMAGES = np.arange(6 * 28 * 28).reshape(6, 28, 28) % 251
DIGITS = np.array([3, 1, 4, 1, 5, 9])


def idx(array):
    """An array of bytes in the idx format."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_mnist():
    """Four training and two test digits."""
    return {
        "MNIST/raw/train-images-idx3-ubyte": idx(IMAGES[:4]),
        "MNIST/raw/train-labels-idx1-ubyte": idx(DIGITS[:4]),
        "MNIST/raw/t10k-images-idx3-ubyte": idx(IMAGES[4:]),
        "MNIST/raw/t10k-labels-idx1-ubyte": idx(DIGITS[4:]),
    }


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"MNIST is not in {DATA}")
def test_the_real_files_have_their_published_counts_and_means(empty_cache):
    train, test = tasks.mnist(DATA)
    assert train.inputs.shape == (60_000, 1, 28, 28)
    assert test.inputs.shape == (10_000, 1, 28, 28)
    assert train.inputs.dtype == torch.uint8
    assert train.targets.dtype == torch.int64
    assert train.counts() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.counts() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    pixels = train.inputs.float().div_(255)
    assert round(float(pixels.mean()), 4) == 0.1307
    assert round(float(pixels.std()), 4) == 0.3081
    tasks.check_disjoint(train, test)


@pytest.mark.parametrize("source", ["data_root", "an earlier download"])
def test_idx_files_are_read_without_a_download(tmp_path, empty_cache, monkeypatch, source):
    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    if source == "data_root":
        root = write_tree(tmp_path / "data", small_mnist())
    else:
        write_tree(empty_cache, small_mnist())
        root = None
    train, test = tasks.mnist(root)
    assert torch.cat([train.targets, test.targets]).tolist() == DIGITS.tolist()
    assert len(test) == 2
    pixels = torch.cat([train.inputs, test.inputs])
    assert torch.equal(pixels, torch.from_numpy(IMAGES[:, None].astype(np.uint8)))


def test_torchvision_downloads_into_the_cache_folder(empty_cache, monkeypatch):
    def download(dataset):
        write_tree(Path(dataset.root), small_mnist())

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    assert tasks.mnist()[0].targets.tolist() == [3, 1, 4, 1]
    assert (empty_cache / "MNIST" / "raw").is_dir()


def test_without_data_the_error_names_the_files(tmp_path, empty_cache, monkeypatch):
    incomplete = small_mnist()
    del incomplete["MNIST/raw/t10k-labels-idx1-ubyte"]
    message = "data_root: found no MNIST in .*train-images-idx3-ubyte.*MNIST/raw/"
    with pytest.raises(FileNotFoundError, match=message):
        tasks.mnist(write_tree(tmp_path / "data", incomplete))
    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    message = r"mnist: could not download it \(no network\).*data_root"
    with pytest.raises(FileNotFoundError, match=message):
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
def test_a_damaged_file_is_refused(tmp_path, empty_cache, name, data):
    root = write_tree(tmp_path / "data", small_mnist() | {f"MNIST/raw/{name}": data})
    message = "MNIST/raw: got idx files that cannot be read .*remove them"
    with pytest.raises(ValueError, match=message):
        tasks.mnist(root)


def random_images(n, channels, seed):
    """Images of 5 × 7 pixels whose channels have different ranges."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, channels, 5, 7))
    pixels = pixels // rng.integers(1, 6, (channels, 1, 1))
    inputs = torch.from_numpy(pixels.astype(np.uint8))
    return tasks.Examples(inputs, torch.zeros(n, dtype=torch.int64))


@pytest.mark.parametrize("channels", [1, 3])
def test_standardise_is_its_formula_in_each_channel(channels):
    train = random_images(40, channels, seed=0)
    test = random_images(9, channels, seed=1)
    exact = train.inputs.double() / 255
    mean = exact.mean((0, 2, 3), keepdim=True)
    std = exact.std((0, 2, 3), keepdim=True, correction=0)
    for examples, like in ((train, None), (test, train)):
        before = examples.inputs.clone()
        standardised = tasks.standardise(examples, like)
        assert standardised.inputs.dtype == torch.float32
        assert standardised.targets is examples.targets
        expected = (examples.inputs.double() / 255 - mean) / std
        assert torch.allclose(standardised.inputs.double(), expected, rtol=0, atol=2e-6)
        assert torch.equal(examples.inputs, before)


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
            "like: got channel 0 with one value only",
        ),
    ],
)
def test_what_cannot_be_standardised_is_refused(examples, like, message):
    with pytest.raises(ValueError, match=message):
        tasks.standardise(examples, like)
