"""Omniglot, from the real zips where they are, and what is said where they are not."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

import tasks
from tasks import omniglot

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "omniglot"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the Omniglot zips are not in {DATA}")


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    """A cache folder that the real data has been read into."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAIMPLICIT_CACHE", str(folder))
        tasks.load("omniglot", data_root=DATA, rotations=False)
    return folder


@pytest.fixture
def load(filled_cache, monkeypatch):
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(filled_cache))
    return lambda **options: tasks.load("omniglot", data_root=DATA.parent, **options)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_network(*args, **options):
    raise OSError("no network")


def png(value):
    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (105, 105), value).save(file, "PNG")
    return file.getvalue()


def small_omniglot(root, monkeypatch, *, image=None, drawings=20):
    """A tree of two characters a set, under its real folder names."""
    monkeypatch.setattr(omniglot, "CHARACTERS", {"images_background": 2, "images_evaluation": 2})
    for part in omniglot.CHARACTERS:
        for character in ("character01", "character02"):
            folder = root / part / "Latin" / character
            folder.mkdir(parents=True)
            for drawing in range(drawings):
                (folder / f"0001_{drawing + 1:02d}.png").write_bytes(
                    png(1) if image is None else image
                )


def base(names):
    """Characters behind class names, rotated or not."""
    return {name.split("/rot")[0] for name in names}


@needs_data
@pytest.mark.parametrize(
    ("split", "sizes"), [("standard", (1100, 100, 423)), ("vinyals", (1028, 172, 423))]
)
@pytest.mark.parametrize("rotations", [False, True])
def test_splits_have_the_published_sizes_and_share_no_character(load, split, sizes, rotations):
    splits = load(split=split, rotations=rotations)
    families = (splits.train, splits.validation, splits.test)
    characters = [base(family.pool.names) for family in families]
    assert tuple(map(len, characters)) == sizes
    assert len(set.union(*characters)) == 1623
    assert [len(f.pool) for f in families] == [sizes[0] * (4 if rotations else 1), *sizes[1:]]
    assert all((family.pool.counts == 20).all() for family in families)


@needs_data
def test_vinyals_lists(load):
    """The lists published with prototypical networks hold out these alphabets, all of the right set."""
    splits = load(split="vinyals")
    validation, test = (
        {tuple(n.split("/")[:2]) for n in f.pool.names} for f in (splits.validation, splits.test)
    )
    expected = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
    assert validation == {("images_background", alphabet) for alphabet in expected}
    assert {part for part, _ in test} == {"images_evaluation"}
    gurmukhi = sorted(n.rsplit("/", 1)[1] for n in splits.test.pool.names if "Gurmukhi" in n)
    assert gurmukhi == ["character42", "character43", "character44", "character45"]
    assert len({alphabet for _, alphabet in test}) == 13


@needs_data
def test_rotated_classes_are_the_upright_images_turned_and_only_in_training(load):
    splits = load()
    train = splits.train.pool
    upright = next(i for i, name in enumerate(train.names) if "/rot" not in name)
    for degrees, turns in ((90, 1), (180, 2), (270, 3)):
        turned = train.names.index(f"{train.names[upright]}/rot{degrees:03d}")
        images = train.images_of(upright).numpy()
        assert np.array_equal(train.images_of(turned).numpy(), np.rot90(images, turns, axes=(2, 3)))
        assert not np.array_equal(train.images_of(turned).numpy(), images)
    assert len(set(train.ids)) == len(train.names) == 4400
    assert not any(
        "/rot" in name for family in (splits.validation, splits.test) for name in family.pool.names
    )


@needs_data
def test_images_are_the_drawings_bright_on_dark_at_28_pixels(load):
    from PIL import Image

    pool = load(rotations=False).test.pool
    part, folder = pool.names[7].split("/", 1)
    with zipfile.ZipFile(DATA / f"{part}.zip") as file:
        paths = sorted(
            n for n in file.namelist() if n.startswith(f"{part}/{folder}/") and n.endswith(".png")
        )
        drawing = (
            Image.open(io.BytesIO(file.read(paths[3])))
            .convert("L")
            .resize((28, 28), Image.Resampling.LANCZOS)
        )
    assert np.array_equal(pool.images_of(7)[3, 0].numpy(), 255 - np.asarray(drawing))
    inputs, _ = (
        tasks.FewShot(pool, ways=5, shots=1, queries=15, name="o")
        .sample(4, np.random.default_rng(0))
        .query
    )
    assert inputs.shape == (4, 75, 1, 28, 28)
    assert inputs.amax((2, 3, 4)).min() > 0.5
    assert inputs.mean() < 0.2


