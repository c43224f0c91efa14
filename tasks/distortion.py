"""Random affine distortions of written characters."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.augmentation import ChangedImages
from tasks.episodes import TaskFamily

# Koch et al. 2015, section 3.4, but for the shift
DEGREES = 10.0
SHEAR = 0.3
SCALE = 0.2
SHIFT = 2 / 28  # of a side


class Distorted(ChangedImages):
    """A family of written characters, each distorted by an affine map of its own.

    It is meant for training. The new image at x, from the centre, is the old one at A x + t,
    interpolated bilinearly. With angle α, shears ρ, scales s (a larger one shrinks) and shifts t,

        A = [[cos α, −sin α], [sin α, cos α]] [[1, ρ₁], [ρ₂, 1]] diag(s₁, s₂).

    Each of these numbers is drawn with probability 1/2, and else leaves the image as it is: α
    uniform in ± 10°, ρ in ± 0.3, s in 1 ± 0.2 (Koch et al. 2015, "Siamese neural networks for
    one-shot image recognition", section 3.4), and t in ± 2/28 of a side. Outside, an image goes on
    as at its edge.

    Args:
        family: Classification tasks of images with one channel and values in [0, 1].

    Raises:
        ValueError: The family has other inputs.

    Example:
        >>> from tasks import FewShot, ImagePool
        >>> images = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8)
        >>> pool = ImagePool.from_sorted(images, counts=[4, 4, 4], names=["a", "b", "c"])
        >>> family = FewShot(pool, ways=2, shots=1, queries=3, name="letters/train")
        >>> Distorted(family).sample(5, np.random.default_rng(0)).query[0].shape
        torch.Size([5, 6, 1, 8, 8])
    """

    def __init__(self, family: TaskFamily) -> None:
        super().__init__(family, channels=1, expected="images with one channel, (1, height, width)")

    def change(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """The images, distorted."""
        matrices, shifts = draw_maps(len(images), rng)
        return distort(images, matrices.to(images.dtype), shifts.to(images.dtype))


def draw_maps(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The matrices A of `n` images, `[n, 2, 2]`, and their shifts t, `[n, 2]`; see `distort`."""
    is_drawn = rng.integers(0, 2, size=(7, n))
    draws = torch.from_numpy(is_drawn * rng.uniform(-1, 1, size=(7, n)))
    angle = draws[0] * np.deg2rad(DEGREES)
    shear = draws[1:3] * SHEAR
    scale = 1 + draws[3:5] * SCALE
    one = torch.ones_like(angle)
    turn = _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    sheared = _matrices(one, shear[0], shear[1], one)
    matrices: Tensor = turn @ sheared @ scale.T.diag_embed()
    return matrices, (draws[5:] * SHIFT).T


def distort(images: Tensor, matrices: Tensor, shifts: Tensor) -> Tensor:
    """Images that at x, in pixels (right, down) from the centre, are the given ones at A x + t.

    Args:
        images: `[n, channels, height, width]`.
        matrices: A, `[n, 2, 2]`.
        shifts: t, in widths and heights of an image, `[n, 2]`.

    Example:
        >>> image = torch.tensor([[[[1.0, 2.0, 3.0]]]])
        >>> distort(image, torch.eye(2)[None], torch.tensor([[1 / 3, 0.0]]))
        tensor([[[[2., 3., 3.]]]])
    """
    height, width = images.shape[-2:]
    # The coordinates of torch go from −1 to 1 along either side.
    half = torch.tensor([width / 2, height / 2], dtype=images.dtype, device=images.device)
    relative = matrices * half / half[:, None]
    maps = torch.cat([relative, 2 * shifts[:, :, None]], dim=2)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    distorted: Tensor = F.grid_sample(
        images,
        grid,
        padding_mode="border",
        align_corners=False,
    )
    return distorted


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """[[a, b], [c, d]] of each image, `[n, 2, 2]`."""
    rows = torch.stack([a, b]), torch.stack([c, d])
    return torch.stack(rows).movedim(2, 0)
