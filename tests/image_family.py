"""A family of tasks of random images."""

import torch

from tasks import FewShot, ImagePool


def few_shot(channels=3, size=(10, 9), names="abc", split="train"):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, channels, *size), dtype=torch.uint8, generator=generator)
    pool = ImagePool.from_sorted(images, counts=[8, 8, 8], names=names)
    return FewShot(pool, ways=2, shots=1, queries=3, name=f"birds/{split}")
