"""Zip and tar archives: each is read as the tree in it, or refused with its name."""

import stat
import tarfile
import zipfile

import numpy as np
import pytest
from image_files import class_folders, red_square, write_tar, write_tree, write_zip

import tasks
from tasks.files import Files, content_digest

FILES = class_folders(3)
HIDDEN = {"._c00": b"x", "c00/.DS_Store": b"x", "__MACOSX/c00/0.png": b"x"}


def tar(compression, **options):
    return lambda path: write_tar(path, FILES | HIDDEN, compression, **options)


def tar_with_folders(path):
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        tree = write_tree(path.parent / "tree", FILES | HIDDEN)
        archive.add(tree, ".")
    return path


ARCHIVES = {
    "data.tar": tar(""),
    "data.tar.gz": tar("gz"),
    "data.tgz": tar("gz"),
    "data.tar.bz2": tar("bz2"),
    "data.tbz2": tar("bz2"),
    "data.tar.xz": tar("xz"),
    "no suffix": tar("gz"),
    "wrong suffix.zip": tar("bz2"),
    "dots.tar": tar("", prefix="./"),
    "folders.tgz": tar_with_folders,
    "data.zip": lambda path: write_zip(path, FILES | HIDDEN | {"c00/": b""}),
    "tar.tar": lambda path: write_zip(path, FILES | HIDDEN),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_has_the_files_of_its_tree_without_hidden_ones(tmp_path, name):
    files = Files(ARCHIVES[name](tmp_path / name))
    assert files.paths == sorted(FILES)
    for path in reversed(files.paths):
        assert files.read(path) == FILES[path]
    images = files.images(["c02/1.png", "c00/0.png", "c01/2.png"], 8, color=True)
    assert images[:, 0, 0, 0].tolist() == [21, 0, 12]


@pytest.mark.parametrize(
    ("compression", "prefix"),
    [("", "data/"), ("gz", ""), ("bz2", "./wrapped/twice/"), ("xz", "data/")],
)
def test_tasks_of_a_tar_are_those_of_its_tree(tmp_path, compression, prefix):
    numbers = {"ways": 2, "shots": 1, "queries": 2, "size": 8}
    write_tree(tmp_path / "tree", class_folders())
    # A tar keeps the order in which its files were added.
    shuffled = dict(reversed(class_folders().items()))
    write_tar(tmp_path / "data", shuffled, compression, prefix)
    tree = tasks.load("folder", data_root=tmp_path / "tree", **numbers)
    packed = tasks.load("folder", data_root=tmp_path / "data", **numbers)
    for one, other in ((tree.train, packed.train), (tree.test, packed.test)):
        assert one.classes == other.classes
        drawn = [family.sample(9, np.random.default_rng(0)) for family in (one, other)]
        assert drawn[0].support[0].equal(drawn[1].support[0])
        assert drawn[0].query[0].equal(drawn[1].query[0])
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "data"}  # nothing extracted


LINKS = {
    "soft": ("c00/9.png", "/etc/passwd", tarfile.SYMTYPE),
    "hard": ("c00/9.png", "c00/0.png", tarfile.LNKTYPE),
    "folder": ("c09", "..", tarfile.SYMTYPE),
    "device": ("c00/9.png", "", tarfile.CHRTYPE),
    "block device": ("c00/9.png", "", tarfile.BLKTYPE),
    "pipe": ("c00/9.png", "", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("compression", ["", "gz"])
def test_links_and_devices_in_a_tar_are_refused_and_not_followed(tmp_path, link, compression):
    path = write_tar(tmp_path / "data.tar", FILES, compression, links=[LINKS[link]])
    name = LINKS[link][0]
    with pytest.raises(ValueError, match=rf"data\.tar: '{name}' is a link or device.*dereference"):
        Files(path)


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("c00/9.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = write_zip(tmp_path / "data.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match=r"data\.zip: 'c00/9\.png' is a link or device"):
        Files(path)


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("name", ["../1.png", "/etc/1.png", "c00/../../1.png", "a/../../b", ".."])
def test_a_path_that_leaves_its_archive_is_refused(tmp_path, write, name):
    path = write(tmp_path / "data", FILES | {name: b"x"})
    with pytest.raises(ValueError, match=r"data: got the path '.*', which leaves the archive"):
        Files(path)


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_file_that_is_packed_twice_is_refused(tmp_path, write):
    """It would be one image in both support and query."""
    path = write(tmp_path / "data", FILES | {"./c00/0.png": red_square(0)})
    with pytest.raises(ValueError, match=r"data: got 'c00/0\.png' twice"):
        Files(path)


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_a_tar_that_breaks_off_is_refused(tmp_path, compression, share):
    # Random bytes, because a tar of images of one colour is compressed to almost nothing.
    rng = np.random.default_rng(0)
    files = {f"c0/{i}.png": rng.bytes(3000) for i in range(12)}
    path = write_tar(tmp_path / "data.tar", files, compression)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"data\.tar: got an unreadable archive .*again"):
        Files(path)


def test_a_tar_that_breaks_off_between_two_files_is_refused(tmp_path):
    path = write_tar(tmp_path / "data.tar", FILES)
    path.write_bytes(path.read_bytes()[: 4 * 1024])  # four headers and four small files
    with pytest.raises(ValueError, match=r"data\.tar: got an unreadable archive \(it breaks off"):
        Files(path)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9999])
