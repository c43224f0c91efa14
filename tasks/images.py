"""Image files of every common kind as small squares of 8 bits, or refused by name."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".bmp",
    ".gif",
    ".webp",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".tif",
    ".tiff",
)
# Images of these formats are not decoded.
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".tga", ".dng", ".cr2", ".nef")
# The formats of IMAGE_SUFFIXES, by Pillow's names. To read PostScript, it would run a program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
EIGHT_BIT_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
TRANSPARENT_MODES = ("LA", "PA", "RGBA")
EXIF_ORIENTATION = 0x0112
BITS_PER_SAMPLE = 258  # a tag of TIFF
PNG_BITS_PER_SAMPLE = 24  # the place of the byte that says so
ALMOST_BLACK = "use the lower 12 bits alone, so that the upper 8 are almost black"
SAVE_AGAIN = "scale its values to 0 … 255 and save it with 8 bits"


def decode(data: bytes, size: int, *, color: bool) -> np.ndarray:
    """Decode the bytes of an image file, and `fit_square` the image.

    Of an animation or of several pages, the first is taken.

    Args:
        data: The content of a file of one of `FORMATS`.
        size: Pixels a side.
        color: Whether the result has three channels (red, green, blue) or one of grey.

    Returns:
        uint8 `[size, size, channels]`.

    Raises:
        ValueError: If the data is empty or damaged, the image has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (89,478,485 unless you change it), or `fit_square` refuses
            it.

    Example:
        >>> decode(b"", 8, color=True)
        Traceback (most recent call last):
            ...
        ValueError: got an empty file, expected an image; replace or remove it
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ValueError("got an empty file, expected an image; replace or remove it")
    try:
        with warnings.catch_warnings():
            # Pillow warns beyond its limit, and raises beyond twice the limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"got an image that is too large ({error}); "
            "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # A damaged image can raise any.
        is_foreign = isinstance(error, UnidentifiedImageError)
        reason = f"they are none of {', '.join(FORMATS)}" if is_foreign else str(error)
        raise ValueError(
            f"got {len(data)} bytes that do not decode ({reason}), "
            "expected an image; replace or remove it"
        ) from error
    _check_depth(image, data)
    return fit_square(image, size, color=color)


def fit_square(image: Image, size: int, *, color: bool) -> np.ndarray:
    """Cut an image to its central square and resize it by Lanczos' filter.

    It is turned upright first, as its EXIF orientation says. Transparent pixels lie on white. Of
    16-bit greys, the upper 8 bits are taken.

    Args:
        image: Of any size: black and white, palette, grey, RGB or CMYK, with or without
            transparency, of 1 to 16 bits a channel. Floats and 32-bit integers from 0 to 255 are
            taken as 8 bits.
        size: Pixels a side.
        color: Whether the result has three channels (red, green, blue) or one of grey.

    Returns:
        uint8 `[size, size, channels]`.

    Raises:
        ValueError: If floats or 32-bit integers lie beyond 0 … 255 or within 0 … 1, only the lower
            12 of 16 bits are used, or colours are of another kind, such as Lab.

    Example:
        >>> from PIL import Image
        >>> fit_square(Image.new("RGB", (9, 5), "red"), 3, color=True)[0, 0].tolist()
        [255, 0, 0]
    """
    from PIL import Image, ImageOps

    converted = _opaque_8_bit(image).convert("RGB" if color else "L")
    upright = _turned_upright(converted, _orientation(image))
    square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(size, size, -1)


def _check_depth(image: Image, data: bytes) -> None:
    """Raise if colours have 16 bits of which 12 are used. Pillow has kept the upper 8 bits."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (8,))[0]
    if image.format == "PNG":
        bits = data[PNG_BITS_PER_SAMPLE]
    is_color = image.mode in ("RGB", "RGBA")
    if bits == 16 and is_color and 0 < np.asarray(image.convert("RGB")).max() < 2**4:
        raise ValueError(f"got 16-bit colours that {ALMOST_BLACK}; {SAVE_AGAIN}")


def _opaque_8_bit(image: Image) -> Image:
    """The image with 8 bits a channel, laid on white if it is transparent."""
    from PIL import Image

    # Pillow scales the greys of a PPM to 16 bits, in mode I. In other files, mode I is 32 bits.
    is_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")
    if is_16_bit or image.mode.startswith("I;16"):
        return Image.fromarray(_upper_8_bits(image))
    if image.mode in ("I", "F"):
        return Image.fromarray(_in_8_bits(np.asarray(image)))
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent)
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"got an image of Pillow's mode {image.mode!r}, expected grey, RGB or CMYK; "
            "save it as RGB"
        )
    return image


def _upper_8_bits(image: Image) -> np.ndarray:
    """The upper 8 bits of greys of 12 or 16 bits, uint8 `[height, width]`."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image)
    largest = int(values.max(initial=0))
    # Cameras of 10 or 12 bits write them into 16. The upper 8 bits would be almost black.
    if bits == 16 and image.format != "PPM" and 0 < largest < 2**12:
        raise ValueError(f"got 16-bit greys that {ALMOST_BLACK}; {SAVE_AGAIN}")
    upper: np.ndarray = (values >> (bits - 8)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        upper[values == transparent] = 255
    return upper


def _in_8_bits(values: np.ndarray) -> np.ndarray:
    """Floats or 32-bit integers from 0 to 255, uint8 `[height, width]`."""
    low = values.min(initial=0)
    high = values.max(initial=0)
    # Values up to 1 would be black, although they probably mean white. NaN fails, too.
    if not (low >= 0 and high <= 255) or 0 < high <= 1:
        raise ValueError(
            f"got an image of {values.dtype} from {low} to {high}, "
            f"expected 8 or 16 bits, or values from 0 to 255; {SAVE_AGAIN}"
        )
    return values.astype(np.uint8)


def _orientation(image: Image) -> int:
    """The number from 1 to 8 by which EXIF says how the camera was held."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # Damaged EXIF can raise any, and the pixels are whole nevertheless.
        return 1


def _turned_upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
