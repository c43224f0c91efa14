"""Few-shot classification of printed characters, rendered from the fonts that matplotlib ships.

Nothing is downloaded. A class is a character. Its images are 16 faces (DejaVu Sans, Sans Mono and
Serif, STIX General, each in four styles) and 2 affine jitters of each. Only characters that every
face has are used, so that none is a 'missing glyph' box.

Glyphs are drawn once, large, on square plates. Every image, a frame, is resampled from a plate.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.cache import Arrays, load_or_build, progress
from tasks.episodes import Splits
from tasks.few_shot import few_shot_splits, shuffled_split
from tasks.pool import ImagePool

SIDE = 28  # of a frame, in pixels
EM = 24.0  # font size in a frame, in pixels: capitals are about 17 pixels high
# Larger glyphs (‱, box drawing) shrink to this many frame pixels, so that jitter keeps them inside.
LARGEST = 20.0
JITTERS = 2  # images of each face
MAX_ROTATION = np.radians(10)
MAX_SHEAR = 0.1
MAX_LOG_SCALE = 0.1
MAX_SHIFT = 1.5  # frame pixels
# Largest distances within a class, see `merge_look_alikes`.
LOOK_ALIKE = 0.41
SAME_LETTER = 0.75
SEED = 0

PLATE_SIDE = 128  # pixels
PLATE_EM = 64  # font size on a plate, in pixels


def load(*, ways: int, shots: int, queries: int) -> Splits:
    """Few-shot tasks of printed characters. See `tasks.FewShot` for shapes and types.

    Images are `[1, 28, 28]`, strokes 1 on 0. A class has 32 images. A fixed shuffle splits the
    classes into 64 % train, 16 % validation and 20 % test. The first call renders the images, which
    takes some seconds, and caches them.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.

    Raises:
        ValueError: If the classes cannot give such tasks.
    """
    arrays = load_or_build("glyphs-1", render)
    images = torch.from_numpy(arrays["images"])
    pool = ImagePool.from_sorted(images, arrays["counts"], arrays["names"].tolist())
    split = shuffled_split(len(pool), SEED)
    return few_shot_splits(
        "glyphs",
        pool,
        split,
        ways=ways,
        shots=shots,
        queries=queries,
    )


def render() -> Arrays:
    """Render the images of every class.

    Returns:
        `images`, uint8 `[classes·32, 1, 28, 28]`, sorted by class; `counts`, int64 `[classes]`, 32
        each; and `names`, `[classes]`, the code points of the characters of a class, such as
        "U+0041 U+0391 U+0410".
    """
    faces = font_files()
    characters = shared_characters(faces)
    bar = progress(faces, "glyphs: drawing")
    plates = [draw(face, characters) for face in bar]
    inked = [plate.amax((1, 2, 3)) > 0 for plate in plates]
    visible = torch.stack(inked).all(0)  # in every face
    characters = [characters[i] for i in visible.nonzero().flatten()]
    plates = [plate[visible] for plate in plates]
    groups = merge_look_alikes(characters, plates)

    rng = np.random.default_rng(SEED)
    first = [group[0] for group in groups]
    images = []
    for plate in progress(plates, "glyphs: jitter"):
        glyphs = plate[first]
        placement = _placement(glyphs)
        for _ in range(JITTERS):
            images.append(warp(glyphs, placement @ jitter(len(glyphs), rng)))
    by_class = torch.stack(images, 1).flatten(0, 1)
    codes = [[f"U+{ord(characters[i]):04X}" for i in group] for group in groups]
    return {
        "images": by_class.mul(255).round().byte().numpy(),
        "counts": np.full(len(groups), len(images)),
        "names": np.array([" ".join(group) for group in codes]),
    }


def font_files() -> list[Path]:
    """The 16 font files, in a fixed order."""
    import matplotlib

    styles = ("", "-Bold", "-Oblique", "-BoldOblique")
    serif_styles = ("", "-Bold", "-Italic", "-BoldItalic")
    stix_styles = ("", "Bol", "Italic", "BolIta")
    names = [f"DejaVuSans{style}" for style in styles]
    names += [f"DejaVuSansMono{style}" for style in styles]
    names += [f"DejaVuSerif{style}" for style in serif_styles]
    names += [f"STIXGeneral{style}" for style in stix_styles]
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return [folder / f"{name}.ttf" for name in names]


def shared_characters(faces: Sequence[Path]) -> list[str]:
    """The characters that every face has, in Unicode order, without spaces and control characters.

    Example:
        >>> "A" in shared_characters(font_files())
        True
    """
    from matplotlib.ft2font import FT2Font

    codes = [set(FT2Font(str(face)).get_charmap()) for face in faces]
    characters = map(chr, sorted(set.intersection(*codes)))
    return [c for c in characters if unicodedata.category(c)[0] not in "ZC"]


def draw(face: Path, characters: Sequence[str]) -> Tensor:
    """Draw each character on a plate of its own, with its ink in the centre.

    Returns:
        uint8 `[characters, 1, 128, 128]`, ink 255 on 0. A character without ink is blank.

    Example:
        >>> draw(font_files()[0], "Rg").shape
        torch.Size([2, 1, 128, 128])
    """
    from PIL import Image, ImageDraw, ImageFont

    layout = ImageFont.Layout.BASIC
    font = ImageFont.truetype(str(face), PLATE_EM, layout_engine=layout)
    middle = (PLATE_SIDE // 2, PLATE_SIDE // 2)
    shape = (len(characters), 1, PLATE_SIDE, PLATE_SIDE)
    plates = np.zeros(shape, dtype=np.uint8)
    for plate, character in zip(plates[:, 0], characters, strict=True):
        page = Image.new("L", (PLATE_SIDE, PLATE_SIDE))
        pen = ImageDraw.Draw(page)
        pen.text(middle, character, fill=255, font=font, anchor="mm")
        box = page.getbbox()
        if box is not None:
            ink = np.asarray(page.crop(box))
            height, width = ink.shape
            top = (PLATE_SIDE - height) // 2
            left = (PLATE_SIDE - width) // 2
            plate[top : top + height, left : left + width] = ink
    return torch.from_numpy(plates)


def merge_look_alikes(characters: Sequence[str], plates: Sequence[Tensor]) -> list[list[int]]:
    """Group characters that differ in position and size only: Latin, Greek and Cyrillic A, or c, C.

    The distance of two glyphs is their largest difference at any point, after both are scaled to
    the frame and blurred. (The blur forgives outlines that are a pixel apart.) In a face, two
    characters are alike if their distance is at most

    - `SAME_LETTER`, if Unicode calls them one letter in two cases or sizes (c and C, h and ʰ),
      since thin and bold strokes of a letter lie further apart;
    - `LOOK_ALIKE` otherwise.

    Characters that are alike in at least half of the faces are one class, directly or through
    others. Characters with different combining marks (È, É) never are alike, because accents are
    small beside their letter.

    Args:
        characters: The n characters.
        plates: For each face, uint8 `[n, 1, 128, 128]`, with some ink on every plate.

    Returns:
        Groups of positions in `characters`, ascending, in the order of their first.
    """
    letters = np.array([_letter(c) for c in characters])
    marks = np.array([_combining_marks(c) for c in characters])
    first, second = np.triu_indices(len(characters), 1)  # of each pair
    limit = np.where(letters[first] == letters[second], SAME_LETTER, LOOK_ALIKE)
    limit[marks[first] != marks[second]] = -1  # no distance is below 0
    limits = torch.from_numpy(limit)
    faces = torch.stack([_distances(plate) <= limits for plate in plates])
    alike = torch.eye(len(characters), dtype=torch.bool)
    alike[first, second] = faces.sum(0) * 2 >= len(plates)
    alike |= alike.T.clone()

    # Connected components: each takes the least leader among those like it, until none changes.
    leader = torch.arange(len(characters))
    while True:
        least = torch.where(alike, leader, len(leader)).amin(1)
        if torch.equal(least, leader):
            break
        leader = least
    groups = defaultdict(list)
    for position, head in enumerate(leader.tolist()):
        groups[head].append(position)
    return list(groups.values())


def warp(plates: Tensor, frame_to_plate: Tensor) -> Tensor:
    """Resample plates into frames, without aliasing.

    Args:
        plates: uint8 `[n, 1, 128, 128]`, ink 255 on 0.
        frame_to_plate: Affine maps `[n, 2, 3]`, from pixels relative to the centre of a frame to
            pixels relative to the centre of its plate.

    Returns:
        float32 `[n, 1, 28, 28]`, ink 1 on 0.

    Example:
        >>> shrink = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
        >>> warp(torch.full((1, 1, 128, 128), 255, dtype=torch.uint8), shrink).mean()
        tensor(1.)
    """
    samples = 2  # a side of a frame pixel
    # Grid coordinates run from -1 to 1, on the frame and on the plate.
    ratio = SIDE / PLATE_SIDE
    units = torch.tensor([ratio, ratio, 2 / PLATE_SIDE])
    frames = []
    # A few plates at a time stay in the processor's cache.
    for few, maps in zip(plates.split(64), frame_to_plate.split(64), strict=True):
        shape = [len(few), 1, SIDE * samples, SIDE * samples]
        grid = F.affine_grid(maps * units, shape, align_corners=False)
        finer = F.grid_sample(few.float() / 255, grid, align_corners=False)
        frames.append(F.avg_pool2d(finer, samples))
    return torch.cat(frames)


def jitter(count: int, rng: np.random.Generator) -> Tensor:
    """Random rotations, shears, scalings and shifts, uniform up to their largest sizes.

    Returns:
        Affine maps of frame pixels, float32 `[count, 2, 3]`.

    Example:
        >>> jitter(5, np.random.default_rng(0)).shape
        torch.Size([5, 2, 3])
    """
    largest = [MAX_ROTATION, MAX_SHEAR, MAX_LOG_SCALE, MAX_SHIFT, MAX_SHIFT]
    drawn = np.array(largest)[:, None] * rng.uniform(-1, 1, (5, count))
    angle, shear, log_scale, x, y = drawn
    cos = np.cos(angle)
    sin = np.sin(angle)
    scale = np.exp(log_scale)
    rows = [
        [scale * cos, scale * (shear * cos - sin), x],
        [scale * sin, scale * (shear * sin + cos), y],
    ]
    return torch.from_numpy(np.array(rows)).permute(2, 0, 1).float()


def _distances(plates: Tensor) -> Tensor:
    """The distances of all pairs of n glyphs in one face, `[n·(n − 1)/2]`, in `pdist`'s order."""
    fitted = warp(plates, _scaling(_extent(plates) / SIDE))
    blurred = F.avg_pool2d(fitted, 3, stride=2, padding=1).flatten(1)
    return F.pdist(blurred, p=float("inf"))


def _extent(plates: Tensor) -> Tensor:
    """The larger side of each glyph's ink in plate pixels, `[n]`."""
    rows = (plates.amax((1, 3)) > 0).sum(1)
    columns = (plates.amax((1, 2)) > 0).sum(1)
    return torch.maximum(rows, columns).float()


def _scaling(scale: Tensor) -> Tensor:
    """Affine maps `[n, 2, 3]` that multiply by `scale` `[n]`."""
    return scale[:, None, None] * torch.eye(2, 3)


def _placement(plates: Tensor) -> Tensor:
    """Linear maps from frame to plate, `[n, 2, 2]`, that keep every glyph within `LARGEST`."""
    scale = torch.clamp(_extent(plates) / LARGEST, min=PLATE_EM / EM)
    return _scaling(scale)[:, :, :2]


def _letter(character: str) -> str:
    """What characters that differ in case or size only have in common."""
    return unicodedata.normalize("NFKC", character).casefold()


def _combining_marks(character: str) -> str:
    """The accents of a character, such as the acute of É."""
    decomposed = unicodedata.normalize("NFD", character)
    return "".join(filter(unicodedata.combining, decomposed))