def test_a_tar_with_a_changed_byte_is_refused(tmp_path, compression, share):
    rng = np.random.default_rng(0)
    files = {f"c0/{i}.png": rng.bytes(3000) for i in range(12)}
    path = write_tar(tmp_path / "data.tar", files, compression)
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"data\.tar: got an unreadable archive"):
        Files(path)


@pytest.mark.parametrize(
    "data", [b"", b"text", b"PK\x03\x04", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"7z\xbc\xaf"]
)
def test_a_file_that_is_no_archive_is_refused(tmp_path, data):
    write_tree(tmp_path, {"data.tar.gz": data})
    with pytest.raises(ValueError, match=r"data\.tar\.gz: got an unreadable archive.*zip or tar"):
        Files(tmp_path / "data.tar.gz")


def test_an_encrypted_zip_names_its_file(tmp_path):
    path = write_zip(tmp_path / "data.zip", FILES)
    data = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + flags] |= 1  # of the first file: encrypted
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"data\.zip: c00/0\.png is encrypted; unpack"):
        Files(path).read("c00/0.png")


def test_an_archive_has_the_digest_of_its_bytes(tmp_path):
    one = write_tar(tmp_path / "one.tar", FILES)
    other = write_tar(tmp_path / "other.tar", FILES | {"c02/2.png": b"x"})
    assert content_digest(one) != content_digest(other)


def made_on_windows(path):
    """Change a zip so that it says that it was made on a FAT file system."""
    data = bytearray(path.read_bytes())
    place = -1
    while (place := data.find(b"PK\x01\x02", place + 1)) >= 0:
        data[place + 5] = 0
    path.write_bytes(data)
    return path


def without_utf8_flags(path):
    """Change a zip so that it does not say in which code its names are."""
    data = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := data.find(header, place + 1)) >= 0:
            data[place + flags + 1] &= ~8
    path.write_bytes(data)
    return path


def test_backslashes_divide_the_paths_of_a_zip_from_windows_alone(tmp_path):
    names = {path.replace("/", "\\"): data for path, data in FILES.items()}
    elsewhere = Files(write_zip(tmp_path / "unix.zip", names))
    assert elsewhere.paths == sorted(names)
    windows = Files(made_on_windows(write_zip(tmp_path / "windows.zip", names | {"c00\\": b""})))
    assert windows.paths == sorted(FILES)
    assert windows.read("c01/2.png") == FILES["c01/2.png"]
    climbing = made_on_windows(write_zip(tmp_path / "up.zip", {"..\\..\\x.png": b"x"}))
    with pytest.raises(ValueError, match="which leaves the archive"):
        Files(climbing)


def test_names_in_utf8_are_read_whether_or_not_the_zip_says_so(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"Ägypten/é.png": b"1", "a/1.png": b"2"})
    assert Files(path).paths == ["a/1.png", "Ägypten/é.png"]
    files = Files(without_utf8_flags(path))
    assert files.paths == ["a/1.png", "Ägypten/é.png"]
    assert files.read("Ägypten/é.png") == b"1"


def test_names_in_code_page_437_are_read(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"Ä.png": b"1"})
    in_utf8 = "Ä".encode()
    # Two bytes that are no UTF-8: Ä and a capital Gamma.
    path = without_utf8_flags(path)
    path.write_bytes(path.read_bytes().replace(in_utf8, b"\x8e\xe2"))
    assert Files(path).paths == ["ÄΓ.png"]


def test_a_zip_whose_names_are_no_text_is_refused(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"Ä.png": b"1"})
    path.write_bytes(path.read_bytes().replace("Ä".encode(), b"\xff\xfe"))
    with pytest.raises(ValueError, match=r"data\.zip: got an unreadable archive"):
        Files(path)


def test_an_unknown_compression_names_its_file_and_what_to_do(tmp_path):
    path = write_zip(tmp_path / "data.zip", FILES)
    data = bytearray(path.read_bytes())
    for header, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(header) + method] = 9  # of the first file: Deflate64
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"c00/0\.png is packed in a way .*; pack it again as"):
        Files(path).read("c00/0.png")


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.filterwarnings("ignore::UserWarning:zipfile")
def test_a_damaged_archive_is_read_or_refused_in_one_way(tmp_path, write):
    whole = write(tmp_path / "data", FILES).read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        (tmp_path / "data").write_bytes(data)
        try:
            files = Files(tmp_path / "data")
            for path in files.paths:
                files.read(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all("data: " in message and ";" in message for message in messages)
