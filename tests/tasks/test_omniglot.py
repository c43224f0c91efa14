"""Omniglot: the real zips if they are there, small trees, and the errors without data."""

import io
import zipfile

import numpy as np
import pytest
from image_files import REAL_DATA, encode, no_network, write_tree
from PIL import Image

import tasks
from tasks import omniglot

DATA = REAL_DATA / "omniglot"
PAPER = 255
INK = 0


@pytest.fixture
def load(real_omniglot):
    return lambda **options: tasks.load("omniglot", data_root=real_omniglot, **options)


@pytest.fixture
def two_characters(monkeypatch):
    """Expect two characters in each set, as `small_tree` has them."""
    monkeypatch.setattr(omniglot, "CHARACTERS", {"images_background": 2, "images_evaluation": 2})


def small_tree(root, drawing, drawings=20):
    """Two characters in each set, whose drawings all have the same bytes."""
    files = {
        f"{part}/Latin/character0{c}/0001_{d + 1:02d}.png": drawing
        for part in ("images_background", "images_evaluation")
        for c in (1, 2)
        for d in range(drawings)
    }
    return write_tree(root, files)


def blank(value):
    return encode(np.full((105, 105), value))


def upright_names(family):
    """The characters of a family's classes, without their rotation."""
    return {name.split("/rot")[0] for name in family.classes}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "sizes"), [("standard", (1100, 100, 423)), ("vinyals", (1028, 172, 423))]
)
@pytest.mark.parametrize("rotations", [False, True])
def test_splits_have_the_published_sizes_and_share_no_character(load, split, sizes, rotations):
    splits = load(split=split, rotations=rotations)
    families = (splits.train, splits.validation, splits.test)
    characters = [upright_names(family) for family in families]
    assert tuple(map(len, characters)) == sizes
    assert len(set.union(*characters)) == 1623
    training_classes = sizes[0] * (4 if rotations else 1)
    assert [len(family.pool) for family in families] == [training_classes, *sizes[1:]]
    assert all((family.pool.counts == 20).all() for family in families)


@pytest.mark.slow
def test_the_vinyals_split_is_that_of_the_published_lists(load):
    """The lists published with prototypical networks hold out these alphabets."""
    splits = load(split="vinyals")
    validation = {tuple(name.split("/")[:2]) for name in splits.validation.classes}
    alphabets = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
    assert validation == {("images_background", alphabet) for alphabet in alphabets}

    test = {tuple(name.split("/")[:2]) for name in splits.test.classes}
    assert {part for part, _ in test} == {"images_evaluation"}
    assert len(test) == 13
    gurmukhi = [name for name in splits.test.classes if "Gurmukhi" in name]
    numbers = sorted(name.rsplit("/", 1)[1] for name in gurmukhi)
    assert numbers == ["character42", "character43", "character44", "character45"]


@pytest.mark.slow
def test_rotated_classes_are_the_upright_images_turned_and_only_in_training(load):
    splits = load()
    train = splits.train.pool
    upright = next(i for i, name in enumerate(train.names) if "/rot" not in name)
    images = train.images_of(upright).numpy()
    for degrees, turns in ((90, 1), (180, 2), (270, 3)):
        turned = train.names.index(f"{train.names[upright]}/rot{degrees:03d}")
        rotated = train.images_of(turned).numpy()
        assert np.array_equal(rotated, np.rot90(images, turns, axes=(2, 3)))
        assert not np.array_equal(rotated, images)
    assert len(set(train.ids)) == len(train.names) == 4400
    for family in (splits.validation, splits.test):
        assert not any("/rot" in name for name in family.classes)


@pytest.mark.slow
def test_images_are_the_drawings_bright_on_dark_at_28_pixels(load):
    family = load(rotations=False).test
    part, folder = family.classes[7].split("/", 1)
    with zipfile.ZipFile(DATA / f"{part}.zip") as file:
        prefix = f"{part}/{folder}/"
        paths = [path for path in file.namelist() if path.startswith(prefix)]
        data = file.read(sorted(path for path in paths if path.endswith(".png"))[3])
    drawing = Image.open(io.BytesIO(data)).convert("L")
    drawing = np.asarray(drawing.resize((28, 28), Image.Resampling.LANCZOS))
    assert np.array_equal(family.pool.images_of(7)[3, 0].numpy(), 255 - drawing)

    inputs, _ = family.sample(4, np.random.default_rng(0)).query
    assert inputs.shape == (4, 75, 1, 28, 28)
    assert inputs.amax((2, 3, 4)).min() > 0.5
    assert inputs.mean() < 0.2


