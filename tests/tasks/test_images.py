"""Images of every kind: each has the values of a conversion written out here, or is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tasks.images import decode

RAMP = np.arange(8)[None].repeat(8, 0)  # 0 … 7 from left to right
SIDE = 8


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def of_array(array, format="PNG", **options):
    return saved(Image.fromarray(np.ascontiguousarray(array)), format, **options)


def grey(data):
    return decode(data, SIDE, color=False)[..., 0]


def color(data):
    return decode(data, SIDE, color=True)


def tiff(values, bits):
    """A TIFF file of greys `[8, 8]` of some bits each, which Pillow cannot write."""
    text = "".join(f"{value:0{bits}b}" for value in values.ravel())
    pixels = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 8, 279: len(pixels)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def pgm(values, largest):
    return f"P5 8 8 {largest}\n".encode() + values.astype(">u2").tobytes()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_are_taken(format):
    values = (RAMP * 9001).astype(np.uint16)
    assert np.array_equal(grey(of_array(values, format)), values // 256)
    assert np.array_equal(color(of_array(values, format))[..., 1], values // 256)


def test_greys_of_10_and_12_bits_fill_the_range_if_the_file_says_so():
    ten = RAMP * 146 + 1
    assert np.array_equal(grey(pgm(ten, 1023)), ten // 4)
    twelve = RAMP * 585
    assert np.array_equal(grey(tiff(twelve, bits=12)), twelve // 16)


def test_a_dark_pgm_of_16_bits_is_dark():
    """Unlike a PNG, it says how many bits it has."""
    values = RAMP * 300
    assert np.array_equal(grey(pgm(values, 65535)), values // 256)


def test_the_transparent_grey_of_16_bits_is_white():
    values = (RAMP * 9001).astype(np.uint16)
    expected = np.where(values == 9001, 255, values // 256)
    assert np.array_equal(grey(of_array(values, transparency=9001)), expected)


@pytest.mark.parametrize("type", [np.float32, np.int32])
def test_floats_and_long_integers_from_0_to_255_are_8_bits(type):
    values = (RAMP * 36).astype(type)
    assert np.array_equal(grey(of_array(values, "TIFF")), values)
    assert np.array_equal(grey(of_array(0 * values, "TIFF")), 0 * values)


def test_a_palette_gives_its_colours():
    colours = np.random.default_rng(0).integers(0, 256, (8, 3), np.uint8)
    image = Image.fromarray(RAMP.astype(np.uint8))
    image.putpalette(colours.ravel().tolist())
    for format in ("PNG", "GIF", "BMP", "TIFF"):
        assert np.array_equal(color(saved(image, format)), colours[RAMP])


def test_inks_are_taken_from_white():
    """Red is what cyan and black leave of white, (1 − C)(1 − K), and so on."""
    rng = np.random.default_rng(0)
    inks = rng.integers(0, 256, (8, 8, 4), np.uint8)
    image = Image.merge("CMYK", [Image.fromarray(inks[..., i].copy()) for i in range(4)])
    share = inks / 255
    expected = 255 * (1 - share[..., :3]) * (1 - share[..., 3:])
    assert np.abs(color(saved(image, "TIFF")) - expected).max() <= 1  # rounded twice


def test_black_and_white_is_0_and_255():
    image = Image.fromarray(RAMP > 3)
    for format in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(grey(saved(image, format)), 255 * (RAMP > 3))


TURNS = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.T,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
    9: lambda pixels: pixels,  # no such orientation
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_an_image_is_turned_as_its_exif_says(orientation, format):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    as_stored = grey(of_array(pixels, format, **options))
    assert format == "JPEG" or np.array_equal(as_stored, pixels)
    upright = grey(of_array(pixels, format, exif=exif, **options))
    assert np.array_equal(upright, TURNS[orientation](as_stored))


def test_16_bits_are_turned_as_well():
    values = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(grey(of_array(values, exif=exif)), np.rot90(values, -1) // 256)


def test_damaged_exif_leaves_the_pixels_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    whole = of_array(pixels, "JPEG")
    assert np.array_equal(grey(of_array(pixels, "JPEG", exif=b"Exif\0\0nonsense")), grey(whole))


def empty_png(width, height):
    """A PNG file of some size with no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png(header, b"")


def png(header, pixels):
    """A PNG file of a header and of compressed pixels."""
    chunks = {b"IHDR": header, b"IDAT": pixels, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def png16(values):
    """A PNG file of 16-bit colours `[8, 8, 3 or 4]`, which Pillow cannot write."""
    rows = np.zeros((8, 1 + 8 * values.shape[2] * 2), np.uint8)  # the first byte: no filter
    rows[:, 1:] = values.astype(">u2").view(np.uint8).reshape(8, -1)
    kind = {3: 2, 4: 6}[values.shape[2]]
    return png(struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0), zlib.compress(rows.tobytes()))


@pytest.mark.parametrize("channels", [3, 4])
def test_of_colours_of_16_bits_the_upper_8_are_taken(channels):
    values = np.random.default_rng(0).integers(0, 2**16, (8, 8, channels))
    values[..., 3:] = 65535  # opaque
    assert np.array_equal(color(png16(values)), values[..., :3] // 256)
    assert not color(png16(0 * values + [0, 0, 0, 65535][:channels])).any()


REFUSED = {
    "10 bits in 16": (
        of_array((RAMP * 146).astype(np.uint16)),
        "got 16-bit greys that use the lower 12 bits alone, .*; scale its values",
    ),
    "10 bits in 16, of colours": (
        png16(np.random.default_rng(0).integers(0, 1024, (8, 8, 3))),
        "got 16-bit colours that use the lower 12 bits alone",
    ),
    "floats to 1": (
        of_array((RAMP / 7).astype(np.float32), "TIFF"),
        "got an image of float32 from 0.0 to 1.0, expected .* values from 0 to 255; scale",
    ),
    "floats to 1000": (of_array((RAMP * 140.0).astype(np.float32), "TIFF"), r"from 0\.0 to 980\.0"),
    "negative floats": (of_array((RAMP - 1.0).astype(np.float32), "TIFF"), r"from -1\.0 to 6\.0"),
    "NaN": (of_array((RAMP * np.nan).astype(np.float32), "TIFF"), "from nan to nan"),
    "long integers": (of_array((RAMP * 9000).astype(np.int32), "TIFF"), "int32 from 0 to 63000"),
    "Lab": (saved(Image.new("LAB", (8, 8)), "TIFF"), "got an image of Pillow's mode 'LAB'"),
    "large": (empty_png(10_000, 10_000), "got an image that is too large .*100000000.*shrink it"),
    "very large": (empty_png(60_000, 60_000), "got an image that is too large .*3600000000"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "do not decode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_right_is_refused_by_name(case):
    data, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        decode(data, SIDE, color=True)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_image_is_read_or_refused_in_one_way(format):
    rng = np.random.default_rng(0)
    whole = of_array(rng.integers(0, 256, (8, 8, 3), np.uint8), format)
    messages = []
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        try:
            assert color(bytes(data[: rng.integers(1, 2 * len(data))])).shape == (8, 8, 3)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(message.startswith("got ") for message in messages)
