"""Random crops, flips and colours of natural images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tasks.episodes import Episodes, Pair, TaskFamily

GREY = (0.299, 0.587, 0.114)  # the shares of red, green and blue in grey (ITU-R BT.601)


class ChangedImages(ABC):
    """A family whose images are changed at random, each in its own way.

    It draws the tasks of `family` and then, from the same generator, the changes. So a batch of a
    sampler has the tasks that it has without the changes, however many workers draw it.

    Args:
        family: Classification tasks of images with values in [0, 1].
        channels: The number of channels that the images have to have.
        expected: What the error says is expected.

    Raises:
        ValueError: The family has other inputs.
    """

    def __init__(self, family: TaskFamily, *, channels: int, expected: str) -> None:
        shape = family.input_shape
        if family.kind != "classification" or len(shape) != 3 or shape[0] != channels:
            raise ValueError(
                f"augment: got {family.name}, {family.kind} of inputs of shape {tuple(shape)}, "
                f"expected {expected}"
            )
        self.family = family
        self.name = family.name
        self.kind = family.kind
        self.input_shape = tuple(shape)
        self.outputs = family.outputs
        # `Splits` compares and identifies families by these.
        self.classes = getattr(family, "classes", ())
        self.class_names = getattr(family, "class_names", self.classes)
        self.pool = getattr(family, "pool", None)

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes:
        """Draw `tasks` tasks. Equal states of `rng` give equal tasks."""
        episodes = self.family.sample(tasks, rng)
        support = self._of_pair(episodes.support, rng)
        return replace(
            episodes,
            support=support,
            query=self._of_pair(episodes.query, rng),
        )

    def _of_pair(self, pair: Pair, rng: np.random.Generator) -> Pair:
        inputs, targets = pair
        images = inputs.flatten(0, 1)
        low, high = (value.item() for value in images.aminmax())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(
                f"augment: got images of {self.name} with values from {low:.3g} to {high:.3g}, "
                "expected values from 0 to 1; standardise them in the model"
            )
        return self.change(images, rng).unflatten(0, inputs.shape[:2]), targets

    @abstractmethod
    def change(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """The images `[n, channels, height, width]`, each changed in its own way."""


class Augmented(ChangedImages):
    """A family whose images are cropped, flipped and coloured at random, each in its own way.

    It is meant for training on natural images. The changes of each support and query image are:

    - a crop of its own size, out of the image with a margin of `padding` pixels by reflection;
    - a horizontal flip, with probability 1/2;
    - brightness, contrast and saturation, each by a factor that is uniform in 1 ± `jitter`.

    Args:
        family: Classification tasks of images with three channels and values in [0, 1]. Written
            characters have one channel, and would be other characters if they were flipped; see
            `Distorted`.
        padding: The margin in pixels, below the smaller side of an image, ≥ 0.
        jitter: How far the factors may be from 1, from 0 to 1.

    Raises:
        ValueError: The family has other inputs, or a number is out of range.

    Example:
        >>> from tasks import FewShot, ImagePool
        >>> images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
        >>> pool = ImagePool.from_sorted(images, counts=[4, 4, 4], names=["a", "b", "c"])
        >>> family = FewShot(pool, ways=2, shots=1, queries=3, name="birds/train")
        >>> Augmented(family).sample(5, np.random.default_rng(0)).query[0].shape
        torch.Size([5, 6, 3, 8, 8])
    """

    def __init__(self, family: TaskFamily, *, padding: int = 4, jitter: float = 0.4) -> None:
        expected = (
            "natural images, (3, height, width); written characters would be other characters if "
            "they were flipped"
        )
        super().__init__(family, channels=3, expected=expected)
        shortest = min(self.input_shape[1:])
        if not 0 <= padding < shortest:
            raise ValueError(
                f"padding: got {padding}, expected from 0 to {shortest - 1}, because the "
                "margin reflects the image"
            )
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter: got {jitter}, expected from 0 to 1")
        self.padding = padding
        self.jitter = jitter

    def change(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """The images, cropped, flipped and coloured."""
        n = len(images)
        corners = rng.integers(0, 2 * self.padding, size=(2, n), endpoint=True)
        top, left = torch.from_numpy(corners - self.padding)
        flips = torch.from_numpy(rng.integers(0, 2, size=n) == 1)
        factors = rng.uniform(1 - self.jitter, 1 + self.jitter, size=(3, n))
        brightness, contrast, saturation = torch.from_numpy(factors).to(images.dtype)

        images = crop_and_flip(images, top, left, flips=flips)
        return colour(images, brightness, contrast, saturation=saturation)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, *, flips: Tensor) -> Tensor:
    """Crops of the size of the images, out of images that go on outside by reflection.

    Pixel (i, j) of a crop is pixel (r(top + i), r(left + j)) of its image, where r reflects at the
    first and the last row or column, as `padding_mode="reflect"` does. Some crops are then flipped.

    Args:
        images: `[n, channels, height, width]`.
        top: The row of the image in which its crop begins, int64 `[n]`, above −height and below
            height.
        left: The column, likewise.
        flips: Which crops are flipped, left to right, bool `[n]`.

    Example:
        >>> image = torch.arange(3.0).reshape(1, 1, 1, 3)
        >>> zero = torch.tensor([0])
        >>> crop_and_flip(image, zero, torch.tensor([-2]), flips=torch.tensor([False]))
        tensor([[[[2., 1., 0.]]]])
    """
    height, width = images.shape[-2:]
    rows = _reflected(top[:, None] + torch.arange(height, device=top.device), height)
    columns = _reflected(left[:, None] + torch.arange(width, device=left.device), width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)

    pixels = width * rows[:, :, None] + columns[:, None, :]  # [n, height, width]
    index = pixels.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).view_as(images)


def colour(images: Tensor, brightness: Tensor, contrast: Tensor, *, saturation: Tensor) -> Tensor:
    """Images of other brightness b, contrast c and saturation s.

    With g the grey of a pixel x, the sum of `GREY` times its channels, the three steps are

        x ← b x,   x ← c x + (1 − c) mean_pixels(g),   x ← s x + (1 − s) g.

    They are torchvision's `ColorJitter`, except that values are clipped to [0, 1] at the end alone.
    Without the clipping, their order does not matter, and together they are an affine map of the
    three channels, c b (s I + (1 − s) 1 gᵀ) x + (1 − c) b mean_pixels(g).

    Args:
        images: `[n, 3, height, width]`, in [0, 1].
        brightness: b, `[n]`.
        contrast: c, `[n]`.
        saturation: s, `[n]`.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        >>> one = torch.ones(1)
        >>> colour(red, 0.5 * one, one, saturation=one).flatten()
        tensor([0.5000, 0.0000, 0.0000])
        >>> colour(red, one, one, saturation=0 * one).flatten()
        tensor([0.2990, 0.2990, 0.2990])
    """
    grey = torch.tensor(GREY, dtype=images.dtype, device=images.device)
    b, c, s = (factor[:, None, None] for factor in (brightness, contrast, saturation))
    identity = torch.eye(3, dtype=images.dtype, device=images.device)
    matrix = c * b * (s * identity + (1 - s) * grey)  # [n, 3, 3]
    mean = (images.mean((2, 3)) @ grey)[:, None, None]
    colours = torch.bmm(matrix, images.flatten(2)).add_((1 - c) * b * mean)
    return colours.clamp_(0, 1).view_as(images)


def _reflected(positions: Tensor, size: int) -> Tensor:
    """The positions in 0 … size − 1 where the reflections of others are."""
    last = size - 1
    return last - (last - positions.abs()).abs()
