"""Image files in folders and zips: which are listed, and what is decoded of them."""

import io

import numpy as np
import pytest
from image_files import class_folders, encode, red_square, write_tree, write_zip
from PIL import Image

from tasks.files import Files, content_digest


def test_a_zip_has_the_files_of_its_tree_without_hidden_ones(tmp_path):
    files = class_folders(2)
    hidden = {".DS_Store": b"x", "c00/._0.png": b"x", "__MACOSX/c00/0.png": b"x", ".git/a.png": b""}
    tree = Files(write_tree(tmp_path / "tree", files | hidden))
    zipped = Files(write_zip(tmp_path / "data.zip", files | hidden | {"c00/": b""}))
    assert tree.paths == zipped.paths == sorted(files)
    for path, data in files.items():
        assert tree.read(path) == zipped.read(path) == data


def test_image_paths_end_in_a_known_suffix_of_either_case(tmp_path):
    names = ["a.png", "b.JPG", "c.txt", "d", "e.tiff"]
    files = Files(write_tree(tmp_path, dict.fromkeys(names, b"x")))
    assert files.image_paths == ["a.png", "b.JPG", "e.tiff"]


def test_links_are_followed_except_to_a_folder_that_contains_them(tmp_path):
    write_tree(tmp_path / "elsewhere", class_folders(4))
    root = write_tree(tmp_path / "data", {"c05/0.png": b"x"})
    for c in range(4):
        (root / f"c{c:02d}").symlink_to(tmp_path / "elsewhere" / f"c{c:02d}")
    (root / "c05" / "up").symlink_to(root)
    (root / "c05" / "broken.png").symlink_to(tmp_path / "nowhere")
    assert Files(root).paths == sorted([*class_folders(4), "c05/0.png"])


def test_a_missing_root_and_damaged_zips_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: nothing there, expected a folder, or"):
        Files(tmp_path / "nowhere")
    write_tree(tmp_path, {"data.zip": b"PK not a zip"})
    with pytest.raises(ValueError, match=r"data\.zip: got an unreadable archive"):
        Files(tmp_path / "data.zip")

    path = write_zip(tmp_path / "flip.zip", class_folders(2))
    data = bytearray(path.read_bytes())
    data[data.index(b"c01/1.png") + 30] ^= 255  # within the bytes of this member
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"flip\.zip: c01/1\.png is damaged"):
        Files(path).read("c01/1.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a\.png: got an empty file, expected an image"),
        (b"text", r"a\.png: got 4 bytes that do not decode"),
        (red_square(0)[:45], r"a\.png: got 45 bytes that do not decode"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, data, message):
    files = Files(write_tree(tmp_path, {"a.png": data}))
    with pytest.raises(ValueError, match=message):
        files.image("a.png", 8, color=True)


def test_the_central_square_is_resized_and_grey_is_its_luma(tmp_path):
    stripes = np.zeros((16, 100, 3), np.uint8)
    stripes[:, 30:70] = [200, 0, 0]  # the central square, and what the filter sees beside it
    files = Files(write_tree(tmp_path, {"a.png": encode(stripes)}))
    color = files.image("a.png", 5, color=True)
    assert color.shape == (5, 5, 3)
    assert np.unique(color.reshape(-1, 3), axis=0).tolist() == [[200, 0, 0]]
    grey = files.image("a.png", 5, color=False)
    assert grey.shape == (5, 5, 1)
    assert np.unique(grey).tolist() == [60]  # 0.299 · 200: the luma of ITU-R 601


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_lie_on_white(tmp_path, mode):
    """Black on the left, transparent on the right."""
    alpha = np.where(np.arange(8) < 4, 255, 0).astype(np.uint8)[None].repeat(8, 0)
    image = Image.merge("LA", (Image.new("L", (8, 8), 0), Image.fromarray(alpha)))
    image = image.convert("RGBA").quantize(4) if mode == "P" else image.convert(mode)
    assert decoded_row(tmp_path, image) == [0] * 4 + [255] * 4


def test_the_upper_8_of_16_bits_are_taken(tmp_path):
    greys = np.where(np.arange(8) < 4, 0x3310, 0xCC20).astype(np.uint16)[None].repeat(8, 0)
    assert decoded_row(tmp_path, Image.fromarray(greys)) == [0x33] * 4 + [0xCC] * 4


def decoded_row(folder, image):
    file = io.BytesIO()
    image.save(file, "PNG")
    files = Files(write_tree(folder, {"a.png": file.getvalue()}))
    return files.image("a.png", 8, color=False)[0, :, 0].tolist()


def test_several_images_are_decoded_in_the_order_asked_for(tmp_path):
    files = Files(write_tree(tmp_path, class_folders(3)))
    images = files.images(["c02/1.png", "c00/0.png"], 8, color=True)
    assert images.shape == (2, 8, 8, 3)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [21, 0]


@pytest.mark.parametrize("write", [write_tree, write_zip])
def test_a_digest_changes_with_a_byte_or_a_name_and_with_nothing_else(tmp_path, write):
    one = content_digest(write(tmp_path / "one", {"a.png": b"1", "b.png": b"2"}))
    assert content_digest(write(tmp_path / "same", {"a.png": b"1", "b.png": b"2"})) == one
    for other in ({"a.png": b"1", "b.png": b"3"}, {"a.png": b"1", "c.png": b"2"}):
        assert content_digest(write(tmp_path / str(other), other)) != one