@pytest.mark.slow
def test_a_download_that_is_already_in_the_cache_folder_is_used(empty_cache, monkeypatch):
    zips = {part: empty_cache / "omniglot-py" / f"{part}.zip" for part in omniglot.CHARACTERS}
    (empty_cache / "omniglot-py").mkdir(parents=True)
    for path in zips.values():
        path.touch()
    read = []
    arrays = {
        "images": np.zeros((32460, 1, 28, 28), np.uint8),
        "names": np.arange(1623).astype(str),
    }
    monkeypatch.setattr("torchvision.datasets.Omniglot", no_network)
    monkeypatch.setattr(omniglot, "_read", lambda roots: read.append(roots) or arrays)
    tasks.load("omniglot")
    assert read == [zips]


@pytest.mark.parametrize("below", ["", "omniglot", "omniglot-py"])
def test_an_extracted_tree_is_read_from_each_layout(tmp_path, two_characters, below):
    small_tree(tmp_path / below, blank(PAPER))
    arrays = omniglot._read(omniglot._find(tmp_path))
    assert arrays["images"].shape == (80, 1, 28, 28)
    assert arrays["images"].max() == 0
    assert arrays["names"].tolist() == [
        "images_background/Latin/character01",
        "images_background/Latin/character02",
        "images_evaluation/Latin/character01",
        "images_evaluation/Latin/character02",
    ]


def test_without_data_the_error_says_the_layout_and_the_source(tmp_path, empty_cache, monkeypatch):
    message = r"data_root: found no Omniglot in .*images_background\.zip.*https://"
    with pytest.raises(FileNotFoundError, match=message):
        tasks.load("omniglot", data_root=tmp_path)
    monkeypatch.setattr("torchvision.datasets.Omniglot", no_network)
    with pytest.raises(FileNotFoundError, match=r"could not download it \(no network\).*data_root"):
        tasks.load("omniglot")
    assert not list(empty_cache.glob("*.arrays"))


def test_a_root_without_data_is_refused_although_the_cache_is_full(tmp_path, empty_cache):
    empty_cache.mkdir()
    images = np.zeros((32460, 1, 28, 28), np.uint8)
    np.savez(empty_cache / "omniglot-1.npz", images=images, names=np.array(["x"] * 1623))
    with pytest.raises(FileNotFoundError, match="data_root: found no Omniglot"):
        tasks.load("omniglot", data_root=tmp_path)


def test_incomplete_and_damaged_data_is_named_and_not_cached(tmp_path, empty_cache, two_characters):
    small_tree(tmp_path / "few", blank(PAPER), drawings=19)
    message = r"images_background: got 38 images of 2 characters, expected 2 .* of 20 images"
    with pytest.raises(ValueError, match=message):
        tasks.load("omniglot", data_root=tmp_path / "few")

    small_tree(tmp_path / "bad", b"\x89PNG broken")
    message = r"Latin/character01/0001_01\.png: got 11 bytes that do not decode"
    with pytest.raises(ValueError, match=message):
        tasks.load("omniglot", data_root=tmp_path / "bad")

    zips = {f"{part}.zip": b"PK not a zip" for part in omniglot.CHARACTERS}
    write_tree(tmp_path / "zips", zips)
    with pytest.raises(ValueError, match=r"images_background\.zip: got an unreadable archive"):
        tasks.load("omniglot", data_root=tmp_path / "zips")
    assert not empty_cache.exists()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split: got 'lake', expected 'standard' or 'vinyals'"):
        tasks.load("omniglot", split="lake")


def test_the_standard_split_is_fixed():
    """A seed, a shuffle or a size changed by accident would change every reported figure."""
    train, validation, test = omniglot.standard_split()
    assert sorted(np.concatenate([train, validation, test])) == list(range(1623))
    assert train[:3].tolist() == [1229, 854, 493]
    assert validation[:3].tolist() == [1590, 1386, 472]
    assert test[:3].tolist() == [0, 1595, 65]


def test_another_source_is_another_entry_of_the_cache(
    tmp_path, empty_cache, two_characters, monkeypatch
):
    monkeypatch.setattr(omniglot, "standard_split", lambda: np.split(np.arange(4), [2, 3]))
    roots = {value: small_tree(tmp_path / str(value), blank(value)) for value in (PAPER, INK)}
    for value in (PAPER, INK, PAPER):
        splits = tasks.load("omniglot", ways=1, queries=5, data_root=roots[value], rotations=False)
        assert splits.train.pool.images.max() == 255 - value
    assert len(list(empty_cache.glob("omniglot-1-*.arrays"))) == 2