def test_a_download_already_in_the_cache_folder_is_used(empty_cache, monkeypatch):
    zips = {part: empty_cache / "omniglot-py" / f"{part}.zip" for part in omniglot.CHARACTERS}
    (empty_cache / "omniglot-py").mkdir(parents=True)
    for path in zips.values():
        path.touch()
    read = []
    blank = {"images": np.zeros((32460, 1, 28, 28), np.uint8), "names": np.arange(1623).astype(str)}
    monkeypatch.setattr("torchvision.datasets.Omniglot", no_network)
    monkeypatch.setattr(omniglot, "_read", lambda found: read.append(found) or blank)
    tasks.load("omniglot")
    assert read == [zips]


@pytest.mark.parametrize("below", ["", "omniglot", "omniglot-py"])
def test_an_extracted_tree_is_read_from_each_layout(tmp_path, monkeypatch, below):
    small_omniglot(tmp_path / below, monkeypatch)
    arrays = omniglot._read(omniglot._find(tmp_path))
    assert arrays["images"].shape == (80, 1, 28, 28)
    assert arrays["images"].max() == 0  # white paper
    assert arrays["names"].tolist() == [
        f"{p}/Latin/character0{c}" for p in omniglot.CHARACTERS for c in (1, 2)
    ]


def test_without_data_the_message_says_the_layout_and_the_source(
    tmp_path, empty_cache, monkeypatch
):
    with pytest.raises(
        FileNotFoundError,
        match=r"data_root: found no Omniglot in .*images_background\.zip.*https://",
    ):
        tasks.load("omniglot", data_root=tmp_path)
    monkeypatch.setattr("torchvision.datasets.Omniglot", no_network)
    with pytest.raises(FileNotFoundError, match=r"could not download it \(no network\).*data_root"):
        tasks.load("omniglot")
    assert not list(empty_cache.glob("*.npz"))


def test_a_data_root_without_data_is_refused_though_the_cache_is_full(tmp_path, empty_cache):
    empty_cache.mkdir()
    np.savez(
        empty_cache / "omniglot-1.npz",
        images=np.zeros((32460, 1, 28, 28), np.uint8),
        names=np.array(["x"] * 1623),
    )
    with pytest.raises(FileNotFoundError, match="data_root: found no Omniglot"):
        tasks.load("omniglot", data_root=tmp_path)


def test_incomplete_and_damaged_data_are_named_and_not_cached(tmp_path, empty_cache, monkeypatch):
    small_omniglot(tmp_path / "few", monkeypatch, drawings=19)
    with pytest.raises(
        ValueError,
        match=r"images_background: got 38 images of 2 characters, expected 2 .* of 20 images",
    ):
        tasks.load("omniglot", data_root=tmp_path / "few")
    small_omniglot(tmp_path / "bad", monkeypatch, image=b"\x89PNG broken")
    with pytest.raises(
        ValueError, match=r"Latin/character01/0001_01\.png: got 11 bytes that do not decode"
    ):
        tasks.load("omniglot", data_root=tmp_path / "bad")
    (tmp_path / "zips").mkdir()
    for part in omniglot.CHARACTERS:
        (tmp_path / "zips" / f"{part}.zip").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match=r"images_background\.zip: got an unreadable zip"):
        tasks.load("omniglot", data_root=tmp_path / "zips")
    assert not empty_cache.exists()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split: got 'lake', expected 'standard' or 'vinyals'"):
        tasks.load("omniglot", split="lake")


def test_the_standard_split_is_fixed():
    """A seed, a shuffle or a size changed by accident would silently change every reported figure."""
    train, validation, test = omniglot.standard_split()
    assert sorted(np.concatenate([train, validation, test])) == list(range(1623))
    assert (train[:3].tolist(), validation[:3].tolist(), test[:3].tolist()) == (
        [1229, 854, 493],
        [1590, 1386, 472],
        [0, 1595, 65],
    )


def test_another_source_is_another_entry_of_the_cache(tmp_path, empty_cache, monkeypatch):
    """Two trees of the right counts, blank and inked."""
    monkeypatch.setattr(omniglot, "standard_split", lambda: tuple(np.split(np.arange(4), [2, 3])))
    seen = []
    for name, value in (("blank", 1), ("inked", 0), ("blank", 1)):
        if not (tmp_path / name).exists():
            small_omniglot(tmp_path / name, monkeypatch, image=png(value))
        splits = tasks.load(
            "omniglot", ways=1, queries=5, data_root=tmp_path / name, rotations=False
        )
        seen.append(int(splits.train.pool.images.max()))
    assert seen == [0, 255, 0]
    assert len(list(empty_cache.glob("omniglot-1-*.npz"))) == 2
