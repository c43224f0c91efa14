"""Image files in folders and zips: which are listed, and what is decoded of them."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from image_files import class_folders, encode, red_square, write_tree, write_zip
from PIL import Image

import tasks
from tasks.files import Files, content_digest


def test_a_zip_has_the_files_of_its_tree_without_hidden_ones(tmp_path):
    files = class_folders(2)
    hidden = {".DS_Store": b"x", "c00/._0.png": b"x", "__MACOSX/c00/0.png": b"x", ".git/a.png": b""}
    tree = Files(write_tree(tmp_path / "tree", files | hidden))
    zipped = Files(write_zip(tmp_path / "data.zip", files | hidden | {"c00/": b""}))
    assert tree.paths == zipped.paths == sorted(files)
    for path, data in files.items():
        assert tree.read(path) == zipped.read(path) == data


def test_the_plots_of_a_training_run_are_no_data(tmp_path):
    files = class_folders(2)
    run = dict.fromkeys(["config.json", "checkpoint.pt", "metrics.jsonl", "curves.png"], b"x")
    in_data = {f"runs/folder-ridge-0/{name}": data for name, data in run.items()}
    assert Files(write_tree(tmp_path / "tree", files | in_data)).paths == sorted(files)
    # Of a class, some of these names may be those of other files.
    others = {"c00/config.json": b"x", "c00/checkpoint.pt": b"x"}
    assert Files(write_tree(tmp_path / "other", files | others)).paths == sorted(files | others)
    assert Files(write_tree(tmp_path / "run", run)).paths == sorted(run)


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


def linked_folders(root, links):
    """Four classes, and links from paths below `root` to others."""
    write_tree(root, class_folders(4))
    for path, target in links.items():
        (root / path).symlink_to(target if target.startswith("/") else root / target)
    return root


@pytest.mark.parametrize(
    ("links", "circles"),
    [
        ({"c00/top": "."}, True),
        ({"c00/self": "c00"}, True),
        ({"c00/system": "/"}, True),
        ({"c00/system": "/etc/.."}, True),
        ({"c00/loop.png": "c00/loop.png"}, True),
        ({"c00/x": "c01"}, False),
        ({"c00/x": "c01", "c01/y": "c00"}, False),
        ({f"c{a:02d}/{b}": f"c{b:02d}" for a in range(4) for b in range(4) if a != b}, False),
    ],
)
def test_circles_end_and_a_folder_that_two_paths_lead_to_is_named(tmp_path, links, circles):
    root = linked_folders(tmp_path / "data", links)
    if circles:
        assert Files(root).paths == sorted(class_folders(4))
    else:
        with pytest.raises(ValueError, match=r"data: c0\d and c0\d/\w are one folder.*remove the"):
            Files(root)


def test_circles_through_another_folder_end(tmp_path):
    other = write_tree(tmp_path / "other", {"1.png": b"x"})
    root = linked_folders(tmp_path / "data", {"c04": str(other)})
    for name, target in {"back": root, "up": tmp_path, "system": "/"}.items():
        (other / name).symlink_to(target)
    assert Files(root).paths == sorted([*class_folders(4), "c04/1.png"])


def test_an_image_that_two_paths_lead_to_is_named(tmp_path):
    root = linked_folders(tmp_path / "data", {"c00/copy.png": "c01/2.png"})
    files = Files(root)
    with pytest.raises(
        ValueError, match=r"data: c00/copy\.png and c01/2\.png are one file.*remove"
    ):
        files.images(files.image_paths, 8, color=True)
    # Other files, such as a list, may have two names.
    (root / "readme.txt").symlink_to(root / "c01" / "2.png")
    assert files.read("c01/2.png") == Files(root).read("readme.txt")


def test_a_stamp_changes_with_a_file_its_name_and_its_time(tmp_path):
    root = write_tree(tmp_path / "data", {"a.png": b"1", "b.png": b"2"})
    files = Files(root)
    stamps = [files.stamp(["a.png"]), files.stamp(["b.png"]), files.stamp(files.paths)]
    assert files.stamp(["a.png"]) == stamps[0]
    before = (root / "a.png").stat()
    (root / "a.png").write_bytes(b"3")
    os.utime(root / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    stamps += [files.stamp(["a.png"]), files.stamp(files.paths)]
    assert len(set(stamps)) == 5
    assert files.stamp(["b.png"]) == stamps[1]
    zipped = Files(write_zip(tmp_path / "data.zip", class_folders(2)))
    assert zipped.stamp(zipped.paths) != zipped.stamp(zipped.paths[1:])
    assert zipped.bytes_of(zipped.paths) == (tmp_path / "data.zip").stat().st_size
    assert files.bytes_of(files.paths) == 2


@pytest.mark.parametrize("name", [b"caf\xe9", "café".encode(), "cafe\u0301".encode(), b"a b"])
def test_names_of_any_bytes_are_read(tmp_path, name):
    folder = os.path.join(os.fsencode(write_tree(tmp_path / "data", class_folders(12))), name)
    os.rename(os.fsencode(tmp_path / "data" / "c00"), folder)
    splits = tasks.load("folder", ways=2, shots=1, queries=2, size=8, data_root=tmp_path / "data")
    families = (splits.train, splits.validation, splits.test)
    assert sum(len(family.classes) for family in families) == 12
    assert len(set(splits.digests.values())) == 3
    assert len(content_digest(tmp_path / "data")) == 16


def test_a_missing_root_and_damaged_zips_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: nothing there, expected a folder, or"):
        Files(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=re.escape(str(Path.cwd() / "nowhere"))):
        Files(Path("nowhere"))
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
