"""Few-shot classification of printed characters, made from the fonts that matplotlib ships: nothing to download.

A class is a character; its images are 16 faces (DejaVu Sans, Sans Mono and Serif, STIX General, each in four styles)
and 2 affine jitters of each. Only characters that every face has are used, so none is a 'missing glyph' box.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.cache import Arrays, load_or_build
from tasks.episodes import Splits
from tasks.pool import ImagePool, few_shot_splits, shuffled_split

SIZE = 28  # pixels a side
EM = 24.0  # font size in pixels: capitals are about 17 pixels high
LARGEST = 20.0  # larger glyphs (‱, box drawing) shrink to this many pixels, so that jitter keeps them in the frame
JITTERS = 2  # images a face
ROTATION, SHEAR, SCALE, SHIFT = np.radians(10), 0.1, 0.1, 1.5  # largest jitter; shift in pixels
LOOK_ALIKE, SAME_LETTER = 0.41, 0.75  # see `merge_look_alikes`
SEED = 0

_PLATE, _PLATE_EM = (
    128,
    64,
)  # glyphs are drawn once, this large, and every image is resampled from that


def load(*, ways: int, shots: int, queries: int) -> Splits:
    """The glyphs, split by a fixed shuffle of their classes into 64 % train, 16 % validation, 20 % test.

    Images are `[1, 28, 28]`, strokes 1 on 0, and 32 a class. The first call renders them (seconds) into the cache.
    """
    arrays = load_or_build("glyphs-1", render)
    pool = ImagePool.from_sorted(
        torch.from_numpy(arrays["images"]), arrays["counts"], arrays["names"].tolist()
    )
    return few_shot_splits(
        "glyphs", pool, shuffled_split(len(pool), SEED), ways=ways, shots=shots, queries=queries
    )


def render() -> Arrays:
    """Draw every class: `images` uint8 `[classes·32, 1, 28, 28]`, `counts` `[classes]`, `names` `[classes]`."""
    from tqdm import tqdm

    faces = font_files()
    characters = shared_characters(faces)
    plates = [
        draw(face, characters)
        for face in tqdm(faces, desc="glyphs: drawing", leave=False, disable=None)
    ]
    inked = torch.stack([plate.amax((1, 2, 3)) > 0 for plate in plates]).all(0)
    characters = [c for c, visible in zip(characters, inked.tolist(), strict=True) if visible]
    plates = [plate[inked] for plate in plates]
    groups = merge_look_alikes(characters, plates)

    rng = np.random.default_rng(SEED)
    first = [group[0] for group in groups]
    images = [
        warp(plate[first], _placement(plate[first]) @ _jitter(len(first), rng))
        for plate in tqdm(plates, desc="glyphs: jitter", leave=False, disable=None)
        for _ in range(JITTERS)
    ]
    return {
        "images": torch.stack(images, 1).flatten(0, 1).mul(255).round().byte().numpy(),
        "counts": np.full(len(groups), len(images)),
        "names": np.array([" ".join(_code(characters[i]) for i in group) for group in groups]),
    }


def font_files() -> list[Path]:
    """The 16 font files."""
    import matplotlib

    styles = ("", "-Bold", "-Oblique", "-BoldOblique")
    names = [f"DejaVuSans{style}" for style in styles]
    names += [f"DejaVuSansMono{style}" for style in styles]
    names += [f"DejaVuSerif{style.replace('Oblique', 'Italic')}" for style in styles]
    names += [f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")]
    return [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf") for name in names]


def shared_characters(faces: Sequence[Path]) -> list[str]:
    """Characters in the character map of every face, in Unicode order; spaces and control characters are left out."""
    from matplotlib.ft2font import FT2Font

    codes = set.intersection(*(set(FT2Font(str(face)).get_charmap()) for face in faces))
    return [chr(code) for code in sorted(codes) if unicodedata.category(chr(code))[0] not in "ZC"]


def draw(face: Path, characters: Sequence[str]) -> Tensor:
    """Each character large, its ink centred on a square plate: float `[characters, 1, plate, plate]` in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(face), _PLATE_EM, layout_engine=ImageFont.Layout.BASIC)
    plates = np.zeros((len(characters), 1, _PLATE, _PLATE), dtype=np.uint8)
    for plate, character in zip(plates[:, 0], characters, strict=True):
        page = Image.new("L", (_PLATE, _PLATE))
        ImageDraw.Draw(page).text(
            (_PLATE // 2, _PLATE // 2), character, fill=255, font=font, anchor="mm"
        )
        if box := page.getbbox():
            left, top = (_PLATE - (box[2] - box[0])) // 2, (_PLATE - (box[3] - box[1])) // 2
            plate[top : top + box[3] - box[1], left : left + box[2] - box[0]] = page.crop(box)
    return torch.from_numpy(plates).float().div_(255)


def merge_look_alikes(characters: Sequence[str], plates: Sequence[Tensor]) -> list[list[int]]:
    """Group characters that are one drawing up to position and size: A of Latin, Greek and Cyrillic, or c and C.

    The distance of two glyphs is their largest difference at any point, both scaled to the frame and blurred (the blur
    forgives outlines a pixel apart). A pair is alike in a face at a distance of at most `LOOK_ALIKE`, or, as thin and
    bold strokes of the same letter lie further apart, `SAME_LETTER` where Unicode calls one the other in another case
    or size (c and C, h and ʰ). Pairs alike in at least half of the faces are one class, directly or through others.
    Accents are small beside their letter, so characters with different combining marks (È, É) are never one class.

    Args:
        characters: the n characters.
        plates: for each face `[n, 1, plate, plate]`, ink in every one.

    Returns:
        Groups of character positions, each ascending, in order of their first.
    """
    folded = np.array([unicodedata.normalize("NFKC", c).casefold() for c in characters])
    marks = np.array(
        [
            "".join(filter(unicodedata.combining, unicodedata.normalize("NFD", c)))
            for c in characters
        ]
    )
    limit = torch.from_numpy(np.where(folded[:, None] == folded, SAME_LETTER, LOOK_ALIKE))
    limit[torch.from_numpy(marks[:, None] != marks)] = -1
    alike = torch.stack([_distances(plate) <= limit for plate in plates]).sum(0) * 2 >= len(plates)

    leader = torch.arange(len(characters))
    while True:  # each takes the least leader among those like it, until nothing changes
        least = torch.where(alike, leader, len(leader)).amin(1)
        if torch.equal(least, leader):
            break
        leader = least
    groups: dict[int, list[int]] = {}
    for position, head in enumerate(leader.tolist()):
        groups.setdefault(head, []).append(position)
    return list(groups.values())


def _distances(plates: Tensor) -> Tensor:
    """Distances of all pairs of glyphs in one face, `[n, n]`."""
    fitted = warp(plates, _scaling(_extent(plates) / SIZE))
    blurred = F.avg_pool2d(fitted, 3, stride=2, padding=1).flatten(1)
    return torch.cdist(blurred, blurred, p=float("inf"))


def warp(plates: Tensor, frame_to_plate: Tensor) -> Tensor:
    """Resample plates `[n, 1, plate, plate]` into frames `[n, 1, 28, 28]`, anti-aliased.

    `frame_to_plate` `[n, 2, 3]` maps pixels from the centre of a frame to pixels from the centre of its plate.
    """
    finer = 2  # samples a side of a pixel
    units = torch.tensor(
        [SIZE / _PLATE, SIZE / _PLATE, 2 / _PLATE]
    )  # grid coordinates run from -1 to 1
    grid = F.affine_grid(
        frame_to_plate * units, [len(plates), 1, SIZE * finer, SIZE * finer], align_corners=False
    )
    return F.avg_pool2d(F.grid_sample(plates, grid, align_corners=False), finer)


def _extent(plates: Tensor) -> Tensor:
    """Larger side of each glyph's ink in plate pixels, `[n]`."""
    rows, columns = (plates.amax(axes) > 0 for axes in ((1, 3), (1, 2)))
    return torch.maximum(rows.sum(1), columns.sum(1)).float()


def _scaling(scale: Tensor) -> Tensor:
    """Maps `[n, 2, 3]` that multiply by `scale` `[n]`."""
    return scale[:, None, None] * torch.eye(2, 3)


def _placement(plates: Tensor) -> Tensor:
    """Frame to plate at the font size `EM`, `[n, 2, 2]`; larger glyphs are shrunk to `LARGEST`."""
    return _scaling(torch.clamp(_extent(plates) / LARGEST, min=_PLATE_EM / EM))[:, :, :2]


def _jitter(count: int, rng: np.random.Generator) -> Tensor:
    """Random rotation, shear, scale and shift, `[count, 2, 3]`."""
    most = np.array([ROTATION, SHEAR, SCALE, SHIFT, SHIFT])
    angle, shear, scale, x, y = most[:, None] * rng.uniform(-1, 1, (5, count))
    cos, sin, size = np.cos(angle), np.sin(angle), np.exp(scale)
    rows = [
        [size * cos, size * (shear * cos - sin), x],
        [size * sin, size * (shear * sin + cos), y],
    ]
    return torch.from_numpy(np.array(rows)).permute(2, 0, 1).float()


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"
