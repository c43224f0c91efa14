"""MNIST in memory (LeCun et al. 1998), and image sets standardised channel by channel."""

from __future__ import annotations

from pathlib import Path

import torch

from tasks.cache import cache_dir, download
from tasks.examples import Examples

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def mnist(data_root: str | Path | None = None) -> tuple[Examples, Examples]:
    """Read MNIST's 60,000 training digits and 10,000 test digits.

    `data_root`, or its subfolder `mnist`, holds the four idx files in `MNIST/raw/`, as torchvision
    leaves them.

    Args:
        data_root: A folder. If None, torchvision downloads the files into the cache folder.

    Returns:
        The training and the test set: inputs uint8 `[n, 1, 28, 28]`, strokes 255 on 0, and targets
        int64 `[n]`, 0 … 9.

    Raises:
        FileNotFoundError: If a file is missing in `data_root`, or the download fails.
        ValueError: If a file is damaged.

    Example:
        >>> train, test = mnist("folder/with/mnist")  # doctest: +SKIP
        >>> train.inputs.shape, len(test)  # doctest: +SKIP
        (torch.Size([60000, 1, 28, 28]), 10000)
        >>> standardise(train).inputs.dtype  # doctest: +SKIP
        torch.float32
    """
    root = _download_mnist() if data_root is None else _find_mnist(Path(data_root))
    from torchvision.datasets import MNIST

    try:
        train = MNIST(str(root), train=True)
        test = MNIST(str(root), train=False)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{root / 'MNIST' / 'raw'}: got idx files that cannot be read ({error}); "
            "remove them, and copy or download them again"
        ) from error
    return (
        Examples(train.data[:, None], train.targets),
        Examples(test.data[:, None], test.targets),
    )


def standardise(examples: Examples, like: Examples | None = None) -> Examples:
    """Standardise images: (x/255 − mean) / std, with one mean and one std for each channel.

    Args:
        examples: Inputs uint8 `[n, channels, *size]`, as the loaders return them.
        like: The set that mean and (population) std are taken of, such as the training set. If
            None, `examples` itself.

    Returns:
        The same examples with inputs float32 `[n, channels, *size]`.

    Raises:
        ValueError: If inputs are not uint8, the sets differ in the number of channels, or a channel
            of `like` has one value only.

    Example:
        >>> pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        >>> standardise(Examples(pixels, torch.zeros(2))).inputs.flatten()
        tensor([-1.,  1.])
    """
    like = examples if like is None else like
    _check_images("examples", examples, examples)
    _check_images("like", like, examples)

    # Mean and variance of the 256 possible values, weighted by how often each occurs, are exact.
    channels = like.inputs.transpose(0, 1).flatten(1)  # [channels, n·size]
    counts = torch.stack([channel.bincount(minlength=256) for channel in channels])
    frequency = counts.double() / channels.shape[1]
    values = torch.arange(256, device=frequency.device, dtype=torch.float64) / 255
    mean = frequency @ values
    std = (frequency * (values - mean[:, None]) ** 2).sum(1).sqrt()
    if (std == 0).any():
        raise ValueError(
            f"like: got channel {int((std == 0).nonzero()[0])} with one value only, "
            "expected several; "
            "take mean and std from other examples, or leave the channel out"
        )

    inputs = examples.inputs.float().div_(255)
    per_channel = [-1] + [1] * (inputs.ndim - 2)
    mean = mean.to(inputs).view(per_channel)
    std = std.to(inputs).view(per_channel)
    return Examples(inputs.sub_(mean).div_(std), examples.targets)


def _check_images(argument: str, images: Examples, other: Examples) -> None:
    """Raise unless the inputs are uint8 images with as many channels as those of `other`."""
    shape = tuple(images.inputs.shape)
    is_uint8 = images.inputs.dtype == torch.uint8
    if not is_uint8 or len(shape) < 2 or shape[1] != other.inputs.shape[1]:
        raise ValueError(
            f"{argument}: got {images.inputs.dtype} of shape {shape}, "
            "expected torch.uint8 [n, channels, *size], both sets of as many channels; "
            "give what the loaders return"
        )


def _find_mnist(root: Path) -> Path:
    """The folder, `root` or its subfolder, that holds `MNIST/raw` with all files."""
    for folder in (root, root / "mnist"):
        raw = folder / "MNIST" / "raw"
        if all((raw / name).is_file() for name in MNIST_FILES):
            return folder
    raise FileNotFoundError(
        f"data_root: found no MNIST in {root}, "
        f"expected {', '.join(MNIST_FILES)} in MNIST/raw/, there or in mnist/; "
        "leave data_root out to download them"
    )


def _download_mnist() -> Path:
    def fetch() -> None:
        from torchvision.datasets import MNIST

        MNIST(str(cache_dir()), download=True)

    try:
        return _find_mnist(cache_dir())
    except FileNotFoundError:
        files = ", ".join(MNIST_FILES)
        by_hand = f"put {files} into the MNIST/raw/ of a folder"
        download("mnist", fetch, by_hand)
        return cache_dir()
